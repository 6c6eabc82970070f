"""doctor: what a storage location can do, a line for each step, and nothing left of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from django.core.management import call_command
from django.test import override_settings

from pgclone import exceptions, keys
from pgclone.api import Entry, Location, hookimpl
from pgclone.plugins import files
from pgclone.recipes.doctor import STEPS
from tests.project import ROOT, Done
from tests.test_storage_conformance import Overwriting, Persistent, Shelf

STEP_NAMES = [step.name for step in STEPS]

HEALTHY = [
    'ok       write      1 MiB as "PROBE" in LOCATION (0.00 s)',
    "ok       list       what was written is listed (0.00 s)",
    "ok       read       what was written came back (0.00 s)",
    "ok       overwrite  a second write of the same key was refused (0.00 s)",
    "ok       interrupt  an interrupted write left nothing (0.00 s)",
    "ok       delete     what was written is gone (0.00 s)",
]
NOTHING_WRITTEN = [
    "ok       list       works, but there is nothing to be found (0.00 s)",
    "skipped  read       cannot be tried without write",
    "skipped  overwrite  cannot be tried without write",
    "skipped  interrupt  cannot be tried without write",
    "skipped  delete     cannot be tried without write",
]


def doctor(location: object, *argv: str, streams: tuple[io.StringIO, ...] = (), **settings: Any) -> Done:
    """What `manage.py pgclone doctor` prints. Keywords are settings."""
    (out, err), status = streams or (io.StringIO(), io.StringIO()), 0
    with override_settings(PGCLONE_STORAGE_LOCATION=location, **settings):
        try:
            call_command("pgclone", "doctor", *argv, stdout=out, stderr=err)
        except SystemExit as error:
            status = int(error.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def lines(done: Done, location: object) -> list[str]:
    """What it printed, but for what is different each time."""
    text = re.sub(r"pgclone-doctor-[0-9a-f]{16}", "PROBE", done.out).replace(str(location), "LOCATION")
    return re.sub(r"\(\d+\.\d\d s\)", "(0.00 s)", text).splitlines()


# On local files


@pytest.mark.parametrize("folder", ["", "not/there/yet"])
def test_a_folder_that_can_be_written_can_do_everything(tmp_path: Path, folder: str) -> None:
    location = tmp_path / folder
    done = doctor(location)
    assert (done.status, done.err, lines(done, location)) == (0, "", HEALTHY)
    assert [*location.iterdir()] == []


def test_what_is_stored_there_is_left_alone(tmp_path: Path) -> None:
    dump = tmp_path / "prod" / "default" / "none" / "2026-01-31-10-20-30-123456.dump"
    dump.parent.mkdir(parents=True)
    dump.write_bytes(b"precious")
    assert doctor(tmp_path).status == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [dump]
    assert dump.read_bytes() == b"precious"


def test_a_folder_that_nobody_can_make() -> None:
    done = doctor("/proc/dumps")
    assert lines(done, "/proc/dumps") == [
        'failed   write      "PROBE" in LOCATION could not be written: No such file or directory',
        "                    Without it, nothing can be dumped to this location.",
        *NOTHING_WRITTEN,
    ]
    assert (done.status, done.err) == (
        1,
        "/proc/dumps cannot do all that pgclone needs: write failed.\n"
        "Mend what is said of it above, and see the doctor again.\n",
    )


def test_a_folder_that_may_only_be_read() -> None:
    with tempfile.TemporaryDirectory() as location:
        Path(location).chmod(0o555)
        with as_an_ordinary_user():
            done = doctor(location)
    assert lines(done, location) == [
        'failed   write      "PROBE" in LOCATION could not be written: Permission denied',
        "                    Without it, nothing can be dumped to this location.",
        *NOTHING_WRITTEN,
    ]
    assert done.status == 1


@contextlib.contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Root may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    location = tmp_path / "file"
    location.write_text("mine")
    done = doctor(location)
    assert lines(done, location) == [
        'failed   write      "PROBE" in LOCATION could not be written: File exists',
        "                    Without it, nothing can be dumped to this location.",
        "failed   list       LOCATION cannot be listed: Not a directory",
        "                    Without it, nothing can be dumped to this location, or restored from it.",
        *NOTHING_WRITTEN[1:],
    ]
    assert done.err.startswith(f"{location} cannot do all that pgclone needs: write, list failed.\n")
    assert (done.status, location.read_text()) == (1, "mine")


# Which location, and which plugin


def test_the_location_is_the_flags_or_the_configurations_or_the_settings(tmp_path: Path) -> None:
    configs = {"mine": {"storage_location": str(tmp_path / "config")}}
    for number, (argv, folder) in enumerate(
        [([], "setting"), (["-c", "mine"], "config"), (["-c", "mine", "-s", str(tmp_path / "flag")], "flag")], 1
    ):
        assert doctor(tmp_path / "setting", *argv, PGCLONE_CONFIGS=configs).status == 0
        assert (tmp_path / folder).exists()
        assert len([*tmp_path.iterdir()]) == number


def test_a_location_that_no_plugin_serves() -> None:
    done = doctor("ftp://host/dumps")
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines() == [
        'No plugin serves the storage location "ftp://host/dumps".',
        "Check its spelling, or install the plugin for it.",
    ]


def test_a_plugin_that_cannot_be_loaded_is_reported_and_does_no_harm(tmp_path: Path) -> None:
    done = doctor(tmp_path, PGCLONE_PLUGINS=["no.such.module"])
    assert (done.status, lines(done, tmp_path)) == (0, HEALTHY)
    assert done.err.startswith('The plugin "no.such.module" (PGCLONE_PLUGINS) cannot be loaded: ModuleNotFoundError')


# Storages that cannot do everything


class Spy(Shelf):
    """A storage that works, and remembers the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str] = []

    def commit(self, key: str, data: bytes) -> None:
        self.keys.append(key)
        super().commit(key, data)


