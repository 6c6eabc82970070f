"""The clients that object_storage.py measures: `storage_clients.py s3 write s3://bucket/key < data`."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

MiB = 1024 * 1024


def s3(url: str, mode: str) -> AbstractContextManager[BinaryIO]:
    """This project's plugin."""
    import pgclone_s3

    return plugin(pgclone_s3, url, mode)


def gcs(url: str, mode: str) -> AbstractContextManager[BinaryIO]:
    """This project's plugin."""
    import pgclone_gcs

    return plugin(pgclone_gcs, url, mode)


def plugin(module: Any, url: str, mode: str) -> AbstractContextManager[BinaryIO]:
    from django.conf import settings

    from pgclone.locations import parse_location

    settings.configure()
    folder, _, key = url.rpartition("/")
    hint = 512 * MiB if mode == "wb" else None
    return module.storage_open(location=parse_location(folder), key=key, mode=mode, size_hint=hint)


def smart_open(url: str, mode: str) -> AbstractContextManager[BinaryIO]:
    """Plain smart_open, with its defaults."""
    import boto3
    import smart_open

    return smart_open.open(url, mode, transport_params={"client": boto3.client("s3")}, compression="disable")


def google(url: str, mode: str) -> AbstractContextManager[BinaryIO]:
    """google-cloud-storage by itself, with its defaults."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    bucket, _, key = url.removeprefix("gs://").partition("/")
    client = storage.Client(project="bench", credentials=AnonymousCredentials())
    return client.bucket(bucket).blob(key).open(mode)


def main() -> None:
    name, direction, url = sys.argv[1:]
    mode = {"write": "wb", "read": "rb"}[direction]
    with globals()[name](url, mode) as file:
        if direction == "write":
            with os.fdopen(0, "rb", buffering=0) as source:
                shutil.copyfileobj(source, file, MiB)
        else:
            with os.fdopen(1, "wb", buffering=0) as sink:
                while block := file.read(MiB):
                    rest = memoryview(block)
                    while rest:
                        rest = rest[sink.write(rest) :]


if __name__ == "__main__":
    main()
