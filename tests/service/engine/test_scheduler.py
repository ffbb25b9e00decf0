from types import SimpleNamespace

from service.engine.kv import KvSlots
from service.engine.scheduler import Scheduler


def people(count):
    return [SimpleNamespace(name=name, slot=None) for name in "abcdefgh"[:count]]


def scheduler_with(sequences, slots=2):
    one = Scheduler(KvSlots(slots, 100))
    for sequence in sequences:
        one.add(sequence)
    return one


def turns(scheduler, count):
    return "".join(scheduler.next().name for _ in range(count))


def test_first_come_first_served():
    a, b, c, d = people(4)
    scheduler = scheduler_with([a, b, c, d])
    assert scheduler.admit() == [a, b]
    assert scheduler.admit() == []
    scheduler.remove(a)
    assert scheduler.admit() == [c]
    assert {b.slot, c.slot} == {0, 1}
    assert a.slot is d.slot is None


def test_those_that_run_take_turns():
    scheduler = scheduler_with(people(3), slots=3)
    assert scheduler.next() is None
    scheduler.admit()
    assert turns(scheduler, 6) == "abcabc"


def test_turns_go_on_in_order_when_one_leaves():
    sequences = people(4)
    scheduler = scheduler_with(sequences, slots=4)
    scheduler.admit()
    assert turns(scheduler, 2) == "ab"
    scheduler.remove(sequences[2])
    assert turns(scheduler, 4) == "dabd"


def test_one_that_waits_can_leave_the_line():
    a, b, c = people(3)
    scheduler = scheduler_with([a, b, c], slots=1)
    scheduler.admit()
    scheduler.remove(b)
    scheduler.remove(a)
    assert scheduler.admit() == [c]


def test_idle_means_that_nobody_runs_or_waits():
    (a,) = people(1)
    scheduler = scheduler_with([])
    assert scheduler.idle
    scheduler.add(a)
    assert not scheduler.idle
    scheduler.admit()
    assert not scheduler.idle
    assert list(scheduler) == [a]
    scheduler.remove(a)
    assert scheduler.idle
