"""The rows of large tables on their way: out of a server into storage, and out of storage, or another server, into one.

Rows go through pipes and codecs in blocks, never one by one. They are counted on both ways: in COPY's text format each row
ends with the only line feed that it has (PostgreSQL docs, COPY).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pgclone import exceptions, process, streams
from pgclone.archive import Part, part_key
from pgclone.crew import Crew
from pgclone.database import rows as statements
from pgclone.database.connection import Conninfo, Session
from pgclone.host import Storage
from pgclone.plan import Chunk
from pgclone.process import Child, Tools
from pgclone.streams import BLOCK, Source
from pgclone.types import Codec

Progress = Callable[[int], None]
"""Called with each number of bytes that went through."""


@dataclass(frozen=True)
class Exporter:
    """Reads chunks of tables as one snapshot shows them. `statements` are psql's for each chunk."""

    tools: Tools
    conninfo: Conninfo
    encoding: str
    statements: Mapping[Chunk, Sequence[str]]

    @contextlib.contextmanager
    def copy(self, chunk: Chunk, crew: Crew) -> Iterator[Child]:
        """The rows of a chunk, as standard output of a child. A clean end of the block means that they are complete."""
        of_the_block: BaseException | None = None
        try:
            copying = process.copy_out(self.tools, self.conninfo, self.statements[chunk], self.encoding)
            with copying as child, crew.ending(child.terminate):
                try:
                    yield child
                except BaseException as error:
                    of_the_block = error
                    raise
        except (exceptions.ServerError, exceptions.ToolFailed) as error:
            if error is of_the_block:
                raise
            raise statements.explain(error, chunk.table) from error


def export(
    tools: Tools,
    conninfo: Conninfo,
    session: Session,
    encoding: str,
    chunks: Sequence[Chunk],
    snapshot: str,
    lock_timeout: str,
) -> Exporter:
    """An exporter for these chunks."""
    prepared = {chunk: statements.copy_out(session, chunk, snapshot, lock_timeout) for chunk in chunks}
    return Exporter(tools, conninfo, encoding, prepared)


def dump_part(
    exporter: Exporter,
    storage: Storage,
    key: str,
    number: int,
    chunk: Chunk,
    codec: Codec | None,
    level: int,
    progress: Progress,
    crew: Crew,
) -> Part:
    """Store the rows of a chunk, and return what they can be proven by."""
    count = 0
    with streams.store(storage, part_key(key, number), chunk.bytes) as stored:
        with streams.encode(stored, codec, level) as sink, exporter.copy(chunk, crew) as child:
            while block := child.read(BLOCK):
                crew.check()
                sink.write(block)
                count += block.count(b"\n")
                progress(len(block))
        crew.check()
    return Part(
        number=number,
        oid=chunk.table.oid,
        schema=chunk.table.schema,
        table=chunk.table.name,
        columns=chunk.table.columns,
        rows=count,
        raw_size=sink.raw_size,
        stored_size=stored.size,
        sha256=stored.digest.sha256,
        first_block=chunk.first,
        end_block=chunk.end,
    )


@dataclass(frozen=True)
class Rows:
    """Rows to be loaded.

    Args:
        oid, schema, table: Whose they are.
        statements: psql's, which begin a transaction and end with COPY from STDIN.
        open: Opens the stream that they come from.
    """

    oid: int
    schema: str
    table: str
    statements: Sequence[str]
    open: Callable[[Crew], contextlib.AbstractContextManager[Reader]]


@dataclass(frozen=True)
class Reader:
    """A stream of rows, or an archive.

    Args:
        read: Reads up to that many bytes; none at the end.
        prove: Raises unless that was all of it, with that many rows.
        end: Lets somebody who waits in `read` go on, with an error or with no bytes.
    """

    read: Callable[[int], bytes]
    prove: Callable[[int], None]
    end: Callable[[], None] = lambda: None


def stored(storage: Storage, key: str, part: Part, codec: Codec | None, session: Session) -> Rows:
    """The rows of a part of a dump."""

    @contextlib.contextmanager
    def open_part(crew: Crew) -> Iterator[Reader]:
        with streams.open_source(storage, part_key(key, part.number), lambda head: codec) as source:

            def read(size: int) -> bytes:
                try:
                    return source.read(size)
                except exceptions.CorruptDump as error:
                    raise exceptions.CorruptDump(f"{error.cause}. It has rows of {part}.", error.remedy) from error

            yield Reader(read, lambda count: _prove(part, source, count))

    return Rows(
        part.oid, part.schema, part.table, statements.copy_in(session, part.schema, part.table, part.columns), open_part
    )


def exported(exporter: Exporter, chunk: Chunk, session: Session) -> Rows:
    """The rows of a chunk of another database's table."""

    @contextlib.contextmanager
    def open_chunk(crew: Crew) -> Iterator[Reader]:
        with contextlib.ExitStack() as stack:
            child = stack.enter_context(exporter.copy(chunk, crew))
            yield Reader(child.read, lambda count: stack.close())

    table = chunk.table
    return Rows(
        table.oid,
        table.schema,
        table.name,
        statements.copy_in(session, table.schema, table.name, table.columns),
        open_chunk,
    )


def load(tools: Tools, conninfo: Conninfo, encoding: str, rows: Rows, progress: Progress, crew: Crew) -> None:
    """Load rows into a database. They are committed when they are proven to be all there.

    Raises:
        CorruptDump: They are not what was dumped.
        ServerError, ToolFailed: They could not be loaded.
    """
    count = 0
    try:
        copying = process.copy_in(tools, conninfo, rows.statements, encoding)
        with rows.open(crew) as reader, copying as loader, crew.ending(loader.child.terminate):
            while block := reader.read(BLOCK):
                crew.check()
                loader.write(block)
                count += block.count(b"\n")
                progress(len(block))
            reader.prove(count)
            crew.check()
            loader.commit(count)
    except (exceptions.ServerError, exceptions.ToolFailed) as error:
        raise exceptions.ToolFailed(
            f"The rows of {rows.schema}.{rows.table} could not be loaded: {error.cause}", error.remedy
        ) from error


def _prove(part: Part, source: Source, count: int) -> None:
    digest = source.drain()
    if (digest, source.raw_size, count) != (part.digest, part.raw_size, part.rows):
        raise exceptions.CorruptDump(
            f"Part {part.number:05d}, rows of {part}, is not what was dumped: {count} rows in {digest.size} bytes with SHA-256 "
            f"{digest.sha256[:16]}…, where the manifest has {part.rows} rows in {part.stored_size} bytes with "
            f"{part.sha256[:16]}….",
            "Nothing was swapped in. Restore another dump.",
        )
