"""Dump keys: `<instance>/<database>/<config>/<timestamp>.dump`. Pure.

A storage location holds other things beside dumps; only names of this form are keys. What belongs to a dump has the
dump's key followed by a dot: `K.json` is its manifest, `K.parts/…` are its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from pgclone import exceptions

_FORMAT = "%Y-%m-%d-%H-%M-%S-%f"
_KEY = re.compile(
    r"(?P<instance>[\w-]+)/(?P<database>[\w-]+)/(?P<config>[\w-]+)/(?P<timestamp>\d{4}(-\d\d){5}-\d{1,6})\.dump",
    re.ASCII,
)
_BELONGING = re.compile(r"(?P<key>.+\.dump)\.(json|parts/.+)", re.DOTALL)


@dataclass(frozen=True)
class Key:
    """The parts of a dump key. `database` is the alias in settings.DATABASES."""

    instance: str
    database: str
    config: str
    timestamp: str

    def __str__(self) -> str:
        return f"{self.instance}/{self.database}/{self.config}/{self.timestamp}.dump"


def make(*, instance: str, database: str, config: str, now: datetime) -> Key:
    """The key of a dump that begins `now` (aware). Characters that a key cannot hold become `_`."""
    timestamp = now.astimezone(timezone.utc).strftime(_FORMAT)
    return Key(clean(instance), clean(database), clean(config), timestamp)


def later(key: Key) -> Key:
    """The key of a microsecond later, for a key that is taken."""
    moment = datetime.strptime(key.timestamp, _FORMAT) + timedelta(microseconds=1)
    return Key(key.instance, key.database, key.config, moment.strftime(_FORMAT))


def clean(segment: str) -> str:
    """A segment of a key: everything outside `[A-Za-z0-9_-]` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", segment) or "_"


def parse(name: str) -> Key | None:
    """The parts of a key; None if `name` is not one."""
    match = _KEY.fullmatch(name)
    return Key(match["instance"], match["database"], match["config"], match["timestamp"]) if match else None


def owner(name: str) -> str | None:
    """The key that a manifest or a part belongs to; None if `name` is neither."""
    match = _BELONGING.fullmatch(name)
    return match["key"] if match else None


def matches(name: str, prefix: str) -> bool:
    """Whether a prefix selects a name: whole segments match, but inside the timestamp any beginning does."""
    if not prefix or name == prefix:
        return True
    if prefix.rstrip("/").count("/") >= 3 and not prefix.endswith("/"):
        return name.startswith(prefix)
    return name.startswith(prefix.rstrip("/") + "/")


def newest_first(names: Iterable[str]) -> list[str]:
    """Names by their timestamps, newest first, whatever else they sort like; names that are no keys come last."""

    def rank(name: str) -> tuple[bool, str, str]:
        key = parse(name)
        return (key is not None, _padded(key.timestamp) if key else "", name)

    return sorted(names, key=rank, reverse=True)


def check(text: str) -> str:
    """A key or prefix as the user gave it, if it stays inside the storage location.

    Raises:
        ValueError: It would leave the location, or could not name anything in one.
    """
    segments = text.removesuffix("/").split("/")
    if text and (any(segment in ("", ".", "..") for segment in segments) or not text.isprintable() or "\\" in text):
        raise exceptions.ValueError(
            f'"{text!s}" is not a dump key or prefix: keys are relative to the storage location and cannot leave it.'
            if text.isprintable()
            else f"{text!r} is not a dump key or prefix: it has characters that cannot be printed.",
            'Use a key or prefix that "pgclone ls" shows.',
        )
    return text


def _padded(timestamp: str) -> str:
    """Comparable as text: strftime pads microseconds, but keys of other tools may not."""
    head, _, fraction = timestamp.rpartition("-")
    return f"{head}-{fraction:>06}"
