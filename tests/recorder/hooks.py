"""Implements every hook, and writes each call to the file PGCLONE_RECORD, with the database that Django is on.

Two plugins, `first` and `second`; the first one is also the storage at `recorded://`, in a folder beside the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgclone.api import Codec, Entry, Event, Location, Run, Target, hookimpl
from pgclone.plugins import files


def record(who: str, what: str, *details: object) -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        (database,) = cursor.fetchone()
    with Path(os.environ["PGCLONE_RECORD"]).open("a") as file:
        file.write(json.dumps([who, what, *map(str, details), database]) + "\n")


class Recorder:
    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def codecs(self) -> list[Codec]:
        record(self.name, "codecs")
        return []

    @hookimpl
    def check_settings(self, settings: Any) -> list[Any]:
        record(self.name, "check_settings", settings.PGCLONE_INSTANCE)
        return []

    @hookimpl
    def pre_dump(self, run: Run, source: Target) -> None:
        record(self.name, "pre_dump", source.name)

    @hookimpl
    def post_dump(self, run: Run, key: str, size: int) -> None:
        record(self.name, "post_dump", run.command, size > 0)

    @hookimpl
    def post_restore(self, run: Run, target: Target) -> None:
        record(self.name, "post_restore", target.name)

    @hookimpl
    def pre_swap(self, run: Run, target: Target) -> None:
        record(self.name, "pre_swap", target.name)

    @hookimpl
    def post_swap(self, run: Run, old_database: str | None) -> None:
        record(self.name, "post_swap", old_database)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        record(self.name, "on_event", type(event).__name__, run.command)


class Storing(Recorder):
    @hookimpl
    def storage_open(self, location: Location, key: str, mode: Any, size_hint: int | None) -> Any:
        if location.scheme != "recorded":
            return None
        record(self.name, "storage_open", mode, kind(key), size_hint is not None)
        return files.storage_open(local(location), key, mode)

    @hookimpl
    def list_keys(self, location: Location, prefix: str) -> Any:
        return self._list(location, prefix) if location.scheme == "recorded" else None

    @hookimpl
    def delete_key(self, location: Location, key: str) -> Any:
        if location.scheme != "recorded":
            return None
        record(self.name, "delete_key", kind(key))
        return files.delete_key(local(location), key)

    def _list(self, location: Location, prefix: str) -> Any:
        record(self.name, "list_keys", kind(prefix))
        entries: list[Entry] = list(files.list_keys(local(location), prefix) or [])
        yield from entries


def local(location: Location) -> Location:
    return replace(location, scheme="", prefix=os.environ["PGCLONE_RECORD"] + ".stored/")


def kind(key: str) -> str:
    """A key or prefix without what differs from run to run."""
    for ending, name in ((".dump", "K"), (".dump.json", "K.json")):
        if key.endswith(ending):
            return name
    return key.rpartition("/")[0] + "/"


first = Storing("first")
second = Recorder("second")
