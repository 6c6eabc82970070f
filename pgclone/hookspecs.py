"""The plugin contract. Each docstring says when a hook is called, what it may return, and what raising does.

Implement hooks as functions decorated with `pgclone.hookimpl`, naming only the arguments you use. Errors that you want
users to read are `pgclone.api.PgcloneError`: a cause that names the object, and a remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import pluggy

from pgclone.types import Codec, Entry, Event, Location, Run, Target

if TYPE_CHECKING:
    from django.core.checks import CheckMessage

hookspec = pluggy.HookspecMarker("pgclone")


@hookspec(firstresult=True)
def storage_open(
    location: Location, key: str, mode: Literal["rb", "wb"], size_hint: int | None
) -> AbstractContextManager[BinaryIO] | None:
    """Open `key` under `location` for reading or writing.

    Called for every stream of a dump or restore. The first answer wins: return None when the location is not yours, and
    implement `list_keys` and `delete_key` in the same plugin. Do not write this as a generator function.

    `"wb"`: nothing is visible under the key until the block ends without an exception; an exception discards everything
    written, parts uploaded included. An explicit `close()` without leaving the block never commits. A commit never
    overwrites an existing key: it raises instead. `size_hint` is an estimate in bytes of what will be written, or None.

    `"rb"`: a missing key raises `KeyNotFound` when the block is entered. What is read is one object from the first byte to
    the last, even if the key is deleted or written anew meanwhile; a reader that cannot go on in it raises.

    Readers and writers may be raw: short reads and writes are handled by the core. The buffer given to `write` may be
    used again once it has returned. Several keys are read and written at once, from several threads. Keys are relative to
    the location, use `/`, and never leave it. Left-overs of writers that died are yours to remove, here or in `list_keys`.

    Raising aborts the command; nothing is swapped in, nothing is listed.
    """


@hookspec(firstresult=True)
def list_keys(location: Location, prefix: str) -> Iterable[Entry] | None:
    """List what is committed under `location` and begins with `prefix`, a plain string.

    Called by `ls`, to resolve a prefix, and before and after a dump. The first answer wins: return None when the location
    is not yours. Entries come in any order, lazily, keys relative to the location; a location that does not exist yet is
    empty. The core does all further matching and hides what belongs to an archive. `Entry.size` is needed for parts,
    `Entry.modified` for the sweep of left-overs: what has none is never swept. Raising aborts the command.
    """


@hookspec(firstresult=True)
def delete_key(location: Location, key: str) -> bool | None:
    """Delete `key` under `location`.

    Called to sweep what dead runs left. The first answer wins: return None when the location is not yours, True when the
    key was deleted, False when it was not there. Raising aborts nothing: what stays is told as a warning.
    """


@hookspec
def pre_dump(run: Run, source: Target) -> None:
    """Called before a database is dumped, with connections routed to it. All implementations run.

    The management commands of `--pre-dump-hook` run first, then the project's own modules, then installed plugins. Raising
    aborts the dump before anything is read or written: a veto.
    """


@hookspec
def post_restore(run: Run, target: Target) -> None:
    """Called when a dump was restored into its temporary database and proven, before anything changed it.

    Not called for restores of local databases. All implementations run. Raising aborts the restore; the primary database
    stays as it was.
    """


@hookspec
def pre_swap(run: Run, target: Target) -> None:
    """Called before the restored database becomes the primary one, with connections routed to the temporary database.

    The management commands of `--pre-swap-hook` (`migrate` by default) run first, so that the project's own modules and then
    the installed plugins see the new schema. All implementations run. Raising aborts the restore, the primary database
    stays as it was: a veto.
    """


@hookspec
def post_dump(run: Run, key: str, size: int) -> None:
    """Called when a dump was committed under `key`; `size` is what was stored, in bytes.

    All implementations run, each on its own: an error is logged and changes nothing.
    """


@hookspec
def post_swap(run: Run, old_database: str | None) -> None:
    """Called when the restored database has become the primary one.

    `old_database` is the name that a reversible restore kept the old one under, else None. All implementations run, each on
    its own: an error is logged and changes nothing.
    """


@hookspec
def on_event(run: Run, event: Event) -> None:
    """Called with `Progress` while a stream runs, and with `Finished` or `Failed` at the end of a command.

    All implementations run, each on its own: an error is logged and changes nothing. Return quickly: the stream waits.
    """


@hookspec
def codecs() -> Iterable[Codec]:  # type: ignore[empty-body]
    """The codecs that a plugin brings. Called once, when the plugins are loaded.

    Two codecs of one name are an error. Raising aborts dump, restore and copy.
    """


@hookspec
def check_settings(settings: Any) -> Iterable[CheckMessage]:  # type: ignore[empty-body]
    """Called by `manage.py check` with Django's settings: return what is wrong with those that the plugin reads.

    Raising is reported as an error of the plugin.
    """
