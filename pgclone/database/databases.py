"""Makes, copies, marks and drops databases, and cleans up after runs that died.

A database is made under a work name, closed to connections, and gets its marker, its real name and its opening in one
transaction: what has neither marker nor work name is none of ours, and is never dropped.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from pgclone import exceptions
from pgclone.database import lock as locks
from pgclone.database.connection import Query, Server, Session
from pgclone.database.names import Marker, derive, parse_marker, run_of_work_name, work_name
from pgclone.database.properties import Properties, creation_options
from pgclone.events import log

_NO_SUCH_DATABASE = "3D000"
_OBJECT_IN_USE = "55006"
_TRIES = 3
_FILE_ERRORS = frozenset({"XX000", "58030", "42501"})
"""What a file system that cannot clone may answer: "not supported", "I/O error", "not permitted"; never "no space left"."""

_WORTH_A_CHECKPOINT = 64 << 20
"""The size, in bytes, from which copying files is faster for all its checkpoints than writing everything to the WAL."""


@dataclass(frozen=True)
class Database:
    """A database of the server, and the marker it carries if it is one of ours."""

    name: str
    owner: str
    marker: Marker | None

    @property
    def ours(self) -> bool:
        return self.marker is not None or run_of_work_name(self.name) is not None

    @property
    def temporary(self) -> bool:
        """Whether it belongs to one run, and has the name that the run gave it: who renames one wants to keep it."""
        marker = self.marker
        if marker and (marker.kind == "temp" or marker.kind == "swap"):
            return self.name == derive(marker.source, marker.kind)
        return False


def list_databases(session: Session) -> list[Database]:
    """All databases of the server, by name."""
    rows = session.execute(
        """SELECT datname::text, pg_get_userbyid(datdba)::text, shobj_description(oid, 'pg_database')
        FROM pg_database ORDER BY datname"""
    )
    return [Database(name, owner, parse_marker(comment)) for name, owner, comment in rows]


def find(session: Session, name: str) -> Database | None:
    """The database of that name; None if there is none."""
    rows = session.execute(
        "SELECT pg_get_userbyid(datdba)::text, shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s",
        [name],
    )
    return Database(name, rows[0][0], parse_marker(rows[0][1])) if rows else None


def create(session: Session, run: str, *, template: str, like: Properties | None) -> str:
    """Make an empty database, closed, under a work name.

    Args:
        like: Take its encoding, locale and tablespace; None for the server's defaults.

    Returns:
        The work name.
    """
    from django.db.backends.postgresql.psycopg_any import sql

    name = work_name(run)
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} {} ALLOW_CONNECTIONS false CONNECTION LIMIT 0").format(
        sql.Identifier(name), sql.Identifier(template), creation_options(like) if like else sql.SQL("")
    )
    session.execute(statement)
    return name


def copy(
    server: Server, session: Session, run: str, *, source: str, strategy: str = "", kill: bool = True
) -> tuple[str, int]:
    """Copy a database with CREATE DATABASE … TEMPLATE, closed, under a work name.

    PostgreSQL allows no other session on the source meanwhile. Sessions that try to connect wait for the end of the copy.

    Args:
        strategy: `wal_log` or `file_copy` (PostgreSQL 15); empty for the fastest, with files cloned where that can be.
        kill: End the sessions on the source; otherwise refuse when there are any.

    Returns:
        The work name, and how many sessions were ended.

    Raises:
        NotPossible: There are sessions on the source, and they were not to be ended, or could not be.
    """
    from django.db.backends.postgresql.psycopg_any import sql

    check_strategy(strategy)
    if strategy and session.version < 150000:
        raise exceptions.NotPossible(
            "The server knows no strategies for copies: they came with PostgreSQL 15.",
            "Leave --strategy out.",
        )
    name = work_name(run)
    chosen = strategy or _choose_strategy(session, source)
    option = sql.SQL("STRATEGY {}").format(sql.Literal(chosen)) if chosen else sql.SQL("")
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} {} ALLOW_CONNECTIONS false CONNECTION LIMIT 0").format(
        sql.Identifier(name), sql.Identifier(source), option
    )
    if not kill and (sessions := _sessions(session, source)):
        raise exceptions.NotPossible(
            f'Database "{source}" is in use by {len(sessions)} session{"s"[: len(sessions) - 1]}, '
            "and PostgreSQL copies none that is in use.",
            "Close them, or leave --no-kill out to have them ended.",
        )
    ended: set[int] = set()
    with _ending_sessions(server, source, ended) if kill else contextlib.nullcontext():
        try:
            if strategy or chosen != "file_copy" or not _clone(session, source, statement):
                log.debug("copying", database=source, strategy=chosen)
                session.execute(statement)
        except exceptions.ServerError as error:
            if error.sqlstate == _NO_SUCH_DATABASE:
                raise exceptions.DatabaseNotFound(
                    f'Database "{source}" does not exist.',
                    f'Check the NAME of DATABASES["{server.alias}"], and see which there are: pgclone ls --local',
                ) from error
            if error.sqlstate == _OBJECT_IN_USE:
                raise exceptions.NotPossible(
                    f'Database "{source}" could not be copied: it stays in use by {_describe(session, source)}.',
                    "End these sessions and try again.",
                ) from error
            raise
    return name, len(ended)


def _choose_strategy(session: Session, source: str) -> str:
    """The faster strategy; empty for the server's own choice, where it knows no other or does not tell the size."""
    if session.version < 150000:
        return ""
    try:
        size = session.value("SELECT pg_database_size(oid) FROM pg_database WHERE datname = %s", [source])
    except exceptions.ServerError:  # copying takes the owner, measuring the right to connect
        return ""
    return "file_copy" if size and size >= _WORTH_A_CHECKPOINT else "wal_log"