class Unwritable(Shelf):
    def commit(self, key: str, data: bytes) -> None:
        raise exceptions.StorageError("The shelf is full.", "Make room,\nor buy another one.")


class Unsure(Shelf):
    """Says that it failed, after all was done."""

    def commit(self, key: str, data: bytes) -> None:
        super().commit(key, data)
        raise TimeoutError("no answer")


class Unlistable(Shelf):
    def walk(self, prefix: str) -> Iterator[Entry]:
        raise PermissionError(13, "Permission denied")
        yield


class Forgetful(Shelf):
    def walk(self, prefix: str) -> Iterator[Entry]:
        return iter(())


class Miscounting(Shelf):
    def walk(self, prefix: str) -> Iterator[Entry]:
        return (Entry(entry.key, 7) for entry in super().walk(prefix))


class Unreadable(Shelf):
    @contextlib.contextmanager
    def read(self, key: str) -> Iterator[BinaryIO]:
        raise PermissionError(13, "Permission denied")
        yield


class Truncating(Shelf):
    @contextlib.contextmanager
    def read(self, key: str) -> Iterator[BinaryIO]:
        yield io.BytesIO(self.objects[key][:-1])


class Undiscardable(Shelf):
    """Cannot abort what was begun."""

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        try:
            with super().write(key) as file:
                yield file
        except BaseException:  # noqa: BLE001
            raise PermissionError(13, "Permission denied") from None


class Undeletable(Shelf):
    @hookimpl
    def delete_key(self, location: Location, key: str) -> bool | None:
        raise exceptions.StorageError(f"{key} is locked.", "Unlock it.")


class Leaving(Shelf):
    @contextlib.contextmanager
    def read(self, key: str) -> Iterator[BinaryIO]:
        sys.exit(0)
        yield


class WriteOnly(Undeletable, Unreadable, Unlistable):
    """The credentials that a careful administrator gives to a server that makes backups."""


def otherwise(name: str) -> str:
    (step,) = (step for step in STEPS if step.name == name)
    return f"                    {step.without}"


