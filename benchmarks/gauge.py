"""Runs commands and measures them with all their descendants: `gauge.py < job > measured`, both JSON.

A process of its own, so that nothing but the commands is its child. It adopts what they leave behind (a subreaper), so
that daemonized processes are counted as well. Only the standard library: it has to start fast and stay small.

The CPU time of the commands is what the kernel charges to children that were waited for: exact. That of servers is read
from /proc, in ticks of 10 ms: each live process loses less than one, those that have ended lose nothing. Their peaks of
memory are the kernel's own, except those of Python processes apart from others, which are asked for 20 times a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
INTERVAL = 0.05
PATIENCE = 5.0
"""Seconds in which orphans have to end."""

TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    job = json.load(sys.stdin)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    watched = {name: [int(pid) for pid in pids] for name, pids in job["watched"].items()}
    before = {name: sum(map(read_cpu, pids)) for name, pids in watched.items()}
    peak = PythonPeak()
    begin = time.perf_counter()
    failed = next((step for step in job["steps"] if not run(step, job)), None)
    wall = time.perf_counter() - begin
    peak.stop()
    escaped = reap_orphans()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    measured = {
        "wall": wall,
        "client": usage.ru_utime + usage.ru_stime,
        "largest": usage.ru_maxrss * 1024,
        "python": peak.bytes,
        "watched": {name: sum(map(read_cpu, pids)) - before[name] for name, pids in watched.items()},
        "escaped": escaped,
        "failed": failed and " | ".join(argv[0] for argv in failed["pipeline"]),
    }
    json.dump(measured, sys.stdout)


def run(step: dict[str, Any], job: dict[str, Any]) -> bool:
    """Run one pipeline to its end, with what it says going to the log. True if all of it succeeded."""
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(Path(job["log"]).open("ab"))
        output = stack.enter_context(Path(step["output"]).open("wb")) if step["output"] else log
        source: Any = subprocess.DEVNULL
        for number, argv in enumerate(step["pipeline"], 1):
            last = number == len(step["pipeline"])
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=source,
                    stdout=output if last else subprocess.PIPE,
                    stderr=log,
                    cwd=job["folder"],
                    env=job["environ"],
                )
            except OSError as error:  # it is not there
                log.write(str(error).encode())
                return False
            if processes:
                source.close()
            source = process.stdout
            processes.append(process)
        statuses = [process.wait() for process in processes]  # of all, before any of them counts
        return not any(statuses)


def reap_orphans() -> int:
    """Wait for what the commands have left behind. Returns how many children do not end."""
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(INTERVAL)
        return len(list(find_children(os.getpid())))
    return 0


def read_cpu(pid: int) -> float:
    """Seconds of a process and all its descendants, those that it has waited for included.

    A child that ends in between would be counted twice, or not at all: then all is read again.
    """
    while True:
        reaped = read_stat(pid)
        ticks = sum(reaped) + sum(sum(read_stat(child)) for child in find_descendants(pid))
        if read_stat(pid)[2:] == reaped[2:]:
            return ticks / TICK


def read_stat(pid: int) -> tuple[int, ...]:
    """utime, stime, cutime, cstime of /proc/PID/stat: behind the name, which may hold anything."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return (0, 0, 0, 0)
    return tuple(map(int, fields[11:15]))


def find_descendants(pid: int) -> Iterator[int]:
    for child in find_children(pid):
        yield child
        yield from find_descendants(child)


def find_children(pid: int) -> Iterator[int]:
    """The children of all threads of a process."""
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (thread / "children").read_text().split())


class PythonPeak:
    """The largest peak of resident memory among the Python processes below this one."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stopped.wait(INTERVAL):
            for pid in find_descendants(os.getpid()):
                with contextlib.suppress(OSError, ValueError):
                    self.bytes = max(self.bytes, read_peak(pid))


def read_peak(pid: int) -> int:
    """Bytes of a Python process, 0 for others. The kernel keeps the peak: the last look sees nearly all of it."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if not fields["Name"].strip().startswith("python"):
        return 0
    return int(fields.get("VmHWM", "0 kB").split()[0]) * 1024


if __name__ == "__main__":
    main()
