"""Pending multipart uploads of processes that were killed: their parts cost money, and no listing of objects shows them.

S3 lists pending uploads without the metadata they were begun with, and another program's may be under the same prefix. So
the parts themselves are the mark: a whole part of ours ends at an odd number of bytes, which no other program's does.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from pgclone.api import StorageError, log, option
from pgclone_s3 import errors
from pgclone_s3.bucket import Bucket

MARK = 271_828
"""The size of our parts, modulo MiB."""


def remove(bucket: Bucket) -> None:
    """Abort uploads of ours below the location that began more than `PGCLONE_SWEEP_AFTER` seconds ago.

    An upload that has no whole part yet cannot be told from another program's, and costs nothing: it stays. What goes wrong
    is logged: no dump fails for it.
    """
    limit = datetime.now(timezone.utc) - timedelta(seconds=option("sweep_after"))
    try:
        with errors.explained(bucket.location):
            _abort_older(bucket, limit)
    except StorageError as error:
        log.warning("left_overs_not_removed", location=str(bucket.location), error=str(error))


def _abort_older(bucket: Bucket, limit: datetime) -> None:
    pages = bucket.client.get_paginator("list_multipart_uploads")
    for page in pages.paginate(Bucket=bucket.name, Prefix=bucket.location.prefix, **bucket.payer):
        for upload in page.get("Uploads", []):
            where = {"Bucket": bucket.name, "Key": upload["Key"], "UploadId": upload["UploadId"], **bucket.payer}
            if upload["Initiated"] < limit and _is_ours(bucket, where):
                bucket.client.abort_multipart_upload(**where)
                log.info("left_over_deleted", key=upload["Key"])


def _is_ours(bucket: Bucket, where: dict[str, Any]) -> bool:
    """Whether it has parts, whole ones of one marked size, and no other size but that of the last."""
    pages = bucket.client.get_paginator("list_parts").paginate(**where)
    sizes = [part["Size"] for page in pages for part in page.get("Parts", [])]
    whole = max(sizes, default=0)
    return whole % (1024 * 1024) == MARK and len({*sizes}) <= 2
