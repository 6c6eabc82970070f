"""The contract of storage plugins, on a real S3 server."""

from __future__ import annotations

from typing import Any

import pytest

import pgclone_s3
from pgclone.testing.storage import MiB, StorageConformance


class TestS3(StorageConformance):
    plugin = pgclone_s3
    big = 40 * MiB  # three parts, five ranges
    many = 60

    @pytest.fixture
    def location(self, s3: Any) -> str:
        return str(s3.location)
