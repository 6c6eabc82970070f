"""What killed processes leave in a bucket: pending uploads, removed later, and only ours."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pgclone.testing.proxy import Answer, Proxy
from pgclone.testing.storage import MiB, keys, noise, put
from tests.faults import wait_until

DATA = noise(12 * MiB)

KILLED = """
import os, signal
from django.conf import settings
settings.configure(**{settings!r})
from pgclone.testing.storage import MiB, noise, serve, write, writer
import pgclone_s3
with writer(serve(pgclone_s3, {location!r}), "killed", 1) as file:
    write(file, noise(12 * MiB))
    print("written", flush=True)
    signal.pause()
"""


def kill_a_writer(s3: Any) -> None:
    """A process dies in the middle of an upload, when some of its parts have been stored."""
    script = KILLED.format(settings=s3.configuration(part_size=5), location=s3.location)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as stdout:
        assert stdout.readline() == b"written\n"
    wait_until(lambda: len(parts(s3, "killed")) == 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def parts(s3: Any, key: str) -> list[int]:
    """The sizes of the stored parts of a pending upload."""
    client, where = s3.server.client(), {"Bucket": s3.server.bucket, "Key": s3.prefix + key}
    found = client.list_multipart_uploads(Bucket=s3.server.bucket, Prefix=s3.prefix + key)
    (upload,) = found["Uploads"]
    return [part["Size"] for part in client.list_parts(**where, UploadId=upload["UploadId"]).get("Parts", [])]


@pytest.fixture
def foreign(s3: Any) -> Iterator[list[str]]:
    """Uploads of another program below the same location, and ours of another location."""
    client = s3.server.client()
    begun = []
    for key, sizes in (("prod/big", [5 * MiB, 5 * MiB]), ("prod/empty", []), ("small", [1000])):
        where = {"Bucket": s3.server.bucket, "Key": s3.prefix + key}
        where["UploadId"] = client.create_multipart_upload(**where)["UploadId"]
        for number, size in enumerate(sizes, 1):
            client.upload_part(**where, PartNumber=number, Body=bytes(size))
        begun.append(where)
    yield sorted(where["Key"].removeprefix(s3.prefix) for where in begun)
    for where in begun:
        client.abort_multipart_upload(**where)


def test_an_upload_of_a_killed_process_is_removed_by_a_later_one(s3: Any, settings: Any, foreign: list[str]) -> None:
    kill_a_writer(s3)
    assert (s3.objects(), sorted(s3.uploads())) == ({}, sorted([*foreign, "killed"]))

    put(s3.use(part_size=5), "young", DATA, 1)
    assert sorted(s3.uploads()) == sorted([*foreign, "killed"])  # it may be alive, for all that can be seen from here

    settings.PGCLONE_SWEEP_AFTER = 0
    put(s3.use(part_size=5), "old", DATA, 1)
    assert sorted(s3.uploads()) == foreign
    assert keys(s3.use()) == ["old", "young"]


def test_an_upload_of_another_location_is_left_to_that_one(s3: Any, settings: Any) -> None:
    kill_a_writer(s3)
    settings.PGCLONE_SWEEP_AFTER = 0
    theirs, s3.prefix = s3.prefix, f"{s3.prefix}below/"
    put(s3.use(part_size=5), "key", DATA, 1)
    s3.prefix = theirs
    assert s3.uploads() == ["killed"]


def test_what_is_removed_is_told(s3: Any, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    kill_a_writer(s3)
    settings.PGCLONE_SWEEP_AFTER = 0
    with caplog.at_level(logging.INFO, "pgclone"):
        put(s3.use(part_size=5), "key", DATA, 1)
    assert f"left_over_deleted key='{s3.prefix}killed'" in caplog.text


def test_no_dump_fails_because_left_overs_cannot_be_removed(
    s3: Any, between: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    between.inject(Answer(403, b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>"), r"GET .*\?uploads")
    with caplog.at_level(logging.WARNING, "pgclone"):
        put(s3.use(url=between.url, part_size=5), "key", DATA, 1)
    assert s3.objects() == {"key": len(DATA)}
    assert "left_overs_not_removed" in caplog.text
    assert "s3:ListBucketMultipartUploads" in caplog.text
