"""What is in a location: listed page by page, deleted one by one."""

from __future__ import annotations

from collections.abc import Iterator

from google.api_core.exceptions import NotFound

from pgclone.api import Entry, Location
from pgclone_gcs import errors
from pgclone_gcs.bucket import open_bucket

PAGE = 1000


def walk(location: Location, prefix: str) -> Iterator[Entry]:
    """The objects below a prefix, page by page. Folders, which some tools make, are none."""
    bucket = open_bucket(location)
    with errors.explained(location, action="storage.objects.list"):
        for blob in bucket.service.client.list_blobs(
            bucket.handle,
            prefix=bucket.path(prefix),
            page_size=PAGE,
            fields="items(name,size,updated),nextPageToken",
            **bucket.calls(),
        ):
            if not blob.name.endswith("/"):
                yield Entry(blob.name.removeprefix(location.prefix), blob.size, blob.updated)


def delete(location: Location, key: str) -> bool:
    """Delete an object. One that is gone when the answer to a first try was lost, was deleted by that."""
    bucket = open_bucket(location)
    tries: list[Exception] = []
    with errors.explained(location, key, "storage.objects.delete"):
        try:
            bucket.handle.blob(bucket.path(key)).delete(**bucket.calls(tries.append))
        except NotFound as error:
            if errors.is_about_the_bucket(error):
                raise
            return bool(tries)
    return True
