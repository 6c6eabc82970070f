"""Dumps in a folder of the local file system.

A file is written beside its final name as `.<name>.<random>.partial`, locked (flock) while its writer lives, and linked
to its name when it is complete and synced. Partial files that nobody locks are left-overs of dead writers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, Literal

from pgclone.api import Entry, KeyNotFound, Location, StorageError, hookimpl

_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.partial", re.DOTALL)
_PARTS = ".parts"
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@hookimpl
def storage_open(
    location: Location, key: str, mode: Literal["rb", "wb"]
) -> contextlib.AbstractContextManager[BinaryIO] | None:
    if location.scheme not in ("", "file"):
        return None
    path = Path(location.prefix) / key
    return _read(path, location) if mode == "rb" else _write(path, Path(location.prefix))


@hookimpl
def list_keys(location: Location, prefix: str) -> Iterator[Entry] | None:
    return _walk(Path(location.prefix), prefix) if location.scheme in ("", "file") else None


@hookimpl
def delete_key(location: Location, key: str) -> bool | None:
    if location.scheme not in ("", "file"):
        return None
    path = Path(location.prefix) / key
    try:
        path.unlink()
    except _MISSING:
        return False
    if path.parent.name.endswith(_PARTS):
        with contextlib.suppress(OSError):  # there are more
            path.parent.rmdir()
    return True


def _walk(root: Path, prefix: str) -> Iterator[Entry]:
    def fail(error: OSError) -> None:
        # Deleted while we look; nothing was dumped yet; or a file is where the prefix wants a folder.
        if not isinstance(error, _MISSING) or (root.exists() and not root.is_dir()):
            raise error

    # Strings: a thousand objects of pathlib take as long as all the rest.
    above = os.path.join(root, "")  # noqa: PTH118
    for name in _files(root / prefix.rpartition("/")[0], fail):
        key = name.removeprefix(above).replace(os.sep, "/")
        if key.startswith(prefix) and not _PARTIAL.fullmatch(os.path.basename(name)):  # noqa: PTH119
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(name)  # noqa: PTH116
                yield Entry(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, timezone.utc))


def _files(root: Path, fail: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """All files below a folder, those in linked folders too. `fail` is told about folders that cannot be read."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        with contextlib.suppress(FileNotFoundError):
            identity = os.stat(folder)  # noqa: PTH116
            if (identity.st_dev, identity.st_ino) in seen:  # a link that leads round in a circle
                folders.clear()
                continue
            seen.add((identity.st_dev, identity.st_ino))
        yield from (os.path.join(folder, name) for name in names)  # noqa: PTH118


@contextlib.contextmanager
def _read(path: Path, location: Location) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb", buffering=0)
    except _MISSING:
        raise KeyNotFound(f'There is no "{path.relative_to(location.prefix)}" in {location}.') from None
    with file:
        yield file


@contextlib.contextmanager
def _write(path: Path, root: Path) -> Iterator[BinaryIO]:
    _make_folders(path.parent)
    if not path.parent.name.endswith(_PARTS):  # a look at everything, once a dump
        _remove_left_overs(root)
    with _create_partial(path) as (file, partial):
        yield file
        if file.closed:
            raise StorageError(f"{path} was closed before it was complete.")
        os.fsync(file.fileno())
        _publish(partial, path)


@contextlib.contextmanager
def _create_partial(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A locked file beside `path`, gone at the end of the block."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        with partial.open("xb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:
                continue  # taken for a left-over before it was locked
            try:
                yield file, partial
                return
            finally:
                partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    """Give a complete file its name, which fails when the name is taken: a commit never overwrites."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise StorageError(f"{path} exists already.", "Dumps are never overwritten.") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise StorageError(f"{path} exists already.", "Dumps are never overwritten.") from None
        partial.rename(path)
    _sync(path.parent)


def _make_folders(folder: Path) -> None:
    """Like mkdir -p, with every new name synced to disk."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        _sync(parent.parent)


def _remove_left_overs(root: Path) -> None:
    """Remove the partial files that no living writer locks, and the manifests and parts of dumps they were to become."""
    for partial in map(Path, _files(root)):
        match = _PARTIAL.fullmatch(partial.name)
        if match is None:
            continue  # another program's
        with contextlib.suppress(OSError), partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            final = partial.with_name(match["name"])
            if not final.exists():
                final.with_name(f"{final.name}.json").unlink(missing_ok=True)
                _remove_parts(final.with_name(f"{final.name}{_PARTS}"))
            partial.unlink(missing_ok=True)


def _remove_parts(folder: Path) -> None:
    for part in [*folder.glob("[0-9]*")]:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or something else is in it
        folder.rmdir()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
