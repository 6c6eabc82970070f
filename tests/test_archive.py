"""What a dump consists of: the manifest, the order of commits, the sweep of what dead runs left."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgclone import archive, exceptions, keys
from pgclone.api import Entry, hookimpl
from pgclone.archive import ForeignKey, Manifest, Part, Table, parse_manifest
from pgclone.host import Storage
from pgclone.plugins import files
from pgclone.testing import storage as stored
from pgclone.testing.storage import serve
from tests.project import Project

KEY = "prod/default/none/2026-01-31-10-20-30-123456.dump"
PART = f"{KEY}.parts/00001"

MANIFEST = Manifest(
    key=KEY,
    created="2026-01-31T10:20:30.123456+00:00",
    pgclone="1.0",
    pg_dump="18.1",
    server="18.1 (Debian 18.1-1)",
    codecs=("zstd",),
    raw_size=1_000_000,
    stored_size=250_000,
    sha256="0123456789abcdef" * 4,
    encoding="UTF8",
    collate="C.UTF-8",
    ctype="C.UTF-8",
    extensions={"plpgsql": "1.0"},
    migrations={"auth": "0012_alter_user_first_name_max_length"},
    tables=(Table("public.böök", 50, 8192), Table('public."odd""\\name"', -1, 0, excluded=True)),
    foreign_keys=(ForeignKey(16402, "public", "review", "review_book_fk", "public.book", partitioned=False),),
    plugins={"files": "", "memo": "1.2.3"},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dumps"


@pytest.fixture
def storage(folder: Path) -> Storage:
    return serve(files, str(folder))


# The manifest

names = st.text(max_size=20)
numbers = st.integers(0, 2**63)
versions = st.dictionaries(names, names, max_size=3)
manifests = st.builds(
    Manifest,
    key=names,
    created=names,
    pgclone=names,
    pg_dump=names,
    server=names,
    codecs=st.lists(names, max_size=2).map(tuple),
    raw_size=numbers,
    stored_size=numbers,
    sha256=names,
    encoding=names,
    collate=names,
    ctype=names,
    extensions=versions,
    migrations=versions,
    tables=st.lists(st.builds(Table, names, numbers, numbers, st.booleans()), max_size=3).map(tuple),
    foreign_keys=st.lists(st.builds(ForeignKey, numbers, names, names, names, names, st.booleans()), max_size=3).map(
        tuple
    ),
    plugins=versions,
    parts=st.lists(
        st.builds(
            Part,
            *(numbers, numbers, names, names, st.lists(names, max_size=3).map(tuple), numbers, numbers, numbers, names),
            *(st.none() | numbers, st.none() | numbers),
        ),
        max_size=3,
    ).map(tuple),
    masks=st.none() | versions,
)


@given(manifests)
@example(MANIFEST)
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    assert parse_manifest(manifest.dumps(), manifest.key) == manifest


def test_a_manifest_is_stored_beside_its_dump(storage: Storage) -> None:
    assert archive.read_manifest(storage, KEY) is None
    archive.write_manifest(storage, MANIFEST)
    assert stored.keys(storage) == [f"{KEY}.json"]
    assert archive.read_manifest(storage, KEY) == MANIFEST


def test_any_flipped_bit_is_found() -> None:
    data = MANIFEST.dumps()
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises((exceptions.CorruptDump, exceptions.NotPossible)):
                parse_manifest(bytes(damaged), KEY)


@given(st.integers(0, len(MANIFEST.dumps()) - 1), st.integers(0, 255))
def test_any_changed_byte_is_found_unless_it_says_the_same(at: int, value: int) -> None:
    data = bytearray(MANIFEST.dumps())
    data[at] = value
    with contextlib.suppress(exceptions.CorruptDump, exceptions.NotPossible):
        assert parse_manifest(bytes(data), KEY) == MANIFEST  # a tab for a space


def test_any_truncation_is_found() -> None:
    data = MANIFEST.dumps()
    for length in range(len(data)):
        with pytest.raises(exceptions.CorruptDump, match=f'The manifest of the dump "{KEY}" is damaged'):
            parse_manifest(data[:length], KEY)


@given(
    st.binary(max_size=50)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
@example(b"[" * 100_000)
@example(b'{"format": "1"}')
@example(b'{"format": 1}')
def test_what_is_no_manifest_is_damaged(data: bytes) -> None:
    with pytest.raises(exceptions.CorruptDump):
        parse_manifest(data, KEY)


def test_a_field_that_is_missing_is_damage_even_with_the_right_digest() -> None:
    body = json.loads(MANIFEST.dumps())
    del body["sha256"], body["self_sha256"]
    with pytest.raises(exceptions.CorruptDump):
        parse_manifest(json.dumps({**body, "self_sha256": archive._digest(body)}).encode(), KEY)


def test_a_manifest_of_a_newer_pgclone_is_refused_and_not_called_damaged() -> None:
    newer = replace(MANIFEST, format=archive.FORMAT + 1)
    with pytest.raises(exceptions.NotPossible, match=r"has the archive format 2, .* up to 1\.\nUpgrade pgclone"):
        parse_manifest(newer.dumps(), KEY)


def test_fields_that_a_later_version_added_are_no_damage() -> None:
    body = json.loads(MANIFEST.dumps())
    del body["self_sha256"]
    body["weather"] = "fine"
    data = json.dumps({**body, "self_sha256": archive._digest(body)}).encode()
    assert parse_manifest(data, KEY) == MANIFEST


def test_parts_without_a_manifest_are_refused(storage: Storage) -> None:
    archive.check_unmanifested(storage, KEY)
    stored.put(storage, PART, b"")
    with pytest.raises(exceptions.CorruptDump, match=f'has lost its manifest: "{PART}"'):
        archive.check_unmanifested(storage, KEY)


# What is listed, and which key is free


def test_what_belongs_to_a_dump_is_not_listed(storage: Storage) -> None:
    for key in (KEY, f"{KEY}.json", PART, "prod/notes.txt"):
        stored.put(storage, key, b"")
    assert sorted(entry.key for entry in archive.list_entries(storage)) == [KEY, "prod/notes.txt"]


@pytest.mark.parametrize("taken", [[KEY], [f"{KEY}.json"], [PART]])
def test_a_taken_key_moves_to_the_next_free_microsecond(storage: Storage, taken: list[str]) -> None:
    key = keys.parse(KEY)
    assert key is not None
    assert archive.free_key(storage, key) == KEY
    for name in taken:
        stored.put(storage, name, b"")
    assert archive.free_key(storage, key) == KEY.replace("123456", "123457")


# The order of commits


class Recording:
    """Local files under another scheme; each commit is recorded with what was listed just after it."""

    @hookimpl
    def storage_open(self, location: Any, key: str, mode: Any) -> Any:
        if location.scheme != "recorded":
            return None
        opened = files.storage_open(_local(location), key, mode)
        return opened if mode == "rb" else self._commit(opened, location, key)

    @contextlib.contextmanager
    def _commit(self, opened: Any, location: Any, key: str) -> Iterator[Any]:
        with opened as file:
            yield file
        listed = sorted(entry.key for entry in files.list_keys(_local(location), "") or [])
        with Path(os.environ["PGCLONE_RECORD"]).open("a") as log:
            log.write(json.dumps([key, listed]) + "\n")

    @hookimpl
    def list_keys(self, location: Any, prefix: str) -> Any:
        return files.list_keys(_local(location), prefix) if location.scheme == "recorded" else None

    @hookimpl
    def delete_key(self, location: Any, key: str) -> Any:
        return files.delete_key(_local(location), key) if location.scheme == "recorded" else None


def _local(location: Any) -> Any:
    return replace(location, scheme="", prefix=os.environ["PGCLONE_RECORD"] + ".stored/")


recording = Recording()


def test_the_manifest_is_committed_before_its_dump(project: Project, tmp_path: Path) -> None:
    project.environ["PGCLONE_RECORD"] = str(tmp_path / "commits")
    project.settings = {
        "PGCLONE_PLUGINS": ["tests.test_archive:recording"],
        "PGCLONE_STORAGE_LOCATION": "recorded://here",
    }
    key = project.dump()
    commits = [json.loads(line) for line in (tmp_path / "commits").read_text().splitlines()]
    assert commits == [
        [f"{key}.json", [f"{key}.json"]],
        [key, [key, f"{key}.json"]],
    ]


# The sweep


def test_what_dead_runs_left_is_swept_by_age(storage: Storage, folder: Path) -> None:
    old, new, whole = (KEY.replace("123456", f"{number:06}") for number in (1, 2, 3))
    foreign = "prod/reports/2020.dump.json"
    other_instance = KEY.replace("prod/", "staging/")
    for key in (f"{old}.json", f"{old}.parts/00001", f"{new}.json", whole, f"{whole}.json", foreign):
        stored.put(storage, key, b"")
    stored.put(storage, f"{other_instance}.json", b"")
    hour_ago = datetime.now().timestamp() - 3600
    for path in folder.rglob("*"):
        if not str(path).endswith(f"{new}.json"):
            os.utime(path, (hour_ago, hour_ago))
    archive.sweep(storage, "prod", timedelta(minutes=59))
    assert stored.keys(storage) == sorted([f"{new}.json", whole, f"{whole}.json", foreign, f"{other_instance}.json"])


def test_what_has_no_time_is_never_swept() -> None:
    class Timeless:
        @hookimpl
        def storage_open(self) -> None: ...

        @hookimpl
        def list_keys(self) -> Any:
            return iter([Entry(f"{KEY}.json", 1, None)])

        @hookimpl
        def delete_key(self, key: str) -> bool:
            raise AssertionError(f"{key} was swept.")

    archive.sweep(serve(Timeless(), "timeless://any"), "prod", timedelta(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda storage: list(archive.list_entries(storage)),
        lambda storage: archive.sweep(storage, "prod", timedelta(0)),
        lambda storage: archive.read_manifest(storage, KEY),
        lambda storage: archive.check_unmanifested(storage, KEY),
        lambda storage: archive.free_key(storage, keys.parse(KEY)),
    ],
    ids=["list_entries", "sweep", "read_manifest", "check_unmanifested", "free_key"],
)
def test_a_storage_that_cannot_be_listed_is_named(call: Any) -> None:
    class Gone:
        @hookimpl
        def storage_open(self) -> None: ...

        @hookimpl
        def list_keys(self) -> Any:
            def walk() -> Iterator[Entry]:
                raise ConnectionResetError(104, "Connection reset by peer")
                yield

            return walk()

        @hookimpl
        def delete_key(self) -> None: ...

    with pytest.raises(exceptions.StorageError, match=r"^gone://any cannot be listed: Connection reset by peer$"):
        call(serve(Gone(), "gone://any"))


class WriteOnly:
    """What credentials that may not delete look like."""

    def __init__(self, *keys: str) -> None:
        two_days_ago = datetime.now(timezone.utc) - timedelta(days=2)
        self.entries = [Entry(key, 1, two_days_ago) for key in keys]

    @hookimpl
    def storage_open(self) -> None: ...

    @hookimpl
    def list_keys(self) -> Any:
        return iter(self.entries)

    @hookimpl
    def delete_key(self) -> bool:
        raise PermissionError(13, "Permission denied")


def test_left_overs_that_cannot_be_deleted_are_told_once_and_stay(caplog: pytest.LogCaptureFixture) -> None:
    orphans = [f"{KEY}.json", PART, f"{KEY}.parts/00002"]
    archive.sweep(serve(WriteOnly(*orphans), "write://only"), "prod", timedelta(0))
    (record,) = caplog.records
    assert (record.levelname, vars(record)["event"]) == ("WARNING", "left_over_not_deleted")
    assert vars(record)["fields"] == {
        "key": f"{KEY}.json",
        "error": f'"{KEY}.json" in write://only could not be deleted: Permission denied',
        "count": 3,
    }


def test_a_left_over_that_cannot_be_deleted_does_not_save_the_others(storage: Storage, folder: Path) -> None:
    class Picky:
        storage_open, list_keys = staticmethod(files.storage_open), staticmethod(files.list_keys)

        @hookimpl
        def delete_key(self, location: Any, key: str) -> bool | None:
            if key == f"{KEY}.json":
                raise exceptions.StorageError("It is locked.", "Wait.")
            return files.delete_key(location, key)

    for key in (f"{KEY}.json", PART):
        stored.put(storage, key, b"")
    hour_ago = datetime.now().timestamp() - 3600
    for path in folder.rglob("*"):
        os.utime(path, (hour_ago, hour_ago))
    archive.sweep(serve(Picky(), str(folder)), "prod", timedelta(0))
    assert stored.keys(storage) == [f"{KEY}.json"]


class Undeletable:
    """Local files of a role that may write and not delete. One was left by a dead run."""

    storage_open = staticmethod(files.storage_open)

    @hookimpl
    def list_keys(self, location: Any, prefix: str) -> Any:
        return itertools.chain(files.list_keys(location, prefix) or (), WriteOnly(f"{KEY}.json", PART).entries)

    @hookimpl
    def delete_key(self) -> bool:
        raise PermissionError(13, "Permission denied")


UNDELETABLE = Undeletable()


def test_a_role_that_may_not_delete_dumps_and_is_told_what_stays(project: Project) -> None:
    done = project.call("dump", PGCLONE_PLUGINS=["tests.test_archive:UNDELETABLE"])
    assert done.status == 0
    assert done.err.splitlines()[0] == (
        f'Left-overs of dead runs that stay: 2. "{KEY}.json" in {project.dumps} could not be deleted: Permission denied'
    )
    assert len(project.stored()) == 2
