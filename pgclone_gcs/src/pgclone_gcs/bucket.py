"""A bucket as a location names it: how it is reached, and what every request to it carries."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.api_core.retry import Retry

from pgclone.api import Location
from pgclone_gcs import errors, session
from pgclone_gcs.settings import Settings, read_settings


@dataclass(frozen=True)
class Bucket:
    """What requests need.

    Args:
        service: Where they go, shared by all streams of the process.
        location: The location in the bucket.
        settings: `PGCLONE_GCS`.
    """

    service: session.Service
    location: Location
    settings: Settings

    @property
    def handle(self) -> Any:
        """The SDK's."""
        return self.service.client.bucket(self.location.bucket)

    def path(self, key: str) -> str:
        """The name in the bucket of a key in the location."""
        return self.location.prefix + key

    def calls(self, on_error: Callable[[Exception], None] | None = None) -> dict[str, Any]:
        """The arguments of a request that make it patient. `on_error` is told of what is tried again, and may raise."""
        retry = Retry(
            predicate=errors.is_transient,
            initial=0.25,
            maximum=15,
            multiplier=2,
            timeout=self.settings.deadline,
            on_error=on_error,
        )
        return {"timeout": (min(10, self.settings.timeout), self.settings.timeout), "retry": retry}


def open_bucket(location: Location) -> Bucket:
    """The bucket of a location, as the settings say now.

    Raises:
        PgcloneError: The settings make no sense, or there are no credentials.
    """
    settings = read_settings()
    # What the SDK looks for in the environment.
    emulator, credentials = map(os.environ.get, ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"))
    with errors.explained(location):
        return Bucket(_service(settings, emulator, credentials), location, settings)


@functools.lru_cache(maxsize=8)
def _service(settings: Settings, emulator: str | None, _credentials: str | None) -> session.Service:
    """Its connections and its token are worth keeping."""
    return session.create_service(settings, emulator)


os.register_at_fork(after_in_child=_service.cache_clear)  # two processes on one connection read each other's objects
