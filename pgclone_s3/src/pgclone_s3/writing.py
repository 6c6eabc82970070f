"""Writing an object: parts in parallel, nothing visible before they are committed.

An object that fits into one part is put whole. A larger one is a multipart upload: its parts cost money until it is completed
or aborted, so every way out of the block does one of the two; what a killed process leaves, `leftovers` removes.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast
from urllib.parse import urlencode

from botocore.exceptions import BotoCoreError, ClientError

from pgclone.api import Location, Part, PartWriter, StorageError, log
from pgclone_s3 import errors, leftovers
from pgclone_s3.bucket import Bucket, open_bucket

MiB = 1024 * 1024
PARTS = 10_000
"""How many parts an upload may have (Amazon S3 user guide, multipart upload limits)."""
_UNKNOWN = 64 * MiB
_PATIENCE_SECONDS = 15
_TOKEN = "pgclone-upload"


@contextlib.contextmanager
def write(location: Location, key: str, size_hint: int | None) -> Iterator[BinaryIO]:
    """The block of `storage_open(…, "wb")`."""
    upload = _Upload(open_bucket(location), key)
    size = part_size(upload.bucket.settings.part_size * MiB, size_hint)
    file = PartWriter(upload.send, begin=upload.begin, part_size=size, width=upload.bucket.settings.concurrency)
    try:
        yield cast(BinaryIO, file)
        if file.closed:
            raise StorageError(f'"{key}" in {location} was closed before it was complete.')
        if file.launched:
            upload.complete(file.finish())
        else:
            upload.put(file.rest())
    except BaseException:
        try:
            file.release()
        finally:
            upload.abort()
        raise
    file.release()


def part_size(least: int, size_hint: int | None) -> int:
    """Bytes of a part, so that 10,000 of them hold half as much again as the hint.

    One size for all but the last part, as some services insist. It ends in a mark by which `leftovers` knows our uploads.
    """
    wanted = _UNKNOWN if size_hint is None else math.ceil(1.5 * size_hint / PARTS)
    return math.ceil(max(least, wanted) / MiB) * MiB + leftovers.MARK


class _Upload:
    """An object on its way. `send` is called by several threads."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket, self._key = bucket, key
        self._client = bucket.client
        self._where = bucket.where(key)
        self._token = secrets.token_hex(16)
        self._id: str | None = None

    def begin(self) -> None:
        """Begin a multipart upload."""
        leftovers.remove(self.bucket)
        with errors.explained(self.bucket.location, self._key):
            about = {**self._properties(), **self._checksum}
            self._id = self._client.create_multipart_upload(**self._where, **about)["UploadId"]

    def send(self, part: Part) -> dict[str, Any]:
        if part.number > PARTS:
            raise StorageError(
                f'"{self._key}" in {self.bucket.location} is larger than {PARTS} parts can hold.',
                f'Set PGCLONE_S3 = {{"part_size": …}} to more than {self.bucket.settings.part_size} (MiB).',
            )
        about = {"UploadId": self._id, "PartNumber": part.number, "ContentLength": part.size, **self._checksum}
        with errors.explained(self.bucket.location, self._key):
            answer = self._client.upload_part(**self._where, **about, Body=part)
        checksums = {
            name: value for name, value in answer.items() if name.startswith("Checksum") and name != "ChecksumType"
        }
        return {"PartNumber": part.number, "ETag": answer["ETag"], **checksums}

    def complete(self, parts: list[dict[str, Any]]) -> None:
        """Commit what was sent."""
        arguments = {**self._where, "UploadId": self._id, "MultipartUpload": {"Parts": parts}}
        self._commit(lambda condition: self._client.complete_multipart_upload(**arguments, **condition))
        self._id = None

    def put(self, part: Part) -> None:
        """Commit an object of one part."""

        def put(condition: dict[str, str]) -> Any:
            part.seek(0)
            size = {"Body": part, "ContentLength": part.size}
            return self._client.put_object(**self._where, **self._properties(), **size, **condition)

        self._commit(put)

    def abort(self) -> None:
        """Discard what was sent. Where that takes too long, for who pressed Ctrl-C as the network is gone, it is left."""
        if self._id is None:
            return
        aborting = threading.Thread(target=self._abort, name="pgclone-abort", daemon=True)
        try:
            aborting.start()
        except RuntimeError:  # the system has no more threads
            self._abort()
            return
        aborting.join(_PATIENCE_SECONDS)
        if aborting.is_alive():
            self._tell_left("the service does not answer")

    def _abort(self) -> None:
        try:
            with (
                errors.explained(self.bucket.location, self._key),
                contextlib.suppress(self._client.exceptions.NoSuchUpload),
            ):
                self._client.abort_multipart_upload(**self._where, UploadId=self._id)
        except StorageError as error:
            self._tell_left(error.cause)

    def _tell_left(self, reason: str) -> None:
        log.warning("upload_left", object=f'"{self._key}" in {self.bucket.location}', error=reason)

    def _commit(self, commit: Callable[[dict[str, str]], Any]) -> None:
        """Commit, unless there is something under the key already."""
        with errors.explained(self.bucket.location, self._key):
            try:
                try:
                    answer = commit({"IfNoneMatch": "*"})
                except ClientError as error:
                    if errors.code(error) not in ("NotImplemented", "501"):
                        raise
                    self._require_free()  # the service knows no conditions: the best that is left
                    answer = commit({})
                errors.require_etag(answer, self.bucket.location)
            except (ClientError, BotoCoreError) as error:
                if not (_may_be_ours(error) and self._is_committed()):
                    raise

    def _is_committed(self) -> bool:
        with contextlib.suppress(ClientError, BotoCoreError):
            found = self._client.head_object(**self._where)
            return bool(found["Metadata"].get(_TOKEN) == self._token)
        return False

    def _require_free(self) -> None:
        try:
            self._client.head_object(**self._where)
        except ClientError as error:
            if errors.code(error) in ("404", "NoSuchKey", "NotFound"):
                return
            raise
        raise errors.exists(self.bucket.location, self._key)

    @property
    def _checksum(self) -> dict[str, str]:
        """What botocore sends with each part by itself, and an upload has to be begun with."""
        wanted = self._client.meta.config.request_checksum_calculation == "when_supported"
        return {"ChecksumAlgorithm": "CRC32"} if wanted else {}

    def _properties(self) -> dict[str, Any]:
        settings = self.bucket.settings
        wanted = {
            "ServerSideEncryption": settings.sse or ("aws:kms" if settings.kms_key else None),
            "SSEKMSKeyId": settings.kms_key,
            "StorageClass": settings.storage_class,
            "ACL": settings.acl,
            "Tagging": urlencode(settings.tags) if settings.tags else None,
        }
        return {"Metadata": {_TOKEN: self._token}, **{name: value for name, value in wanted.items() if value}}


def _may_be_ours(error: Exception) -> bool:
    """Whether a commit that failed may have been done: of one whose answer was lost, the next try is refused."""
    if not isinstance(error, ClientError):
        return True
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or errors.code(error) in (
        "PreconditionFailed",
        "412",
        "NoSuchUpload",
        "ConditionalRequestConflict",
    )
