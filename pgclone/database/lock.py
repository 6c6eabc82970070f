"""Locks that outlive no one: session-level advisory locks in the maintenance database.

A lock is gone as soon as the session that holds it is, whatever ended it. Advisory locks belong to one database,
so all of them are taken in the maintenance database (PostgreSQL docs, 13.3.5).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pgclone import exceptions
from pgclone.database.connection import Server, Session

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Lock:
    """A lock that is held. Its `session` may be used for other maintenance statements."""

    name: str
    session: Session = field(repr=False)

    def verify(self) -> None:
        """Make sure that the lock is still held.

        Raises:
            Locked: It was lost: the session was terminated, or its connection is gone.
        """
        try:
            held = _holds(self.session, self.name)
        except exceptions.ServerError as error:
            raise _lost(self.name) from error
        if not held:
            raise _lost(self.name)


@contextlib.contextmanager
def lock(
    server: Server, database: str, *, wait: bool = True, waiting: Callable[[str], None] = lambda holder: None
) -> Iterator[Lock]:
    """Hold the lock of a database, in a session of its own, until the end of the block.

    Args:
        wait: Wait for another run to end, however long it takes.
        waiting: Called once, if there is someone to wait for, with a description of the holder.

    Raises:
        Locked: Another run holds it, and `wait` is False.
        ServerError: The server cannot be reached.
    """
    with server.connect() as session:
        said = False
        while not take(session, database):
            holder = _holder(session, database)
            if holder is None:  # gone in this moment
                continue
            if not wait:
                raise exceptions.Locked(
                    f'Another run is at work on database "{database}": {holder}.',
                    "Wait for it to end, or let this command wait for it.",
                )
            if not said:
                waiting(holder)
                said = True
            time.sleep(_POLL_SECONDS)
        yield Lock(database, session)
        # Free now: the server may notice a little later that the session is closed.
        with contextlib.suppress(exceptions.ServerError):
            session.execute("SELECT pg_advisory_unlock_all()")


def take(session: Session, name: str) -> bool:
    """Take a lock for as long as the session, in the maintenance database, lives. False: another holds it."""
    return bool(session.value(f"SELECT pg_try_advisory_lock({_KEY})", [name]))


def is_free(session: Session, name: str) -> bool:
    """Whether no session holds this lock.

    It only looks, so it leaves no lock behind and stands in nobody's way. Find what the lock protects first, then
    ask: a run takes its lock before it makes anything, so what is there while the lock is free was left behind.

    Args:
        session: A session in the maintenance database.
    """
    return not session.value(f"SELECT EXISTS (SELECT {_OF_LOCK})", [name])


_KEY = "hashtextextended('pgclone:' || %s, 0)"

# A bigint key is shown as two halves, with objsubid 1 (PostgreSQL docs, 53.13).
_OF_LOCK = f"""
    FROM pg_locks AS l, {_KEY} AS key
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND l.classid::bigint = (key >> 32) & 4294967295 AND l.objid::bigint = key & 4294967295"""


def _holds(session: Session, name: str) -> bool:
    return bool(session.value(f"SELECT EXISTS (SELECT {_OF_LOCK} AND l.pid = pg_backend_pid())", [name]))


def _holder(session: Session, name: str) -> str | None:
    """Who holds the lock. A plain role does not see since when another role's session lives."""
    rows = session.execute(
        f"""WITH holder AS (SELECT l.pid {_OF_LOCK})
        SELECT pid, usename, application_name,
            to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')
        FROM holder LEFT JOIN pg_stat_activity USING (pid)""",
        [name],
    )
    if not rows:
        return None
    pid, user, application, since = rows[0]
    parts = [f"{application or 'a session'} with pid {pid}", f'of role "{user}"' if user else ""]
    return " ".join(filter(None, [*parts, f"since {since} UTC" if since else ""]))


def _lost(name: str) -> exceptions.Locked:
    return exceptions.Locked(
        f'The lock of database "{name}" was lost: the session that held it is gone.',
        "Another run may be at work on it now. Nothing was replaced; run the command again.",
    )
