"""The swap: a proven database takes the place of the primary, in one transaction, under the eyes of its clients.

PostgreSQL renames no database that has sessions, and clients that are cut off come back at once. So three sessions
work together. The gate takes a lock that lets clients be, but makes the actor, who wants to rename, wait; behind the
waiting actor every new client waits. The watcher ends the sessions that are left. When there is none, the gate opens
for the actor, who finds the database empty.

Until the actor commits, nothing has happened. If this process dies or freezes, the server rolls back and lets
everybody go, after 1.5 s at the latest.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pgclone import exceptions
from pgclone.database import names, properties, rights
from pgclone.database.connection import Row, Server, Session
from pgclone.database.properties import quoted

if TYPE_CHECKING:
    from psycopg import sql

_Kind = Literal["pre", "post", "swap"]

_TIMEOUTS = {
    "lock_timeout": "1000ms",
    "statement_timeout": "1000ms",  # so long clients wait for a rename that does not come about
    "idle_in_transaction_session_timeout": "5s",
}
_IDLE_AT_THE_END = "500ms"
"""So long they wait, beside that, for a process that is frozen when it holds the primary."""
_PAUSES = (0, 0.2, 0.5, 1, 2)
"""Seconds before each attempt, in which clients can work. The last one repeats."""
_LOOK_SECONDS = 0.003
_PATIENCE = 15
"""Looks after which the attempt fails because of a session that the role may not end."""
_PASSING = frozenset({None, "55006", "55P03", "57014", "57P01", "25P03", "25P04", "40001", "40P01", "XX000"})
"""SQLSTATEs of what may be over at the next attempt: locked, in use, timed out, terminated, changed by others."""


@dataclass(frozen=True)
class Swapped:
    """Where things are after a swap.

    Args:
        old_database: The old primary's name now; None if there was none.
        leftovers: Databases that nobody needs any more, for the caller to drop.
    """

    old_database: str | None
    leftovers: tuple[str, ...]


def swap(
    server: Server,
    *,
    database: str,
    restored: str,
    run: str,
    keep: bool,
    post: str | None = None,
    lock_still_held: Callable[[], None] = lambda: None,
    attempts: int = 8,
) -> Swapped:
    """Give the name `database`, and all that belongs to it, to the database `restored`.

    Whatever happens, and whenever, the name belongs to either the old or the restored database. Sessions on all that
    is renamed are ended. An attempt holds clients up for some 50 ms as a rule, and for 1.5 s at most.

    Args:
        restored: The proven database, marked as made by pgclone.
        run: The run that this is part of, for names and markers.
        keep: The old database stays, as `…__pre`. Otherwise it becomes `…__swap`, to be dropped.
        post: With `keep`: a copy of `restored`, marked as well, which becomes `…__post`.
        lock_still_held: Called right before the primary is touched. What it raises ends the swap.
        attempts: How often to try.

    Raises:
        NotPossible: Found before anything was touched: a database that pgclone did not make has a name that is
            needed, or PostgreSQL allows no rename.
        SwapFailed: Everything was rolled back.
        ServerError: The server cannot be reached any more. The name belongs to one of the two databases.
        Locked: By `lock_still_held`.
    """
    with server.connect() as session:
        plan = _plan(session, database, restored, run, keep, post)
    failure = None
    for attempt in range(attempts):
        time.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
        failure = _attempt(server, plan, lock_still_held)
        if failure is None:
            return Swapped(plan.primary.to if plan.primary else None, plan.leftovers)
        if failure.sqlstate not in _PASSING:
            break
    raise exceptions.SwapFailed(
        f"Database {quoted(database)} was not replaced, it is as it was. {failure.cause if failure else ''}",
        (failure and failure.remedy) or "Clear what is named, then run the command again.",
    ) from failure


def check_names(session: Session, database: str, *, keep: bool) -> None:
    """Make sure, long before the swap, that the names it needs are free or taken by what pgclone made for it.

    Args:
        session: A maintenance session.

    Raises:
        NotPossible: Another database has one of the names, or another role's.
    """
    for kind in _kinds(keep):
        move = _out_of_the_way(session, database, kind, names.new_run())
        owner = move and session.value(
            "SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE oid = %s", [move.oid]
        )
        if move and owner and not session.value("SELECT pg_has_role(%s, 'MEMBER')", [owner]):
            raise exceptions.NotPossible(
                f"Database {quoted(move.name)} is in the way: it belongs to the role {quoted(owner)}.",
                "Have that role drop it, or give it to the one that restores: ALTER DATABASE … OWNER TO …",
            )


@dataclass(frozen=True)
class _Move:
    """A database, known by its OID, that gets another name and perhaps a marker."""

    oid: int
    name: str
    to: str
    marker: names.Marker | None = None


@dataclass(frozen=True)
class _Plan:
    """All that is renamed.

    Args:
        aside: First the restored database, to a name that no client knows, then others; clients need none of them.
        primary: The old primary; None if there is none.
        final: The restored database, from that name to the primary's.
        leftovers: Names that databases have afterwards which nobody needs.
    """

    aside: tuple[_Move, ...]
    primary: _Move | None
    final: _Move
    leftovers: tuple[str, ...]


@dataclass(frozen=True)
class _Sessions:
    gate: Session
    actor: Session
    watcher: Session


@dataclass(frozen=True)
class _Found:
    """A database as it is before the swap."""

    oid: int
    marker: names.Marker | None


def _plan(session: Session, database: str, restored: str, run: str, keep: bool, post: str | None) -> _Plan:
    """Look at everything that takes part, and refuse while nothing is touched."""
    old, kind = _find(session, database), _kinds(keep)[0]
    if old and (problems := list(rights.obstacles(session, database, old.oid))):
        raise exceptions.NotPossible(f"Database {quoted(database)} cannot be replaced.", "\n".join(problems))
    new, hidden = _made_by_us(session, restored), names.work_name(run)
    aside = [_Move(new.oid, restored, hidden)]
    marker = names.Marker(kind, database, run)
    primary = _Move(old.oid, database, names.derive(database, kind), marker) if old else None

    # A reversible swap replaces what an earlier one kept. Without a primary, that may be the only copy: it stays.
    replaced = [each for each in _kinds(keep) if old or (each == "post" and post)]
    unneeded = [move for each in replaced if (move := _out_of_the_way(session, database, each, run))]
    aside += unneeded
    if keep and post:
        marker = names.Marker("post", database, run)
        aside.append(_Move(_made_by_us(session, post).oid, post, names.derive(database, "post"), marker))

    leftovers = [move.to for move in unneeded] + ([primary.to] if primary and not keep else [])
    return _Plan(tuple(aside), primary, _Move(new.oid, hidden, database), tuple(leftovers))


def _attempt(server: Server, plan: _Plan, lock_still_held: Callable[[], None]) -> exceptions.ServerError | None:
    """Try once. Returns what went wrong; None if the restored database has the name."""
    backend = None
    try:
        with _open(server) as sessions:
            actor = sessions.actor
            backend = actor.execute(_BACKEND)[0]
            with actor.transaction():
                for move in plan.aside:
                    _rename(sessions, move)
                carried = _carry_over(actor, plan)
                lock_still_held()
                actor.execute("SELECT set_config('idle_in_transaction_session_timeout', %s, true)", [_IDLE_AT_THE_END])
                if plan.primary:
                    _rename(sessions, plan.primary)
                _finish(actor, plan, carried)
            return None
    except exceptions.ServerError as error:
        failure = error
    # The answer to the COMMIT may be lost: whose the name is decides.
    if backend and _owner_of_name(server, plan.final.to, backend) == plan.final.oid:
        return None
    return failure


def _rename(sessions: _Sessions, move: _Move) -> None:
    """Rename a database in the actor's transaction, whoever uses it or comes back to it.

    Raises:
        ServerError: Some sessions could not be ended (55006), or the server refused.
    """
    from django.db.backends.postgresql.psycopg_any import sql

    gate, actor, watcher = sessions.gate, sessions.actor, sessions.watcher
    statement = sql.SQL("ALTER DATABASE {} RENAME TO {}")
    rename = statement.format(sql.Identifier(move.name), sql.Identifier(move.to))
    clients: list[rights.Client] = []
    refusals = 0
    with contextlib.ExitStack() as closed:
        closed.enter_context(_closed(gate, move.name))
        with _running(actor, rename) as renamed:
            while not renamed.done():
                clients = rights.clients(watcher, move.oid, but=(gate.pid, actor.pid))
                _end(watcher, clients)
                refusals += any(client.user and not client.endable for client in clients)
                if refusals > _PATIENCE:
                    raise _in_use(move, clients)
                if not clients and watcher.value(_WAITS_FOR, [gate.pid, actor.pid]):
                    closed.close()  # the gate opens: only the actor is left, and goes first
                wait([renamed], _LOOK_SECONDS)
            try:
                renamed.result()
            except exceptions.ServerError as error:
                raise (_in_use(move, clients) if clients and error.sqlstate in _PASSING else error) from error


def _carry_over(actor: Session, plan: _Plan) -> properties.Properties | None:
    """Give what belongs to the primary to the restored database, before any client has to wait."""
    primary = properties.read(actor, plan.primary.name) if plan.primary else None
    if primary:
        properties.replay(actor, primary, plan.final.name)
    return primary


def _finish(actor: Session, plan: _Plan, carried: properties.Properties | None) -> None:
    """Give the name to the restored database. From now on clients wait for every statement."""
    from django.db.backends.postgresql.psycopg_any import sql

    _execute(actor, "ALTER DATABASE {} RENAME TO {}", sql.Identifier(plan.final.name), sql.Identifier(plan.final.to))
    now = properties.read(actor, plan.primary.to) if plan.primary else None
    if now and carried and replace(now, name=carried.name) != carried:  # changed by others in between
        properties.replay(actor, now, plan.final.to)
    if now is None:
        _execute(actor, "COMMENT ON DATABASE {} IS NULL", sql.Identifier(plan.final.to))
    elif now.is_template:  # which cannot be dropped
        _execute(actor, "ALTER DATABASE {} IS_TEMPLATE false", sql.Identifier(now.name))
    moves = [*plan.aside[1:], *filter(None, [plan.primary]), plan.final]
    for move in moves:
        if move.marker:
            text = sql.Literal(str(move.marker))
            _execute(actor, "COMMENT ON DATABASE {} IS {}", sql.Identifier(move.to), text)
    found = actor.execute(
        "SELECT oid::bigint, datname::text FROM pg_database WHERE datname = ANY (%s)", [[move.to for move in moves]]
    )
    if set(found) != {(move.oid, move.to) for move in moves}:
        raise exceptions.ServerError(
            f"Database {quoted(plan.final.to)} was replaced by someone else at the same time.", sqlstate="3D000"
        )


def _execute(session: Session, statement: str, *parts: sql.Composable) -> None:
    from django.db.backends.postgresql.psycopg_any import sql

    session.execute(sql.SQL(statement).format(*parts))


@contextlib.contextmanager
def _open(server: Server) -> Iterator[_Sessions]:
    """The three sessions of an attempt, which the server ends soon if nobody speaks to them."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(server.connect(application="pgclone swap")) for _ in range(3)]
        for session in opened:
            for name, value in _TIMEOUTS.items():
                session.execute("SELECT set_config(%s, %s, false)", [name, value])
        yield _Sessions(*opened)


