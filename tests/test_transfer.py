"""Parts and ranges in parallel, and the one budget of memory that they share."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pgclone import transfer
from pgclone.exceptions import StorageError
from pgclone.transfer import Budget, Cancelled, Part, PartWriter, RangeReader
from tests.faults import wait_until

DATA = random.Random(1).randbytes(1000)


class Far:
    """A storage elsewhere: parts arrive when they are let through, and stay in the order in which they came."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, bytes]] = []
        self.under_way = self.most = 0
        self.open = threading.Event()
        self.open.set()
        self._mutex = threading.Lock()

    def send(self, part: Part) -> int:
        with self._mutex:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.open.wait(10)
        data = part.read()
        with self._mutex:
            self.under_way -= 1
            self.arrived.append((part.number, data))
        return part.number

    @property
    def stored(self) -> bytes:
        return b"".join(data for _, data in sorted(self.arrived))


@pytest.fixture
def budget() -> Iterator[Budget]:
    """Room for ten parts of 100 bytes; all of it free at the end of each test."""
    budget = Budget(1000)
    yield budget
    wait_until(lambda: budget.used == 0, seconds=5)


def write(budget: Budget, send: Callable[[Part], Any], **options: Any) -> PartWriter[Any]:
    return PartWriter(send, **{"part_size": 100, "width": 4, "budget": budget, **options})


# Writing


def test_content_is_cut_into_parts_of_one_size_and_a_smaller_last_one(budget: Budget) -> None:
    far = Far()
    file = write(budget, far.send)
    for start in range(0, 950, 37):
        assert file.write(DATA[start : min(start + 37, 950)]) > 0
    assert file.finish() == list(range(1, 11))
    assert sorted(len(data) for _, data in far.arrived) == [50] + [100] * 9
    assert far.stored == DATA[:950]
    file.release()


def test_one_write_may_be_many_parts(budget: Budget) -> None:
    far = Far()
    file = write(budget, far.send)
    assert file.write(memoryview(DATA)) == 1000
    assert len(file.finish()) == 10
    assert far.stored == DATA
    file.release()


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_what_fits_into_one_part_is_not_sent_off(size: int, budget: Budget) -> None:
    begun: list[bool] = []
    file = write(budget, Far().send, begin=lambda: begun.append(True))
    file.write(DATA[:size])
    assert (file.launched, begun) == (0, [])
    rest = file.rest()
    assert (rest.size, rest.read()) == (size, DATA[:size])
    file.release()


def test_the_upload_begins_once_before_the_first_part(budget: Budget) -> None:
    order: list[str] = []
    file = write(budget, lambda part: order.append("part"), begin=lambda: order.append("begin"))
    file.write(DATA)
    file.finish()
    assert (order[0], order.count("begin"), order.count("part")) == ("begin", 1, 10)
    file.release()


def test_several_parts_are_on_their_way_at_once_and_no_more(budget: Budget) -> None:
    far = Far()
    far.open.clear()
    file = write(budget, far.send, width=3)
    writer = threading.Thread(target=file.write, args=[DATA])
    writer.start()
    wait_until(lambda: far.under_way == 3, seconds=5)
    time.sleep(0.05)
    assert far.most == 3
    far.open.set()
    writer.join()
    file.finish()
    assert far.most == 3
    file.release()


def test_the_buffer_of_a_write_may_be_used_again(budget: Budget) -> None:
    far = Far()
    file = write(budget, far.send)
    buffer = bytearray(250)
    for letter in b"abc":
        buffer[:] = bytes([letter]) * 250
        file.write(buffer)
    buffer[:] = b"z" * 250
    file.finish()
    assert far.stored == b"a" * 250 + b"b" * 250 + b"c" * 250
    file.release()


def test_a_part_that_fails_ends_the_upload_at_the_next_write(budget: Budget) -> None:
    def send(part: Part) -> None:
        raise StorageError("The bucket is full.")

    file = write(budget, send)
    with pytest.raises(StorageError, match="full"):
        for _ in range(100):
            file.write(DATA[:100])
            time.sleep(0.01)
    assert file.launched < 20
    with pytest.raises(StorageError, match="full"):
        file.finish()
    file.release()


def test_the_last_part_waits_until_a_whole_one_has_arrived(budget: Budget) -> None:
    far, sizes = Far(), []
    far.open.clear()

    def send(part: Part) -> None:
        sizes.append(part.size)
        far.send(part)

    file = write(budget, send)
    file.write(DATA[:110])
    finisher = threading.Thread(target=file.finish)
    finisher.start()
    time.sleep(0.05)
    assert sizes == [100]
    far.open.set()
    finisher.join()
    assert sizes == [100, 10]
    file.release()


def test_giving_up_stops_what_is_under_way(budget: Budget) -> None:
    reached, ended = threading.Event(), []

    def send(part: Part) -> None:
        try:
            while True:  # an SDK that reads a part again and again
                part.seek(0)
                part.read(1)
                reached.set()
        except Cancelled:
            ended.append(part.number)
            raise

    file = write(budget, send)
    file.write(DATA[:150])
    reached.wait(5)
    file.release()
    assert ended == [1]