BROKEN: dict[str, tuple[type[Shelf], dict[str, list[str]]]] = {
    "write": (
        Unwritable,
        {
            "write": [
                "failed   write      The shelf is full.",
                "                    Make room,",
                "                    or buy another one.",
                otherwise("write"),
            ],
            **dict(zip(STEP_NAMES[1:], ([line] for line in NOTHING_WRITTEN))),
        },
    ),
    "list": (
        Unlistable,
        {
            "list": ["failed   list       LOCATION cannot be listed: Permission denied", otherwise("list")],
            "interrupt": ["skipped  interrupt  cannot be tried without list"],
        },
    ),
    "list: nothing": (
        Forgetful,
        {
            "list": ['failed   list       "PROBE" in LOCATION was written, and is not listed.', otherwise("list")],
            "interrupt": ["skipped  interrupt  cannot be tried without list"],
        },
    ),
    "list: another size": (
        Miscounting,
        {
            "list": [
                'failed   list       "PROBE" in LOCATION has 1048576 bytes, and is listed with 7.',
                otherwise("list"),
            ],
            "interrupt": ["skipped  interrupt  cannot be tried without list"],
        },
    ),
    "read": (
        Unreadable,
        {
            "read": [
                'failed   read       "PROBE" in LOCATION could not be opened: Permission denied',
                otherwise("read"),
            ],
            "overwrite": ["skipped  overwrite  cannot be tried without read"],
        },
    ),
    "read: other bytes": (
        Truncating,
        {
            "read": ['failed   read       "PROBE" in LOCATION did not come back as it was written.', otherwise("read")],
            "overwrite": ["skipped  overwrite  cannot be tried without read"],
        },
    ),
    "read: leaves": (
        Leaving,
        {
            "read": ["failed   read       A plugin tried to end the process: SystemExit(0).", otherwise("read")],
            "overwrite": ["skipped  overwrite  cannot be tried without read"],
        },
    ),
    "overwrite": (
        Overwriting,
        {
            "overwrite": [
                'failed   overwrite  "PROBE" in LOCATION was written twice, and the second time not refused.',
                otherwise("overwrite"),
            ]
        },
    ),
    "interrupt": (
        Persistent,
        {
            "interrupt": [
                'failed   interrupt  "PROBE-interrupted" in LOCATION is listed, although its write was interrupted.',
                otherwise("interrupt"),
            ]
        },
    ),
    "interrupt: cannot discard": (
        Undiscardable,
        {
            "interrupt": [
                'failed   interrupt  "PROBE-interrupted" in LOCATION could not be discarded: Permission denied',
                otherwise("interrupt"),
            ]
        },
    ),
    "delete": (
        Undeletable,
        {
            "delete": [
                "failed   delete     PROBE is locked.",
                "                    Unlock it.",
                otherwise("delete"),
            ]
        },
    ),
    "list and read and delete": (
        WriteOnly,
        {
            "list": ["failed   list       LOCATION cannot be listed: Permission denied", otherwise("list")],
            "read": [
                'failed   read       "PROBE" in LOCATION could not be opened: Permission denied',
                otherwise("read"),
            ],
            "overwrite": ["skipped  overwrite  cannot be tried without read"],
            "interrupt": ["skipped  interrupt  cannot be tried without list"],
            "delete": [
                "failed   delete     PROBE is locked.",
                "                    Unlock it.",
                otherwise("delete"),
            ],
        },
    ),
}


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Shelf]], Shelf]:
    """Registers a storage for shelf://any."""

    def register(kind: type[Shelf]) -> Shelf:
        shelf = kind()
        monkeypatch.setattr(sys.modules[__name__], "PLUGIN", shelf, raising=False)
        return shelf

    return register


SHELF = {"PGCLONE_PLUGINS": [f"{__name__}:PLUGIN"]}


@pytest.mark.parametrize("what", BROKEN)
def test_what_a_storage_cannot_do_is_said_with_its_consequence(
    what: str, shelf: Callable[[type[Shelf]], Shelf]
) -> None:
    kind, differences = BROKEN[what]
    broken = shelf(kind)
    done = doctor("shelf://any", **SHELF)
    expected = {**dict(zip(STEP_NAMES, ([line] for line in HEALTHY))), **differences}
    assert lines(done, "shelf://any") == [line for step in expected.values() for line in step]
    failed = [step for step in STEP_NAMES if expected[step][0].startswith("failed")]
    assert done.status == 1
    assert done.err.splitlines() == [
        f"shelf://any cannot do all that pgclone needs: {', '.join(failed)} failed.",
        "Mend what is said of it above, and see the doctor again.",
    ]
    assert bool(broken.objects) == ("delete" in failed)


