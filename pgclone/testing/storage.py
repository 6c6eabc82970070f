"""The contract of storage plugins, as tests. Subclass it, say where to store, and run pytest:

    import pgclone_mine
    import pytest
    from pgclone.testing.storage import StorageConformance

    class TestMine(StorageConformance):
        plugin = pgclone_mine

        @pytest.fixture
        def location(self, tmp_path):
            return f"mine://bucket/{tmp_path.name}/"

This module needs pytest; nothing else in pgclone imports it. With
`pytest.register_assert_rewrite("pgclone.testing.storage")` in your conftest.py, failures show what was compared.
"""

from __future__ import annotations

import contextlib
import gc
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from typing import Any, BinaryIO

import pluggy
import pytest

from pgclone import hookspecs
from pgclone.exceptions import KeyNotFound
from pgclone.host import Storage, validate
from pgclone.locations import parse_location
from pgclone.types import Entry, Location

MiB = 1024 * 1024

ODD_KEYS = (
    "prod/default/none/2026-01-31-10-20-30-123456.dump",
    "prod/default/none/2026-01-31-10-20-30-123456.dump.json",
    "prod/default/none/2026-01-31-10-20-30-123456.dump.parts/00001",
    "with space/and  two",
    "ünïcödé/日本語/🐘",
    "quotes'and\"more`$(x);&|",
    "100%/a%2Fb/%00",
    "plus+hash#question?key=value",
    "-dash/--flag",
    ".hidden/.file",
    "ends.with.partial",
    "~/tilde",
    "x" * 120,
)
"""What a plugin must take for a key, beside the plain ones."""


class Interrupted(BaseException):
    """What Ctrl-C looks like from inside a block: no `Exception`."""


