"""The conformance suite on the built-in storage and on a stranger's; and on broken ones, which it must find out."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pgclone.api import Entry, KeyNotFound, Location, PluginError, StorageError, hookimpl
from pgclone.plugins import files
from pgclone.testing.storage import StorageConformance, noise, serve

sys.path.append(str(Path(__file__).parent / "plugins" / "pgclone-memo" / "src"))
import pgclone_memo


class TestFiles(StorageConformance):
    plugin = files

    @pytest.fixture
    def location(self, tmp_path: Path) -> str:
        return str(tmp_path / "dumps")


class TestMemo(StorageConformance):
    plugin = pgclone_memo

    @pytest.fixture
    def location(self, tmp_path: Path, settings: Any) -> str:
        settings.PGCLONE_MEMO_FOLDER = str(tmp_path)
        return "memo://shelf/some/prefix/"


class Shelf:
    """A storage in memory that keeps its promises. Its children break one each."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    @hookimpl
    def storage_open(self, location: Location, key: str, mode: str) -> Any:
        if location.scheme != "shelf":
            return None
        return self.read(key) if mode == "rb" else self.write(key)

    @hookimpl
    def list_keys(self, location: Location, prefix: str) -> Any:
        return self.walk(prefix) if location.scheme == "shelf" else None

    @hookimpl
    def delete_key(self, location: Location, key: str) -> bool | None:
        if location.scheme != "shelf":
            return None
        return self.objects.pop(key, None) is not None

    @contextlib.contextmanager
    def read(self, key: str) -> Iterator[BinaryIO]:
        if key not in self.objects:
            raise KeyNotFound(f"There is no {key}.")
        yield io.BytesIO(self.objects[key])

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        yield file
        self.commit(key, file.getvalue())

    def commit(self, key: str, data: bytes) -> None:
        if key in self.objects:
            raise StorageError(f"{key} exists.")
        self.objects[key] = data

    def walk(self, prefix: str) -> Iterator[Entry]:
        for key, data in [*self.objects.items()]:
            if key.startswith(prefix):
                yield Entry(key, len(data))


class Greedy(Shelf):
    @hookimpl
    def delete_key(self, key: str) -> bool | None:
        return self.objects.pop(key, None) is not None


class Absent(Shelf):
    def walk(self, prefix: str) -> Iterator[Entry]:
        if not self.objects:
            raise StorageError("There is no such shelf.")
        return super().walk(prefix)


class Early(Shelf):
    """Visible from the first byte."""

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        self.commit(key, b"")
        try:
            with super().write(key) as file:
                yield file
                del self.objects[key]
        except BaseException:
            self.objects.pop(key, None)
            raise


class Persistent(Shelf):
    """Commits whatever happens, as a `finally` does."""

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        try:
            yield file
        finally:
            self.commit(key, file.getvalue())


class Uninterrupted(Shelf):
    """Knows only `Exception`."""

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        try:
            yield file
        except Exception:
            file.truncate(0)
            raise
        finally:
            if file.getvalue():
                self.commit(key, file.getvalue())


class Swallowing(Shelf):
    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        with contextlib.suppress(ValueError), super().write(key) as file:
            yield file


class Closing(Shelf):
    """Commits on close(), as smart_open's writers do."""

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        shelf = self

        class File(io.BytesIO):
            def close(self) -> None:
                shelf.commit(key, self.getvalue())
                super().close()

        file = File()
        try:
            yield file
            file.close()
        except BaseException:
            self.objects.pop(key, None)
            raise


class Collected(Shelf):
    """Commits when the block is garbage-collected."""

    def write(self, key: str) -> Any:
        shelf = self

        class Block:
            file: BinaryIO | None = None

            def __enter__(self) -> BinaryIO:
                self.file = io.BytesIO()
                return self.file

            def __exit__(self, kind: object, *_: object) -> None:
                file, self.file = self.file, None
                if kind is None:
                    shelf.commit(key, file.getvalue())  # type: ignore[union-attr]

            def __del__(self) -> None:
                if self.file is not None:
                    shelf.commit(key, self.file.getvalue())  # type: ignore[attr-defined]

        return Block()


class Overwriting(Shelf):
    def commit(self, key: str, data: bytes) -> None:
        self.objects[key] = data


class Checking(Overwriting):
    """Looks whether the key is free before it writes, and not again."""

    def write(self, key: str) -> Any:
        if key in self.objects:
            raise StorageError(f"{key} exists.")
        return super().write(key)


class Clearing(Shelf):
    """Makes room for what it is about to write."""

    def write(self, key: str) -> Any:
        self.objects.pop(key, None)
        return super().write(key)


class Single(Shelf):
    """One buffer for all writers."""

    buffer = io.BytesIO()

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        yield self.buffer
        self.commit(key, self.buffer.getvalue())


class Skipping(Shelf):
    """Stores no empty objects."""

    def commit(self, key: str, data: bytes) -> None:
        if data:
            super().commit(key, data)


class Limited(Shelf):
    def commit(self, key: str, data: bytes) -> None:
        super().commit(key, data[: 20 * 1024 * 1024])


class Keeping(Shelf):
    """Keeps the caller's buffers instead of what is in them."""

    @contextlib.contextmanager
    def write(self, key: str) -> Iterator[BinaryIO]:
        blocks = []

        class File(io.RawIOBase):
            def write(self, data: Any) -> int:
                blocks.append(memoryview(data.obj) if data.obj.__class__ is bytearray else bytes(data))
                return len(data)

        yield File()  # type: ignore[misc]
        self.commit(key, b"".join(blocks))


