"""A private S3 with a proxy before it, and what is counted of dumps, there and in files."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools import ROOT

from pgclone.testing import proxy

MB = 1e6


class S3:
    """A private SeaweedFS, and a proxy with latency before it; both in processes whose CPU time can be told apart."""

    def __init__(self, server: Any, proxy: int, port: int) -> None:
        self._server = server
        self._port = port
        self.processes = (server.process.popen.pid, proxy)

    def locate(self, folder: str) -> str:
        return f"s3://{self._server.bucket}/{folder}/"

    def environ(self, latency: float) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self._server.access_key,
            "AWS_SECRET_ACCESS_KEY": self._server.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port if latency else self._server.port}",
        }

    def count(self, folder: str) -> dict[str, float]:
        objects = list(self._objects(folder))
        client = self._server.client()
        manifests = [
            json.load(client.get_object(Bucket=self._server.bucket, Key=item["Key"])["Body"])
            for item in objects
            if item["Key"].endswith(".dump.json")
        ]
        return {"MB": sum(item["Size"] for item in objects) / MB, "streamed": count_raw(manifests)}

    def clear(self, folder: str) -> None:
        client = self._server.client()
        for item in self._objects(folder):
            client.delete_object(Bucket=self._server.bucket, Key=item["Key"])

    def _objects(self, folder: str) -> Iterator[Any]:
        pages = self._server.client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._server.bucket, Prefix=f"{folder}/"):
            yield from page.get("Contents", ())


@contextmanager
def start_s3() -> Iterator[S3]:
    sys.path[:0] = [str(ROOT), str(ROOT / "pgclone_s3" / "tests")]
    import seaweed

    with seaweed.start() as server:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=forward, args=(theirs, server.port, 0.03))
        process.start()
        try:
            assert process.pid is not None
            yield S3(server, process.pid, ours.recv())
        finally:
            ours.send("stop")
            process.join()


def forward(pipe: Connection, port: int, latency: float) -> None:
    with proxy.start("127.0.0.1", port, latency=latency) as between:
        pipe.send(between.port)
        pipe.recv()


def count_files(folder: Path) -> dict[str, float]:
    """Everything that a dump consists of, and what was streamed if a manifest tells."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifests = [json.loads(path.read_bytes()) for path in files if path.name.endswith(".dump.json")]
    size = sum(path.stat().st_size for path in files) / MB
    if not size:
        raise RuntimeError("There is no dump.")
    return {"MB": size, **({"streamed": count_raw(manifests)} if manifests else {})}


def count_raw(manifests: list[Any]) -> float:
    """Bytes of archives and parts before they were compressed."""
    return float(sum(piece["raw_size"] for manifest in manifests for piece in (manifest, *manifest["parts"])))
