"""Writing to S3: all or nothing, whatever breaks, and nothing left that costs money."""

from __future__ import annotations

import gc
import logging
import re
import threading
from typing import Any

import pytest

from pgclone.exceptions import StorageError, Terminated
from pgclone.testing.proxy import Answer, LoseAnswer, Proxy, ResetRequest, Stall
from pgclone.testing.storage import MiB, get, keys, noise, put, same, write, writer
from pgclone.transfer import shared_budget
from pgclone_s3 import leftovers
from pgclone_s3.bucket import open_bucket
from pgclone_s3.writing import PARTS, part_size
from tests.faults import wait_until

DATA = noise(12 * MiB)
HINT = len(DATA)
"""Three parts of the smallest size, where the size is known; what is not gets larger parts."""

SLOW_DOWN = Answer(503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")
NOT_IMPLEMENTED = Answer(501, b"<Error><Code>NotImplemented</Code><Message>If-None-Match</Message></Error>")

COMPLETE = r"POST .*uploadId="
PART = r"PUT .*partNumber="
ABORT = r"DELETE .*uploadId="


def methods(between: Proxy) -> list[str]:
    """The requests, without what only they have."""
    return [
        f"{request.method} {re.sub(r'=[^&]+', '', request.target.partition('?')[2])}" for request in between.requests
    ]


# Requests


@pytest.mark.parametrize("size", [0, 1, 5 * MiB])
def test_an_object_that_fits_into_one_part_is_one_request(size: int, s3: Any, between: Proxy) -> None:
    put(s3.use(url=between.url, part_size=5), "key", DATA[:size], HINT)
    assert [request.method for request in between.requests] == ["PUT"]
    assert s3.objects() == {"key": size}


def test_a_large_object_is_sent_in_parts_of_one_size(s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5)
    put(storage, "key", DATA, HINT)
    kinds = methods(between)
    assert kinds[0].startswith("GET uploads")  # left-overs
    assert kinds[1] == "POST uploads"
    assert sorted(kinds[2:5]) == [kinds[2]] * 3
    assert "partNumber" in kinds[2]
    assert (len(kinds), kinds[5]) == (6, "POST uploadId")
    assert same(get(storage, "key"), DATA)


@pytest.mark.parametrize("hint", [None, 0, 1, 10**9, 10**11, 10**12, 5 * 10**12, 48 * 10**12])
@pytest.mark.parametrize("least", [5 * MiB, 16 * MiB, 64 * MiB])
def test_ten_thousand_parts_hold_what_was_hinted(least: int, hint: int | None) -> None:
    size = part_size(least, hint)
    assert size * PARTS >= 1.5 * (hint or 0)
    assert least <= size <= max(2 * least, 65 * MiB, 2 * 1.5 * (hint or 0) / PARTS)
    assert size % MiB == leftovers.MARK
    assert size <= 5 << 30 or (hint or 0) > 30 * 10**12  # what S3 takes for a part


def test_more_parts_than_there_may_be_are_an_error_that_says_what_to_set(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgclone_s3.writing.PARTS", 2)
    with pytest.raises(StorageError, match=r"(?s)larger than 2 parts can hold.*part_size.*more than 5 \(MiB\)"):
        put(s3.use(part_size=5), "key", DATA, 1)
    assert (s3.objects(), s3.uploads()) == ({}, [])


# Discarding


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Terminated])
def test_an_exception_leaves_no_upload(error: type[BaseException], s3: Any) -> None:
    with pytest.raises(error):
        with writer(s3.use(part_size=5), "key", HINT) as file:
            write(file, DATA)
            assert s3.uploads() == ["key"]
            raise error
    assert (s3.objects(), s3.uploads()) == ({}, [])


def test_a_writer_that_is_garbage_collected_leaves_no_upload(s3: Any) -> None:
    block = writer(s3.use(part_size=5), "key", HINT)
    file = block.__enter__()
    write(file, DATA)
    del block, file
    gc.collect()
    assert (s3.objects(), s3.uploads()) == ({}, [])


