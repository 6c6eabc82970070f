"""Streams between a dump and its storage: storage, digest and codec, composed in one ExitStack.

The digest covers the stored bytes, so that `sha256sum` of the stored object is what the manifest says.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from pgclone import exceptions
from pgclone.host import Storage
from pgclone.types import Codec

BLOCK = 1024 * 1024
"""Bytes that a stream moves at a time."""


@dataclass(frozen=True)
class Digest:
    """What a stored stream is known by: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


class Stored(io.RawIOBase):
    """Hands on what is read or written, counts it and digests it. Short reads and writes of storage plugins end here."""

    def __init__(self, raw: Any, storage: Storage, key: str) -> None:
        self._raw = raw
        self._where = f'"{key}" in {storage.location}'
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.failure: exceptions.PgcloneError | None = None

    @property
    def digest(self) -> Digest:
        return Digest(self.size, self._sha256.hexdigest())

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer):
            data = self._storage_call("read", self._raw.read, len(buffer) - filled)
            if not data:
                break
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        self._sha256.update(buffer[:filled])
        self.size += filled
        return filled

    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as view:
            sent = 0
            while sent < len(view):
                count = self._storage_call("written", self._raw.write, view[sent:])
                if count == 0:  # it would be asked forever
                    self.failure = exceptions.StorageError(f"{self._where} could not be written: it takes no bytes.")
                    raise self.failure
                sent += len(view) - sent if count is None else count
            self._sha256.update(view)
            self.size += len(view)
            return len(view)

    def _storage_call(self, verb: str, call: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return call(argument)
        except exceptions.PgcloneError as error:
            self.failure = error
            raise
        except Exception as error:  # whatever a storage plugin raises; codecs on top must not take it for damage
            self.failure = exceptions.StorageError(f"{self._where} could not be {verb}: {_words(error)}")
            raise self.failure from error


class Sink:
    """A dump on its way to storage: raw bytes go in, encoded ones out."""

    def __init__(self, encoder: BinaryIO, codec: Codec | None = None) -> None:
        self._encoder = encoder
        self._codec = codec
        self.raw_size = 0

    def write(self, block: bytes) -> None:
        try:
            self._encoder.write(block)
        except exceptions.PgcloneError:
            raise
        except Exception as error:
            raise _codec_failed(self._codec, error) from error
        self.raw_size += len(block)


class Source:
    """A dump on its way from storage: encoded bytes come in, raw ones out."""

    def __init__(self, decoder: BinaryIO, stored: Stored, key: str, codec: Codec | None) -> None:
        self._decoder = decoder
        self._stored = stored
        self._key = key
        self.codec = codec
        self.raw_size = 0

    def read(self, size: int = BLOCK) -> bytes:
        """Up to `size` raw bytes; none at the end.

        Raises:
            CorruptDump: The codec cannot make sense of the bytes, or they end too early.
            StorageError: The storage failed.
        """
        try:
            block = self._decoder.read(size)
        except Exception as error:
            if self._stored.failure is not None:
                raise self._stored.failure from error
            raise exceptions.CorruptDump(
                f'The dump "{self._key}" is damaged after {self.raw_size} bytes: {_words(error)}',
                "Nothing was swapped in. Restore another dump.",
            ) from error
        self.raw_size += len(block)
        return block

    def drain(self) -> Digest:
        """Read what the codec left over, and return what the storage holds."""
        while self.read(BLOCK):
            pass
        buffer = bytearray(BLOCK)
        while self._stored.readinto(buffer):
            pass
        return self._stored.digest


@contextlib.contextmanager
def store(storage: Storage, key: str, size_hint: int | None = None) -> Iterator[Stored]:
    """Write the bytes of `key`. A clean end of the block commits them, an exception discards them."""
    with _opened(storage, key, "wb", size_hint) as raw:
        yield Stored(raw, storage, key)


@contextlib.contextmanager
def encode(stored: Stored, codec: Codec | None, level: int) -> Iterator[Sink]:
    """Compress into what is stored. A clean end of the block finishes the codec, and commits nothing."""
    if codec is None:
        yield Sink(cast(BinaryIO, stored))
        return
    entered = left = False
    try:
        with codec.compress(cast(BinaryIO, stored), level) as encoder:
            entered = True
            yield Sink(encoder, codec)
            left = True
    except exceptions.PgcloneError:
        raise
    except Exception as error:
        if entered and not left:  # the dump's own
            raise
        raise _codec_failed(codec, error) from error


@contextlib.contextmanager
def open_source(storage: Storage, key: str, find_codec: Callable[[bytes], Codec | None]) -> Iterator[Source]:
    """Read the dump `key`. `find_codec` is shown the first bytes and says how they are encoded."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(_opened(storage, key, "rb", None))
        stored = Stored(raw, storage, key)
        buffered = io.BufferedReader(stored, BLOCK)
        codec = find_codec(buffered.peek(16)[:16])
        decoder = stack.enter_context(codec.decompress(buffered)) if codec else buffered
        yield Source(decoder, stored, key, codec)


@contextlib.contextmanager
def _opened(storage: Storage, key: str, mode: str, size_hint: int | None) -> Iterator[BinaryIO]:
    """The storage's block, with what opening, committing and discarding raise in this project's words."""
    own: BaseException | None = None
    try:
        opened = storage.open(location=storage.location, key=key, mode=mode, size_hint=size_hint)
        if opened is None:
            raise exceptions.PluginError(f"The plugin that lists {storage.location} does not open keys in it.")
        with opened as raw:
            try:
                yield raw
            except BaseException as error:
                own = error
                raise
        if own is not None:  # the storage swallowed the exception that should have discarded everything
            raise exceptions.PluginError(
                f"The storage of {storage.location} hides exceptions: its block must let them pass."
            )
    except Exception as error:
        if error is own:
            raise
        if own is not None and not isinstance(own, Exception):  # Ctrl-C stays that, whatever went wrong because of it
            raise own from error
        if isinstance(error, exceptions.PgcloneError):
            raise
        verb = "opened" if mode == "rb" else "written" if own is None else "discarded"
        raise exceptions.StorageError(
            f'"{key}" in {storage.location} could not be {verb}: {_words(error)}',
            f"That was tried because of this: {_words(own)}" if own else "",
        ) from error


def _codec_failed(codec: Codec | None, error: Exception) -> exceptions.PluginError:
    return exceptions.PluginError(f'The codec "{codec.name if codec else "none"}" failed: {_words(error)}')


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
