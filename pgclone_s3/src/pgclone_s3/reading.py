"""Reading an object: ranges in parallel, all of one version."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from botocore.exceptions import BotoCoreError, ClientError

from pgclone.api import Location, RangeReader, StorageError
from pgclone_s3 import errors
from pgclone_s3.bucket import Bucket, open_bucket

MiB = 1024 * 1024
RANGE = 8 * MiB
_BLOCK = MiB
_ATTEMPTS = 6
"""How often a range is taken up again where its connection broke; botocore repeats requests that were not answered."""


@contextlib.contextmanager
def read(location: Location, key: str) -> Iterator[BinaryIO]:
    """The block of `storage_open(…, "rb")`."""
    with errors.explained(location, key):
        found = _Object(open_bucket(location), key)
    width = 2 * found.bucket.settings.concurrency  # a range costs this machine less than a part
    with (
        contextlib.closing(found),
        RangeReader(found.fetch, found.size, range_size=RANGE, width=width) as file,
    ):
        yield cast(BinaryIO, file)


class _Object:
    """One version of an object. Opening it asks for its first range, which says how long it is and what its version is."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket, self._key = bucket, key
        self._where = bucket.where(key)
        self._closed = False
        self._first: Any = None
        self.size = 0
        try:
            answer = bucket.client.get_object(**self._where, Range=f"bytes=0-{RANGE - 1}")
        except ClientError as error:
            if errors.code(error) != "InvalidRange":  # an object without any bytes
                raise
        else:
            errors.require_etag(answer, bucket.location)
            self._first = answer["Body"]
            self._version = answer["ETag"]
            whole = answer.get("ContentRange", "").rpartition("/")[2]
            self.size = int(whole) if whole.isdigit() else answer["ContentLength"]

    def close(self) -> None:
        self._closed = True
        if self._first is not None:
            self._first.close()

    def fetch(self, start: int, stop: int) -> bytearray:
        """Those bytes, taken up where a connection broke."""
        data = bytearray(stop - start)
        got = 0
        with errors.explained(self.bucket.location, self._key), memoryview(data) as view:
            for attempt in range(_ATTEMPTS):
                with contextlib.closing(self._open(start + got, stop)) as body:
                    try:
                        while count := body.readinto(view[got : got + _BLOCK]):
                            got += count
                        if got == len(data):
                            body.read(1)  # at the end, botocore compares the checksum, if there is one
                            return data
                    except (BotoCoreError, OSError):
                        if self._closed or attempt == _ATTEMPTS - 1:
                            raise
                        if got == len(data):  # all of it, and wrong
                            got = 0
                time.sleep(random.uniform(0, min(2**attempt / 4, 5)))
        raise StorageError(f'"{self._key}" in {self.bucket.location} ends after {start + got} of {self.size} bytes.')

    def _open(self, start: int, stop: int) -> Any:
        if start == 0 and self._first is not None:
            first, self._first = self._first, None
            return first
        where = {**self._where, "Range": f"bytes={start}-{stop - 1}", "IfMatch": self._version}
        answer = self.bucket.client.get_object(**where)
        if not answer.get("ContentRange", "").startswith(f"bytes {start}-{stop - 1}/"):
            answer["Body"].close()
            raise StorageError(
                f"{self.bucket.location} does not answer with the bytes of an object that are asked for.",
                "Look at proxies on the way, and at what the service knows of Range.",
            )
        return answer["Body"]
