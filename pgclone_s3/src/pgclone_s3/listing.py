"""What is in a location: listed page by page, deleted one by one."""

from __future__ import annotations

from collections.abc import Iterator

from pgclone.api import Entry, Location
from pgclone_s3 import errors
from pgclone_s3.bucket import open_bucket


def walk(location: Location, prefix: str) -> Iterator[Entry]:
    """The objects below a prefix, in pages of 1,000. Folders, which some tools make, are none."""
    bucket = open_bucket(location)
    with errors.explained(location):
        pages = bucket.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket.name, Prefix=bucket.path(prefix), **bucket.payer):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    yield Entry(item["Key"].removeprefix(location.prefix), item["Size"], item["LastModified"])


def delete(location: Location, key: str) -> bool:
    """Delete an object. S3 says yes to deleting what is not there, so it is looked for."""
    bucket = open_bucket(location)
    with errors.explained(location, key):
        found = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix=bucket.path(key), MaxKeys=1, **bucket.payer)
        if [item["Key"] for item in found.get("Contents", [])] != [bucket.path(key)]:
            return False
        bucket.client.delete_object(**bucket.where(key))
    return True
