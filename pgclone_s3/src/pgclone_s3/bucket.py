"""A bucket as a location names it: its client, and what every request to it carries."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Any

from pgclone.api import Location
from pgclone_s3 import errors, session
from pgclone_s3.settings import Settings, read_environment, read_settings


@dataclass(frozen=True)
class Bucket:
    """What requests need.

    Args:
        client: botocore's, shared by all streams of the process.
        location: The location in it.
        settings: `PGCLONE_S3`.
    """

    client: Any = field(repr=False)
    location: Location
    settings: Settings

    @property
    def name(self) -> str:
        return self.location.bucket

    def path(self, key: str) -> str:
        """The key in the bucket for a key in the location."""
        return self.location.prefix + key

    def where(self, key: str) -> dict[str, Any]:
        """The arguments of a request for a key."""
        return {"Bucket": self.name, "Key": self.path(key), **self.payer}

    @property
    def payer(self) -> dict[str, str]:
        return {"RequestPayer": "requester"} if self.settings.requester_pays else {}


def open_bucket(location: Location) -> Bucket:
    """The bucket of a location, as the settings say now.

    Raises:
        PgcloneError: The settings make no sense, or there are no credentials.
    """
    settings = read_settings()
    with errors.explained(location):
        client = _client(settings, tuple(sorted(read_environment().items())))
    return Bucket(client, location, settings)


@functools.lru_cache(maxsize=8)
def _client(settings: Settings, environment: tuple[tuple[str, str], ...]) -> Any:
    """Making one takes a tenth of a second, and its connections are worth keeping."""
    return session.create_client(settings, dict(environment))


os.register_at_fork(after_in_child=_client.cache_clear)  # two processes on one connection read each other's objects