class StorageConformance:
    """Every promise of `storage_open`, `list_keys` and `delete_key` (docs/hooks.md).

    Attributes:
        plugin: What is registered: a module, or an object with hook methods.
        big: Bytes of the big object. Make it span several parts if the storage uploads in parts.
        many: Keys of the long listing. Make it span several pages if the storage lists in pages.
    """

    plugin: Any = None
    big: int = 24 * MiB
    many: int = 50

    @pytest.fixture
    def location(self) -> str:
        """Override this: a location as in PGCLONE_STORAGE_LOCATION, new and empty for each test."""
        raise NotImplementedError("Override the fixture `location` with a storage location that is empty.")

    @pytest.fixture
    def storage(self, location: str) -> Storage:
        """The plugin at the location, as the core sees it."""
        return serve(self.plugin, location)

    # Whose location it is

    def test_locations_of_other_schemes_are_left_to_other_plugins(self, storage: Storage) -> None:
        foreign = Location("pgclone-foreign://bucket/dumps/", "pgclone-foreign", "bucket", "dumps/")
        assert storage.open(location=foreign, key="key", mode="rb", size_hint=None) is None
        assert storage.open(location=foreign, key="key", mode="wb", size_hint=None) is None
        assert storage.list(location=foreign, prefix="") is None
        assert storage.delete(location=foreign, key="key") is None

    def test_a_location_that_does_not_exist_yet_is_empty(self, storage: Storage) -> None:
        assert keys(storage) == []
        assert keys(storage, "prod/default/") == []
        assert storage.delete(location=storage.location, key="prod/key") is False
        with pytest.raises(KeyNotFound):
            get(storage, "prod/key")

    # Writing: all or nothing

    def test_what_was_written_is_read(self, storage: Storage) -> None:
        put(storage, "prod/key", b"bytes")
        assert get(storage, "prod/key") == b"bytes"
        assert keys(storage) == ["prod/key"]

    def test_nothing_is_visible_before_the_block_ends(self, storage: Storage) -> None:
        with writer(storage, "key") as file:
            write(file, bytes(2 * MiB))
            with contextlib.suppress(AttributeError):
                file.flush()
            assert keys(storage) == [], "A key was listed while it was still being written."
            with pytest.raises(KeyNotFound):
                get(storage, "key")
        assert keys(storage) == ["key"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Interrupted])
    def test_an_exception_discards_everything_and_passes(self, storage: Storage, error: type[BaseException]) -> None:
        with pytest.raises(error):
            with writer(storage, "prod/key") as file:
                write(file, bytes(2 * MiB))
                raise error
        assert keys(storage) == [], "A key was listed although its block ended with an exception."
        put(storage, "prod/key", b"second try")
        assert get(storage, "prod/key") == b"second try"

    def test_a_block_that_wrote_nothing_is_discarded_too(self, storage: Storage) -> None:
        with pytest.raises(ValueError):
            with writer(storage, "key"):
                raise ValueError
        assert keys(storage) == []

    def test_an_explicit_close_does_not_commit(self, storage: Storage) -> None:
        with pytest.raises(ValueError):
            with writer(storage, "key") as file:
                write(file, b"bytes")
                file.close()
                assert keys(storage) == [], "close() committed."
                raise ValueError
        assert keys(storage) == [], "A key was listed although its block ended with an exception."

    def test_a_writer_that_is_garbage_collected_does_not_commit(self, storage: Storage) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            block = writer(storage, "key")
            file = block.__enter__()
            write(file, bytes(2 * MiB))
            del file, block
            gc.collect()
        assert keys(storage) == [], "A writer that was garbage-collected committed."

    def test_a_commit_never_overwrites(self, storage: Storage) -> None:
        put(storage, "key", b"first")
        with pytest.raises(Exception):  # noqa: B017  which one is the plugin's choice
            put(storage, "key", b"second")
        assert get(storage, "key") == b"first"

    def test_a_commit_never_overwrites_what_was_committed_meanwhile(self, storage: Storage) -> None:
        with pytest.raises(Exception):  # noqa: B017
            with writer(storage, "key") as file:
                write(file, b"second")
                put(storage, "key", b"first")
        assert get(storage, "key") == b"first"

    def test_discarding_leaves_what_is_committed_alone(self, storage: Storage) -> None:
        put(storage, "key", b"first")
        with contextlib.suppress(Exception):
            with writer(storage, "key") as file:
                write(file, b"second")
                raise ValueError
        assert get(storage, "key") == b"first"

    def test_two_keys_are_written_at_once(self, storage: Storage) -> None:
        with writer(storage, "prod/one") as one:
            write(one, b"1")
            with writer(storage, "prod/two") as two:
                write(two, b"2")
                write(one, b"1")
                write(two, b"2")
            assert keys(storage) == ["prod/two"]
        assert (get(storage, "prod/one"), get(storage, "prod/two")) == (b"11", b"22")

    def test_threads_write_and_read_at_once(self, storage: Storage) -> None:
        contents = {f"prod/{number}": noise(MiB, number) for number in range(4)}
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda key: put(storage, key, contents[key]), contents))
            assert dict(zip(contents, pool.map(lambda key: get(storage, key), contents))) == contents

    # What is written

    def test_an_empty_object(self, storage: Storage) -> None:
        put(storage, "empty", b"")
        assert get(storage, "empty") == b""
        assert [(entry.key, entry.size) for entry in entries(storage)] == [("empty", 0)]

    def test_a_big_object(self, storage: Storage) -> None:
        data = noise(self.big)
        with writer(storage, "big", size_hint=len(data)) as file:
            with memoryview(data) as view:
                for start in range(0, len(view), 1_000_003):
                    write(file, view[start : start + 1_000_003])
        assert same(get(storage, "big"), data)
        assert [entry.size for entry in entries(storage)] == [self.big]

    @pytest.mark.parametrize("size_hint", [0, 1, 10**10])
    def test_the_size_hint_may_be_wrong(self, storage: Storage, size_hint: int) -> None:
        data = noise(MiB)
        put(storage, "key", data, size_hint=size_hint)
        assert same(get(storage, "key"), data)

    def test_many_small_writes(self, storage: Storage) -> None:
        data = noise(1000)
        with writer(storage, "key") as file:
            for start in range(0, len(data), 3):
                write(file, data[start : start + 3])
                write(file, b"")
        assert get(storage, "key") == data

    def test_the_buffer_of_a_write_may_be_reused(self, storage: Storage) -> None:
        buffer = bytearray(b"a" * MiB)
        with writer(storage, "key") as file:
            for letter in b"abc":
                buffer[:] = bytes([letter]) * MiB
                write(file, buffer)
            buffer[:] = b"z" * MiB
        assert same(get(storage, "key"), b"a" * MiB + b"b" * MiB + b"c" * MiB)

    @pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
    def test_odd_keys(self, storage: Storage, key: str) -> None:
        put(storage, key, key.encode())
        assert get(storage, key) == key.encode()
        assert keys(storage) == [key]
        assert keys(storage, key[:-1]) == [key]
        assert storage.delete(location=storage.location, key=key) is True
        assert keys(storage) == []

    # Reading

    def test_a_missing_key_raises_when_the_block_is_entered(self, storage: Storage) -> None:
        put(storage, "prod/key.json", b"")
        for missing in ("prod/key", "prod", "prod/key.json/x"):
            with pytest.raises(KeyNotFound):
                with reader(storage, missing):
                    raise AssertionError(f"There is no {missing}, and its block was entered.")

    def test_reads_give_at_most_what_was_asked_for_and_then_nothing(self, storage: Storage) -> None:
        data = noise(3000)
        put(storage, "key", data)
        with reader(storage, "key") as file:
            found = b""
            while block := file.read(7):
                assert len(block) <= 7
                found += block
            assert found == data
            assert file.read(7) == b""

    def test_two_readers_at_once(self, storage: Storage) -> None:
        data = noise(3000)
        put(storage, "key", data)
        with reader(storage, "key") as one, reader(storage, "key") as two:
            beginning = one.read(10)
            assert read(two) == data
            assert beginning + read(one) == data

    def test_a_reader_never_goes_on_in_another_object(self, storage: Storage) -> None:
        old, new = noise(4 * MiB, 1), noise(4 * MiB, 2)
        put(storage, "key", old)
        with reader(storage, "key") as file:
            found = file.read(1000)
            storage.delete(location=storage.location, key="key")
            put(storage, "key", new)
            try:
                found += read(file)
            except Exception:  # noqa: BLE001  an error is a good answer, other bytes are not
                return
        assert same(found, old)

    # Listing

    def test_a_prefix_is_a_plain_string(self, storage: Storage) -> None:
        for key in ("a/one", "a/two", "a/deep/er", "ab/three", "b"):
            put(storage, key, b"")
        found = {prefix: keys(storage, prefix) for prefix in ("", "a", "a/", "a/o", "ab/", "b", "b/x", "z", "A")}
        assert found == {
            "": ["a/deep/er", "a/one", "a/two", "ab/three", "b"],
            "a": ["a/deep/er", "a/one", "a/two", "ab/three"],
            "a/": ["a/deep/er", "a/one", "a/two"],
            "a/o": ["a/one"],
            "ab/": ["ab/three"],
            "b": ["b"],
            "b/x": [],
            "z": [],
            "A": [],
        }

    def test_every_key_is_listed_once(self, storage: Storage) -> None:
        written = [f"prod/{number % 7}/{number:05}" for number in range(self.many)]
        for key in written:
            put(storage, key, b"")
        assert keys(storage) == sorted(written)

    def test_entries_have_sizes_and_times(self, storage: Storage) -> None:
        put(storage, "key", bytes(12345))
        (entry,) = entries(storage)
        assert isinstance(entry, Entry)
        assert entry.size == 12345
        if entry.modified is not None:  # without one, left-overs are never swept
            assert entry.modified.tzinfo is not None, "Entry.modified must be aware."
            assert abs(datetime.now(timezone.utc) - entry.modified) < timedelta(minutes=15)

    def test_a_listing_is_made_when_it_is_iterated(self, storage: Storage) -> None:
        listing = storage.list(location=storage.location, prefix="")
        put(storage, "key", b"")
        assert [entry.key for entry in listing] == ["key"], "list_keys must be lazy."

    # Deleting

    def test_deleting(self, storage: Storage) -> None:
        for key in ("key", "key.json", "key.parts/00001"):
            put(storage, key, b"bytes")
        assert storage.delete(location=storage.location, key="key") is True
        assert keys(storage) == ["key.json", "key.parts/00001"]
        with pytest.raises(KeyNotFound):
            get(storage, "key")

    def test_deleting_what_is_not_there(self, storage: Storage) -> None:
        put(storage, "prod/key", b"bytes")
        for missing in ("prod/other", "prod", "prod/key/x", "elsewhere/key"):
            assert storage.delete(location=storage.location, key=missing) is False
        assert keys(storage) == ["prod/key"]

    def test_a_deleted_key_can_be_written_again(self, storage: Storage) -> None:
        put(storage, "key", b"first")
        storage.delete(location=storage.location, key="key")
        put(storage, "key", b"second")
        assert get(storage, "key") == b"second"


