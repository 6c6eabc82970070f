"""What dumps and online copies read: a database as one snapshot shows it, and the plan for reading it in parallel."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pgclone import parts, plan, process
from pgclone.database import catalogue, models, rows
from pgclone.database.catalogue import Shape
from pgclone.database.connection import Conninfo, Session
from pgclone.parts import Exporter
from pgclone.plan import Plan, Relation
from pgclone.process import Child, Tools
from pgclone.recipes.project import Project

_BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
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
    conninfo: Conninfo
    snapshot: str
    shape: Shape
    plan: Plan
    excluded: tuple[Relation, ...]
    lock_timeout: str

    def pg_dump(self) -> contextlib.AbstractContextManager[Child]:
        """The archive: everything but the rows that are excluded or that the plan has as parts."""
        return process.pg_dump(
            self.tools,
            self.conninfo,
            snapshot=self.snapshot,
            excluded=[
                *(relation.pattern for relation in self.excluded),
                *(table.pattern for table in self.plan.tables),
            ],
            encoding=self.shape.encoding,
            lock_timeout=self.lock_timeout,
        )

    def export(self) -> Exporter:
        """The rows that the plan has as parts."""
        return parts.export(
            self.tools, self.conninfo, self.session, self.shape.encoding, self.plan.chunks, self.snapshot
        )


@contextlib.contextmanager
def open_source(project: Project, tools: Tools, session: Session) -> Iterator[Source]:
    """Plan, lock the tables that become parts, and export a snapshot for the time of the block.

    Locks come before the snapshot: a table that was emptied by TRUNCATE between the two would be read without its rows. So
    the plan is made twice, once to know what to lock, and once in the snapshot.
    """
    wanted = find_plan(project, session).tables
    with session.transaction(_BEGIN):
        rows.lock(session, wanted, project.options.lock_timeout)
        snapshot = session.value("SELECT pg_export_snapshot()")
        excluded = _find_excluded(project, session)
        yield Source(
            tools,
            session,
            project.server.conninfo(project.database),
            snapshot,
            catalogue.shape(session),
            _plan(project, session, excluded, {table.oid for table in wanted}),
            excluded,
            project.options.lock_timeout,
        )


def find_plan(project: Project, session: Session) -> Plan:
    """What would be read in parallel now, if nothing changed."""
    with session.transaction(_BEGIN):
        rows.limit_waits(session, project.options.lock_timeout)
        return _plan(project, session, _find_excluded(project, session))


def _plan(
    project: Project, session: Session, excluded: tuple[Relation, ...], among: Collection[int] | None = None
) -> Plan:
    candidates, total = catalogue.candidates(session, excluded, plan.LARGE)
    return plan.make(
        [table for table in candidates if among is None or table.oid in among],
        total,
        project.options.jobs,
        chunks=session.version >= _TID_RANGE_SCANS,
    )


def _find_excluded(project: Project, session: Session) -> tuple[Relation, ...]:
    options = project.options
    return catalogue.find_tables(session, models.find_tables(project.server, options.exclude), options.exclude_tables)
