"""The statements that take rows out of tables and put them into others: COPY, and what its sessions need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pgclone import exceptions
from pgclone.database.connection import Session, preamble
from pgclone.plan import Chunk, Relation

if TYPE_CHECKING:
    from psycopg.sql import Composable, Composed

_LOCK_NOT_AVAILABLE = "55P03"
_LET_REST = "Let migrations and other changes of tables rest while a dump is made, and try again."
_NO_SUCH_TABLE = ("42P01", "3F000")

# As pg_dump and pg_restore set them (setup_connection, _doSetFixedOutputState): values must not change on their way.
_FORMATS = (
    *("SET DateStyle = ISO", "SET IntervalStyle = postgres", "SET extra_float_digits = 3", "SET array_nulls = on"),
    *("SET standard_conforming_strings = on", "SET xmloption = content", "SET client_min_messages = warning"),
    *("SET row_security = off", "SET synchronize_seqscans = off", "SET check_function_bodies = off"),
)


def limit_waits(session: Session, timeout: str) -> None:
    """Let no statement of the transaction wait for a lock for longer than this (lock_timeout; empty: for any time).

    Takes no snapshot, as a SELECT would.
    """
    from django.db.backends.postgresql.psycopg_any import sql

    if timeout:
        session.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(timeout)))


def lock(session: Session, tables: Sequence[Relation], timeout: str) -> None:
    """Lock tables as pg_dump does, so that they stay as they are until the transaction ends.

    Raises:
        ServerError: A lock was waited for longer than `timeout`, or a table has gone.
    """
    limit_waits(session, timeout)
    for table in tables:
        try:
            session.execute(_lock(table))
        except exceptions.ServerError as error:
            if error.sqlstate == _LOCK_NOT_AVAILABLE:
                raise exceptions.ServerError(
                    f"The table {table} stays locked by another session: its lock was not to be had within {timeout}.",
                    "Wait for what changes it (a migration?), or raise PGCLONE_LOCK_TIMEOUT.",
                    sqlstate=error.sqlstate,
                ) from error
            raise _explained(error, table) from error


def copy_out(session: Session, chunk: Chunk, snapshot: str, timeout: str) -> list[str]:
    """The statements that copy a chunk to STDOUT as an exported snapshot shows it.

    The lock is there already: who would have to queue for it, behind a change of the table that waits for the dump itself,
    fails at once instead of waiting for ever.
    """
    from django.db.backends.postgresql.psycopg_any import sql

    return [
        *_setup(session),
        *([session.text(sql.SQL("SET lock_timeout = {}").format(sql.Literal(timeout)))] if timeout else []),
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        session.text(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot))),
        session.text(_lock(chunk.table) + sql.SQL(" NOWAIT")),
        session.text(_copy_out(chunk)),
        "COMMIT",
    ]


def copy_in(session: Session, schema: str, name: str, columns: Sequence[str]) -> list[str]:
    """The statements that begin a transaction and copy STDIN into a table."""
    from django.db.backends.postgresql.psycopg_any import sql

    table = sql.Identifier(schema, name)
    statement = sql.SQL("COPY {}{} FROM STDIN").format(table, _listed(columns))
    return [*_setup(session), "BEGIN", session.text(statement)]


def refuse_deadlock(session: Session, application: str) -> None:
    """Find out whether somebody waits for the locks of this session, and has what another one of ours waits for.

    The server does not see that as a deadlock, as this session is idle.

    Args:
        application: The application_name of the other session.

    Raises:
        ServerError: So it is.
    """
    session.execute("SELECT pg_stat_clear_snapshot()")  # pg_stat_activity stays as it is for a transaction otherwise
    rows = session.execute(  # what other roles' sessions wait for is in pg_locks alone
        """WITH RECURSIVE blocking (pid) AS (
            SELECT unnest(pg_blocking_pids(pid)) FROM pg_stat_activity
            WHERE datname = current_database() AND application_name = %s
            UNION SELECT unnest(pg_blocking_pids(pid)) FROM blocking)
        SELECT b.pid, format('%%s.%%s', n.nspname, c.relname)
        FROM blocking b JOIN pg_locks l ON l.pid = b.pid AND NOT l.granted JOIN pg_class c ON c.oid = l.relation
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE pg_backend_pid() = ANY(pg_blocking_pids(b.pid))""",
        [application],
    )
    for pid, table in rows:
        raise exceptions.ServerError(
            f"The table {table} is about to be changed by another session, process {pid}, which waits for this dump, and this "
            "dump for it.",
            _LET_REST,
            sqlstate=_LOCK_NOT_AVAILABLE,
        )


def explain(error: exceptions.PgcloneError, table: Relation) -> exceptions.PgcloneError:
    """What went wrong with the copying of a table, in words that name it."""
    if isinstance(error, exceptions.ServerError):
        return _explained(error, table)
    return exceptions.ToolFailed(f"The rows of {table} could not be dumped: {error.cause}", error.remedy)


def _explained(error: exceptions.ServerError, table: Relation) -> exceptions.ServerError:
    if error.sqlstate == _LOCK_NOT_AVAILABLE:
        return exceptions.ServerError(
            f"The table {table} is about to be changed by another session, or its indexes are.",
            _LET_REST,
            sqlstate=error.sqlstate,
        )
    if error.sqlstate in _NO_SUCH_TABLE:
        return exceptions.ServerError(
            f"The table {table} was dropped or renamed while the dump began.", "Try again.", sqlstate=error.sqlstate
        )
    return exceptions.ServerError(
        f"The rows of {table} could not be dumped: {error.cause}", error.remedy, sqlstate=error.sqlstate
    )


def _setup(session: Session) -> list[str]:
    from django.db.backends.postgresql.psycopg_any import sql

    return [
        *([session.text(sql.SQL("SET ROLE {}").format(sql.Identifier(session.role)))] if session.role else []),
        "; ".join([*preamble(session.version), *_FORMATS]),
    ]


def _lock(table: Relation) -> Composed:
    from django.db.backends.postgresql.psycopg_any import sql

    name = sql.Identifier(table.schema, table.name)
    statement: Composed = sql.SQL("LOCK TABLE ONLY {} IN ACCESS SHARE MODE").format(name)
    return statement


def _copy_out(chunk: Chunk) -> Composed:
    from django.db.backends.postgresql.psycopg_any import sql

    table = sql.Identifier(chunk.table.schema, chunk.table.name)
    whole: Composed = sql.SQL("COPY {}{} TO STDOUT").format(table, _listed(chunk.table.columns))
    if chunk.first is None and chunk.end is None:
        return whole
    columns = sql.SQL(", ").join(map(sql.Identifier, chunk.table.columns))
    bounds = [("ctid >= {}", chunk.first), ("ctid < {}", chunk.end)]
    where = sql.SQL(" AND ").join(
        sql.SQL(bound).format(sql.Literal(f"({block},0)")) for bound, block in bounds if block is not None
    )
    piece: Composed = sql.SQL("COPY (SELECT {} FROM ONLY {} WHERE {}) TO STDOUT").format(columns, table, where)
    return piece


def _listed(columns: Sequence[str]) -> Composable:
    """A list of columns as COPY takes it; nothing for a table that has none."""
    from django.db.backends.postgresql.psycopg_any import sql

    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    listed: Composable = sql.SQL(" ({})").format(names) if columns else sql.SQL("")
    return listed
