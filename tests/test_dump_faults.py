"""Dumps that are killed, interrupted or failed: no key is listed that cannot be restored, and nothing goes on or stays."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import Fault, Tally, alive, children, read_trace, spread, tally, wait_until  # noqa: F401
from tests.forks import Forks
from tests.project import Done, Project
from tests.tools import make_tools

STATUS = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130,)}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


class Dumps:
    """The folder of dumps of a project that has one dump already."""

    def __init__(self, project: Project, forks: Forks, tally: Tally) -> None:  # noqa: F811
        self.project, self.forks, self.tally = project, forks, tally
        assert self.dump().status == 0
        self.first = self.files()

    def dump(self, *argv: str, **options: object) -> Done:
        return self.forks.run(self.project, "pgclone", "dump", *argv, **options)  # type: ignore[arg-type]

    def files(self) -> dict[str, str]:
        """What is stored, and its SHA-256."""
        folder = self.project.dumps
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in self.project.stored()}

    def listed(self) -> list[str]:
        return self.forks.run(self.project, "pgclone", "ls").lines

    def check_after_a_fault(self, kind: str) -> None:
        """Earlier dumps are untouched, what is listed can be restored, and the next run clears what was left."""
        self.tally.faults[kind] += 1
        problems = []
        if not self.first.items() <= self.files().items():
            problems.append("an earlier dump is gone or changed")
        for key in set(self.listed()) - self.first.keys():
            done = self.forks.run(self.project, "pgclone", "restore", key, "--as", ":trial")
            if done.status != 0 or self.project.digest("trial") != self.project.digest():
                problems.append(f"{key} is listed, but cannot be restored: {done.err}")
        if (done := self.dump()).status != 0:
            problems.append(f"the next dump failed: {done.err}")
        names = self.files().keys()
        if left := names ^ {f"{name.removesuffix('.json')}{end}" for name in names for end in ("", ".json")}:
            problems.append(f"the next run left {left}")
        self.tally.lost += len(problems)
        assert problems == []
        for name in self.files().keys() - self.first.keys():
            (self.project.dumps / name).unlink()

    def check_nothing_was_listed(self, done: Done, words: str) -> None:
        """It failed, said why in words, and left nothing."""
        assert (done.status, done.out) == (1, "")
        assert words in done.err and "Traceback" not in done.err
        assert self.files() == self.first
        self.tally.faults["failed dumps"] += 1


@pytest.fixture
def dumps(project: Project, forks: Forks, tally: Tally) -> Dumps:  # noqa: F811
    return Dumps(project, forks, tally)


def points_of_a_dump(dumps: Dumps, folder: Path, *, lines: bool = False) -> list[tuple[str, int]]:
    assert dumps.dump(trace=folder / "trace", lines=lines).status == 0
    dumps.check_after_a_fault("runs without a fault")
    return read_trace(folder / "trace")


@pytest.mark.parametrize(("blow", "count"), [("SIGKILL", 6), ("SIGTERM", 3), ("SIGINT", 3)])
def test_a_dump_that_is_killed_leaves_no_broken_key(dumps: Dumps, tmp_path: Path, blow: str, count: int) -> None:
    for point, occurrence in spread(points_of_a_dump(dumps, tmp_path)[:-1], count):
        kill(dumps, Fault(point, blow, occurrence))


@pytest.mark.soak
@pytest.mark.parametrize("blow", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_dump_that_is_killed_anywhere_leaves_no_broken_key(dumps: Dumps, tmp_path: Path, blow: str) -> None:
    for point, occurrence in points_of_a_dump(dumps, tmp_path):
        kill(dumps, Fault(point, blow, occurrence))


@pytest.mark.soak
def test_a_dump_that_is_interrupted_in_any_line_leaves_no_broken_key(dumps: Dumps, tmp_path: Path) -> None:
    lines = points_of_a_dump(dumps, tmp_path, lines=True)
    for point, occurrence in spread(lines, 240):
        kill(dumps, Fault(point, "SIGINT", occurrence), lines=True)


def kill(dumps: Dumps, fault: Fault, *, lines: bool = False) -> None:
    done = dumps.dump(faults=[fault], lines=lines)
    assert done.status in (0, *STATUS[fault.blow]), f"{fault}: {done.err}"
    try:
        dumps.check_after_a_fault(f"{fault.blow} in dumps" if done.status else "faults that came too late")
    except AssertionError as error:
        raise AssertionError(f"{fault}: {error}") from None


@pytest.mark.parametrize("point", ["file: after link", "file: after unlink"])
def test_a_dump_that_is_interrupted_while_it_commits_keeps_its_manifest(dumps: Dumps, point: str) -> None:
    kill(dumps, Fault(point, "SIGINT", 2))


def test_ctrl_c_twice_leaves_no_broken_key(dumps: Dumps) -> None:
    faults = [Fault("stream: Sink.write", "SIGINT"), Fault("child: stopped", "SIGINT", 3)]
    done = dumps.dump(faults=faults)
    assert done.status == 130
    dumps.check_after_a_fault("SIGINT twice in dumps")


def test_pg_dump_ends_with_a_killed_dump(dumps: Dumps) -> None:
    dump = dumps.forks.start(dumps.project, "pgclone", "dump", faults=[Fault("child: pg_dump started", "SIGSTOP", 2)])
    dump.wait_until_frozen()
    started = children(dump.pid)
    assert len(started) == 1
    dump.send(signal.SIGKILL)
    dump.wait()
    wait_until(lambda: not alive(started), seconds=3)
    dumps.check_after_a_fault("SIGKILL in dumps")


def test_a_killed_dump_that_waits_for_a_table_leaves_no_session(dumps: Dumps) -> None:
    project = dumps.project
    with holding(project, "LOCK TABLE app_book IN ACCESS EXCLUSIVE MODE"):
        dump = dumps.forks.start(project, "pgclone", "dump")
        waiting = "FROM pg_stat_activity WHERE application_name = 'pgclone' AND datname <> 'postgres'"
        wait_until(lambda: project.sql(f"SELECT count(*) {waiting} AND wait_event_type = 'Lock'", "postgres") == "1")
        dump.send(signal.SIGKILL)
        dump.wait()
        wait_until(lambda: project.sql(f"SELECT count(*) {waiting}", "postgres") == "0", seconds=3)
    dumps.check_after_a_fault("SIGKILL in dumps")


@contextlib.contextmanager
def holding(project: Project, statement: str) -> Iterator[None]:
    """A transaction that has run a statement and stays open for the block."""
    process = subprocess.Popen(
        [str(project.server.bin / "psql"), "-XAtq", "-d", project.name],
        env=project.server.environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    process.stdin.write(f"BEGIN; {statement}; SELECT 'held';\n")
    process.stdin.flush()
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.communicate("ROLLBACK;\n")


@pytest.mark.parametrize("after", [0, 1, 5_000, 20_000])
def test_a_pg_dump_that_is_killed_fails_the_dump(dumps: Dumps, tmp_path: Path, after: int) -> None:
    tools = make_tools(tmp_path, dumps.project.server.bin, pg_dump=f"die(after={after}, by=9)")
    dumps.check_nothing_was_listed(dumps.dump(PGCLONE_BIN_DIR=str(tools)), "was killed by signal 9")


@pytest.mark.parametrize("after", [0, 20_000, None])
def test_a_pg_dump_that_fails_fails_the_dump(dumps: Dumps, tmp_path: Path, after: int | None) -> None:
    tools = make_tools(tmp_path, dumps.project.server.bin, pg_dump=f"die(after={after}, status=1)")
    dumps.check_nothing_was_listed(dumps.dump(PGCLONE_BIN_DIR=str(tools)), "failed with status 1")


def test_a_table_that_may_not_be_read_fails_the_dump(dumps: Dumps) -> None:
    project = dumps.project
    project.sql("CREATE ROLE clerk LOGIN PASSWORD 'secret'")
    try:
        project.database |= {"USER": "clerk", "PASSWORD": "secret"}
        dumps.check_nothing_was_listed(dumps.dump(), "permission denied for table")
    finally:
        project.sql("DROP ROLE clerk")


def test_a_disk_that_is_full_in_mid_stream_fails_the_dump(dumps: Dumps) -> None:
    dumps.check_nothing_was_listed(dumps.dump(largest_file=2_000), "could not be written: File too large")


@pytest.mark.parametrize("occurrence", [1, 2, 3])
def test_a_disk_that_is_full_at_the_commit_fails_the_dump(dumps: Dumps, occurrence: int) -> None:
    done = dumps.dump(faults=[Fault("file: before fsync", "ENOSPC", occurrence)])
    dumps.check_nothing_was_listed(done, os.strerror(errno.ENOSPC))


def test_a_disk_error_after_the_commit_leaves_a_key_that_can_be_restored(dumps: Dumps) -> None:
    done = dumps.dump(faults=[Fault("file: before fsync", "EIO", 4)])
    assert done.status == 1
    dumps.check_after_a_fault("disk errors")


def test_a_hook_that_objects_fails_the_dump(dumps: Dumps) -> None:
    done = dumps.dump(PGCLONE_PLUGINS=["tests.bad_plugins:objects"])
    dumps.check_nothing_was_listed(done, "not today")


def test_a_storage_that_fails_at_the_commit_fails_the_dump(dumps: Dumps) -> None:
    done = dumps.dump(PGCLONE_PLUGINS=["tests.bad_plugins:fails_at_commit"])
    dumps.check_nothing_was_listed(done, "the bucket is gone")


@pytest.mark.parametrize("plugin", ["leaves_at_commit", "leaves_at_import.anything"])
def test_a_plugin_that_leaves_the_process_fails_the_dump(dumps: Dumps, plugin: str) -> None:
    done = dumps.dump(PGCLONE_PLUGINS=[f"tests.bad_plugins:{plugin}"])
    dumps.check_nothing_was_listed(done, "SystemExit")


@pytest.mark.parametrize("plugin", ["fails_afterwards", "leaves_afterwards"])
def test_a_hook_that_fails_after_the_dump_leaves_it(dumps: Dumps, plugin: str) -> None:
    done = dumps.dump(PGCLONE_PLUGINS=[f"tests.bad_plugins:{plugin}"])
    assert done.status == 0
    assert "too late" in done.err
    assert len(dumps.listed()) == 2
    dumps.check_after_a_fault("failed dumps")


def test_a_plugin_does_not_turn_a_failure_into_a_success(dumps: Dumps) -> None:
    plugins = ["tests.bad_plugins:objects", "tests.bad_plugins:leaves_afterwards"]
    dumps.check_nothing_was_listed(dumps.dump(PGCLONE_PLUGINS=plugins), "not today")


@pytest.mark.parametrize("committed", [True, False])
def test_a_key_that_is_taken_in_the_meantime_keeps_its_manifest(dumps: Dumps, committed: bool) -> None:
    """Two dumps may find the same key free in the same microsecond."""
    begun = Fault("child: pg_dump started", "SIGSTOP", 2)
    dump = dumps.forks.start(dumps.project, "pgclone", "dump", faults=[begun])
    dump.wait_until_frozen()
    key = dump.err.split('to "')[1].split('"')[0]
    (first,) = (name for name in dumps.first if name.endswith(".dump"))
    for name in (key, f"{key}.json") if committed else (f"{key}.json",):
        (dumps.project.dumps / name).write_bytes((dumps.project.dumps / name.replace(key, first)).read_bytes())
    taken = {name: digest for name, digest in dumps.files().items() if not name.endswith(".partial")}
    assert "exists already" in dump.thaw().err
    assert dumps.files() == taken
    dumps.tally.faults["failed dumps"] += 1


def test_a_partial_file_of_somebody_else_is_left_alone(dumps: Dumps) -> None:
    others = dumps.project.dumps / ".holiday.mp4.partial"
    others.write_bytes(b"half of it")
    assert dumps.dump().status == 0
    assert others.exists()