def _clone(session: Session, source: str, statement: Query) -> bool:
    """Let the server copy files by sharing their blocks (PostgreSQL 18), and return whether it could."""
    if not session.value("SELECT 'clone' = ANY (enumvals) FROM pg_settings WHERE name = 'file_copy_method'"):
        return False
    try:
        session.execute("SET file_copy_method = 'clone'")
        log.debug("copying", database=source, strategy="file_copy", method="clone")
        session.execute(statement)
    except exceptions.ServerError as error:
        if error.sqlstate not in _FILE_ERRORS:
            raise
        log.debug("clone_not_possible", database=source, error=error.cause)
        return False
    finally:
        with contextlib.suppress(exceptions.ServerError):  # a lost connection has no settings
            session.execute("RESET file_copy_method")
    return True


def check_strategy(name: str) -> None:
    """Refuse a strategy that PostgreSQL does not know.

    Raises:
        ValueError: It is neither `wal_log` nor `file_copy`, nor empty.
    """
    if name not in ("", "wal_log", "file_copy"):
        raise exceptions.ValueError(f'"{name}" is not a strategy for copies.', "Use wal_log or file_copy.")


def publish(session: Session, work: str, name: str, marker: Marker, *, replace: bool = False) -> str | None:
    """Give a work database its marker and its name, and open it, in one transaction.

    A database of ours that has the name goes to a work name in the same transaction.

    Args:
        replace: Do so with one that is none of ours, too.

    Returns:
        The work name of the database that was replaced, for the caller to drop; None if there was none.

    Raises:
        NotPossible: The name belongs to a database that is none of ours.
    """
    from django.db.backends.postgresql.psycopg_any import sql

    found = find(session, name)
    if found and not found.ours and not replace:
        raise foreign(name)
    replaced = work_name(marker.run) if found else None
    for attempt in range(_TRIES):
        for used in (name, work):  # monitoring and the like look into any database
            end_sessions(session, used)
        try:
            with session.transaction():
                for old, new in ((name, replaced), (work, name)):
                    if new:
                        session.execute(
                            sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(old), sql.Identifier(new))
                        )
                _open(session, name, marker)
            break
        except exceptions.ServerError as error:
            if error.sqlstate != _OBJECT_IN_USE or attempt == _TRIES - 1:
                raise
    return replaced


