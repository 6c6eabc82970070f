"""What a dump consists of, and the order in which it is committed (docs/archive-format.md).

Under the key `K`: `K` itself is a custom-format archive of pg_dump inside a codec, `K.json` its manifest. The manifest is
written when `K` is complete but not yet committed: a key that is listed has its manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta, timezone
from typing import Any

from pgclone import exceptions, keys
from pgclone.events import log
from pgclone.host import Storage
from pgclone.streams import BLOCK, Digest, open_source, store
from pgclone.types import Entry

FORMAT = 1
"""The version of the archive format. A reader refuses greater ones."""

_MANIFEST_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key that points to rows which were left out of the dump.

    Args:
        oid: Its OID in the dumped database: the archive's table of contents has it.
        schema, table: The referencing table.
        name: The constraint.
        references: The table whose rows are missing.
        partitioned: Whether the referencing table is partitioned (before PostgreSQL 18, no NOT VALID there).
    """

    oid: int
    schema: str
    table: str
    name: str
    references: str
    partitioned: bool

    def __str__(self) -> str:
        return f"{self.name} on {self.schema}.{self.table} (rows of {self.references} were left out)"


@dataclass(frozen=True)
class Table:
    """A table of the dump, with what the catalogue said of it: estimated rows, and bytes with indexes."""

    name: str
    rows: int
    bytes: int
    excluded: bool = False


@dataclass(frozen=True)
class Manifest:
    """What is known about a dump beside its bytes. Nothing in it is secret.

    Args:
        key: Its dump key.
        created: When it was made, in ISO 8601.
        pgclone: The version of pgclone, and of pg_dump and the server (as PostgreSQL prints them).
        codecs: From the outside in.
        raw_size: Bytes of the archive inside the codecs.
        stored_size: Bytes as stored.
        sha256: Of the bytes as stored.
        extensions: Name and version.
        migrations: The last applied migration of each Django app.
        parts: Parts beside `K` (none yet).
        plugins: Name and version.
        encoding, collate, ctype: Of the dumped database.
    """

    key: str
    created: str
    pgclone: str
    pg_dump: str
    server: str
    codecs: tuple[str, ...]
    raw_size: int
    stored_size: int
    sha256: str
    encoding: str
    collate: str
    ctype: str
    extensions: Mapping[str, str]
    migrations: Mapping[str, str]
    tables: tuple[Table, ...]
    foreign_keys: tuple[ForeignKey, ...]
    plugins: Mapping[str, str]
    parts: tuple[Mapping[str, Any], ...] = ()
    masks: Mapping[str, Any] | None = None
    format: int = field(default=FORMAT)

    def dumps(self) -> bytes:
        """As stored: JSON with a digest of itself, so that damage is found."""
        body = asdict(self)
        return json.dumps({**body, "self_sha256": _digest(body)}, indent=1, ensure_ascii=False).encode()

    @property
    def digest(self) -> Digest:
        return Digest(self.stored_size, self.sha256)


def parse_manifest(data: bytes, key: str) -> Manifest:
    """Read a stored manifest.

    Raises:
        CorruptDump: It is damaged.
        NotPossible: It was written by a newer version of pgclone.
    """
    damaged = exceptions.CorruptDump(
        f'The manifest of the dump "{key}" is damaged.', "Nothing was swapped in. Restore another dump."
    )
    try:
        body = json.loads(data)
        version = body["format"]
        if isinstance(version, int) and version > FORMAT:
            raise exceptions.NotPossible(
                f'The dump "{key}" has the archive format {version}, this pgclone reads formats up to {FORMAT}.',
                "Upgrade pgclone.",
            )
        if body.pop("self_sha256") != _digest(body):
            raise damaged
        body |= {name: tuple(body[name]) for name in ("codecs", "parts")}
        body["tables"] = tuple(Table(**table) for table in body["tables"])
        body["foreign_keys"] = tuple(ForeignKey(**foreign) for foreign in body["foreign_keys"])
        return Manifest(**{item.name: body[item.name] for item in fields(Manifest)})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error


def write_manifest(storage: Storage, manifest: Manifest) -> None:
    """Commit a manifest, just before its dump is committed."""
    with store(storage, f"{manifest.key}.json") as stored:
        stored.write(manifest.dumps())


