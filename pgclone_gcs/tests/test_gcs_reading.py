"""Reading and listing: what a restore may meet on its way."""

from __future__ import annotations

import gzip
import itertools
import os
import time
from typing import Any

import fake_gcs
import pytest

from pgclone.api import KeyNotFound, StorageError
from pgclone.host import Storage
from pgclone.testing.proxy import Answer, LoseAnswer, Proxy, ResetAnswer, Stall
from pgclone.testing.storage import MiB, entries, get, keys, noise, put, read, reader, same
from pgclone.transfer import shared_budget
from pgclone_gcs import listing, reading

DATA = noise(3 * MiB + 500_000)
RANGE = "GET .*alt=media"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "RANGE", MiB)
    monkeypatch.setattr(listing, "PAGE", 3)


@pytest.fixture
def storage(connect: Any, between: Proxy) -> Storage:
    """One with an object, read through the proxy."""
    storage: Storage = connect(between.url)
    put(storage, "key", DATA)
    return storage


def _ranges(between: Proxy) -> int:
    return sum("alt=media" in request.target for request in between.requests)


# The network


def test_one_request_for_the_object_and_one_for_each_range(storage: Storage, between: Proxy) -> None:
    before = len(between.requests)
    assert same(get(storage, "key"), DATA)
    methods = [request.method for request in between.requests[before:]]
    assert (methods, _ranges(between)) == (["GET"] * 5, 4)


def test_ranges_are_read_at_once(storage: Storage, between: Proxy) -> None:
    between.latency = 0.2
    begun = time.monotonic()
    assert same(get(storage, "key"), DATA)
    assert time.monotonic() - begun < 0.6  # one after the other, these five requests take a second


@pytest.mark.parametrize("fault", [ResetAnswer(300_000), ResetAnswer(0), LoseAnswer(), Answer(503), Answer(429)])
def test_a_range_that_breaks_off_is_read_again(storage: Storage, between: Proxy, fault: Any) -> None:
    between.inject(fault, RANGE, skip=1)
    assert same(get(storage, "key"), DATA)
    assert between.pending == []


@pytest.mark.parametrize("after", [0, 300_000])
def test_a_range_that_stalls_is_read_again(storage: Storage, between: Proxy, connect: Any, after: int) -> None:
    between.inject(Stall(after), RANGE, skip=1)
    assert same(get(connect(between.url, timeout=0.3), "key"), DATA)
    assert between.pending == []


@pytest.mark.parametrize("fault", [Answer(503), ResetAnswer(1000)])
def test_a_storm_ends_in_an_error(storage: Storage, between: Proxy, connect: Any, fault: Any) -> None:
    between.inject(fault, RANGE, times=10_000)
    begun = time.monotonic()
    with pytest.raises(StorageError, match="after several tries"):
        get(connect(between.url, deadline=0.5), "key")
    assert time.monotonic() - begun < 3


def test_a_reader_that_is_left_early_gives_up_what_nobody_waits_for(storage: Storage, between: Proxy) -> None:
    between.inject(ResetAnswer(1000), RANGE, times=10_000, skip=1)
    with reader(storage, "key") as file:
        file.read(10)
    deadline = time.monotonic() + 4  # that of the requests is 10
    while shared_budget().used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shared_budget().used == 0


# The object


def test_a_missing_key(storage: Storage) -> None:
    with pytest.raises(KeyNotFound, match='There is no "other" in gs://pgclone/'):
        get(storage, "other")


def test_an_empty_object_has_no_ranges(storage: Storage, between: Proxy) -> None:
    put(storage, "empty", b"")
    assert get(storage, "empty") == b""
    assert _ranges(between) == 0


@pytest.mark.parametrize("answer", [None, Answer(404), Answer(412)])
def test_an_object_that_was_written_anew_is_not_read_on(
    storage: Storage, between: Proxy, answer: Answer | None, connect: Any
) -> None:
    storage = connect(between.url, concurrency=1)
    with reader(storage, "key") as file:
        file.read(10)
        storage.delete(location=storage.location, key="key")
        put(storage, "key", noise(len(DATA), 1))
        if answer is not None:
            between.inject(answer, RANGE)
        with pytest.raises(StorageError, match=r'"key" .* was deleted or written anew while it was read') as caught:
            read(file)
    assert not isinstance(caught.value, KeyNotFound)


def test_bytes_of_another_generation_are_not_taken(storage: Storage, between: Proxy) -> None:
    # An emulator that overlooks which one is wanted, and says which one it gives.
    between.inject(Answer(206, bytes(MiB), {"X-Goog-Generation": "7"}), RANGE)
    with pytest.raises(StorageError, match="written anew"):
        get(storage, "key")


def test_ranges_name_the_generation(storage: Storage, between: Proxy) -> None:
    get(storage, "key")
    assert all("generation=" in request.target for request in between.requests if "alt=media" in request.target)


def test_an_encoding_that_the_object_claims_is_left_to_others(
    storage: Storage, server: fake_gcs.Server, place: str
) -> None:
    content = gzip.compress(noise(MiB) * 2)
    blob = server.client().bucket(server.bucket).blob(place.split("/", 3)[3] + "zipped")
    blob.content_encoding = "gzip"
    blob.upload_from_string(content)
    assert same(get(storage, "zipped"), content)


# Listing and deleting


def test_a_listing_goes_on_page_by_page(storage: Storage, between: Proxy) -> None:
    for number in range(6):
        put(storage, f"many/{number}", b"")
    before = len(between.requests)
    listed = iter(storage.list(location=storage.location, prefix="many/"))
    assert len(between.requests) == before
    assert [entry.key for entry in itertools.islice(listed, 3)] == ["many/0", "many/1", "many/2"]
    assert len(between.requests) == before + 1
    assert [entry.key for entry in listed] == ["many/3", "many/4", "many/5"]
    assert len(between.requests) == before + 2


def test_a_page_that_breaks_off_is_asked_for_again(storage: Storage, between: Proxy) -> None:
    between.inject(ResetAnswer(10), "GET .*prefix=")
    assert [(entry.key, entry.size) for entry in entries(storage)] == [("key", len(DATA))]
    assert between.pending == []


def test_folders_are_no_keys(storage: Storage, server: fake_gcs.Server, place: str) -> None:
    server.client().bucket(server.bucket).blob(place.split("/", 3)[3] + "folder/").upload_from_string(b"")
    assert keys(storage) == ["key"]


def test_a_deletion_whose_answer_was_lost_is_one(storage: Storage, between: Proxy) -> None:
    between.inject(LoseAnswer(), "DELETE ")
    assert storage.delete(location=storage.location, key="key") is True
    assert keys(storage) == []
    assert storage.delete(location=storage.location, key="key") is False


def test_parent_and_child_of_a_fork_do_not_read_each_others_objects(storage: Storage) -> None:
    """They would on one connection: each would get what the other has asked for."""
    put(storage, "other", DATA[::-1])
    for _ in range(5):
        assert same(get(storage, "key"), DATA)  # a connection is open now
        child = os.fork()
        if not child:
            os._exit(0 if same(get(storage, "other"), DATA[::-1]) else 1)
        assert same(get(storage, "key"), DATA)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
