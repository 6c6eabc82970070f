"""Reading from S3: taken up where it broke, in the same version, or not at all."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pgclone.exceptions import KeyNotFound, StorageError
from pgclone.testing.proxy import Answer, Proxy, ResetAnswer, Stall
from pgclone.testing.storage import MiB, get, noise, put, read, reader, same
from pgclone_s3.reading import RANGE

DATA = noise(20 * MiB)
GET = "GET .*/key$"
SLOW_DOWN = Answer(503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")


@pytest.fixture
def key(s3: Any) -> str:
    put(s3.use(), "key", DATA)
    return "key"


def test_ranges_are_fetched_one_by_one_and_the_first_tells_the_size(key: str, s3: Any, between: Proxy) -> None:
    assert same(get(s3.use(url=between.url), key), DATA)
    assert [(request.method, request.status) for request in between.requests] == [("GET", 206)] * 3
    assert len(DATA) // RANGE + 1 == 3


def test_a_small_object_is_one_request(s3: Any, between: Proxy) -> None:
    put(s3.use(), "key", b"bytes")
    assert get(s3.use(url=between.url), "key") == b"bytes"
    assert len(between.requests) == 1


@pytest.mark.parametrize("after", [0, 1000, 3 * MiB])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_a_reset_in_the_middle_is_taken_up_at_the_byte(
    after: int, skip: int, key: str, s3: Any, between: Proxy
) -> None:
    between.inject(ResetAnswer(after), GET, skip=skip)
    assert same(get(s3.use(url=between.url), key), DATA)
    assert len(between.requests) == 4


def test_what_is_taken_up_is_the_same_version(key: str, s3: Any, between: Proxy) -> None:
    """The object is replaced by one of the same length while a range breaks off: never are bytes of both given."""
    storage = s3.use(url=between.url, concurrency=1)
    between.inject(ResetAnswer(MiB), GET, skip=1)
    with reader(storage, key) as file:
        found = file.read(1000)
        storage.delete(location=storage.location, key=key)
        put(s3.use(), key, noise(20 * MiB, 7))
        # A range that is asked for between the two steps finds nothing.
        with pytest.raises((StorageError, KeyNotFound), match=r"was written anew while it was read|There is no"):
            found += read(file)
    between.calm()


def test_an_object_that_was_deleted_meanwhile_is_an_error(key: str, s3: Any) -> None:
    storage = s3.use(concurrency=1)
    with pytest.raises(KeyNotFound, match='There is no "key"'), reader(storage, key) as file:
        file.read(1000)
        storage.delete(location=storage.location, key=key)
        read(file)


def test_resets_without_end_end_the_read(key: str, s3: Any, between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    between.inject(ResetAnswer(10), GET, skip=1, times=50)
    with pytest.raises(StorageError, match=r"broke off, also after several tries(.|\n)*Try again later"):
        get(s3.use(url=between.url, concurrency=1), key)
    assert len(between.requests) < 16
    between.calm()


@pytest.mark.usefixtures("impatient")
def test_a_storm_of_refusals_is_weathered(key: str, s3: Any, between: Proxy) -> None:
    between.inject(SLOW_DOWN, GET, times=3)
    assert same(get(s3.use(url=between.url), key), DATA)


@pytest.mark.parametrize("after", [0, MiB])
def test_a_connection_that_stalls_is_given_up_and_taken_up(after: int, key: str, s3: Any, between: Proxy) -> None:
    between.inject(Stall(after), GET, skip=1)
    assert same(get(s3.use(url=between.url, timeout=0.7), key), DATA)


def test_a_reader_may_stop_early(key: str, s3: Any, between: Proxy) -> None:
    with reader(s3.use(url=between.url), key) as file:
        assert file.read(10) == DATA[:10]
    assert same(get(s3.use(url=between.url), key), DATA)


def test_an_answer_with_other_bytes_than_those_asked_for_is_refused(key: str, s3: Any, between: Proxy) -> None:
    between.inject(Answer(200, DATA, {"ETag": '"x"'}), GET, skip=1)
    with pytest.raises(StorageError, match=r"does not answer with the bytes of an object that are asked for"):
        get(s3.use(url=between.url, concurrency=1), key)


def test_a_checksum_that_is_wrong_is_noticed(s3: Any, between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    wrong = {"ETag": '"x"', "Content-Range": "bytes 0-4/5", "x-amz-checksum-crc32": "AAAAAA=="}
    put(s3.use(), "key", b"right")
    between.inject(Answer(206, b"wrong", wrong), GET, times=6)
    with pytest.raises(StorageError, match="checksum"):
        get(s3.use(url=between.url), "key")


def test_parent_and_child_of_a_fork_do_not_read_each_others_objects(s3: Any) -> None:
    """They would on one connection: each would get what the other has asked for."""
    contents = {f"key{number}": noise(RANGE, number) for number in range(2)}
    storage = s3.use()
    for name, data in contents.items():
        put(storage, name, data)
    for _ in range(5):
        assert same(get(storage, "key0"), contents["key0"])  # a connection is open now
        child = os.fork()
        if not child:
            os._exit(0 if same(get(storage, "key1"), contents["key1"]) else 1)
        assert same(get(storage, "key0"), contents["key0"])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
