"""Parts in parallel behind a file, for storages that one connection does not fill.

A `PartWriter` cuts what is written into parts and sends several at once; a `RangeReader` fetches several ranges ahead. All of
them share one budget of memory, `PGCLONE_TRANSFER_MEMORY`. What a part or a range is on the wire is the storage plugin's.
"""

from __future__ import annotations

import functools
import io
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pgclone import conf, exceptions

MiB = 1024 * 1024

_GRACE_SECONDS = 5
_Result = TypeVar("_Result")


class Cancelled(BaseException):
    """Ends a transfer that nobody waits for any more. No `Exception`: whoever retries must not retry this."""


class Budget:
    """Bytes that all open streams of the process may hold together.

    A stream only waits for memory while parts of its own are on their way, which come to an end without anybody's help. One
    that holds nothing takes what it needs. So streams never wait for each other.
    """

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self.used = 0
        self.changed = threading.Condition(threading.RLock())

    def has_room(self, size: int) -> bool:
        return self.used + size <= self.size

    def give_back(self, size: int) -> None:
        with self.changed:
            self.used -= size
            self.changed.notify_all()


@functools.cache
def _budget_of_the_process() -> Budget:
    return Budget()


os.register_at_fork(after_in_child=_budget_of_the_process.cache_clear)  # the streams are the parent's


def shared_budget() -> Budget:
    """The budget of this process, as large as the settings say now."""
    budget = _budget_of_the_process()
    budget.size = conf.option("transfer_memory") * MiB
    return budget


class Part(io.BytesIO):
    """A part on its way: a file for the SDK that sends it, and that may read it from the beginning again.

    `number` counts from 1, `size` is in bytes. Reading raises once the upload was given up, which ends the SDK's tries.
    """

    def __init__(self, number: int, cancelled: threading.Event) -> None:
        super().__init__()
        self.number = number
        self.size = 0
        self._cancelled = cancelled

    def write(self, data: Any) -> int:
        self.size += len(data)
        return super().write(data)

    def read(self, size: int | None = -1) -> bytes:
        """Like that of any file.

        Raises:
            Cancelled: The upload was given up.
        """
        if self._cancelled.is_set():
            raise Cancelled
        return super().read(size)


class PartWriter(io.RawIOBase, Generic[_Result]):
    """A file whose content goes away in parts of one size, the last one smaller, several at once.

    Nothing is committed here: `finish` returns what `send` returned for each part, in order, and the storage plugin commits.
    `close()`, or the garbage collector, do neither.

    Args:
        send: Sends a part, in a thread of its own; what it raises ends the upload.
        begin: Called once, before the first part is sent off: what fits into one part may be put whole instead (`rest`).
        part_size: Bytes of a part.
        width: How many parts may be on their way.
        budget: Whose memory they take; that of the process by default.
    """

    def __init__(
        self,
        send: Callable[[Part], _Result],
        *,
        part_size: int,
        width: int,
        begin: Callable[[], None] = lambda: None,
        budget: Budget | None = None,
    ) -> None:
        self._send, self._begin, self._part_size, self._width = send, begin, part_size, width
        self._budget = budget or shared_budget()
        self._cancelled = threading.Event()
        self._results: dict[int, _Result] = {}
        self._failure: BaseException | None = None
        self._under_way = 0
        self._part: Part | None = None
        self.launched = 0
        """How many parts were sent off."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Take all of it, waiting until there is room.

        Raises:
            Exception: What `send` raised for an earlier part.
        """
        if self.closed:
            raise ValueError("write to a closed file")
        view = memoryview(data).cast("B")
        sent = 0
        while sent < len(view):
            part = self._begin_part() if self._part is None else self._part
            if part.size == self._part_size:  # only now: the last part is for `finish`
                self._launch()
                continue
            sent += part.write(view[sent : sent + self._part_size - part.size])
        return len(view)

    def rest(self) -> Part:
        """What was not sent off yet: all of it, if it fits into one part. For storages that put small objects whole."""
        part = self._begin_part() if self._part is None else self._part
        part.seek(0)
        return part

    def finish(self) -> list[_Result]:
        """Send the last part, wait for all, and return their results in order."""
        if self._part is not None:
            # An upload is recognised by its whole parts: no smaller one must be stored before the first of them.
            self._wait_until(lambda: bool(self._results) or not self._under_way)
            self._launch()
        self._wait_until(lambda: self._under_way == 0)
        return [result for _, result in sorted(self._results.items())]

    def release(self) -> None:
        """Give up what is under way, wait for it a little, and hand back the memory. Whatever comes later is ignored."""
        self._cancelled.set()
        with self._budget.changed:
            self._budget.changed.wait_for(lambda: self._under_way == 0, _GRACE_SECONDS)
        if self._part is not None:
            self._part = None
            self._budget.give_back(self._part_size)

    def _begin_part(self) -> Part:
        room = self._budget
        self._wait_until(lambda: room.has_room(self._part_size) or not self._under_way, take=self._part_size)
        self._part = Part(self.launched + 1, self._cancelled)
        return self._part

    def _launch(self) -> None:
        assert self._part is not None
        if not self.launched:
            self._begin()
        self._wait_until(lambda: self._under_way < self._width)
        part, self._part = self._part, None
        part.seek(0)
        with self._budget.changed:
            self.launched += 1
            self._under_way += 1
        carrier = threading.Thread(target=self._carry, args=[part], name=f"pgclone-part-{part.number}", daemon=True)
        try:
            carrier.start()
        except RuntimeError:  # the system has no more threads
            self._arrive()
            raise

    def _carry(self, part: Part) -> None:
        try:
            result = self._send(part)
        except BaseException as error:  # noqa: BLE001  for the thread that writes
            self._failure = self._failure or error
        else:
            self._results[part.number] = result
        self._arrive()

    def _arrive(self) -> None:
        with self._budget.changed:
            self._under_way -= 1
            self._budget.give_back(self._part_size)

    def _wait_until(self, condition: Callable[[], bool], take: int = 0) -> None:
        """Wait; raise what has gone wrong meanwhile."""
        with self._budget.changed:
            self._budget.changed.wait_for(lambda: self._failure is not None or condition())
            if self._failure is not None:
                raise self._failure
            self._budget.used += take


