"""Everything a plugin may import. What is not here may change without notice."""

from __future__ import annotations

import pluggy

from pgclone.exceptions import (
    CorruptDump,
    HookFailed,
    KeyNotFound,
    PgcloneError,
    PluginError,
    StorageError,
)
from pgclone.types import Codec, Entry, Event, Failed, Finished, Location, Progress, Run, Target

hookimpl = pluggy.HookimplMarker("pgclone")
"""Marks a function as the implementation of the hook of the same name (`pgclone.hookspecs`)."""

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
    "PgcloneError",
    "PluginError",
    "Progress",
    "Run",
    "StorageError",
    "Target",
    "hookimpl",
]
