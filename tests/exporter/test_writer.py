"""Files written in the background, with their hashes."""

import errno
import hashlib
import os
import threading

import pytest
import torch

from exporter import writer as writers
from exporter.writer import BUFFER_BYTES, Writer, Written


def fill(writer, rows, columns, value, dtype=torch.bfloat16):
    writer.room(rows, columns, dtype).fill_(value)


def test_what_is_filled_is_written_in_order_behind_the_header(tmp_path):
    done: list[Written] = []
    with Writer(tmp_path) as writer:
        writer.begin("a", b"header")
        fill(writer, 3, 5, 1.0)
        fill(writer, 1, 2, 7, torch.int64)
        fill(writer, 2, 5, 2.0)
        writer.finish(done.append)
        writer.wait()
    wanted = b"header" + b"\x80\x3f" * 15 + b"\x07\0\0\0\0\0\0\0" * 2 + b"\x00\x40" * 10
    assert (tmp_path / "a").read_bytes() == wanted
    assert done == [Written("a", len(wanted), hashlib.sha256(wanted).hexdigest())]


@pytest.mark.parametrize("rows", [1, 1000, 700_000, 3_000_000])
def test_blocks_of_any_size_are_written_in_order(tmp_path, rows):
    with Writer(tmp_path) as writer:
        writer.begin("a", b"")
        for value in range(8):
            fill(writer, rows, 1, value)
        writer.finish(lambda _: None)
        writer.wait()
    found = torch.frombuffer(bytearray((tmp_path / "a").read_bytes()), dtype=torch.bfloat16).view(8, rows)
    assert torch.equal(found, torch.arange(8).bfloat16()[:, None].expand(8, rows))


def test_any_number_of_blocks_passes_through_the_same_few_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "BUFFER_BYTES", 4096)
    rooms = []  # held, so that no buffer's memory is given to another one
    with Writer(tmp_path) as writer:
        writer.begin("a", b"")
        for value in range(10 * writers.BUFFERS):
            rooms.append(writer.room(4096, 1, torch.uint8).fill_(value))
        writer.finish(lambda _: None)
        writer.wait()
    assert len({room.data_ptr() for room in rooms}) <= writers.BUFFERS
    assert (tmp_path / "a").read_bytes() == b"".join(bytes([n]) * 4096 for n in range(10 * writers.BUFFERS))


def test_a_file_is_finished_before_the_next_one_is_opened(tmp_path):
    there: list[list[str]] = []
    with Writer(tmp_path) as writer:
        for name in ("a", "b", "c"):
            writer.begin(name, name.encode())
            fill(writer, BUFFER_BYTES, 1, 1)
            writer.finish(lambda _: there.append(sorted(path.name for path in tmp_path.iterdir())))
        writer.wait()
    assert there == [["a"], ["a", "b"], ["a", "b", "c"]]


def test_a_longer_file_of_an_earlier_run_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    with Writer(tmp_path) as writer:
        writer.begin("a", b"short")
        writer.finish(lambda _: None)
        writer.wait()
    assert (tmp_path / "a").read_bytes() == b"short"


def test_a_full_disk_surfaces_and_nothing_hangs(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_much(tmp_path)


def write_much(folder):
    with Writer(folder) as writer:
        writer.begin("a", b"header")
        for _ in range(3 * writers.BUFFERS):
            fill(writer, BUFFER_BYTES // 2, 1, 1)
        writer.wait()


def test_an_error_of_the_disk_that_comes_once_is_not_lost_and_the_file_is_not_done(tmp_path, monkeypatch):
    real, failed = writers.fdatasync, threading.Event()

    def fails_once(descriptor):
        if failed.is_set():
            return real(descriptor)
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writers, "fdatasync", fails_once)
    monkeypatch.setattr(writers, "SYNC_BYTES", 1)
    done: list[Written] = []
    with Writer(tmp_path) as writer:
        writer.begin("a", b"header")
        assert failed.wait(30)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            write_on(writer, done)
    assert done == []


def write_on(writer, done):
    for value in range(6):
        fill(writer, BUFFER_BYTES // 2, 1, value)
    writer.finish(done.append)
    writer.wait()


def test_an_error_of_the_caller_ends_every_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "SYNC_BYTES", 1)
    with pytest.raises(KeyError):
        break_off(tmp_path)
    assert threads() == set()


def break_off(folder):
    with Writer(folder) as writer:
        writer.begin("a", b"header")
        writer.wait()
        fill(writer, 3, 5, 1.0)
        assert threads() == {"hash", "write", "sync"}
        raise KeyError


def threads():
    return {thread.name.partition("_")[0] for thread in threading.enumerate()} & {"hash", "write", "sync"}
