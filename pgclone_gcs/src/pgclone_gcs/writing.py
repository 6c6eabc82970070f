"""Writing an object: a resumable upload, of which nothing is visible before it is committed.

smart_open's writer sends chunk after chunk on one connection. It is fed from a thread of its own, so that the next chunk is
filled while one is on its way.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from google.cloud.storage.exceptions import DataCorruption
from smart_open import gcs

from pgclone.api import Location, Part, PartWriter, StorageError
from pgclone_gcs import errors
from pgclone_gcs.bucket import Bucket, open_bucket
from pgclone_gcs.session import UploadSession

MiB = 1024 * 1024
_TOKEN = "pgclone-upload"


@contextlib.contextmanager
def write(location: Location, key: str, size_hint: int | None) -> Iterator[BinaryIO]:
    """The block of `storage_open(…, "wb")`."""
    bucket = open_bucket(location)
    upload = _Upload(bucket, key)
    file = PartWriter(upload.send, part_size=bucket.settings.chunk_size * MiB, width=1)
    try:
        yield cast(BinaryIO, file)
        if file.closed:
            raise StorageError(f'"{key}" in {location} was closed before it was complete.')
        file.finish()
        upload.commit()
    except BaseException:
        upload.give_up()
        try:
            file.release()
        finally:
            upload.discard()
        raise
    file.release()


class _Upload:
    """An object on its way. `send` is called by one thread at a time."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        settings = bucket.settings
        self._bucket, self._key = bucket, key
        self._token = secrets.token_hex(16)
        self._size = 0
        self._session = UploadSession(bucket.service.credentials, f'"{key}" in {bucket.location}')
        properties = {
            "metadata": {_TOKEN: self._token},
            "storage_class": settings.storage_class,
            "kms_key_name": settings.kms_key,
        }
        self._file: Any = gcs.open(
            bucket.location.bucket,
            bucket.path(key),
            "wb",
            min_part_size=settings.chunk_size * MiB,
            client=bucket.service.client_of(bucket.service.prepare(self._session)),
            blob_properties={name: value for name, value in properties.items() if value},
            blob_open_kwargs={
                "if_generation_match": 0,
                "predefined_acl": settings.acl,
                "checksum": "crc32c",
                **bucket.calls(),
            },
        )

    def send(self, part: Part) -> None:
        """Send a chunk; the last one waits for `commit`.

        The writer keeps a copy, and sends it with the byte that completes it. By then the part must not take memory as well.
        """
        self._size += part.size
        with errors.explained(self._bucket.location, self._key, "storage.objects.create"):
            with part.getbuffer() as view:
                self._file.write(view[:-1])
                last = bytes(view[-1:])
            part.truncate(0)
            self._file.write(last)

    def commit(self) -> None:
        """Make the object visible, unless there is one under its name already."""
        with errors.explained(self._bucket.location, self._key, "storage.objects.create"):
            if self._bucket.service.is_emulator and self._find() is not None:  # they overlook the condition
                raise errors.exists(self._bucket.location, self._key)
            self._session.may_commit = True
            try:
                self._file.close()
            except DataCorruption:
                self._withdraw()
                raise
            except errors.FAILURES:
                # Of a commit whose answer was lost, the second try is refused because of the first.
                if not self._is_committed():
                    raise

    def give_up(self) -> None:
        """Stop what is being sent."""
        self._session.given_up.set()

    def discard(self) -> None:
        """Discard what was sent."""
        self._file.terminate()

    def _find(self) -> Any:
        return self._bucket.handle.get_blob(self._bucket.path(self._key), **self._bucket.calls())

    def _is_committed(self) -> bool:
        with contextlib.suppress(*errors.FAILURES):
            found = self._find()
            return found is not None and self._is_ours(found) and found.size == self._size
        return False

    def _is_ours(self, blob: Any) -> bool:
        return bool((blob.metadata or {}).get(_TOKEN) == self._token)

    def _withdraw(self) -> None:
        """Delete the object that came to be with other bytes than those that were sent. Only emulators let that happen."""
        found = self._find()
        if found is not None and self._is_ours(found):
            found.delete(if_generation_match=found.generation, **self._bucket.calls())
