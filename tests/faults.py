"""Faults that are met inside a pgclone process, at points that are the same in every run.

A point is a step that changes something or may fail: a statement that is sent, a block that is streamed, a child that is
started, a file that is synced, linked or removed, an event that is logged; on demand every line of pgclone.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

PACKAGE = str(Path(__file__).parent.parent / "pgclone") + os.sep

_EFFECT = re.compile(r"(CREATE|DROP|ALTER|COMMENT|COMMIT|ANALYZE|GRANT|REVOKE)\b")
_IN_THE_MIDDLE_SECONDS = 0.002
_REPEATS = 2
"""How often a point that changes nothing is worth a fault. Loops that wait pass some of them any number of times."""


@dataclass(frozen=True)
class Fault:
    """What happens when a process comes by a point for the n-th time.

    Args:
        blow: The name of a signal that the process gets, or of an error (`ENOSPC`) that it meets.
    """

    point: str
    blow: str = "SIGKILL"
    occurrence: int = 1

    def __str__(self) -> str:
        return f"{self.blow} at {self.point!r}, {self.occurrence}"


class Points:
    """The points that a process passes."""

    def __init__(self, faults: Sequence[Fault], trace: str) -> None:
        self._faults = {(fault.point, fault.occurrence): fault.blow for fault in faults}
        self._trace = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if trace else None
        self._seen: Counter[str] = Counter()
        self._mutex = threading.Lock()

    def reach(self, point: str) -> None:
        with self._mutex:
            self._seen[point] += 1
            blow = self._faults.get((point, self._seen[point]))
        if self._trace is not None:
            os.write(self._trace, f"{point}\n".encode())
        if blow is None:
            return
        if not blow.startswith("SIG"):
            raise OSError(getattr(errno, blow), os.strerror(getattr(errno, blow)))
        if point.startswith("while "):
            threading.Thread(target=_strike, args=[blow, _IN_THE_MIDDLE_SECONDS], daemon=True).start()
        else:
            _strike(blow)


def arm(faults: Sequence[Fault], trace: str = "", lines: bool = False) -> None:
    """Let this process meet faults, and write the points that it passes to a file."""
    points = Points(faults, trace)
    _watch_events(points)
    if lines:
        _watch_lines(points)
    else:
        _watch_statements(points)
        _watch_streams(points)
        _watch_children(points)
        _watch_files(points)


def read_trace(path: Path) -> list[tuple[str, int]]:
    """The points that a process has passed, each with its number."""
    seen: Counter[str] = Counter()
    found = []
    for point in path.read_text().splitlines():
        seen[point] += 1
        changes = _EFFECT.match(point.partition(": ")[2]) or not point.startswith(("before: ", "while: ", "line "))
        if seen[point] <= (1 if point.startswith("line ") else sys.maxsize if changes else _REPEATS):
            found.append((point, seen[point]))
    return found


def spread(points: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """Some of many, evenly, the first and the last among them."""
    if count >= len(points):
        return list(points)
    return [points[round(number * (len(points) - 1) / (count - 1))] for number in range(count)]


def _strike(blow: str, after: float = 0) -> None:
    time.sleep(after)
    os.kill(os.getpid(), getattr(signal, blow))


def _watch_events(points: Points) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            points.reach(f"event: {getattr(record, 'event', record.msg)}")

    logger = logging.getLogger("pgclone")
    logger.addHandler(Handler())
    logger.setLevel(logging.DEBUG)


def _watch_statements(points: Points) -> None:
    from pgclone.database.connection import Session

    execute = Session.execute

    def watched(session: Session, query: Any, params: Any = None) -> Any:
        text = _text(query if isinstance(query, str) else query.as_string(session._connection))
        points.reach(f"before: {text}")
        if _EFFECT.match(text):
            points.reach(f"while: {text}")
        return execute(session, query, params)

    Session.execute = watched  # type: ignore[method-assign]


def _text(statement: str) -> str:
    """The beginning of a statement, without what is random."""
    text = re.sub(r"[0-9a-f]{12}(_[0-9a-f]{6})?|\b\d{4,}\b", "…", " ".join(statement.split()))
    return text[:90]


def _watch_streams(points: Points) -> None:
    from pgclone.streams import Sink, Source, Stored

    for owner, name in ((Sink, "write"), (Stored, "write"), (Source, "read"), (Source, "drain")):
        _before(points, owner, name, f"stream: {owner.__name__}.{name}")


def _watch_children(points: Points) -> None:
    from pgclone.process import Child

    begin = Child.__init__

    def watched(child: Child, process: Any, name: str) -> None:
        begin(child, process, name)
        points.reach(f"child: {name} started")

    Child.__init__ = watched  # type: ignore[method-assign]
    _before(points, Child, "wait", "child: awaited")
    _before(points, Child, "stop", "child: stopped")


def _watch_files(points: Points) -> None:
    for name in ("fsync", "link", "unlink", "mkdir", "rename"):
        _before(points, os, name, f"file: before {name}")
        _after(points, os, name, f"file: after {name}")


def _before(points: Points, owner: Any, name: str, point: str) -> None:
    call: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        points.reach(point)
        return call(*args, **kwargs)

    setattr(owner, name, watched)


def _after(points: Points, owner: Any, name: str, point: str) -> None:
    call: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        points.reach(point)
        return result

    setattr(owner, name, watched)


def _watch_lines(points: Points) -> None:
    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            points.reach(f"line {frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}")
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


class Tally:
    """How many faults there were, and what was lost; the last line of a test run."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.lost = 0

    def __str__(self) -> str:
        counts = [f"{count} {name}" for name, count in sorted(self.faults.items())]
        return f"{sum(self.faults.values())} faults ({', '.join(counts)}); data was lost {self.lost} times"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("faults")
        terminalreporter.line(str(self))


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    """One for the whole run, whichever files use it."""
    plugins = request.config.pluginmanager
    found = plugins.get_plugin("tally")
    if found is None:
        plugins.register(found := Tally(), "tally")
    assert isinstance(found, Tally)
    return found


def children(pid: int) -> list[int]:
    """The processes that a process has started, and theirs. Linux."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for thread in threads for child in thread.read_text().split()]
    return found + [below for child in found for below in children(child)]


def alive(pids: Sequence[int]) -> list[int]:
    """Those that have not ended (a zombie has)."""
    return [pid for pid in pids if _state(pid) not in ("", "Z", "X")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Look until it is so."""
    for _ in _looks(seconds):
        if condition():
            return
    raise AssertionError(f"not so after {seconds} seconds: {condition.__name__}")


def _looks(seconds: float) -> Iterator[None]:
    for _ in range(int(seconds / 0.02)):
        yield
        time.sleep(0.02)