def mark(session: Session, work: str, marker: Marker) -> None:
    """Give a work database its marker and open it, in one transaction. It keeps its work name until the swap."""
    with session.transaction():
        _open(session, work, marker)


def drop(session: Session, name: str) -> None:
    """Drop a database of ours, ending its sessions. One that is gone already is fine.

    Raises:
        NotPossible: It is none of ours.
    """
    from django.db.backends.postgresql.psycopg_any import sql

    found = find(session, name)
    if found is None:
        return
    if not found.ours:
        raise foreign(name)
    force = " WITH (FORCE)" if session.version >= 130000 else ""
    try:
        session.execute(sql.SQL("DROP DATABASE {}" + force).format(sql.Identifier(name)))
    except exceptions.ServerError as error:
        if error.sqlstate != _NO_SUCH_DATABASE:
            raise


def foreign(name: str) -> exceptions.NotPossible:
    """The error for a database that is in the way, and that this tool did not make."""
    quoted = name.replace('"', '""')
    return exceptions.NotPossible(
        f'Database "{name}" is in the way, and pgclone did not make it for this purpose.',
        f'If nobody needs it (django-pgclone leaves such databases behind): DROP DATABASE "{quoted}";',
    )


def left_overs(session: Session, database: str) -> Iterator[str]:
    """The names of what dead runs left: unlocked work names, and temporary databases of `database`, whose lock is held."""
    for found in list_databases(session):
        run = run_of_work_name(found.name)
        if run is not None:
            if locks.is_free(session, f"run:{run}"):
                yield found.name
        elif found.temporary and found.marker and found.marker.source == database:
            yield found.name


def remains(session: Session, run: str) -> Iterator[str]:
    """The names of what a run made and did not hand over: its work names and its temporary databases."""
    for found in list_databases(session):
        if run_of_work_name(found.name) == run or (found.temporary and found.marker and found.marker.run == run):
            yield found.name


def end_sessions(session: Session, database: str) -> int:
    """End all sessions on a database that may be ended, and return how many there were."""
    ended = 0
    for pid in _sessions(session, database):
        with contextlib.suppress(exceptions.ServerError):  # a superuser's: whoever needs the database says so
            ended += bool(session.value("SELECT pg_terminate_backend(%s)", [pid]))
    return ended


@contextlib.contextmanager
def _ending_sessions(server: Server, database: str, ended: set[int]) -> Iterator[None]:
    """End the sessions on a database again and again while the block runs. Their process IDs are added to `ended`."""
    stop = threading.Event()

    def work(session: Session) -> None:
        with contextlib.suppress(exceptions.ServerError):  # the connection was lost: the copy says what is wrong
            while True:
                for pid in _sessions(session, database):
                    with contextlib.suppress(exceptions.ServerError):
                        session.execute("SELECT pg_terminate_backend(%s)", [pid])
                        ended.add(pid)
                if stop.wait(0.05):
                    return

    with server.connect() as session:
        thread = threading.Thread(target=work, args=[session], name="pgclone-sessions", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(5)


def _sessions(session: Session, database: str) -> list[int]:
    """The process IDs of the clients that are connected to a database (autovacuum workers leave by themselves)."""
    rows = session.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = %s AND usesysid IS NOT NULL AND pid <> pg_backend_pid()",
        [database],
    )
    return [pid for (pid,) in rows]


def _describe(session: Session, database: str) -> str:
    rows = session.execute(
        "SELECT pid, usename::text, application_name FROM pg_stat_activity WHERE datname = %s LIMIT 5",
        [database],
    )
    return ", ".join(f'process {pid} (user "{user}", application "{name}")' for pid, user, name in rows) or "a session"


def _open(session: Session, database: str, marker: Marker) -> None:
    from django.db.backends.postgresql.psycopg_any import sql

    name = sql.Identifier(database)
    session.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(name, sql.Literal(str(marker))))
    session.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
    session.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT -1").format(name))
