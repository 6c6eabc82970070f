"""Dumps at `memo://shelf/prefix/`: flat files in a folder of PGCLONE_MEMO_FOLDER, their names the quoted keys."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import quote, unquote

from django.conf import settings
from django.core.checks import CheckMessage, Error

from pgclone.api import Entry, KeyNotFound, Location, StorageError, hookimpl

DAY = 24 * 3600


@hookimpl
def storage_open(
    location: Location, key: str, mode: Literal["rb", "wb"]
) -> contextlib.AbstractContextManager[BinaryIO] | None:
    if location.scheme != "memo":
        return None
    return _read(location, key) if mode == "rb" else _write(location, key)


@hookimpl
def list_keys(location: Location, prefix: str) -> Iterator[Entry] | None:
    return _list(location, prefix) if location.scheme == "memo" else None


@hookimpl
def delete_key(location: Location, key: str) -> bool | None:
    if location.scheme != "memo":
        return None
    try:
        _path(location, key).unlink()
    except FileNotFoundError:
        return False
    return True


@hookimpl
def check_settings(settings: Any) -> Iterable[CheckMessage]:
    if not getattr(settings, "PGCLONE_MEMO_FOLDER", None):
        yield Error("PGCLONE_MEMO_FOLDER is missing.", hint="Set it to a folder.", id="pgclone_memo.E001")


@contextlib.contextmanager
def _read(location: Location, key: str) -> Iterator[BinaryIO]:
    try:
        file = _path(location, key).open("rb")
    except FileNotFoundError:
        raise KeyNotFound(f'There is no "{key}" in {location}.') from None
    with file:
        yield file


@contextlib.contextmanager
def _write(location: Location, key: str) -> Iterator[BinaryIO]:
    unfinished = _shelf(location) / ".unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    for left_over in unfinished.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if left_over.stat().st_mtime < time.time() - DAY:
                left_over.unlink()
    with tempfile.NamedTemporaryFile(dir=unfinished) as file:
        yield file
        if file.closed:
            raise StorageError(f'"{key}" was closed before it was complete.')
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, _path(location, key))
        except FileExistsError:
            raise StorageError(f'"{key}" exists already in {location}.') from None


def _list(location: Location, prefix: str) -> Iterator[Entry]:
    beginning = location.prefix + prefix
    with contextlib.suppress(FileNotFoundError), os.scandir(_shelf(location)) as files:
        for file in files:
            name = unquote(file.name)
            if file.is_file() and name.startswith(beginning):
                stat = file.stat()
                modified = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
                yield Entry(name.removeprefix(location.prefix), stat.st_size, modified)


def _path(location: Location, key: str) -> Path:
    return _shelf(location) / quote(location.prefix + key, safe="")


def _shelf(location: Location) -> Path:
    return Path(settings.PGCLONE_MEMO_FOLDER) / location.bucket
