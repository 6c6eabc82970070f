"""One SeaweedFS for all tests of a worker, a location for each, and a proxy that breaks what passes between."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import moto_server
import pytest
import seaweed

import pgclone_s3
from pgclone.host import Storage
from pgclone.testing import proxy
from pgclone.testing.proxy import Proxy
from pgclone.testing.storage import serve
from pgclone_s3 import session


@pytest.fixture(scope="session")
def server() -> Iterator[seaweed.Server]:
    with seaweed.start() as server:
        yield server


@dataclass
class S3:
    """A new location in the server's bucket, and the settings of a project that uses it."""

    server: seaweed.Server
    settings: Any
    prefix: str

    @property
    def location(self) -> str:
        return f"s3://{self.server.bucket}/{self.prefix}"

    def configuration(self, identity: Any = None, *, url: str = "", **options: Any) -> dict[str, Any]:
        """The settings. Keywords are keys of `PGCLONE_S3`."""
        who = identity or self.server
        return {
            "PGCLONE_STORAGE_LOCATION": self.location,
            "PGCLONE_S3_ENDPOINT_URL": url or self.server.url,
            "PGCLONE_S3_CONFIG": {
                "AWS_ACCESS_KEY_ID": who.access_key,
                "AWS_SECRET_ACCESS_KEY": who.secret_key,
                "AWS_DEFAULT_REGION": "us-east-1",
            },
            "PGCLONE_S3": options,
        }

    def use(self, identity: Any = None, *, url: str = "", **options: Any) -> Storage:
        """The plugin at the location, as the core sees it."""
        for name, value in self.configuration(identity, url=url, **options).items():
            setattr(self.settings, name, value)
        return serve(pgclone_s3, self.location)

    def uploads(self) -> list[str]:
        """The keys of the multipart uploads that are pending below the location."""
        found = self.server.client().list_multipart_uploads(Bucket=self.server.bucket, Prefix=self.prefix)
        return [upload["Key"].removeprefix(self.prefix) for upload in found.get("Uploads", [])]

    def objects(self) -> dict[str, int]:
        """What is below the location, with sizes."""
        found = self.server.client().list_objects_v2(Bucket=self.server.bucket, Prefix=self.prefix)
        return {item["Key"].removeprefix(self.prefix): item["Size"] for item in found.get("Contents", [])}

    def put(self, key: str, data: bytes) -> None:
        """What another program does."""
        self.server.client().put_object(Bucket=self.server.bucket, Key=self.prefix + key, Body=data)


@pytest.fixture
def s3(server: seaweed.Server, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    made, create = [], session.create_client

    def create_client(*arguments: Any) -> Any:
        made.append(create(*arguments))
        return made[-1]

    monkeypatch.setattr(session, "create_client", create_client)
    found = S3(server, settings, f"{secrets.token_hex(4)}/")
    found.use()
    yield found
    for client in made:
        if client.meta.endpoint_url != server.url:  # nobody will use it again, and the cache would only forget it
            client.close()


@pytest.fixture
def between(server: seaweed.Server) -> Iterator[Proxy]:
    """A proxy before the server. All faults of a test must have been met at its end."""
    with proxy.start("127.0.0.1", server.port) as between:
        yield between
        assert between.pending == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore repeats as often as ever, and does not wait before."""
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """moto's server, for what SeaweedFS does not have: KMS, storage classes, roles."""
    with moto_server.start() as server:
        yield server.url
