from __future__ import annotations

from django.apps import AppConfig


class PgcloneConfig(AppConfig):
    name = "pgclone"

    def ready(self) -> None:
        from pgclone import checks  # noqa: F401  registers the checks
