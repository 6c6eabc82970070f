"""Reading an object: ranges in parallel, all of one generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

from google.api_core.exceptions import NotFound, PreconditionFailed

from pgclone.api import Location, RangeReader, StorageError
from pgclone_gcs import errors
from pgclone_gcs.bucket import open_bucket

MiB = 1024 * 1024
RANGE = 8 * MiB


@contextlib.contextmanager
def read(location: Location, key: str) -> Iterator[BinaryIO]:
    """The block of `storage_open(…, "rb")`."""
    with (
        contextlib.closing(_Object(location, key)) as found,
        RangeReader(found.fetch, found.size, range_size=RANGE, width=found.bucket.settings.concurrency) as file,
    ):
        yield cast(BinaryIO, file)


class _Object:
    """One generation of an object. Opening it asks which one, and how long it is."""

    def __init__(self, location: Location, key: str) -> None:
        self.bucket, self._key = open_bucket(location), key
        self._path = self.bucket.path(key)
        self._closed = False
        with errors.explained(location, key, "storage.objects.get"):
            blob = self.bucket.handle.blob(self._path)
            blob.reload(**self.bucket.calls())
        self.size, self._generation = int(blob.size), int(blob.generation)

    def close(self) -> None:
        self._closed = True

    def fetch(self, start: int, stop: int) -> bytes:
        """Those bytes as they are stored. The SDK asks again for a range that broke off."""
        blob = self.bucket.handle.blob(self._path, generation=self._generation)
        pieces: list[bytes] = []
        with errors.explained(self.bucket.location, self._key, "storage.objects.get"):
            try:
                blob.download_to_file(
                    SimpleNamespace(write=pieces.append),
                    start=start,
                    end=stop - 1,
                    raw_download=True,
                    single_shot_download=True,
                    checksum=None,  # the service has none of a range
                    **self.bucket.calls(self._before_next_try),
                )
            except (NotFound, PreconditionFailed) as error:
                raise self._changed() from error
        if blob.generation is not None and int(blob.generation) != self._generation:  # what the answer says it is of
            raise self._changed()
        return b"".join(pieces)

    def _before_next_try(self, error: Any) -> None:
        with contextlib.suppress(AttributeError, *errors.FAILURES):
            _ = error.response.content  # or the SDK leaves its connection to the garbage collector
        if self._closed:  # nobody waits for the range any more
            raise error

    def _changed(self) -> StorageError:
        return StorageError(
            f'"{self._key}" in {self.bucket.location} was deleted or written anew while it was read.', "Try again."
        )