def serve(plugin: Any, url: str) -> Storage:
    """A plugin at a location, checked and called as the core does.

    Raises:
        PluginError: It breaks a rule that can be seen without calling it.
    """
    manager = pluggy.PluginManager("pgclone")
    manager.add_hookspecs(hookspecs)
    validate(manager, plugin, "plugin")
    manager.register(plugin, "plugin")
    manager.check_pending()
    hook = manager.hook
    return Storage(parse_location(url), hook.storage_open, hook.list_keys, hook.delete_key)


def writer(storage: Storage, key: str, size_hint: int | None = None) -> AbstractContextManager[BinaryIO]:
    opened: AbstractContextManager[BinaryIO] = storage.open(
        location=storage.location, key=key, mode="wb", size_hint=size_hint
    )
    return opened


def reader(storage: Storage, key: str) -> AbstractContextManager[BinaryIO]:
    opened: AbstractContextManager[BinaryIO] = storage.open(
        location=storage.location, key=key, mode="rb", size_hint=None
    )
    return opened


def put(storage: Storage, key: str, data: bytes, size_hint: int | None = None) -> None:
    with writer(storage, key, size_hint) as file:
        write(file, data)


def get(storage: Storage, key: str) -> bytes:
    with reader(storage, key) as file:
        return read(file)


def write(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write all of it, as the core does: in views that are gone afterwards, and short writes are no error."""
    with memoryview(data) as view:
        sent = 0
        while sent < len(view):
            with view[sent:] as rest:
                count = file.write(rest)
            sent += len(view) - sent if count is None else count


def read(file: BinaryIO) -> bytes:
    return b"".join(iter(lambda: file.read(MiB), b""))


def entries(storage: Storage, prefix: str = "") -> list[Entry]:
    return list(storage.list(location=storage.location, prefix=prefix))


def keys(storage: Storage, prefix: str = "") -> list[str]:
    return sorted(entry.key for entry in entries(storage, prefix))


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def same(found: bytes, wanted: bytes) -> bool:
    """Whether two long objects are the same: pytest takes minutes to say how they differ."""
    return found == wanted
