"""Everything a plugin may import. What is not here may change without notice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

from pgclone.conf import option, read_settings
from pgclone.exceptions import (
    CorruptDump,
    HookFailed,
    KeyNotFound,
    PgcloneError,
    PluginError,
    StorageError,
)
from pgclone.transfer import Part, PartWriter, RangeReader
from pgclone.types import Codec, Entry, Event, Failed, Finished, Location, Progress, Run, Target

if TYPE_CHECKING:
    from pgclone.events import log

hookimpl = pluggy.HookimplMarker("pgclone")
"""Marks a function as the implementation of the hook of the same name (`pgclone.hookspecs`)."""


def __getattr__(name: str) -> Any:
    if name == "log":  # structlog takes its time, and most commands of a project log nothing here
        from pgclone.events import log

        return log
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Codec",
    "CorruptDump",
    "Entry",
    "Event",
    "Failed",
    "Finished",
    "HookFailed",
    "KeyNotFound",
    "Location",
    "Part",
    "PartWriter",
    "PgcloneError",
    "PluginError",
    "Progress",
    "RangeReader",
    "Run",
    "StorageError",
    "Target",
    "hookimpl",
    "log",
    "option",
    "read_settings",
]