class Quoting(Shelf):
    def commit(self, key: str, data: bytes) -> None:
        super().commit(key.replace("%2F", "/"), data)


class Late(Shelf):
    """Finds out that a key is missing when it is read."""

    @contextlib.contextmanager
    def read(self, key: str) -> Iterator[BinaryIO]:
        yield io.BytesIO(self.objects.get(key, b""))


class Unending(Shelf):
    """Reads what it likes."""

    @contextlib.contextmanager
    def read(self, key: str) -> Iterator[BinaryIO]:
        with super().read(key) as whole:

            class File(io.BytesIO):
                def read(self, size: int | None = -1) -> bytes:
                    return super().read(max(size or 0, 4096))

            yield File(whole.read())


class Splicing(Shelf):
    """Reads each range from whatever is there."""

    @contextlib.contextmanager
    def read(self, key: str) -> Iterator[BinaryIO]:
        with super().read(key):
            pass
        shelf = self

        class File(io.RawIOBase):
            at = 0

            def read(self, size: int = -1) -> bytes:
                block = shelf.objects[key][self.at : self.at + size]
                self.at += len(block)
                return block

        yield File()  # type: ignore[misc]


class Segmented(Shelf):
    """Takes a prefix for a folder."""

    def walk(self, prefix: str) -> Iterator[Entry]:
        return (
            entry for entry in super().walk("") if not prefix or f"{entry.key}/".startswith(prefix.rstrip("/") + "/")
        )


class FirstPage(Shelf):
    def walk(self, prefix: str) -> Iterator[Entry]:
        return (entry for number, entry in enumerate(super().walk(prefix)) if number < 40)


class Sizeless(Shelf):
    def walk(self, prefix: str) -> Iterator[Entry]:
        return (Entry(entry.key) for entry in super().walk(prefix))


class Eager(Shelf):
    def walk(self, prefix: str) -> Any:
        return list(super().walk(prefix))


class Sweeping(Shelf):
    """Deletes what belongs to a key along with it."""

    @hookimpl
    def delete_key(self, location: Location, key: str) -> bool | None:
        if location.scheme != "shelf":
            return None
        return bool([self.objects.pop(name) for name in [*self.objects] if name.startswith(key)])


class Tombstones(Shelf):
    """Remembers what was deleted, and lets nobody write it again."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted: set[str] = set()

    @hookimpl
    def delete_key(self, location: Location, key: str) -> bool | None:
        self.deleted.add(key)
        return super().delete_key(location, key)

    def commit(self, key: str, data: bytes) -> None:
        if key in self.deleted:
            raise StorageError(f"{key} was deleted.")
        super().commit(key, data)


suite = StorageConformance
FOUND_BY: dict[type[Shelf], Callable[..., None]] = {
    Greedy: suite.test_locations_of_other_schemes_are_left_to_other_plugins,
    Absent: suite.test_a_location_that_does_not_exist_yet_is_empty,
    Early: suite.test_nothing_is_visible_before_the_block_ends,
    Persistent: lambda self, storage: suite.test_an_exception_discards_everything_and_passes(self, storage, ValueError),
    Uninterrupted: lambda self, storage: suite.test_an_exception_discards_everything_and_passes(
        self, storage, KeyboardInterrupt
    ),
    Swallowing: suite.test_a_block_that_wrote_nothing_is_discarded_too,
    Closing: suite.test_an_explicit_close_does_not_commit,
    Collected: suite.test_a_writer_that_is_garbage_collected_does_not_commit,
    Overwriting: suite.test_a_commit_never_overwrites,
    Checking: suite.test_a_commit_never_overwrites_what_was_committed_meanwhile,
    Clearing: suite.test_discarding_leaves_what_is_committed_alone,
    Single: suite.test_two_keys_are_written_at_once,
    Skipping: suite.test_an_empty_object,
    Limited: suite.test_a_big_object,
    Keeping: suite.test_the_buffer_of_a_write_may_be_reused,
    Quoting: lambda self, storage: suite.test_odd_keys(self, storage, "100%/a%2Fb"),
    Late: suite.test_a_missing_key_raises_when_the_block_is_entered,
    Unending: suite.test_reads_give_at_most_what_was_asked_for_and_then_nothing,
    Splicing: suite.test_a_reader_never_goes_on_in_another_object,
    Segmented: suite.test_a_prefix_is_a_plain_string,
    FirstPage: suite.test_every_key_is_listed_once,
    Sizeless: suite.test_entries_have_sizes_and_times,
    Eager: suite.test_a_listing_is_made_when_it_is_iterated,
    Sweeping: suite.test_deleting,
    Tombstones: suite.test_a_deleted_key_can_be_written_again,
}


class TestShelf(StorageConformance):
    """What is broken below works otherwise."""

    @pytest.fixture
    def location(self) -> str:
        self.plugin = Shelf()
        return "shelf://any"


@pytest.mark.parametrize("broken", FOUND_BY, ids=lambda broken: broken.__name__)
def test_the_suite_finds_a_broken_promise(broken: type[Shelf]) -> None:
    storage = serve(broken(), "shelf://any")
    with pytest.raises((AssertionError, KeyNotFound, StorageError, pytest.fail.Exception)):
        FOUND_BY[broken](suite(), storage)


def test_the_suite_refuses_what_the_host_refuses() -> None:
    class Half:
        list_keys = Shelf.list_keys

    with pytest.raises(PluginError, match="a storage needs all of storage_open, list_keys, delete_key"):
        serve(Half(), "shelf://any")


def test_noise_is_the_same_for_everyone() -> None:
    assert noise(8) == noise(8) != noise(8, 1)
