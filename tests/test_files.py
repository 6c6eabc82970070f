"""Local files as storage, beyond the conformance suite: left-overs, locks, syncs, full disks, odd file systems."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pgclone import exceptions, streams
from pgclone.api import StorageError
from pgclone.host import Storage
from pgclone.locations import parse_location
from pgclone.plugins import files
from pgclone.testing.storage import get, keys, put, serve, writer

KEY = "prod/default/none/2026-01-31-10-20-30-123456.dump"

WRITER = """
import sys
from pgclone.plugins import files
from pgclone.testing.storage import put, serve, writer
storage = serve(files, sys.argv[1])
with writer(storage, sys.argv[2]) as file:
    file.write(b"half")
    put(storage, sys.argv[2] + ".json", b"manifest")
    print("writing", flush=True)
    sys.stdin.read()
"""
"""Writes a key and its manifest, and is about to commit the key when its standard input ends."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dumps"


@pytest.fixture
def storage(folder: Path) -> Storage:
    return serve(files, str(folder))


@pytest.fixture
def start_writer(folder: Path) -> Callable[[str], subprocess.Popen[str]]:
    def start(key: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    return start


# Left-overs of writers


def test_a_file_is_written_beside_its_name(storage: Storage, folder: Path) -> None:
    with writer(storage, "prod/key"):
        (partial,) = names(folder)
        assert files._PARTIAL.fullmatch(Path(partial).name)
        assert keys(storage) == []
    assert names(folder) == ["prod/key"]


def test_the_partial_file_of_a_living_writer_is_left_alone(
    storage: Storage, folder: Path, start_writer: Callable[[str], subprocess.Popen[str]]
) -> None:
    with start_writer(KEY) as process:
        put(storage, "other", b"")
        assert len(names(folder)) == 3
        assert keys(storage) == ["other", f"{KEY}.json"]
    assert process.returncode == 0
    assert names(folder) == ["other", KEY, f"{KEY}.json"]


def test_what_a_dead_writer_left_goes_with_the_next_write(
    storage: Storage, folder: Path, start_writer: Callable[[str], subprocess.Popen[str]]
) -> None:
    with start_writer(KEY) as process:
        put(storage, f"{KEY}.parts/00001", b"rows")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(names(folder)) == 3
    put(storage, "other", b"")
    assert names(folder) == ["other"]


def test_the_parts_of_a_living_writer_and_of_a_complete_dump_stay(
    storage: Storage, folder: Path, start_writer: Callable[[str], subprocess.Popen[str]]
) -> None:
    with start_writer(KEY) as process:
        put(storage, f"{KEY}.parts/00001", b"rows")
        put(storage, "other", b"")
        assert f"{KEY}.parts/00001" in keys(storage)
    assert process.returncode == 0
    put(storage, "another", b"")
    assert f"{KEY}.parts/00001" in keys(storage)


def test_the_folder_of_parts_goes_with_the_last_one(storage: Storage, folder: Path) -> None:
    for number in (1, 2):
        put(storage, f"{KEY}.parts/0000{number}", b"rows")
    storage.delete(location=storage.location, key=f"{KEY}.parts/00001")
    assert keys(storage) == [f"{KEY}.parts/00002"]
    storage.delete(location=storage.location, key=f"{KEY}.parts/00002")
    assert not [*folder.rglob("*.parts")]


def test_a_writer_that_died_between_its_commit_and_its_end_leaves_a_whole_dump(storage: Storage, folder: Path) -> None:
    put(storage, KEY, b"whole")
    put(storage, f"{KEY}.json", b"manifest")
    (folder / KEY).with_name(f".{Path(KEY).name}.0123abcd.partial").hardlink_to(folder / KEY)
    put(storage, "other", b"")
    assert names(folder) == ["other", KEY, f"{KEY}.json"]


def test_partial_files_of_other_programs_are_theirs(storage: Storage, folder: Path) -> None:
    for name in (".film.mkv.partial", "film.0123abcd.partial", ".cache"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    put(storage, "key", b"")
    assert set(names(folder)) == {".film.mkv.partial", "film.0123abcd.partial", ".cache", "key"}


# What a commit promises


def test_everything_is_synced_before_the_name_appears_and_the_name_after_it(
    storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_link = os.fsync, os.link

    def sync(handle: int) -> None:
        real_sync(handle)
        done.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink()}".replace(str(folder), ""))

    def link(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"bytes"
        real_link(source, target)
        done.append(f"link {target}".replace(str(folder), ""))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", link)
    put(storage, "prod/default/key", b"bytes")
    partial = done.pop(3)
    assert partial.startswith("sync /prod/default/.key.")
    assert done == [
        "sync /prod",
        "sync ",
        f"sync {folder.parent}",
        "link /prod/default/key",
        "sync /prod/default",
    ]


def test_an_existing_file_is_never_overwritten(storage: Storage, folder: Path) -> None:
    put(storage, "key", b"first")
    with pytest.raises(StorageError, match=r"dumps/key exists already\.\nDumps are never overwritten"):
        put(storage, "key", b"second")
    assert (get(storage, "key"), names(folder)) == (b"first", ["key"])


def test_a_file_system_without_hard_links_does_as_well(
    storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")  # as vfat and many network mounts answer

    monkeypatch.setattr(os, "link", link)
    put(storage, "key", b"first")
    with pytest.raises(StorageError, match="exists already"):
        put(storage, "key", b"second")
    assert (get(storage, "key"), names(folder)) == (b"first", ["key"])


# When things go wrong


def test_a_file_that_was_closed_is_not_committed(storage: Storage, folder: Path) -> None:
    with pytest.raises(StorageError, match=r"dumps/key was closed before it was complete"):
        with writer(storage, "key") as file:
            file.close()
    assert names(folder) == []


def test_a_full_disk_discards_what_was_written(folder: Path) -> None:
    script = """
import resource, signal, sys
from pgclone import exceptions, streams
from pgclone.plugins import files
from pgclone.testing.storage import serve
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try:
    with streams.store(serve(files, sys.argv[1]), "prod/key") as stored:
        for _ in range(100):
            stored.write(bytes(65536))
except exceptions.StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (
        0,
        f'"prod/key" in {folder} could not be written: File too large\n',
    )
    assert names(folder) == []


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty(
    storage: Storage, folder: Path, unprivileged: Callable[[str], str]
) -> None:
    put(storage, "prod/key", b"")
    (folder / "prod").chmod(0)
    said = unprivileged(
        "from pgclone import archive\n"
        "from pgclone.plugins import files\n"
        "from pgclone.testing.storage import serve\n"
        f"list(archive.list_entries(serve(files, {str(folder)!r})))"
    )
    (folder / "prod").chmod(0o755)
    assert said.endswith(f"StorageError: {folder} cannot be listed: Permission denied\n")


def test_a_location_that_is_a_file_is_an_error_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        keys(serve(files, str(tmp_path / "file")))


def test_what_disappears_while_it_is_listed_is_left_out(storage: Storage, folder: Path) -> None:
    for key in ("a/1", "a/2", "b/1", "b/2"):
        put(storage, key, b"")
    listing = iter(storage.list(location=storage.location, prefix=""))
    first = next(listing).key
    for path in [*folder.rglob("?/?")]:
        path.unlink()
    for path in [*folder.iterdir()]:
        path.rmdir()
    assert [first, *(entry.key for entry in listing)] == [first]


# How a location may be written


@pytest.mark.parametrize(
    "name", ["dumps", "with space", "ünïcödé 🐘", "quo'te\"s", "100%", "$HOME;`x`", "#a?b=c&d"], ids=ascii
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_absolute_folders(tmp_path: Path, scheme: str, name: str) -> None:
    storage = serve(files, f"{scheme}{tmp_path}/{name}")
    put(storage, "prod/key", b"bytes")
    assert (tmp_path / name / "prod" / "key").read_bytes() == b"bytes"
    assert (keys(storage), get(storage, "prod/key")) == (["prod/key"], b"bytes")


@pytest.mark.parametrize("url", [".pgclone/", "dumps", "./a/b", "-dash/", "file://dumps"])
def test_relative_folders(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = serve(files, url)
    put(storage, "prod/key", b"bytes")
    assert (tmp_path / url.removeprefix("file://") / "prod" / "key").read_bytes() == b"bytes"
    assert keys(storage) == ["prod/key"]


@pytest.mark.parametrize("url", ["", "file://"])
def test_a_location_that_says_nothing_is_refused(url: str) -> None:
    with pytest.raises(exceptions.ValueError, match=r"is empty|names no folder"):
        parse_location(url)


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "dumps").symlink_to(tmp_path / "disk")
    storage = serve(files, str(tmp_path / "dumps"))
    put(storage, "prod/key", b"bytes")
    assert keys(storage) == ["prod/key"]
    assert names(tmp_path / "disk") == ["prod/key"]


def test_folders_in_it_may_be_links_even_round_in_a_circle(tmp_path: Path, storage: Storage, folder: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    folder.mkdir()
    (folder / "prod").symlink_to(disk)
    (disk / "again").symlink_to(folder)
    left_over = disk / ".key.0123abcd.partial"
    left_over.write_bytes(b"")
    put(storage, "prod/key", b"bytes")
    assert keys(storage) == ["prod/key"]
    assert not left_over.exists()


def test_a_stream_into_a_file_is_digested_as_it_is_stored(storage: Storage, folder: Path) -> None:
    with streams.store(storage, "key") as stored:
        stored.write(b"bytes")
    assert stored.digest.size == (folder / "key").stat().st_size == 5


@pytest.fixture
def unprivileged(tmp_path: Path) -> Callable[[str], str]:
    """Runs a script as somebody who is not root, and returns what it wrote to stderr."""

    def run(script: str) -> str:
        prepare = "import os\nif os.geteuid() == 0:\n    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        # What is to be imported may lie where only root can read.
        imports = "".join(line + "\n" for line in script.splitlines() if "import" in line)
        for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
            parent.chmod(parent.stat().st_mode | 0o011)
        done = subprocess.run([sys.executable, "-c", imports + prepare + script], stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        return done.stderr

    return run


def names(folder: Path) -> list[str]:
    """All files, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
