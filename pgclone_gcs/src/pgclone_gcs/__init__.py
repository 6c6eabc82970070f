"""Dumps in Google Cloud Storage: `PGCLONE_STORAGE_LOCATION = "gs://bucket/prefix/"`.

Every pgclone command loads this module, so the SDK of Google is imported when a bucket is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Literal

from pgclone.api import Entry, Location, hookimpl


@hookimpl
def storage_open(
    location: Location, key: str, mode: Literal["rb", "wb"], size_hint: int | None
) -> AbstractContextManager[BinaryIO] | None:
    if location.scheme != "gs":
        return None
    from pgclone_gcs import reading, writing

    return reading.read(location, key) if mode == "rb" else writing.write(location, key, size_hint)


@hookimpl
def list_keys(location: Location, prefix: str) -> Iterable[Entry] | None:
    if location.scheme != "gs":
        return None
    from pgclone_gcs import listing

    return listing.walk(location, prefix)


@hookimpl
def delete_key(location: Location, key: str) -> bool | None:
    if location.scheme != "gs":
        return None
    from pgclone_gcs import listing

    return listing.delete(location, key)


@hookimpl
def check_settings(settings: Any) -> list[Any]:
    from pgclone_gcs import checks

    return checks.check(settings)
