"""Streams between a dump and its storage: short reads and writes, digests, codecs, and whose error it was."""

from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgclone import exceptions
from pgclone.host import Storage
from pgclone.locations import parse_location
from pgclone.plugins import files
from pgclone.plugins.zstd import codecs
from pgclone.streams import BLOCK, Digest, encode, open_source, store
from pgclone.testing.storage import get, keys, noise, put, serve
from pgclone.types import Codec
from tests.test_codecs import TEXT, deflate

(zstd,) = codecs()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return serve(files, str(tmp_path))


def dump(storage: Storage, data: bytes, codec: Codec | None) -> Digest:
    with store(storage, "key", len(data)) as stored:
        with encode(stored, codec, codec.default_level if codec else 0) as sink:
            for start in range(0, len(data), 100_000):
                sink.write(data[start : start + 100_000])
        assert sink.raw_size == len(data)
    return stored.digest


def restore(storage: Storage, codec: Codec | None) -> tuple[bytes, Digest]:
    with open_source(storage, "key", lambda head: codec) as source:
        data = b"".join(iter(source.read, b""))
        assert source.raw_size == len(data)
        return data, source.drain()


CODECS = pytest.mark.parametrize("codec", [None, zstd, deflate], ids=["none", "zstd", "a plugin's"])


@CODECS
def test_a_dump_comes_back_with_the_same_digest(storage: Storage, codec: Codec | None) -> None:
    digest = dump(storage, TEXT, codec)
    assert restore(storage, codec) == (TEXT, digest)


@CODECS
def test_the_digest_is_that_of_the_stored_bytes(storage: Storage, codec: Codec | None) -> None:
    stored = get(storage, "key") if dump(storage, TEXT, codec) else b""
    assert dump_digest(stored) == restore(storage, codec)[1]


def dump_digest(stored: bytes) -> Digest:
    return Digest(len(stored), hashlib.sha256(stored).hexdigest())


@CODECS
def test_an_empty_dump(storage: Storage, codec: Codec | None) -> None:
    digest = dump(storage, b"", codec)
    assert restore(storage, codec) == (b"", digest)


def test_the_codec_is_found_by_the_first_bytes_and_they_are_not_lost(storage: Storage) -> None:
    dump(storage, TEXT, zstd)
    heads = []
    with open_source(storage, "key", lambda head: heads.append(head) or zstd) as source:  # type: ignore[func-returns-value]
        assert source.codec is zstd
        assert source.read(10) == TEXT[:10]
    assert heads[0].startswith(zstd.magic)


def test_what_stands_behind_the_codecs_stream_counts_as_damage(storage: Storage) -> None:
    dump(storage, TEXT, None)
    digest = dump_digest(TEXT + b"junk")
    storage.delete(location=storage.location, key="key")
    put(storage, "key", TEXT + b"junk")
    assert restore(storage, None)[1] == digest != dump_digest(TEXT)


def test_drain_reads_what_a_codec_leaves_over(storage: Storage) -> None:
    dump(storage, TEXT, deflate)
    encoded = get(storage, "key")
    storage.delete(location=storage.location, key="key")
    put(storage, "key", encoded + noise(5_000_000))
    found, digest = restore(storage, deflate)
    assert (found, digest.size) == (TEXT, len(encoded) + 5_000_000)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:5000] + b"?" + data[5001:]])
def test_damage_is_named_with_the_key(storage: Storage, damage: Callable[[bytes], bytes]) -> None:
    dump(storage, TEXT, zstd)
    damaged = damage(get(storage, "key"))
    storage.delete(location=storage.location, key="key")
    put(storage, "key", damaged)
    with pytest.raises(exceptions.CorruptDump, match=r'^The dump "key" is damaged after \d+ bytes: '):
        restore(storage, zstd)


def test_nothing_is_committed_when_the_dump_fails(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError):
        with store(storage, "key") as stored, encode(stored, zstd, 3) as sink:
            sink.write(TEXT)
            raise ZeroDivisionError
    assert keys(storage) == []


def test_the_codec_is_finished_before_the_storage_commits(storage: Storage) -> None:
    with store(storage, "key") as stored:
        with encode(stored, zstd, 3) as sink:
            sink.write(TEXT)
        assert keys(storage) == []
        complete = stored.digest
    assert dump_digest(get(storage, "key")) == complete


@pytest.mark.parametrize("where", ["begin", "write", "end"])
def test_a_codec_that_fails_is_named_and_commits_nothing(storage: Storage, where: str) -> None:
    @contextlib.contextmanager
    def compress(sink: Any, level: int) -> Iterator[Any]:
        fail("begin")
        yield Writer()
        fail("end")

    class Writer:
        def write(self, data: bytes) -> None:
            fail("write")

    def fail(now: str) -> None:
        if now == where:
            raise MemoryError("no room")

    broken = Codec("broken", b"", compress, deflate.decompress)
    with pytest.raises(exceptions.PluginError, match=r'The codec "broken" failed: no room'):
        dump(storage, TEXT, broken)
    assert keys(storage) == []


# Storage plugins as they come


class Raw:
    """A storage that opens one file, whatever the key."""

    def __init__(self, file: Any, *, leave: Callable[[], None] = lambda: None, swallow: bool = False) -> None:
        self.file, self.leave, self.swallow = file, leave, swallow
        self.storage = Storage(parse_location("raw://any"), self.open, self.list, self.list)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def open(self, **_: Any) -> Iterator[Any]:
        with contextlib.suppress(ZeroDivisionError) if self.swallow else contextlib.nullcontext():
            yield self.file
            self.leave()

    def list(self, **_: Any) -> None:
        raise AssertionError("Streams do not list.")