def test_giving_up_does_not_wait_forever(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_GRACE_SECONDS", 0.05)
    far = Far()
    far.open.clear()
    file = write(budget, far.send)
    file.write(DATA[:150])
    file.release()
    assert budget.used == 100  # of the part that hangs
    far.open.set()


def test_a_closed_file_takes_nothing(budget: Budget) -> None:
    far = Far()
    file = write(budget, far.send)
    file.write(DATA[:150])
    file.close()
    with pytest.raises(ValueError):
        file.write(b"more")
    file.release()
    assert file.launched == 1  # closing sends nothing


# Memory


def test_a_writer_waits_for_memory_while_parts_of_its_own_are_on_their_way(budget: Budget) -> None:
    budget.size = 300
    far = Far()
    far.open.clear()
    file = write(budget, far.send, width=100)
    writer = threading.Thread(target=file.write, args=[DATA])
    writer.start()
    wait_until(lambda: far.under_way == 3, seconds=5)
    time.sleep(0.05)
    assert (far.under_way, budget.used) == (3, 300)
    far.open.set()
    writer.join()
    file.finish()
    assert far.stored == DATA
    file.release()


def test_streams_never_wait_for_each_other(budget: Budget) -> None:
    """One thread writes to many at once: a stream that waited for another's memory would wait forever."""
    budget.size = 200
    files = [(write(budget, far.send), far) for far in (Far() for _ in range(8))]
    for start in range(0, 1000, 50):
        for file, _ in files:
            file.write(DATA[start : start + 50])
    for file, far in files:
        file.finish()
        file.release()
        assert far.stored == DATA


def test_the_shared_budget_is_as_large_as_the_settings_say(settings: Any) -> None:
    assert transfer.shared_budget().size == 256 * 1024 * 1024
    settings.PGCLONE_TRANSFER_MEMORY = 64
    assert transfer.shared_budget().size == 64 * 1024 * 1024


# Reading


def read(budget: Budget, fetch: Callable[[int, int], Any], size: int = 1000, **options: Any) -> RangeReader:
    return RangeReader(fetch, size, **{"range_size": 100, "width": 4, "budget": budget, **options})


def slowly(start: int, stop: int) -> bytes:
    time.sleep(random.random() / 100)
    return DATA[start:stop]


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 999, 1000])
@pytest.mark.parametrize("at_once", [7, 100, 5000])
def test_ranges_are_read_in_order(size: int, at_once: int, budget: Budget) -> None:
    with read(budget, slowly, size) as file:
        found = b"".join(iter(lambda: file.read(at_once), b""))
        assert found == DATA[:size]
        assert file.read(1) == b""


def test_several_ranges_are_fetched_ahead_and_no_more(budget: Budget) -> None:
    asked: list[int] = []

    def fetch(start: int, stop: int) -> bytes:
        asked.append(start)
        return DATA[start:stop]

    with read(budget, fetch, width=3) as file:
        wait_until(lambda: len(asked) == 3, seconds=5)
        assert file.read(100) == DATA[:100]
        wait_until(lambda: len(asked) == 4, seconds=5)
    assert sorted(asked) == [0, 100, 200, 300]


def test_a_reader_without_memory_fetches_one_range_at_a_time(budget: Budget) -> None:
    budget.size = 50
    with read(budget, slowly, width=8) as file:
        assert file.read(1) == DATA[:1]
        assert budget.used == 100
        assert b"".join(iter(lambda: file.read(64), b"")) == DATA[1:]


def test_what_a_range_raises_is_raised_by_its_reader(budget: Budget) -> None:
    def fetch(start: int, stop: int) -> bytes:
        if start >= 200:
            raise StorageError("The cable is gone.")
        return DATA[start:stop]

    with read(budget, fetch) as file:
        assert file.read(100) + file.read(100) == DATA[:200]
        with pytest.raises(StorageError, match="cable"):
            file.read(100)
        with pytest.raises(StorageError, match="cable"):
            file.read(100)


def test_a_range_that_is_too_short_is_an_error(budget: Budget) -> None:
    with read(budget, lambda start, stop: DATA[start : stop - 1]) as file:
        with pytest.raises(StorageError, match="Bytes 0 to 100 came as 99 bytes"):
            file.read(100)


def test_a_reader_that_is_closed_early_hands_its_memory_back(budget: Budget) -> None:
    held = threading.Event()

    def fetch(start: int, stop: int) -> bytes:
        if start:
            held.wait(5)
        return DATA[start:stop]

    file = read(budget, fetch)
    assert file.read(10) == DATA[:10]
    file.close()
    assert budget.used == 300  # of ranges that are still fetched into
    held.set()


def test_a_reader_goes_on_with_the_threads_that_the_system_has(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    start, running = threading.Thread.start, []

    def start_some(thread: threading.Thread) -> None:
        if sum(other.is_alive() for other in running) >= 2:
            raise RuntimeError("can't start new thread")
        running.append(thread)
        start(thread)

    monkeypatch.setattr("threading.Thread.start", start_some)
    with read(budget, slowly) as file:
        assert b"".join(iter(lambda: file.read(77), b"")) == DATA


def test_a_child_of_a_fork_begins_with_all_of_the_memory() -> None:
    shared = transfer.shared_budget()
    file = PartWriter(lambda part: None, part_size=100, width=1)
    file.write(b"x")
    assert shared.used == 100
    child = os.fork()
    if not child:
        os._exit(transfer.shared_budget().used)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    file.release()
    assert shared.used == 0
