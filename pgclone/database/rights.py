"""What stands in the way of a swap, found out before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pgclone import exceptions
from pgclone.database import properties
from pgclone.database.connection import Server, Session
from pgclone.database.properties import quoted


@dataclass(frozen=True)
class Client:
    """A session that uses a database.

    Args:
        user: The role that logged in; None if that is not known yet.
        application: What it calls itself.
        endable: Whether our role may end it.
    """

    pid: int
    user: str | None
    application: str
    endable: bool
    superuser: bool

    def __str__(self) -> str:
        details = [f"role {quoted(self.user)}" if self.user else "holds a lock on the database", self.application]
        return f"pid {self.pid} ({', '.join(filter(None, details))})"


def check(server: Server, session: Session, database: str) -> None:
    """Make sure that a swap of this database can be done, as far as can be known now.

    It changes nothing and disturbs no client. A database that does not exist yet needs the right to create it only.

    Args:
        session: A maintenance session.

    Raises:
        NotPossible: With everything that is in the way, and the statements that clear it.
    """
    me = session.value("SELECT current_user::text")
    problems = list(_problems(server, session, database, me))
    if problems:
        raise exceptions.NotPossible(
            f"Role {quoted(me)} cannot replace database {quoted(database)} on {server}:\n"
            + "\n".join(f"- {problem}" for problem in problems),
            "Nothing was touched. Clear what is named, as a superuser where the role may not, and try again.",
        )


def obstacles(session: Session, database: str, oid: int) -> Iterator[str]:
    """What PostgreSQL does not let a database be renamed or dropped with, or would lose without a word."""
    for (gid,) in session.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s", [database]):
        literal = "'" + gid.replace("'", "''") + "'"
        yield f"It has a prepared transaction. In it: COMMIT PREPARED {literal} or ROLLBACK PREPARED {literal}"
    for (name,) in session.execute("SELECT subname::text FROM pg_subscription WHERE subdbid = %s", [oid]):
        yield f"It has a subscription, which would go on in the old database. In it: DROP SUBSCRIPTION {quoted(name)}"
    slots = session.execute(
        "SELECT slot_name::text, active_pid FROM pg_replication_slots WHERE database = %s", [database]
    )
    for name, pid in slots:
        use = f"used by pid {pid}" if pid else "unused"
        yield (
            f"It has a logical replication slot ({use}), which would stay with the old database. "
            f"SELECT pg_drop_replication_slot('{name}')"
        )
    walsenders = session.execute(
        "SELECT pid FROM pg_stat_activity WHERE datid = %s AND backend_type = 'walsender' AND pid <> ALL (%s)",
        [oid, [pid for _, pid in slots if pid]],
    )
    for (pid,) in walsenders:
        yield f"A replication client reads it. SELECT pg_terminate_backend({pid})"


def clients(session: Session, oid: int, *, but: tuple[int, ...] = ()) -> list[Client]:
    """Who uses a database, or is about to: its sessions, then whoever holds a lock on the database itself.

    A session that starts holds that lock until it is to be seen in pg_stat_activity, so the locks are looked at first.
    Autovacuum workers, which belong to no role, are left out: PostgreSQL ends them itself.
    """
    rows = session.execute(
        """SELECT used.pid, rolname::text, coalesce(application_name, ''), sees AND coalesce(
            (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) OR NOT rolsuper AND (
                pg_has_role(r.oid, 'USAGE') OR pg_has_role('pg_signal_backend', 'USAGE')), false),
            coalesce(rolsuper, false)
        FROM (
            SELECT pid, false AS sees, NULL::oid AS usesysid, NULL AS application_name FROM pg_locks
            WHERE locktype = 'object' AND classid = 'pg_database'::regclass AND objid = %s AND granted
            UNION ALL
            SELECT pid, true, usesysid, application_name FROM pg_stat_activity
            WHERE datid = %s AND usesysid IS NOT NULL
        ) AS used LEFT JOIN pg_roles AS r ON r.oid = usesysid WHERE used.pid <> ALL (%s)""",
        [oid, oid, list(but)],
    )
    return [Client(*row) for row in rows]


def _problems(server: Server, session: Session, database: str, me: str) -> Iterator[str]:
    if not session.value("SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"):
        yield f"The role may not create databases. ALTER ROLE {quoted(me)} CREATEDB"
    primary = properties.read(session, database)
    if primary is None:
        return
    if database == server.maintenance:
        yield "It is the maintenance database, which cannot be renamed. Set PGCLONE_CONN_DB to another one"
    yield from obstacles(session, database, primary.oid)
    if not session.value("SELECT pg_has_role(%s, 'USAGE')", [primary.owner]):
        yield (
            f"The role is neither its owner nor a member of it. GRANT {quoted(primary.owner)} TO {quoted(me)}, "
            f"or ALTER DATABASE {quoted(database)} OWNER TO {quoted(me)}"
        )
    else:
        yield from properties.unreplayable(session, primary)
    yield from _unendable(session, primary.oid, me)


def _unendable(session: Session, oid: int, me: str) -> Iterator[str]:
    others = [client for client in clients(session, oid) if client.user and not client.endable]
    for client in others:
        if client.superuser:
            yield f"Only a superuser can end the session of {client}. SELECT pg_terminate_backend({client.pid})"
        else:
            yield f"The role may not end the session of {client}. GRANT pg_signal_backend TO {quoted(me)}"
