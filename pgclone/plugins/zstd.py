"""The default codec: Zstandard, compressing beside the stream that it reads, on two cores where there are two."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

from pgclone.api import Codec, hookimpl

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878, 3.1.1
_LEVEL = 2  # 2 % larger than level 3 on rows of COPY, for three quarters of its time


@hookimpl
def codecs() -> list[Codec]:
    lowest, highest = zstd.CompressionParameter.compression_level.bounds()
    return [Codec("zstd", _MAGIC, _compress, _decompress, _LEVEL, range(lowest, highest + 1))]


class _Writer:
    def __init__(self, sink: BinaryIO, compressor: zstd.ZstdCompressor) -> None:
        self._sink = sink
        self._compressor = compressor

    def write(self, data: bytes) -> int:
        if block := self._compressor.compress(data):
            self._sink.write(block)
        return len(data)


@contextlib.contextmanager
def _compress(sink: BinaryIO, level: int) -> Iterator[BinaryIO]:
    parameter = zstd.CompressionParameter
    workers = min(2, os.cpu_count() or 1)  # several streams are open at once, and each worker takes 20 MiB
    options: dict[int, int] = {parameter.compression_level: level, parameter.checksum_flag: 1}
    compressor = zstd.ZstdCompressor(options={**options, parameter.nb_workers: workers if workers > 1 else 0})
    yield cast(BinaryIO, _Writer(sink, compressor))
    sink.write(compressor.flush())


@contextlib.contextmanager
def _decompress(source: BinaryIO) -> Iterator[BinaryIO]:
    with zstd.ZstdFile(source, "rb") as reader:
        yield cast(BinaryIO, reader)