def test_a_write_that_failed_and_stored_something_all_the_same_leaves_nothing(
    shelf: Callable[[type[Shelf]], Shelf],
) -> None:
    unsure = shelf(Unsure)
    done = doctor("shelf://any", **SHELF)
    assert lines(done, "shelf://any")[0] == 'failed   write      "PROBE" in LOCATION could not be written: no answer'
    assert unsure.objects == {}


def test_what_is_written_is_no_dump_and_has_a_name_of_its_own(shelf: Callable[[type[Shelf]], Shelf]) -> None:
    spy = shelf(Spy)
    for _ in range(2):
        assert doctor("shelf://any", **SHELF).status == 0
    written = set(spy.keys)
    assert len(written) == 2
    for key in written:
        assert (keys.parse(key), keys.owner(key)) == (None, None)
        assert keys.check(key) == key


# Interruptions


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_in(step: str) -> type[Shelf]:
    """A storage at which somebody presses Ctrl-C in a step."""

    class Interrupted(Shelf):
        def walk(self, prefix: str) -> Iterator[Entry]:
            if step == "list":
                interrupt()
            yield from super().walk(prefix)

        @contextlib.contextmanager
        def read(self, key: str) -> Iterator[BinaryIO]:
            with super().read(key) as file:
                yield file
                interrupt()

        def commit(self, key: str, data: bytes) -> None:
            if key in self.objects and step == "overwrite":
                interrupt()
            super().commit(key, data)
            if step == "write":
                interrupt()

        @hookimpl
        def delete_key(self, location: Location, key: str) -> bool | None:
            nonlocal step
            if step == "delete":
                step = ""  # not again when what is left is removed
                interrupt()
            return super().delete_key(location, key)

    if step != "read":
        del Interrupted.read
    return Interrupted


@pytest.mark.parametrize("step", ["write", "list", "read", "overwrite", "delete"])
def test_ctrl_c_leaves_nothing(shelf: Callable[[type[Shelf]], Shelf], step: str) -> None:
    storage = shelf(interrupted_in(step))
    done = doctor("shelf://any", **SHELF)
    assert (done.status, done.err) == (130, "Interrupted.\n")
    assert lines(done, "shelf://any") == HEALTHY[: STEP_NAMES.index(step)]
    assert storage.objects == {}


def test_ctrl_c_between_two_steps_leaves_nothing(shelf: Callable[[type[Shelf]], Shelf]) -> None:
    class Out(io.StringIO):
        def write(self, text: str) -> int:
            if "list" in text:
                interrupt()
            return super().write(text)

    class Err(io.StringIO):
        def write(self, text: str) -> int:
            return super().write(f"{text}left: {[*storage.objects]}\n")

    storage = shelf(Shelf)
    done = doctor("shelf://any", streams=(Out(), Err()), **SHELF)
    assert (done.status, done.err, lines(done, "shelf://any")) == (130, "Interrupted.\nleft: []\n", HEALTHY[:1])


class Slow:
    """Local files, which take a minute to be read."""

    list_keys, delete_key = staticmethod(files.list_keys), staticmethod(files.delete_key)

    @hookimpl
    def storage_open(self, location: Location, key: str, mode: Any) -> Any:
        if mode == "rb":
            time.sleep(60)
        return files.storage_open(location, key, mode)


SLOW = Slow()

SIGNALS = {signal.SIGINT: (130, "Interrupted.\n"), signal.SIGTERM: (143, "Ended by SIGTERM.\n")}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_process_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    settings = {"PGCLONE_STORAGE_LOCATION": str(tmp_path), "PGCLONE_PLUGINS": ["tests.test_doctor:SLOW"]}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "django", "pgclone", "doctor"],
        env={**os.environ, "PGCLONE_TEST_SETTINGS": json.dumps(settings)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    for name in ("write", "list"):
        assert process.stdout.readline().split()[:2] == ["ok", name]
    assert len([*tmp_path.iterdir()]) == 1
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == SIGNALS[number]
    assert [*tmp_path.iterdir()] == []
