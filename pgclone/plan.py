"""Plans a parallel dump: which tables leave the archive and become parts, in which pieces and in which order. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MiB = 1024**2

LARGE = 16 * MiB
"""Smaller tables are never worth a stream of their own."""

CHUNK = 1024 * MiB
"""No chunk of a table is larger."""

SMALL_CHUNK = 64 * MiB
"""No table is cut into smaller chunks, whatever the number of jobs."""

MOST_TABLES = 1000
"""pg_dump looks for each table that it leaves out with a query of its own."""


@dataclass(frozen=True)
class Relation:
    """A table, by its OID and its name."""

    oid: int
    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def pattern(self) -> str:
        """The pattern (psql docs, Patterns) that matches this table and no other."""
        return ".".join('"' + part.replace('"', '""') + '"' for part in (self.schema, self.name))


@dataclass(frozen=True)
class Candidate(Relation):
    """A table that could leave the archive.

    Args:
        columns: Those that COPY takes, in order.
        bytes: Of its rows, TOAST included, as the catalogue says.
        blocks: Of its heap.
    """

    columns: tuple[str, ...]
    bytes: int
    blocks: int


@dataclass(frozen=True)
class Chunk:
    """A table, or the rows in some blocks of its heap: from `first` on (None: from the beginning) and before `end` (None:
    to the end, wherever that will be)."""

    table: Candidate
    bytes: int
    first: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        if self.first is None and self.end is None:
            return str(self.table)
        return f"{self.table}, blocks {self.first or 0} to {'the last' if self.end is None else self.end - 1}"


@dataclass(frozen=True)
class Plan:
    """What becomes parts, biggest first, and the bytes of the tables that stay in the archive."""

    jobs: int
    chunks: tuple[Chunk, ...] = ()
    kept: int = 0

    @property
    def tables(self) -> tuple[Candidate, ...]:
        return tuple({chunk.table.oid: chunk.table for chunk in self.chunks}.values())

    def describe(self) -> Iterator[str]:
        """For people: a line for the archive, and one for each part."""
        yield f"{self.jobs} job{'s'[: self.jobs - 1]}, {len(self.chunks)} part{'s'[: len(self.chunks) != 1]}"
        yield f"{_megabytes(self.kept)}  archive: all tables that are not named below, and everything else"
        for number, chunk in enumerate(self.chunks, 1):
            yield f"{_megabytes(chunk.bytes)}  part {number:05d}: {chunk}"


def make(candidates: Sequence[Candidate], total: int, jobs: int, *, chunks: bool = True) -> Plan:
    """Share out the work of a dump among `jobs` streams, of which the archive itself is the first.

    The largest tables leave the archive until it is half of a fair share or less. Pieces of about half a share come out
    even enough, and fewer pieces cost less.

    Args:
        total: Bytes of all tables that are dumped.
        chunks: Whether the server can scan a part of a table (PostgreSQL 14).
    """
    if jobs == 1:
        return Plan(jobs, kept=total)
    piece = total // jobs // 2
    found: list[Chunk] = []
    kept = total
    for table in sorted(candidates, key=lambda table: -table.bytes)[:MOST_TABLES]:
        if table.bytes < LARGE or kept <= piece:
            break
        found += _cut(table, min(CHUNK, max(SMALL_CHUNK, piece))) if chunks else [Chunk(table, table.bytes)]
        kept -= table.bytes
    return Plan(jobs, tuple(sorted(found, key=lambda chunk: -chunk.bytes)), kept)


def _cut(table: Candidate, size: int) -> Iterator[Chunk]:
    count = max(1, min(-(-table.bytes // size), table.blocks))
    edges = [table.blocks * number // count for number in range(1, count)]
    for first, end in zip([None, *edges], [*edges, None]):
        yield Chunk(table, table.bytes // count, first, end)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:>12,.1f} MB"