def test_a_closed_writer_commits_nothing_at_the_end_of_its_block(s3: Any) -> None:
    with pytest.raises(StorageError, match="closed before it was complete"):
        with writer(s3.use(part_size=5), "key", HINT) as file:
            write(file, DATA)
            file.close()
    assert (s3.objects(), s3.uploads()) == ({}, [])


def test_an_upload_that_cannot_be_aborted_is_logged_and_the_error_that_counts_is_raised(
    s3: Any, between: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    storage = s3.use(url=between.url, part_size=5)
    between.inject(Answer(403, b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>"), ABORT)
    with caplog.at_level(logging.WARNING, "pgclone"), pytest.raises(ValueError, match="mine"):
        with writer(storage, "key", HINT) as file:
            write(file, DATA)
            raise ValueError("mine")
    assert "upload_left" in caplog.text
    assert s3.uploads() == ["key"]
    s3.server.client().abort_multipart_upload(
        Bucket=s3.server.bucket,
        Key=f"{s3.prefix}key",
        UploadId=s3.server.client().list_multipart_uploads(Bucket=s3.server.bucket, Prefix=s3.prefix)["Uploads"][0][
            "UploadId"
        ],
    )


# Committing


@pytest.mark.parametrize(("size", "request_"), [(1, r"PUT /"), (len(DATA), COMPLETE)], ids=["small", "large"])
def test_a_commit_whose_answer_is_lost_is_recognised(size: int, request_: str, s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5)
    between.inject(LoseAnswer(), request_ if size > 1 else r"PUT [^?]*$")
    put(storage, "key", DATA[:size], HINT)
    assert same(get(s3.use(), "key"), DATA[:size])
    assert s3.uploads() == []


@pytest.mark.parametrize("size", [1, len(DATA)], ids=["small", "large"])
def test_a_key_that_somebody_else_took_meanwhile_stays_theirs(size: int, s3: Any) -> None:
    with pytest.raises(StorageError, match=r'"key" exists already in s3://.*\n.*never overwritten'):
        with writer(s3.use(part_size=5), "key", HINT) as file:
            write(file, DATA[:size])
            s3.put("key", b"theirs")
    assert get(s3.use(), "key") == b"theirs"
    assert s3.uploads() == []


@pytest.mark.parametrize("size", [1, len(DATA)], ids=["small", "large"])
def test_a_service_without_conditions_is_asked_just_before_the_commit(size: int, s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5)
    commit = COMPLETE if size > 1 else r"PUT [^?]*$"
    between.inject(NOT_IMPLEMENTED, commit)
    put(storage, "key", DATA[:size], HINT)
    assert same(get(storage, "key"), DATA[:size])
    between.inject(NOT_IMPLEMENTED, commit)
    with pytest.raises(StorageError, match="exists already"):
        put(storage, "key", b"x" * size, HINT)
    assert same(get(storage, "key"), DATA[:size])
    assert s3.uploads() == []


def test_a_commit_that_conflicts_with_another_is_an_error(s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5)
    between.inject(Answer(409, b"<Error><Code>ConditionalRequestConflict</Code><Message>x</Message></Error>"), COMPLETE)
    with pytest.raises(StorageError, match=r"is being written by another process"):
        put(storage, "key", DATA, HINT)
    assert (s3.objects(), s3.uploads()) == ({}, [])


# Faults


def test_a_reset_in_the_middle_of_a_part_repeats_that_part(s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5)
    between.inject(ResetRequest(MiB), PART, times=2)
    put(storage, "key", DATA, HINT)
    assert same(get(storage, "key"), DATA)


@pytest.mark.usefixtures("impatient")
def test_a_storm_of_refusals_is_weathered(s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5)
    for request in (r"POST .*uploads", PART, COMPLETE):
        between.inject(SLOW_DOWN, request, times=2)
    put(storage, "key", DATA, HINT)
    assert same(get(storage, "key"), DATA)


@pytest.mark.usefixtures("impatient")
def test_a_storm_without_end_ends_the_write(s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5, timeout=7)
    between.inject(SLOW_DOWN, PART, times=21)
    with pytest.raises(StorageError, match=r"answers SlowDown, also after several tries(.|\n)*Try again later"):
        put(storage, "key", DATA, HINT)
    assert (s3.objects(), s3.uploads()) == ({}, [])
    tries = sum("partNumber" in request for request in methods(between))
    assert 7 <= tries <= 21
    between.calm()


def test_a_connection_that_stalls_is_given_up_and_the_part_repeated(s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5, timeout=0.7)
    between.inject(Stall(), PART)
    put(storage, "key", DATA, HINT)
    assert same(get(storage, "key"), DATA)


def test_interrupting_an_upload_that_stalls_does_not_wait_for_it(
    s3: Any, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgclone.transfer._GRACE_SECONDS", 0.2)
    storage = s3.use(url=between.url, part_size=5, timeout=30)
    between.inject(Stall(), PART)
    done = threading.Event()

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt), writer(storage, "key", HINT) as file:
            write(file, DATA[: 6 * MiB])
            wait_until(lambda: between.pending == [])  # it is stalled
            raise KeyboardInterrupt
        done.set()

    threading.Thread(target=interrupted, daemon=True).start()
    assert done.wait(10)
    assert s3.objects() == {}


def test_threads_that_write_share_one_budget(s3: Any, settings: Any) -> None:
    settings.PGCLONE_TRANSFER_MEMORY = 12
    storage = s3.use(part_size=5)
    threads = [threading.Thread(target=put, args=[storage, f"key{number}", DATA, HINT]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys(storage) == [f"key{number}" for number in range(4)]
    assert same(get(storage, "key3"), DATA)


def test_an_abort_that_nobody_answers_is_not_waited_for(
    s3: Any, between: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pgclone_s3.writing._PATIENCE_SECONDS", 0.2)
    storage = s3.use(url=between.url, part_size=5)
    between.inject(Stall(), ABORT)
    with pytest.raises(ValueError), writer(storage, "key", HINT) as file:
        write(file, DATA)
        raise ValueError
    assert 'upload_left object=\'"key" in s3://' in caplog.text
    assert "the service does not answer" in caplog.text


def test_a_system_without_threads_is_an_error_and_nothing_is_left(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("pgclone-part-2"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr("threading.Thread.start", refuse)
    with pytest.raises(RuntimeError, match="thread"):
        put(s3.use(part_size=5), "key", DATA, HINT)
    assert (s3.objects(), s3.uploads(), shared_budget().used) == ({}, [], 0)


def test_an_interruption_stays_one_in_a_system_without_threads(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.raises(KeyboardInterrupt), writer(s3.use(part_size=5), "key", HINT) as file:
        write(file, DATA)
        monkeypatch.setattr("threading.Thread.start", refuse)
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert (s3.objects(), s3.uploads()) == ({}, [])


@pytest.mark.usefixtures("impatient")
def test_streams_do_not_use_up_each_others_tries(s3: Any, between: Proxy) -> None:
    storage = s3.use(url=between.url, part_size=5, timeout=8)
    for number in range(8):
        between.inject(SLOW_DOWN, r"PUT [^?]*$", times=6)
        put(storage, f"key{number}", b"bytes")
    assert len(s3.objects()) == 8


def test_parts_are_checked_by_what_the_upload_was_begun_with(s3: Any) -> None:
    storage = s3.use(part_size=5)
    seen = {}
    bucket = open_bucket(storage.location)
    for operation in ("CreateMultipartUpload", "UploadPart"):
        bucket.client.meta.events.register(
            f"before-send.s3.{operation}", lambda request, event_name, **_: seen.update({event_name: request.headers})
        )
    put(storage, "key", DATA, HINT)
    assert bytes(seen["before-send.s3.CreateMultipartUpload"]["x-amz-checksum-algorithm"]) == b"CRC32"
    assert seen["before-send.s3.UploadPart"]["x-amz-checksum-crc32"]
    found = s3.server.client().head_object(Bucket=s3.server.bucket, Key=f"{s3.prefix}key", ChecksumMode="ENABLED")
    assert found["ContentLength"] == len(DATA)
