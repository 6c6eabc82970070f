"""Listing a bucket: page by page, and nothing that is no object."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pgclone.testing.proxy import Proxy
from pgclone.testing.storage import entries, keys, put

MANY = 50_000


class Endless(BaseHTTPRequestHandler):
    """A bucket of 50,000 objects, which no test has the time to write: it answers ListObjectsV2 and nothing else."""

    protocol_version = "HTTP/1.1"
    asked: list[int] = []

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("continuation-token", ["0"])[0])
        assert "max-keys" not in query or query["max-keys"] == ["1000"]
        self.asked.append(start)
        items = "".join(
            f"<Contents><Key>{query['prefix'][0]}{number:06}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<Size>{number}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for number in range(start, start + 1000)
        )
        more = start + 1000 < MANY
        after = f"<NextContinuationToken>{start + 1000}</NextContinuationToken>" if more else ""
        body = (
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>{str(more).lower()}'
            f"</IsTruncated>{after}{items}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endless() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pages_are_fetched_as_the_list_is_read(s3: Any, endless: str) -> None:
    storage = s3.use(url=endless)
    Endless.asked.clear()
    listing = iter(storage.list(location=storage.location, prefix="prod/"))
    assert Endless.asked == []
    assert next(listing).key == "prod/000000"
    assert Endless.asked == [0]
    for _ in range(1000):
        next(listing)
    assert Endless.asked == [0, 1000]


@pytest.mark.soak
def test_fifty_thousand_keys_take_no_memory(s3: Any, endless: str) -> None:
    storage = s3.use(url=endless)
    tracemalloc.start()
    try:
        count = size = 0
        for entry in storage.list(location=storage.location, prefix=""):
            count, size = count + 1, size + (entry.size or 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (count, size) == (MANY, sum(range(MANY)))
    assert peak < 30 * 1024 * 1024


def test_folders_that_other_tools_make_are_no_keys(s3: Any) -> None:
    for key in ("", "prod/", "prod/default/"):
        s3.put(key, b"")
    put(s3.use(), "prod/key", b"bytes")
    assert keys(s3.use()) == ["prod/key"]


def test_a_location_ends_at_a_segment(s3: Any) -> None:
    put(s3.use(), "key", b"bytes")
    s3.prefix = s3.prefix.rstrip("/") + "-other/"
    put(s3.use(), "other", b"bytes")
    s3.prefix = s3.prefix.replace("-other/", "")  # as users write it: without the slash
    assert keys(s3.use()) == ["key"]


def test_deleting_asks_for_the_one_key(s3: Any, between: Proxy) -> None:
    for key in ("key", "key.json"):
        put(s3.use(), key, b"bytes")
    storage = s3.use(url=between.url)
    assert storage.delete(location=storage.location, key="ke") is False
    assert storage.delete(location=storage.location, key="key") is True
    assert [request.method for request in between.requests] == ["GET", "GET", "DELETE"]
    assert [entry.key for entry in entries(storage)] == ["key.json"]
