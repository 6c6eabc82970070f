"""The values that pass between the core and its plugins. All frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Location:
    """A storage location, parsed.

    Args:
        url: As the user wrote it: `.pgclone/`, `s3://bucket/prefix/`.
        scheme: What stands before `://`; empty for a path of the local file system.
        bucket: The first part after `://`; empty for a path.
        prefix: The rest, without a leading slash and with a trailing one; for a path, the folder itself.
    """

    url: str
    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Entry:
    """What a storage lists: a key relative to the location, its size in bytes, and when it was written (aware)."""

    key: str
    size: int | None = None
    modified: datetime | None = None


@dataclass(frozen=True)
class Codec:
    """A way to compress a stream.

    Args:
        name: What `PGCLONE_CODEC` and the manifest call it.
        magic: How every stream of it begins, for tools that look at a dump without its manifest.
        compress: `compress(sink, level)` is a context manager that gives a writable file. A clean end of the block
            finishes the stream, an exception leaves it unfinished; `sink` stays open. Several streams are open at once, in
            several threads, and share the memory that the process may take.
        decompress: `decompress(source)` is a context manager that gives a readable file. Reading raises when the stream
            is damaged or ends early.
        default_level: The level if none is given.
        levels: Those that it takes; None if any number will do.
    """

    name: str
    magic: bytes
    compress: Callable[[BinaryIO, int], AbstractContextManager[BinaryIO]]
    decompress: Callable[[BinaryIO], AbstractContextManager[BinaryIO]]
    default_level: int = 0
    levels: range | None = None


@dataclass(frozen=True)
class Run:
    """What is being done. Names that do not apply are empty strings.

    Args:
        id: Random, part of every name that the run makes up.
        command: `dump`, `restore` or `copy`.
        alias: The alias in settings.DATABASES.
        database: The name of its database on the server.
        location: Where dumps are stored.
        key: The dump key, or `:name`.
        config: The name of the configuration (`PGCLONE_CONFIGS`), or "none".
        options: Every option of the command, by its name in a configuration.
    """

    id: str
    command: str
    alias: str
    database: str
    location: Location
    key: str
    config: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Target:
    """A database that a hook may look at or change. The ORM and management commands are routed to it as well.

    Args:
        name: Its name on the server.
        cursor: Gives a cursor of Django's in that database, as a context manager.
        call_command: Django's `call_command`, with `--database` left to the routing.
    """

    name: str
    cursor: Callable[[], AbstractContextManager[Any]] = field(repr=False)
    call_command: Callable[..., Any] = field(repr=False)


@dataclass(frozen=True)
class Event:
    """Something that happened during a run."""


@dataclass(frozen=True)
class Progress(Event):
    """Bytes of the archive and its parts that went through, before compression. `total` is an estimate, None if unknown."""

    done: int
    total: int | None = None


@dataclass(frozen=True)
class Finished(Event):
    """The run did what it was asked for."""


@dataclass(frozen=True)
class Failed(Event):
    """The run ended with this error, or was interrupted."""

    error: BaseException
