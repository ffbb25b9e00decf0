"""loader/offload.py: which weights leave, so that the fewest bytes are copied at every step."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.footprint import WeightUnit
from loader.offload import Offload, Offloader


def unit(module, kind, n_bytes, layer=None, tied_to=None):
    return WeightUnit(module, kind, layer, n_bytes, tied_to)


def decoder(layers=3, tied=False, mlp=100, attention=40, head=500, norm=1):
    """A decoder with two matrices of each kind in a layer, in execution order."""
    units = [unit("embed", "embed", head), unit("rotary", "buffer", 2)]
    for i in range(layers):
        units += [unit(f"{i}.norm", "norm", norm, i)]
        units += [unit(f"{i}.{name}", "attention", attention, i) for name in ("q", "o")]
        units += [unit(f"{i}.router", "other", 1, i)]
        units += [unit(f"{i}.{name}", "mlp", mlp, i) for name in ("up", "down")]
    units += [unit("norm", "norm", norm)]
    return [*units, unit("head", "head", 0 if tied else head, tied_to="embed" if tied else None)]


def names(offload):
    return [unit.module for unit in offload.units]


def total(units):
    return sum(unit.n_bytes for unit in units)


def best(units, room):
    return next(Offloader(units).choices(room), None)


KINDS = ("embed", "buffer", "norm", "attention", "mlp", "other", "head")


@st.composite
def models(draw):
    """Any units; an embedding may own the head's matrix."""
    kinds = draw(st.lists(st.sampled_from(KINDS[1:6]), min_size=1, max_size=12))
    sizes = [draw(st.integers(0, 60)) for _ in kinds]
    inner = [
        unit(f"m{i}", kind, size, i // 3) for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True))
    ]
    tied, size = draw(st.booleans()), draw(st.integers(1, 80))
    head = unit("head", "head", 0, tied_to="embed") if tied else unit("head", "head", size)
    return [unit("embed", "embed", size), *inner, head]


# Examples


def test_nothing_leaves_when_everything_fits():
    units = decoder()
    assert list(Offloader(units).choices(total(units))) == [Offload(())]
    assert (Offload(()).n_bytes, Offload(()).staging_bytes) == (0, 0)


def test_one_byte_short_a_module_leaves_and_its_room_is_the_staging():
    units = decoder()
    choice = best(units, total(units) - 1)
    # One attention matrix alone frees nothing: it comes back whole at each step. Two free one.
    assert names(choice) == ["2.q", "2.o"]
    assert (choice.n_bytes, choice.staging_bytes) == (80, 40)


def test_mlp_matrices_leave_from_the_last_layer_to_the_first():
    units = decoder(attention=100)
    assert names(best(units, total(units) - 450)) == ["2.up", "2.down", "1.up", "1.down", "0.up", "0.down"]


def test_attention_leaves_after_the_mlp_from_the_last_layer_to_the_first():
    units = decoder(attention=100)
    assert names(best(units, total(units) - 650))[6:] == ["2.q", "2.o"]
    assert names(best(units, total(units) - 850))[6:] == ["2.q", "2.o", "1.q", "1.o"]


def test_a_layers_largest_matrices_leave_first():
    sizes = (("small", 10), ("large", 30), ("middle", 20))
    units = [unit(name, "mlp", size, 0) for name, size in sizes] + [unit("other", "other", 100, 0)]
    assert names(best(units, 160 - 29)) == ["large", "middle", "small"]


def test_the_head_leaves_only_when_layers_are_not_enough():
    units = decoder(head=90)
    layers = 3 * 2 * (100 + 40)
    everything_but = total(units) - layers
    assert "head" not in names(best(units, everything_but + 100))
    with_head = best(units, everything_but + 100 - 1)
    assert names(with_head)[-1] == "head"
    assert "embed" not in names(with_head)


def test_the_embedding_leaves_at_the_very_last():
    units = decoder(head=90)
    kept = 2 + 3 * (1 + 1) + 1  # rotary, norms and routers, last norm
    assert "embed" not in names(best(units, kept + 90 + 100))
    everything = best(units, kept + 100)
    assert "embed" in names(everything)
    assert total(units) - everything.n_bytes == kept
    assert best(units, kept + 100 - 1) is None


def test_norms_buffers_and_routers_never_leave():
    units = decoder()
    left = {unit.kind for unit in best(units, 500 + 2 + 3 * 2 + 1).units}  # the staging and what must stay
    assert left == {"mlp", "attention", "head", "embed"}


def test_a_tied_embedding_never_leaves():
    units = decoder(tied=True)
    kept = 500 + 2 + 3 * 2 + 1
    choice = best(units, kept + 100)
    assert {unit.kind for unit in choice.units} == {"mlp", "attention"}
    assert total(units) - choice.n_bytes == kept
    assert best(units, kept + 100 - 1) is None


def test_when_little_has_to_go_small_modules_alone_do():
    units = decoder(mlp=1000, attention=40)
    choice = best(units, total(units) - 100)
    assert (choice.staging_bytes, choice.n_bytes) == (40, 160)  # an MLP matrix would be 2,000 for it


def test_when_much_has_to_go_large_modules_leave():
    units = decoder(mlp=1000, attention=40)
    assert best(units, total(units) - 1500).staging_bytes == 1000


def test_the_last_to_leave_is_no_larger_than_is_needed():
    sizes = [("a", 50, 3), ("b", 50, 2), ("c", 50, 1), ("d", 8, 0)]
    units = [unit(name, "mlp", size, layer) for name, size, layer in sizes] + [unit("x", "other", 10, 0)]
    # 105 bytes have to leave, the staging among them: a and b are 100, and d's 8 are enough for the rest.
    assert names(best(units, total(units) - 55)) == ["a", "b", "d"]


# Rules, for any model


@settings(deadline=None, max_examples=50)
@given(models(), st.integers(0, 900))
def test_what_stays_and_the_staging_fit_in_the_room(units, room):
    for choice in Offloader(units).choices(room):
        assert total(units) - choice.n_bytes + choice.staging_bytes <= room
        assert choice.staging_bytes == max((u.n_bytes for u in choice.units), default=0)
        assert len(set(names(choice))) == len(choice.units)


@settings(deadline=None, max_examples=50)
@given(models(), st.integers(0, 900))
def test_only_what_may_leave_leaves(units, room):
    tied = {unit.tied_to for unit in units}
    for choice in Offloader(units).choices(room):
        for left in choice.units:
            assert left.kind in ("mlp", "attention", "head", "embed")
            assert left.module not in tied
            assert left.tied_to is None


@settings(deadline=None, max_examples=50)
@given(models(), st.integers(0, 900))
def test_fewer_bytes_are_offered_first_and_embeddings_last(units, room):
    choices = list(Offloader(units).choices(room))
    tiers = [max((_tier(unit) for unit in choice.units), default=0) for choice in choices]
    assert sum(after.n_bytes < before.n_bytes for before, after in pairwise(choices)) <= 2  # of three tiers
    if 0 in tiers:
        assert tiers[0] == 0


def _tier(unit):
    return {"head": 1, "embed": 2}.get(unit.kind, 0)


@settings(deadline=None, max_examples=50)
@given(models(), st.integers(0, 900), st.integers(1, 300))
def test_for_each_choice_a_larger_room_has_one_that_is_no_worse(units, room, more):
    """So whatever fits at one budget, wherever offloaded weights go, fits at every larger one."""
    offloader = Offloader(units)
    larger = [(choice.n_bytes, choice.staging_bytes) for choice in offloader.choices(room + more)]
    for choice in offloader.choices(room):
        assert any(n <= choice.n_bytes and staging <= choice.staging_bytes for n, staging in larger)


@settings(deadline=None, max_examples=50)
@given(models())
def test_the_least_room_is_what_stays_and_the_largest_that_leaves(units):
    tied = {unit.tied_to for unit in units}
    movable = [
        unit.n_bytes
        for unit in units
        if unit.kind in ("mlp", "attention", "head", "embed") and unit.module not in tied
    ]
    # Modules above some size stay: keeping them can be cheaper than bringing them back.
    least = min(total(units) - sum(n for n in movable if n <= size) + size for size in {0, *movable})
    assert best(units, least) is not None
    assert best(units, least - 1) is None


def test_a_model_of_which_nothing_may_leave_has_no_choice():
    units = [unit("embed", "embed", 50), unit("norm", "norm", 5), unit("head", "head", 0, tied_to="embed")]
    assert list(Offloader(units).choices(54)) == []
    assert list(Offloader(units).choices(55)) == [Offload(())]


@pytest.mark.parametrize("room", [-1, 0])
def test_no_room_at_all_is_no_choice_rather_than_an_error(room):
    assert list(Offloader(decoder()).choices(room)) == []