class Short(io.RawIOBase):
    """Writes and reads at most 7 bytes at a time."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)

    def write(self, data: Any) -> int:
        self.content += bytes(data[:7])
        return min(7, len(data))

    def read(self, size: int = -1) -> bytes:
        found = bytes(self.content[: min(7, size)])
        del self.content[: len(found)]
        return found


@CODECS
def test_short_reads_and_writes(codec: Codec | None) -> None:
    data = TEXT[:50_000]
    raw = Short()
    digest = dump(Raw(raw).storage, data, codec)
    assert dump_digest(bytes(raw.content)) == digest
    assert restore(Raw(raw).storage, codec) == (data, digest)


def test_a_writer_that_does_not_say_how_much_it_wrote_wrote_all() -> None:
    class Silent:
        content = b""

        def write(self, data: Any) -> None:
            self.content += bytes(data)

    raw = Silent()
    assert dump(Raw(raw).storage, TEXT, None) == dump_digest(raw.content) == dump_digest(TEXT)


def test_a_writer_that_writes_nothing_is_an_error_and_no_endless_loop() -> None:
    class Stuck(Short):
        def write(self, data: Any) -> int:
            return 0

    with pytest.raises(exceptions.StorageError, match='"key" in raw://any could not be written: it takes no bytes'):
        dump(Raw(Stuck()).storage, TEXT, None)


class Failing(io.BytesIO):
    """Works for a while, longer than anybody reads ahead; then the network is gone."""

    def write(self, data: Any) -> int:
        raise ConnectionResetError(104, "Connection reset by peer")

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 2 * BLOCK:
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().read(min(size or 0, 65536))


@CODECS
def test_an_error_of_the_storage_is_no_damage_of_the_dump(storage: Storage, codec: Codec | None) -> None:
    dump(storage, noise(3 * BLOCK), codec)
    with pytest.raises(
        exceptions.StorageError, match=r'^"key" in raw://any could not be read: Connection reset by peer$'
    ):
        restore(Raw(Failing(get(storage, "key"))).storage, codec)


def test_a_codec_that_takes_an_error_of_the_storage_for_damage_is_not_believed(storage: Storage) -> None:
    @contextlib.contextmanager
    def decompress(source: Any) -> Iterator[Any]:
        class Reader:
            def read(self, size: int) -> bytes:
                try:
                    return bytes(source.read(size))
                except Exception:  # noqa: BLE001
                    raise EOFError("The stream ends early.") from None

        yield Reader()

    codec = Codec("suspicious", b"", deflate.compress, decompress)
    with pytest.raises(exceptions.StorageError, match="could not be read: Connection reset by peer"):
        restore(Raw(Failing(bytes(3 * BLOCK))).storage, codec)


@CODECS
def test_an_error_in_a_write_names_key_and_location(codec: Codec | None) -> None:
    with pytest.raises(exceptions.StorageError, match=r'^"key" in raw://any could not be written: Connection reset'):
        dump(Raw(Failing()).storage, TEXT, codec)


def test_an_error_in_a_commit_names_key_and_location() -> None:
    def leave() -> None:
        raise TimeoutError

    with pytest.raises(exceptions.StorageError, match=r'^"key" in raw://any could not be written: TimeoutError$'):
        dump(Raw(Short(), leave=leave).storage, b"", None)


def test_a_storage_that_hides_the_dumps_exception_is_found_out() -> None:
    with pytest.raises(exceptions.PluginError, match="The storage of raw://any hides exceptions"):
        with store(Raw(Short(), swallow=True).storage, "key"):
            raise ZeroDivisionError


def test_an_error_while_discarding_names_key_and_location_and_what_it_was_discarded_for() -> None:
    class Undiscardable(Raw):
        @contextlib.contextmanager
        def open(self, **_: Any) -> Iterator[Any]:
            try:
                yield self.file
            finally:
                raise PermissionError(13, "Permission denied")

    with pytest.raises(exceptions.StorageError) as caught:
        with store(Undiscardable(Short()).storage, "key"):
            raise exceptions.ToolFailed("pg_dump failed.", "See why.")
    assert str(caught.value).splitlines() == [
        '"key" in raw://any could not be discarded: Permission denied',
        "That was tried because of this: pg_dump failed.",
        "See why.",
    ]


def test_errors_with_cause_and_remedy_pass_as_they_are() -> None:
    denied = exceptions.StorageError("Access to the bucket is denied.", "Grant s3:PutObject.")

    class Denied(Short):
        def write(self, data: Any) -> int:
            raise denied

    with pytest.raises(exceptions.StorageError) as caught:
        dump(Raw(Denied()).storage, TEXT, zstd)
    assert caught.value is denied


def test_a_stream_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    script = """
import sys
from pgclone.plugins import files
from pgclone.plugins.zstd import codecs
from pgclone.streams import encode, open_source, store
from pgclone.testing.storage import noise, serve

def peak():  # unlike ru_maxrss, it does not begin with what the parent had
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024

storage, (zstd,), block = serve(files, sys.argv[1]), codecs(), noise(1 << 20)
before = peak()
with store(storage, "key") as stored, encode(stored, zstd, 3) as sink:
    for _ in range(300):
        sink.write(block)
with open_source(storage, "key", lambda head: zstd) as source:
    while source.read():
        pass
    print(sink.raw_size, source.raw_size, source.drain() == stored.digest, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    written, read, equal, grown = done.stdout.split()
    assert (written, read, equal) == (str(300 << 20), str(300 << 20), "True")
    assert int(grown) < 96
