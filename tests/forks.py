"""Commands in processes of their own, forked from one that has loaded Django: real processes, at a fifth of the cost.

with Forks() as forks:
    done = forks.run(project, "pgclone", "dump", faults=[Fault("event: dump_started", "SIGKILL")])
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests import faults
from tests.faults import Fault
from tests.project import ROOT, Done, Project

_SECONDS = 120
"""How long a command may take before it is killed, so that its test fails instead of hanging."""


class Forks:
    """The process that forks. `close` ends it, and every command that still runs."""

    def __init__(self, large: int | None = None) -> None:
        """`large`: the bytes from which tables become parts, and the least bytes of a chunk; None for pgclone's own."""
        parts = {"PGCLONE_TEST_LARGE": str(large)} if large else {}
        self._folder = tempfile.TemporaryDirectory(prefix="pgclone-forks-")
        self._running: set[int] = set()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", **parts},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):  # killed, and nobody has waited for it
                os.kill(pid, signal.SIGKILL)
        self._server.communicate()
        self._folder.cleanup()

    def start(
        self,
        project: Project,
        *argv: str,
        faults: Sequence[Fault] = (),
        trace: Path | None = None,
        lines: bool = False,
        largest_file: int | None = None,
        **settings: Any,
    ) -> Forked:
        """Start a management command.

        Args:
            faults: What is to happen to it, and when.
            trace: A file for the points that it passes.
            lines: Whether every line of pgclone is such a point.
            largest_file: RLIMIT_FSIZE, in bytes.
        """
        output = Path(tempfile.mkdtemp(dir=self._folder.name))
        order = {
            "argv": argv,
            "environ": project.environment(settings),
            "output": str(output),
            "faults": [asdict(fault) for fault in faults],
            "trace": str(trace or ""),
            "lines": lines,
            "largest_file": largest_file,
        }
        pid = self._ask(order)
        self._running.add(pid)
        return Forked(self, pid, output)

    def run(self, project: Project, *argv: str, **options: Any) -> Done:
        """Run a management command to its end."""
        return self.start(project, *argv, **options).wait()

    def wait(self, pid: int, *, stopped: bool) -> int | None:
        """The exit status; None if it was stopped by a signal (SIGSTOP)."""
        guard = threading.Timer(_SECONDS, os.kill, [pid, signal.SIGKILL])
        guard.start()
        status: int | None = self._ask({"wait": pid, "stopped": stopped})
        guard.cancel()
        if status is not None:
            self._running.discard(pid)
        return status

    def _ask(self, order: Any) -> Any:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@dataclass(frozen=True)
class Forked:
    """A command that was started."""

    forks: Forks
    pid: int
    output: Path

    def wait(self) -> Done:
        status = self.forks.wait(self.pid, stopped=False)
        assert status is not None
        return Done(status, (self.output / "out").read_text(), self.err)

    def wait_until_frozen(self) -> None:
        """Wait until it has met a fault that is SIGSTOP."""
        status = self.forks.wait(self.pid, stopped=True)
        assert status is None, f"ended with {status} instead: {self.err}"

    def thaw(self) -> Done:
        """Let it go on after SIGSTOP, and wait for its end."""
        self.send(signal.SIGCONT)
        return self.wait()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def err(self) -> str:
        """What it wrote to stderr so far."""
        return (self.output / "err").read_text()


def main() -> None:
    """Take orders on stdin, a line each, and answer each with a line."""
    import django

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore for what runs in the background
    django.setup()
    _load()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_wait(**order) if "wait" in order else _fork(order)), flush=True)


def _load() -> None:
    """Everything that a command imports."""
    from django.core.management import load_command_class

    from pgclone.recipes import copy, dump, ls, restore  # noqa: F401

    load_command_class("pgclone", "pgclone")
    load_command_class("django.core", "migrate")
    with contextlib.suppress(ImportError):
        import compression.zstd  # noqa: F401
    with contextlib.suppress(ImportError):
        import backports.zstd  # noqa: F401


def _wait(wait: int, stopped: bool) -> int | None:
    _, status = os.waitpid(wait, os.WUNTRACED if stopped else 0)
    return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def _fork(order: dict[str, Any]) -> int:
    for name in ("out", "err"):
        Path(order["output"], name).touch()
    if pid := os.fork():
        return pid
    status = 1
    try:
        with _redirected(Path(order["output"])):
            status = _run(order)
    finally:
        os._exit(status)


@contextlib.contextmanager
def _redirected(folder: Path) -> Iterator[None]:
    targets = [os.open(os.devnull, os.O_RDONLY), *(os.open(folder / n, os.O_WRONLY) for n in ("out", "err"))]
    for number, target in enumerate(targets):
        os.dup2(target, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _run(order: dict[str, Any]) -> int:
    from django.conf import settings
    from django.core.management import execute_from_command_line
    from django.db import connections

    os.environ.clear()
    os.environ.update(order["environ"])
    settings.DATABASES["default"].update(json.loads(os.environ["PGCLONE_TEST_DATABASE"]))
    for name, value in json.loads(os.environ["PGCLONE_TEST_SETTINGS"]).items():
        setattr(settings, name, value)
    connections.settings = connections.configure_settings(settings.DATABASES)
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"],) * 2)
    faults.arm([Fault(**fault) for fault in order["faults"]], order["trace"], order["lines"])
    try:
        execute_from_command_line(["manage.py", *order["argv"]])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:  # noqa: BLE001  what the interpreter does with it
        traceback.print_exc()
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    main()