@contextlib.contextmanager
def _closed(gate: Session, database: str) -> Iterator[None]:
    """Hold a lock on the database which sessions, old and new, do not mind, but which a rename waits for."""
    from django.db.backends.postgresql.psycopg_any import sql

    gate.execute("BEGIN")
    try:
        gate.execute(sql.SQL("COMMENT ON DATABASE {} IS NULL").format(sql.Identifier(database)))
        yield
    finally:
        with contextlib.suppress(exceptions.ServerError):  # a lost connection holds no lock
            gate.execute("ROLLBACK")


@contextlib.contextmanager
def _running(session: Session, statement: sql.Composable) -> Iterator[Future[list[Row]]]:
    """Run a statement beside the block. An exception in the block cancels it."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(session.execute, statement)
        try:
            yield future
        finally:
            if not future.done():
                session.cancel()


def _end(watcher: Session, clients: list[rights.Client]) -> None:
    if pids := [client.pid for client in clients if client.endable]:
        with contextlib.suppress(exceptions.ServerError):  # a refusal is seen by who is still there at the next look
            watcher.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [pids])


def _in_use(move: _Move, clients: list[rights.Client]) -> exceptions.ServerError:
    left = {client.pid: client for client in clients}.values()
    return exceptions.ServerError(
        f"Database {quoted(move.name)} is used by sessions that could not be ended: {', '.join(map(str, left))}.",
        "End them, as a superuser if need be, and run the command again: "
        + "; ".join(f"SELECT pg_terminate_backend({client.pid})" for client in left),
        sqlstate="55006",
    )


# A process ID may be given again, not with the same start.
_BACKEND = "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()"
_WAITS_FOR = "SELECT %s = ANY (pg_blocking_pids(%s))"


def _owner_of_name(server: Server, database: str, backend: Row) -> int | None:
    """The OID of the database that has the name after the backend of an actor, whose answer was lost, has ended."""
    with server.connect() as session:
        for _ in range(200):
            still_there = session.execute(
                """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE pid = %s AND backend_start::text = %s""",
                backend,
            )
            if not still_there:
                found = _find(session, database)
                return found.oid if found else None
            time.sleep(0.05)
    raise exceptions.ServerError(
        f"Whether database {quoted(database)} was replaced is not known: pid {backend[0]} does not end.",
        f"It is complete, whichever it is. Look at it once that session is gone: SELECT pg_terminate_backend({backend[0]})",
    )


def _kinds(keep: bool) -> list[_Kind]:
    """What databases a swap leaves behind, that of the old primary first."""
    return ["pre", "post"] if keep else ["swap"]


def _find(session: Session, database: str) -> _Found | None:
    rows = session.execute(
        "SELECT oid::bigint, shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s",
        [database],
    )
    return _Found(rows[0][0], names.parse_marker(rows[0][1])) if rows else None


def _made_by_us(session: Session, database: str) -> _Found:
    found = _find(session, database)
    if found is None:
        raise exceptions.NotPossible(f"Database {quoted(database)} does not exist, so it cannot be swapped in.")
    if found.marker is None and names.run_of_work_name(database) is None:
        raise _not_ours(database)
    return found


def _out_of_the_way(session: Session, database: str, kind: _Kind, run: str) -> _Move | None:
    """The database that has the name which another one is to get, on its way to where it is dropped."""
    name = names.derive(database, kind)
    found = _find(session, name)
    if found is None:
        return None
    if found.marker is None or (found.marker.kind, found.marker.source) != (kind, database):
        raise _not_ours(name)
    return _Move(found.oid, name, names.work_name(run))


def _not_ours(database: str) -> exceptions.NotPossible:
    return exceptions.NotPossible(
        f"Database {quoted(database)} is in the way: pgclone did not make it for this purpose, so it is left alone.",
        f"Rename it, or drop it if nobody needs it: DROP DATABASE {quoted(database)}",
    )
