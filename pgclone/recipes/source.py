"""What dumps and online copies read: a database as one snapshot shows it, and the plan for reading it in parallel."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pgclone import parts, plan, process
from pgclone.crew import Crew
from pgclone.database import catalogue, models, rows
from pgclone.database.catalogue import Shape
from pgclone.database.connection import Server, Session
from pgclone.parts import Exporter, Reader
from pgclone.plan import Plan, Relation
from pgclone.process import Tools
from pgclone.recipes.project import Project
from pgclone.streams import BLOCK

_BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_WATCH_SECONDS = 0.5
_TID_RANGE_SCANS = 140000
"""Since PostgreSQL 14, a condition on ctid reads no more than the blocks that it names."""


@dataclass(frozen=True)
class Source:
    """An exported snapshot, held by the open transaction of `session`, and what is to be read in it.

    Args:
        excluded: Tables whose rows are left out.
    """

    tools: Tools
    session: Session
    server: Server
    database: str
    snapshot: str
    shape: Shape
    plan: Plan
    excluded: tuple[Relation, ...]
    lock_timeout: str

    @contextlib.contextmanager
    def pg_dump(self, workers: Crew) -> Iterator[Reader]:
        """The archive: everything but the rows that are excluded or that the plan has as parts.

        A clean end of the block means that pg_dump has succeeded.
        """
        begun = threading.Event()
        application = f"pg_dump {self.snapshot}"
        dumping = process.pg_dump(
            self.tools,
            self.server.conninfo(self.database, application=application),
            snapshot=self.snapshot,
            excluded=[table.pattern for table in (*self.excluded, *self.plan.tables)],
            encoding=self.shape.encoding,
            lock_timeout=self.lock_timeout,
        )

        def watch(workers: Crew) -> None:
            while not begun.wait(_WATCH_SECONDS):
                workers.check()
                rows.refuse_deadlock(self.session, application)

        with dumping as child, workers.ending(child.terminate):
            workers.begin(watch)

            def read(size: int) -> bytes:
                block = child.read(size)
                begun.set()  # pg_dump writes nothing before it has locked everything
                if not block:
                    process.succeed(child)
                return block

            def prove(_: int) -> None:
                while read(BLOCK):  # whoever reads may have had enough before the end
                    pass

            try:
                yield Reader(read, prove, child.terminate)
            finally:
                begun.set()

    def export(self) -> Exporter:
        """The rows that the plan has as parts."""
        conninfo = self.server.conninfo(self.database)
        chunks, encoding = self.plan.chunks, self.shape.encoding
        return parts.export(self.tools, conninfo, self.session, encoding, chunks, self.snapshot, self.lock_timeout)


@dataclass(frozen=True)
class Survey:
    """The bytes of all tables that are to be read, by their OIDs, and what would be read in parallel if nothing changed."""

    sizes: Mapping[int, int]
    plan: Plan


def survey(project: Project, session: Session) -> Survey:
    """Look at a database, without waiting for anybody who changes it.

    Raises:
        ValueError: What is to be left out does not exist.
    """
    with session.transaction(_BEGIN):
        rows.limit_waits(session, project.options.lock_timeout)
        sizes = catalogue.sizes(session, _find_excluded(project, session))
        large = {oid: size for oid, size in sizes.items() if size >= plan.LARGE}
        return Survey(sizes, _plan(project, session, large, sum(sizes.values())))


@contextlib.contextmanager
def open_source(project: Project, tools: Tools, session: Session, found: Survey) -> Iterator[Source]:
    """Plan, lock the tables that become parts, and export a snapshot for the time of the block.

    Locks come before the snapshot: a table that was emptied by TRUNCATE between the two would be read without its rows. So
    the plan is made twice, once to know what to lock, and once in the snapshot; and what somebody changes at this moment
    is waited for.
    """
    options = project.options
    changing = catalogue.changing(session, found.sizes)
    with session.transaction(_BEGIN):
        rows.lock(session, [*changing, *found.plan.tables], options.lock_timeout)
        snapshot = session.value("SELECT pg_export_snapshot()")
        locked = catalogue.locked(session)  # by their names, which others may have by now
        known = {table.oid: found.sizes[table.oid] for table in found.plan.tables if table.oid in locked}
        yield Source(
            tools,
            session,
            project.server,
            project.database,
            snapshot,
            catalogue.shape(session),
            _plan(project, session, known, sum(found.sizes.values())),
            _find_excluded(project, session),
            options.lock_timeout,
        )


def _plan(project: Project, session: Session, sizes: Mapping[int, int], total: int) -> Plan:
    chunks = session.version >= _TID_RANGE_SCANS
    return plan.make(catalogue.candidates(session, sizes), total, project.options.jobs, chunks=chunks)


def _find_excluded(project: Project, session: Session) -> tuple[Relation, ...]:
    options = project.options
    return catalogue.find_tables(session, models.find_tables(project.server, options.exclude), options.exclude_tables)
