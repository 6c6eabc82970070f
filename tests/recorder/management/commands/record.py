from typing import Any

from django.core.management.base import BaseCommand

from tests.recorder.hooks import record


class Command(BaseCommand):
    """A management command that says that it ran."""

    def handle(self, *_: Any, **options: Any) -> None:
        record("command", "record")