class RangeReader(io.RawIOBase):
    """A file whose content is fetched in ranges, several ahead of the reader.

    Args:
        fetch: `fetch(start, stop)` returns those bytes, in a thread of its own. What it raises, `read` raises.
        size: Bytes of the whole object.
        range_size: Bytes of a range.
        width: How many ranges may be fetched ahead.
        budget: Whose memory they take; that of the process by default. Without room there, one range at a time.
    """

    def __init__(
        self,
        fetch: Callable[[int, int], Any],
        size: int,
        *,
        range_size: int,
        width: int,
        budget: Budget | None = None,
    ) -> None:
        self._fetch, self._size, self._range_size, self._width = fetch, size, range_size, width
        self._budget = budget or shared_budget()
        self._ahead: deque[_Range] = deque()
        self._next = 0
        self._look_ahead()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what the first range has, waiting for it.

        Raises:
            Exception: What `fetch` raised for it.
        """
        if self.closed:
            raise ValueError("read of a closed file")
        if not self._ahead:
            return 0
        count = self._ahead[0].readinto(buffer)
        if self._ahead[0].is_used_up:
            self._ahead.popleft().drop()
            self._look_ahead()
        return count

    def close(self) -> None:
        while self._ahead:
            self._ahead.popleft().drop()
        super().close()

    def _look_ahead(self) -> None:
        while self._next < self._size and len(self._ahead) < self._width:
            stop = min(self._next + self._range_size, self._size)
            with self._budget.changed:
                if self._ahead and not self._budget.has_room(stop - self._next):
                    return
                self._budget.used += stop - self._next
            try:
                self._ahead.append(_Range(self._next, stop, self._fetch, self._budget))
            except RuntimeError:  # the system has no more threads
                self._budget.give_back(stop - self._next)
                if self._ahead:
                    return
                raise
            self._next = stop


class _Range:
    """A range that is being fetched, or was."""

    def __init__(self, start: int, stop: int, fetch: Callable[[int, int], Any], budget: Budget) -> None:
        self._size, self._budget = stop - start, budget
        self._position = 0
        self._data = memoryview(b"")
        self._failure: BaseException | None = None
        self._arrived = self._dropped = False
        self._thread = threading.Thread(
            target=self._run, args=[fetch, start, stop], name=f"pgclone-range-{start}", daemon=True
        )
        self._thread.start()

    @property
    def is_used_up(self) -> bool:
        return self._position == self._size

    def readinto(self, buffer: Any) -> int:
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        count = min(len(buffer), self._size - self._position)
        buffer[:count] = self._data[self._position : self._position + count]
        self._position += count
        return count

    def drop(self) -> None:
        """Hand the memory back, as soon as nothing is fetched into it any more."""
        with self._budget.changed:
            self._dropped = True
            self._hand_back()

    def _run(self, fetch: Callable[[int, int], Any], start: int, stop: int) -> None:
        try:
            self._data = memoryview(fetch(start, stop))
            if len(self._data) != self._size:
                raise exceptions.StorageError(f"Bytes {start} to {stop} came as {len(self._data)} bytes.")
        except BaseException as error:  # noqa: BLE001  for the thread that reads
            self._failure = error
        with self._budget.changed:
            self._arrived = True
            self._hand_back()

    def _hand_back(self) -> None:
        if self._arrived and self._dropped:
            self._data = memoryview(b"")
            self._budget.give_back(self._size)