def read_manifest(storage: Storage, key: str) -> Manifest | None:
    """The manifest of a dump; None if it has none, as those of django-pgclone."""
    name = f"{key}.json"
    if not any(entry.key == name for entry in _everything(storage, name)):
        return None
    with open_source(storage, name, lambda head: None) as source:
        data = b""
        while len(data) < _MANIFEST_BYTES and (block := source.read(BLOCK)):
            data += block
    return parse_manifest(data, key)


def check_unmanifested(storage: Storage, key: str) -> None:
    """Refuse a dump without a manifest that has parts: without their list, nobody knows whether they are all there.

    Raises:
        CorruptDump: It has parts.
    """
    for entry in _everything(storage, f"{key}.parts/"):
        raise exceptions.CorruptDump(
            f'The dump "{key}" has lost its manifest: "{entry.key}" is a part of it.', "Restore another dump."
        )


def list_entries(storage: Storage, prefix: str = "") -> Iterator[Entry]:
    """What is committed under a location, without what belongs to a dump.

    Raises:
        StorageError: The storage cannot be listed.
    """
    return (entry for entry in _everything(storage, prefix) if keys.owner(entry.key) is None)


def free_key(storage: Storage, key: keys.Key) -> str:
    """The key, or the first one of the following microseconds that nothing is stored under."""
    taken = {entry.key for entry in _everything(storage, f"{key}".rpartition("-")[0])}
    taken |= {owner for name in taken if (owner := keys.owner(name))}
    while str(key) in taken:
        key = keys.later(key)
    return str(key)


def sweep(storage: Storage, instance: str, after: timedelta) -> None:
    """Delete manifests and parts of an instance whose dump was never committed, when they are older than `after`.

    Those that cannot be deleted stay, with one warning for all of them: credentials that may only write are good enough
    for dumps. Left-overs that only the storage can see (partial files and uploads) are the storage plugin's to remove.
    """
    dumps: set[str] = set()
    orphans: list[Entry] = []
    limit = datetime.now(timezone.utc) - after
    for entry in _everything(storage, f"{instance}/"):
        if keys.owner(entry.key) is None:
            dumps.add(entry.key)
        elif keys.parse(keys.owner(entry.key) or "") and entry.modified is not None and entry.modified < limit:
            orphans.append(entry)
    refused: list[tuple[str, str]] = []
    for entry in orphans:
        if keys.owner(entry.key) not in dumps:
            try:
                delete(storage, entry.key)
            except exceptions.PgcloneError as error:
                refused.append((entry.key, error.cause))
            else:
                log.info("left_over_deleted", key=entry.key)
    if refused:
        key, cause = refused[0]
        log.warning("left_over_not_deleted", key=key, error=cause, count=len(refused))


def delete(storage: Storage, key: str) -> bool:
    """Delete an object of a storage. Whether it was there.

    Raises:
        StorageError: It cannot be deleted.
    """
    try:
        return bool(storage.delete(location=storage.location, key=key))
    except exceptions.PgcloneError:
        raise
    except Exception as error:
        words = getattr(error, "strerror", None) or error
        raise exceptions.StorageError(f'"{key}" in {storage.location} could not be deleted: {words}') from error


def discard_manifest(storage: Storage, manifest: Manifest) -> None:
    """Delete the manifest of a dump that could not be committed.

    A dump that is listed needs its manifest, whatever went wrong; and another run's, under the same key, is not ours.
    """
    key = manifest.key
    with contextlib.suppress(Exception):  # the sweep gets it later; the error that brought us here counts
        listed = any(entry.key == key for entry in storage.list(location=storage.location, prefix=key))
        if not listed and read_manifest(storage, key) == manifest:
            storage.delete(location=storage.location, key=f"{key}.json")


def _everything(storage: Storage, prefix: str) -> Iterator[Entry]:
    try:
        yield from storage.list(location=storage.location, prefix=prefix)
    except exceptions.PgcloneError:
        raise
    except Exception as error:
        words = getattr(error, "strerror", None) or error
        raise exceptions.StorageError(f"{storage.location} cannot be listed: {words}") from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
