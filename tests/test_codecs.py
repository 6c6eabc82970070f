"""Codecs: what goes in comes out, damage is found, memory stays bounded."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgclone.api import Codec
from pgclone.plugins.zstd import codecs
from pgclone.testing.storage import noise

(zstd,) = codecs()

TEXT = b"".join(b"%d\tBook %d\t2020-01-31\t\\N\n" % (number, number * 7) for number in range(20_000))


def encode(codec: Codec, data: bytes, level: int | None = None, step: int = 65536) -> bytes:
    sink = io.BytesIO()
    with codec.compress(sink, codec.default_level if level is None else level) as encoder:
        for start in range(0, len(data), step):
            encoder.write(data[start : start + step])
    assert not sink.closed, "The sink belongs to the caller."
    return sink.getvalue()


def decode(codec: Codec, data: bytes, step: int = 65536) -> bytes:
    with codec.decompress(io.BufferedReader(io.BytesIO(data))) as decoder:  # type: ignore[arg-type]
        return b"".join(iter(lambda: decoder.read(step), b""))


@given(st.binary(max_size=10_000), st.integers(1, 5000))
@example(b"", 1)
@settings(max_examples=50, deadline=None)
def test_what_goes_in_comes_out(data: bytes, step: int) -> None:
    assert decode(zstd, encode(zstd, data, step=step), step) == data


@pytest.mark.parametrize("level", [-5, 1, 3, 19])
def test_levels(level: int) -> None:
    encoded = encode(zstd, TEXT, level)
    assert decode(zstd, encoded) == TEXT
    assert len(encoded) < len(TEXT) / 2


def test_the_stream_is_known_by_its_first_bytes() -> None:
    assert encode(zstd, b"").startswith(zstd.magic)
    assert encode(zstd, TEXT).startswith(zstd.magic)


def test_any_truncation_is_found() -> None:
    encoded = encode(zstd, TEXT)
    for length in {*range(0, 40), *range(40, len(encoded), 997), *range(len(encoded) - 40, len(encoded))}:
        with pytest.raises(Exception):  # noqa: B017  whatever the codec raises
            decode(zstd, encoded[:length])


def test_any_flipped_bit_is_found() -> None:
    encoded = encode(zstd, TEXT)
    for at in {*range(0, 40), *range(40, len(encoded), 997), *range(len(encoded) - 40, len(encoded))}:
        for bit in range(8):
            damaged = bytearray(encoded)
            damaged[at] ^= 1 << bit
            try:
                found = decode(zstd, bytes(damaged))
            except Exception:  # noqa: BLE001  whatever the codec raises
                continue
            assert found == TEXT, f"Bit {bit} of byte {at} went unnoticed."  # a bit that means nothing


def test_what_follows_the_stream_is_found() -> None:
    with pytest.raises(Exception):  # noqa: B017
        decode(zstd, encode(zstd, TEXT) + b"junk")


def test_an_exception_leaves_the_stream_unfinished() -> None:
    sink = io.BytesIO()
    with pytest.raises(ZeroDivisionError):
        with zstd.compress(sink, 3) as encoder:
            encoder.write(TEXT)
            raise ZeroDivisionError
    with pytest.raises(Exception):  # noqa: B017
        decode(zstd, sink.getvalue())


def test_memory_stays_bounded_while_300_MB_go_through_and_come_back() -> None:
    script = """
import hashlib, io, random, resource
from pgclone.plugins.zstd import codecs

def peak():  # unlike ru_maxrss, it does not begin with what the parent had
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024

(zstd,) = codecs()
block, digests = random.Random(1).randbytes(500_000) + bytes(500_000), []

class Pipe(io.RawIOBase):  # holds what one block becomes, as a storage does
    pending = b""
    def readable(self): return True
    def writable(self): return True
    def write(self, data):
        self.pending += bytes(data)
        return len(data)
    def readinto(self, buffer):
        while not self.pending and next(feed, None) is not None:
            pass
        count = min(len(buffer), len(self.pending))
        buffer[:count], self.pending = self.pending[:count], self.pending[count:]
        return count

def fill():
    with zstd.compress(pipe, 3) as encoder:
        for _ in range(300):
            sent.update(block)
            encoder.write(block)
            yield True

pipe, sent, found = Pipe(), hashlib.sha256(), hashlib.sha256()
feed = fill()
resource.setrlimit(resource.RLIMIT_AS, (2 * 1024**3, -1))
before, size = peak(), 0
with zstd.decompress(io.BufferedReader(pipe)) as decoder:
    while data := decoder.read(1 << 20):
        found.update(data)
        size += len(data)
print(size, sent.digest() == found.digest(), peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    size, equal, grown = done.stdout.split()
    assert (size, equal) == ("300000000", "True")
    assert int(grown) < 96


class Deflate:
    """A plugin's codec, in the few lines that it takes."""

    @staticmethod
    @contextlib.contextmanager
    def compress(sink: BinaryIO, level: int) -> Iterator[Any]:
        compressor = zlib.compressobj(level)

        class Writer:
            def write(self, data: bytes) -> int:
                sink.write(compressor.compress(data))
                return len(data)

        yield Writer()
        sink.write(compressor.flush())

    @staticmethod
    @contextlib.contextmanager
    def decompress(source: BinaryIO) -> Iterator[Any]:
        decompressor = zlib.decompressobj()

        class Reader:
            def read(self, size: int) -> bytes:
                while not decompressor.eof:
                    block = source.read(65536)
                    if not block:
                        raise EOFError("The stream ends early.")
                    if data := decompressor.decompress(block):
                        return data
                return b""

        yield Reader()


deflate = Codec("deflate", b"\x78", Deflate.compress, Deflate.decompress, default_level=6)
"""Reads return as much as they like, at most what was asked for or not: the core copes."""


def test_a_plugins_codec() -> None:
    encoded = encode(deflate, TEXT)
    assert decode(deflate, encoded) == TEXT
    assert encoded.startswith(deflate.magic)
    with pytest.raises(EOFError):
        decode(deflate, encoded[:-1])


def test_noise_does_not_grow() -> None:
    data = noise(1024 * 1024)
    assert len(encode(zstd, data)) < len(data) + 1024
