"""Writing: what a dump may meet on its way, and what it leaves."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import fake_gcs
import pytest
import strict_gcs
from google.cloud.storage.exceptions import DataCorruption
from smart_open import gcs

from pgclone import transfer
from pgclone.api import Part, StorageError
from pgclone.testing import proxy
from pgclone.testing.proxy import Answer, LoseAnswer, Proxy, ResetRequest, Stall
from pgclone.testing.storage import MiB, get, keys, noise, put, same, write, writer
from pgclone_gcs import session, writing
from pgclone_gcs.bucket import open_bucket

CHUNK = "PUT .*upload_id="
COMMIT = (CHUNK, 2)
"""The third request of an upload in chunks of 1 MiB that has between 2 and 3 MiB."""
DATA, OTHERS = noise(2 * MiB + 5), noise(2 * MiB + 5, 1)


# The network


def test_a_lost_answer_to_the_commit_is_no_error(connect: Any, between: Proxy) -> None:
    storage = connect(between.url)
    between.inject(LoseAnswer(), COMMIT[0], skip=COMMIT[1])
    put(storage, "key", DATA)
    assert between.pending == []
    assert same(get(storage, "key"), DATA)


def test_a_lost_answer_to_the_commit_of_an_empty_object_is_no_error(connect: Any, between: Proxy) -> None:
    storage = connect(between.url)
    between.inject(LoseAnswer(), CHUNK)
    put(storage, "key", b"")
    assert between.pending == []
    assert get(storage, "key") == b""


def test_a_lost_answer_does_not_make_the_object_of_another_ours(
    connect: Any, before: Proxy, service: strict_gcs.Service, key_file: str
) -> None:
    storage = connect(before.url, credentials_file=key_file)
    with pytest.raises(StorageError, match='"key" exists already'):
        with writer(storage, "key") as file:
            write(file, DATA)
            _wait_for(lambda: sum(request.method == "PUT" for request in before.requests) == 2)
            put(storage, "key", OTHERS)
            before.inject(LoseAnswer(), CHUNK)
    assert before.pending == []
    (found,) = service.objects.values()
    assert same(found.data, OTHERS)


def test_a_lost_answer_to_the_beginning(connect: Any, between: Proxy) -> None:
    storage = connect(between.url)
    between.inject(LoseAnswer(), "POST ")
    put(storage, "key", DATA)
    assert same(get(storage, "key"), DATA)


def test_a_reset_in_the_middle_of_a_chunk(connect: Any, between: Proxy) -> None:
    storage = connect(between.url)
    between.inject(ResetRequest(300_000), CHUNK, skip=1)
    put(storage, "key", DATA)
    assert between.pending == []
    assert same(get(storage, "key"), DATA)


@pytest.mark.parametrize("fault", [LoseAnswer(), Stall()])
def test_a_chunk_that_is_sent_twice_is_stored_once(
    connect: Any, before: Proxy, service: strict_gcs.Service, fault: Any
) -> None:
    before.inject(fault, CHUNK, skip=1)
    put(connect(before.url, timeout=0.3), "key", DATA)
    assert before.pending == []
    (found,) = service.objects.values()
    assert same(found.data, DATA)


def test_the_rest_of_a_chunk_is_sent_when_less_was_stored(connect: Any, service: strict_gcs.Service) -> None:
    service.stores = [300_000, 400_000, MiB, 0, 300_000]
    put(connect(service.url), "key", DATA)
    (found,) = service.objects.values()
    assert same(found.data, DATA)
    assert service.stores == []


def test_a_service_that_stores_nothing_ends_in_an_error(connect: Any, service: strict_gcs.Service) -> None:
    service.stores = [0] * 10_000
    with pytest.raises(StorageError, match="broke off, also after several tries: The service has stored nothing"):
        put(connect(service.url, deadline=0.3), "key", DATA)


def test_answers_of_5xx_and_429_are_waited_for(connect: Any, between: Proxy) -> None:
    storage = connect(between.url)
    for status, pattern in ((503, "POST "), (429, CHUNK), (500, CHUNK)):
        between.inject(Answer(status), pattern)
    put(storage, "key", DATA)
    assert between.pending == []
    assert same(get(storage, "key"), DATA)


@pytest.mark.parametrize("skip", [1, 2])
def test_a_storm_of_503_ends_in_an_error(connect: Any, between: Proxy, skip: int) -> None:
    storage = connect(between.url, deadline=0.5)
    between.inject(Answer(503), CHUNK, times=10_000, skip=skip)
    begun = time.monotonic()
    with pytest.raises(StorageError, match="answers 503, also after several tries"):
        put(storage, "key", DATA)
    assert time.monotonic() - begun < 3
    assert keys(storage) == []


def test_a_new_token_is_fetched_in_the_middle_of_an_upload(
    connect: Any, between: Proxy, google: Any, key_file: str
) -> None:
    storage = connect(between.url, credentials_file=key_file)
    between.inject(Answer(401), CHUNK, skip=1)
    put(storage, "key", DATA)
    assert between.pending == []
    assert google.asked == ["/token", "/token"]
    assert same(get(storage, "key"), DATA)


def test_an_object_that_arrived_damaged_is_discarded(connect: Any, between: Proxy) -> None:
    storage = connect(between.url)
    between.inject(LoseAnswer(), CHUNK, skip=1)  # fake-gcs-server stores a chunk twice that is sent twice
    with pytest.raises(StorageError, match='"key" arrived damaged') as caught:
        put(storage, "key", DATA)
    assert isinstance(caught.value.__cause__, DataCorruption)
    assert keys(storage) == []


# All or nothing


def test_nothing_is_overwritten_that_was_there_before(connect: Any, service: strict_gcs.Service, key_file: str) -> None:
    storage = connect(service.url, credentials_file=key_file)
    put(storage, "key", b"first")
    with pytest.raises(StorageError, match='"key" exists already'):
        put(storage, "key", DATA)
    assert [found.data for found in service.objects.values()] == [b"first"]


def test_nothing_is_overwritten_that_was_committed_meanwhile(
    connect: Any, service: strict_gcs.Service, key_file: str
) -> None:
    storage = connect(service.url, credentials_file=key_file)
    with pytest.raises(StorageError, match='"key" exists already'):
        with writer(storage, "key") as file:
            write(file, DATA)
            put(storage, "key", b"first")
    assert [found.data for found in service.objects.values()] == [b"first"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_cancels_the_upload(connect: Any, service: strict_gcs.Service, error: type[BaseException]) -> None:
    with pytest.raises(error):
        with writer(connect(service.url), "key") as file:
            write(file, DATA)
            _wait_for(lambda: service.uploads)
            raise error
    assert service.requests[-1].startswith("DELETE /upload/session?upload_id=")
    assert (service.uploads, service.objects) == ({}, {})


def test_garbage_collection_cancels_the_upload(connect: Any, service: strict_gcs.Service) -> None:
    block = writer(connect(service.url), "key")
    file = block.__enter__()
    write(file, DATA)
    _wait_for(lambda: service.uploads)
    del block, file
    gc.collect()
    assert (service.uploads, service.objects) == ({}, {})


def test_a_file_that_was_closed_is_not_committed(connect: Any, service: strict_gcs.Service) -> None:
    with pytest.raises(StorageError, match=r'"key" in gs://pgclone/.* was closed before it was complete'):
        with writer(connect(service.url), "key") as file:
            write(file, DATA)
            file.close()
    assert (service.uploads, service.objects) == ({}, {})


def test_a_block_that_fails_before_anything_was_sent_asks_for_nothing(
    connect: Any, service: strict_gcs.Service
) -> None:
    with pytest.raises(ValueError):
        with writer(connect(service.url), "key") as file:
            write(file, b"bytes")
            raise ValueError
    assert service.requests == []


def test_the_writer_of_the_sdk_cannot_commit_by_being_closed(
    connect: Any, service: strict_gcs.Service, place: str
) -> None:
    bucket = open_bucket(connect(service.url).location)
    carrier = session.UploadSession(bucket.service.credentials, "an object")
    client = bucket.service.client_of(bucket.service.prepare(carrier))
    file: Any = gcs.open("pgclone", "key", "wb", client=client)
    file.write(b"bytes")
    with pytest.raises(StorageError, match="closed before it was complete"):
        file.close()
    file.terminate()
    assert (service.uploads, service.objects) == ({}, {})


def test_a_network_that_is_gone_does_not_hide_the_exception(connect: Any, server: fake_gcs.Server) -> None:
    with proxy.start(fake_gcs.HOST, server.port) as gone:
        storage = connect(gone.url)
        with pytest.raises(ZeroDivisionError):
            with writer(storage, "key") as file:
                write(file, DATA)
                _wait_for(lambda: len(gone.requests) > 2)
                gone.stop()
                begun = time.monotonic()
                raise ZeroDivisionError
    assert time.monotonic() - begun < 2


def test_a_service_that_is_silent_does_not_hold_the_exception_up(
    connect: Any, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_CANCEL_SECONDS", 0.2)
    between.inject(Stall(), "DELETE ")
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        with writer(connect(between.url), "key") as file:
            write(file, DATA)
            raise ZeroDivisionError
    assert between.pending == []
    assert time.monotonic() - begun < 2


def test_a_chunk_that_gets_no_answer_does_not_hold_the_exception_up(
    connect: Any, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_GRACE_SECONDS", 0.1)
    between.inject(Stall(), CHUNK)
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        with writer(connect(between.url, timeout=60), "key") as file:
            write(file, DATA[: MiB + 5])
            _wait_for(lambda: between.pending == [])
            raise ZeroDivisionError
    assert time.monotonic() - begun < 2


def test_a_chunk_that_is_being_sent_ends_with_the_upload() -> None:
    given_up = threading.Event()
    body = session._Body(DATA, 0, given_up)
    assert len(body.read()) < len(DATA) / 4
    given_up.set()
    with pytest.raises(StorageError, match="given up"):
        body.read()


# What an object is given


def test_what_the_settings_say_of_objects(connect: Any, service: strict_gcs.Service) -> None:
    key = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
    more = {"kms_key": key, "storage_class": "NEARLINE", "acl": "bucketOwnerRead", "user_project": "payer"}
    put(connect(service.url, **more), "key", b"bytes")
    (upload,) = service.uploads.values()
    assert upload.parameters == {
        "uploadType": "resumable",
        "ifGenerationMatch": "0",
        "kmsKeyName": key,
        "predefinedAcl": "bucketOwnerRead",
        "userProject": "payer",
    }
    assert upload.resource["storageClass"] == "NEARLINE"
    assert list(upload.resource["metadata"]) == ["pgclone-upload"]


def test_a_chunk_that_is_sent_takes_memory_once(
    connect: Any, service: strict_gcs.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Part(1, threading.Event())
    part.write(DATA[:MiB])
    held: list[int] = []
    put_chunk = session.UploadSession._put

    def put_and_look(self: Any, *arguments: Any) -> Any:
        held.append(len(part.getvalue()))
        return put_chunk(self, *arguments)

    monkeypatch.setattr(session.UploadSession, "_put", put_and_look)
    upload = writing._Upload(open_bucket(connect(service.url).location), "key")
    upload.send(part)
    assert held == [0]  # the writer of the SDK has its own copy
    upload.discard()


def test_chunks_have_the_size_of_the_settings(connect: Any, service: strict_gcs.Service) -> None:
    put(connect(service.url, chunk_size=2), "key", bytes(5 * MiB))
    assert sum(request.startswith("PUT") for request in service.requests) == 3


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
