"""The contract of storage plugins, on the real fake-gcs-server."""

from __future__ import annotations

from typing import Any

import fake_gcs
import pytest

import pgclone_gcs
from pgclone.testing.storage import MiB, StorageConformance
from pgclone_gcs import listing


class TestConformance(StorageConformance):
    plugin = pgclone_gcs
    big = 5 * MiB + 1  # six chunks, and ranges of which the last one is short
    many = 25

    @pytest.fixture
    def location(self, place: str) -> str:
        return place

    @pytest.fixture(autouse=True)
    def _settings(self, settings: Any, server: fake_gcs.Server, monkeypatch: pytest.MonkeyPatch) -> None:
        settings.PGCLONE_GCS = {"endpoint": server.url, "chunk_size": 1}
        monkeypatch.setattr(listing, "PAGE", 10)
        monkeypatch.setattr("pgclone_gcs.reading.RANGE", MiB)
