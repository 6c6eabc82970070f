"""What a dump consists of, and the order in which it is committed (docs/archive-format.md).

Under the key `K`: `K` itself is a custom-format archive of pg_dump inside a codec, `K.parts/NNNNN` the rows of large tables,
`K.json` the manifest. Parts are committed first. The manifest is written when `K` is complete but not yet committed: a key
that is listed has its manifest, and all parts that the manifest names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
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
    """A table of the dump, with what the catalogue said of it: estimated rows, and bytes without indexes."""

    name: str
    rows: int
    bytes: int
    excluded: bool = False


@dataclass(frozen=True)
class Part:
    """The rows of a table, or of some blocks of it, as COPY writes them, stored beside the archive.

    Args:
        number: Counts from 1.
        oid: Of the table in the dumped database: the archive's table of contents has it.
        schema, table: Whose rows they are.
        columns: In the order of the rows' values.
        rows: Exactly.
        raw_size: Bytes inside the codecs.
        stored_size, sha256: Of the bytes as stored.
        first_block, end_block: The blocks of the table's heap that they came from, the last one excluded; None: all up to,
            or from there.
    """

    number: int
    oid: int
    schema: str
    table: str
    columns: tuple[str, ...]
    rows: int
    raw_size: int
    stored_size: int
    sha256: str
    first_block: int | None = None
    end_block: int | None = None

    @property
    def digest(self) -> Digest:
        return Digest(self.stored_size, self.sha256)

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}"


def part_key(key: str, number: int) -> str:
    """Where a part of a dump is stored."""
    return f"{key}.parts/{number:05d}"


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
        parts: What is stored beside `K`.
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
    parts: tuple[Part, ...] = ()
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
        body["codecs"] = tuple(body["codecs"])
        body["parts"] = tuple(Part(**{**part, "columns": tuple(part["columns"])}) for part in body["parts"])
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


def check_parts(storage: Storage, key: str, parts: Collection[Part]) -> None:
    """Look whether all parts of a dump are there, and as large as they were.

    Raises:
        CorruptDump: One is not.
    """
    if not parts:
        return
    sizes = {entry.key: entry.size for entry in _everything(storage, f"{key}.parts/")}
    for part in parts:
        name = part_key(key, part.number)
        if name not in sizes:
            raise exceptions.CorruptDump(
                f'"{name}" is gone, which is a part of the dump "{key}": rows of {part}.', "Restore another dump."
            )
        if sizes[name] not in (None, part.stored_size):
            raise exceptions.CorruptDump(
                f'"{name}", a part of the dump "{key}", has {sizes[name]} bytes where the manifest has {part.stored_size}.',
                "Restore another dump.",
            )


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
    owned: dict[str, list[Entry]] = {}
    limit = datetime.now(timezone.utc) - after
    for entry in _everything(storage, f"{instance}/"):
        owner = keys.owner(entry.key)
        if owner is None:
            dumps.add(entry.key)
        elif keys.parse(owner):
            owned.setdefault(owner, []).append(entry)
    refused: list[tuple[str, str]] = []
    for owner, entries in owned.items():
        # A run that lives longer than `after` still adds parts.
        if owner in dumps or not all(entry.modified is not None and entry.modified < limit for entry in entries):
            continue
        for entry in entries:
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


def discard(storage: Storage, key: str, parts: Iterable[Part], manifest: Manifest | None) -> None:
    """Delete what was committed of a dump that could not be committed itself.

    A dump that is listed needs its manifest and its parts, whatever went wrong; and another run's manifest, under the same
    key, is not ours. What cannot be deleted now is left to the sweep.
    """
    with contextlib.suppress(Exception):  # the error that brought us here counts
        if any(entry.key == key for entry in storage.list(location=storage.location, prefix=key)):
            return
        if manifest and read_manifest(storage, key) == manifest:
            storage.delete(location=storage.location, key=f"{key}.json")
        for part in parts:
            storage.delete(location=storage.location, key=part_key(key, part.number))


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
