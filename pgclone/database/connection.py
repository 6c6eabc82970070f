"""Connections to the server of a database alias: sessions of our own, and conninfo strings for the client tools."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pgclone import exceptions
from pgclone.database.names import MAX_BYTES

if TYPE_CHECKING:
    from psycopg import sql

Query: TypeAlias = "str | sql.Composable"

Result = TypeVar("Result")
Row = tuple[Any, ...]

# Keys of DATABASES["OPTIONS"] that Django or a driver reads; all others are libpq's.
_NOT_LIBPQ = frozenset(
    {
        *("assume_role", "isolation_level", "pool", "server_side_binding", "client_encoding", "autocommit"),
        *("async", "async_", "connection_factory", "context", "cursor_factory", "prepare_threshold", "row_factory"),
    }
)
_CANCEL_SECONDS = 5
_KEEPALIVES = {"keepalives": 1, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}


@dataclass(frozen=True)
class Conninfo:
    """How a client tool reaches one database: a conninfo string without secrets, the variables of the environment
    that carry them, and the role to assume (`--role`), if any."""

    dsn: str
    environ: Mapping[str, str] = field(repr=False)
    role: str | None = None


class Session:
    """One connection in autocommit mode, the same on psycopg2 and psycopg 3.

    Statements are interruptible: an exception that a signal raises (Ctrl-C) cancels the statement in the server.
    """

    def __init__(self, connection: Any, where: str, role: str | None = None) -> None:
        self._connection = connection
        self._where = where
        self.role = role
        """The role that it has assumed, if any."""
        self._busy = False

    def execute(self, query: Query, params: Sequence[object] | None = None) -> list[Row]:
        """Run one statement and return its rows.

        Raises:
            ServerError: The server refused it, or the connection is gone. `sqlstate` is set in the first case.
        """

        def run() -> list[Row]:
            self._busy = True
            try:
                with self._connection.cursor() as cursor:
                    cursor.execute(query, params)
                    return cursor.fetchall() if cursor.description else []
            finally:
                self._busy = False

        try:
            return _interruptible(run, self.cancel)
        except driver_error() as error:
            state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
            raise exceptions.ServerError(f"{self._where}: {_first_line(error)}", sqlstate=state) from error

    def value(self, query: Query, params: Sequence[object] | None = None) -> Any:
        """The first column of the first row, or None."""
        rows = self.execute(query, params)
        return rows[0][0] if rows else None

    def text(self, query: sql.Composable) -> str:
        """The statement as it would be sent."""
        return str(query.as_string(self._connection))

    @contextlib.contextmanager
    def transaction(self, begin: str = "BEGIN") -> Iterator[None]:
        """A clean end of the block commits, an exception rolls back: wherever a signal raises it, no lock is left behind."""
        try:
            self.execute(begin)
            yield
            self.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(exceptions.ServerError):  # a lost connection has rolled back already
                self.execute("ROLLBACK")
            raise

    @property
    def pid(self) -> int:
        """The process ID of the session's backend in the server."""
        return int(self._connection.info.backend_pid)

    @property
    def version(self) -> int:
        """The server's version as libpq gives it: 150018 is 15.18."""
        return int(self._connection.info.server_version)

    def cancel(self) -> None:
        with contextlib.suppress(*driver_error()):
            self._connection.cancel()

    def close(self) -> None:
        if self._busy:  # the server did not answer to the cancellation: closing would crash the driver's thread
            return
        with contextlib.suppress(*driver_error()):
            self._connection.close()


@dataclass(frozen=True)
class Server:
    """The server behind a database alias, and how to log in to it.

    Args:
        alias: The alias in settings.DATABASES.
        settings: Its entry there, completed by Django.
        maintenance: The database to connect to for work on other databases (`PGCLONE_CONN_DB`).
        timeouts: `statement_timeout` and `lock_timeout` for the maintenance statements, as PostgreSQL takes them.
    """

    alias: str
    settings: Mapping[str, Any] = field(repr=False)
    maintenance: str = "postgres"
    timeouts: Mapping[str, str | int] = field(default_factory=dict)

    @contextlib.contextmanager
    def connect(self, database: str | None = None, *, application: str = "pgclone") -> Iterator[Session]:
        """A session in `database` (default: the maintenance database), closed at the end of the block.

        It has an empty search_path, every timeout off (but for those of `timeouts` in the maintenance database), and
        the role of `assume_role`.

        Raises:
            ServerError: The server cannot be reached, or refuses the login.
        """
        name = database or self.maintenance
        session = self.open(name, application=application)
        try:
            if database is None:
                for setting, value in self.timeouts.items():
                    session.execute("SELECT set_config(%s, %s, false)", [setting, str(value)])
            yield session
        finally:
            session.close()

    def open(self, database: str, *, application: str = "pgclone") -> Session:
        """Like `connect`, for callers that close the session themselves."""
        from django.db.utils import load_backend

        options = {**_KEEPALIVES, **self.settings["OPTIONS"], "application_name": application}
        options.pop("pool", None)
        wrapper = load_backend(self.settings["ENGINE"]).DatabaseWrapper(
            {**self.settings, "NAME": database, "OPTIONS": options, "CONN_MAX_AGE": 0}, self.alias
        )

        def log_in() -> Any:
            return wrapper.get_new_connection(wrapper.get_connection_params())

        try:
            connection = _interruptible(log_in, lambda: None)
        except driver_error() as error:
            raise refused(self, database, error) from error
        connection.autocommit = True
        session = Session(connection, f'Database "{database}" on {self}', self.role)
        try:
            for statement in preamble(session.version):
                session.execute(statement)
            if self.role:
                session.execute("SELECT set_config('role', %s, false)", [self.role])
        except BaseException:
            session.close()
            raise
        return session

    def conninfo(self, database: str, *, options: str = "", application: str = "") -> Conninfo:
        """The conninfo string of `database` for a client tool, from all OPTIONS that libpq knows.

        Args:
            options: Command-line options for the server session (`-c name=value …`), beside the project's own.
            application: Its application_name; empty for the project's or the tool's own.
        """
        given: dict[str, Any] = {k: v for k, v in self.settings["OPTIONS"].items() if k not in _NOT_LIBPQ}
        secrets = {"PGPASSWORD": self.settings["PASSWORD"] or given.pop("password", None)}
        given.pop("password", None)
        if given.get("sslpassword"):
            raise exceptions.ValueError(
                f'DATABASES["{self.alias}"]["OPTIONS"]["sslpassword"] cannot be handed to pg_dump and pg_restore: '
                "libpq takes it from a command line or a service file only.",
                'Put sslpassword into a connection service file and name it with OPTIONS["service"].',
            )
        for key in ("user", "host", "port"):
            given[key] = self.settings[key.upper()] or given.get(key)
        given["dbname"] = database
        given["application_name"] = application or given.get("application_name")
        given["options"] = " ".join(
            filter(None, [str(given.get("options") or os.environ.get("PGOPTIONS", "")), options])
        )
        dsn = " ".join(f"{key}={_quote(str(value))}" for key, value in given.items() if value not in (None, ""))
        return Conninfo(dsn, {key: str(value) for key, value in secrets.items() if value}, self.role)

    @property
    def role(self) -> str | None:
        """The role that the sessions assume after the login (`OPTIONS["assume_role"]`)."""
        return self.settings["OPTIONS"].get("assume_role") or None

    def __str__(self) -> str:
        host = self.settings["HOST"] or self.settings["OPTIONS"].get("host")
        if not host:
            return (
                f'service "{self.settings["OPTIONS"]["service"]}"'
                if "service" in self.settings["OPTIONS"]
                else "the local server"
            )
        return f"{host}:{self.settings['PORT']}" if self.settings["PORT"] else str(host)


def find_server(alias: str, *, maintenance: str, timeouts: Mapping[str, str | int] | None = None) -> Server:
    """The server of a database alias.

    Raises:
        ValueError: No such alias, or not PostgreSQL.
    """
    from django.db import connections

    if alias not in connections.settings:
        raise exceptions.ValueError(
            f'"{alias}" is not a valid database. Use one from settings.DATABASES.',
            f"There are: {', '.join(sorted(connections.settings))}.",
        )
    connection = connections[alias]
    if connection.vendor == "unknown":
        raise exceptions.ValueError(
            f'Database "{alias}" has no ENGINE in settings.DATABASES.', "Choose another one with --database."
        )
    if connection.vendor != "postgresql":
        raise exceptions.ValueError(
            f'Database "{alias}" is not a PostgreSQL database, but {connection.display_name}.',
            "Choose another one with --database.",
        )
    settings = {**connection.settings_dict, "OPTIONS": dict(connection.settings_dict.get("OPTIONS") or {})}
    return Server(alias, settings, maintenance, dict(timeouts or {}))


def database_name(server: Server) -> str:
    """The name of the alias's database: from the settings, or from the server where a service file says it."""
    if name := str(server.settings["NAME"] or server.settings["OPTIONS"].get("dbname") or ""):
        if (size := len(name.encode())) > MAX_BYTES:
            raise exceptions.ValueError(
                f'The NAME of DATABASES["{server.alias}"] has {size} bytes, and PostgreSQL takes at most {MAX_BYTES}: "{name}".',
                "Name the database as the server does: pgclone ls --local",
            )
        return name
    if "service" not in server.settings["OPTIONS"]:
        raise exceptions.ValueError(
            f'DATABASES["{server.alias}"] has no NAME.',
            "Name the database there, or a service in its OPTIONS.",
        )
    from django.db import connections

    connection = connections.create_connection(server.alias)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_database()")
            return str(cursor.fetchone()[0])
    except driver_error() as error:
        raise refused(server, f"of {server}", error) from error
    finally:
        connection.close()


def preamble(version: int) -> list[str]:
    """What every session of this tool sets: the projects' own settings must not cut it off or change what it reads."""
    timeouts = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    timeouts += ["idle_session_timeout"] if version >= 140000 else []
    timeouts += ["transaction_timeout"] if version >= 170000 else []
    check = ["SET client_connection_check_interval = '100ms'"] if version >= 140000 else []
    return [f"SET {name} = 0" for name in timeouts] + check + ["SET search_path = ''"]


def _interruptible(call: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """Run `call` beside the main thread, which alone gets the exceptions of signals: psycopg2 blocks them otherwise."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    done = threading.Event()
    outcome: list[tuple[Result | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # noqa: BLE001  handed to the caller below
            outcome.append((None, error))
        finally:
            done.set()

    threading.Thread(target=run, name="pgclone-statement", daemon=True).start()
    try:
        done.wait()
    except BaseException:
        # The driver must be out of the connection before anyone closes it.
        threading.Thread(target=cancel, name="pgclone-cancel", daemon=True).start()
        done.wait(_CANCEL_SECONDS)
        raise
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def driver_error() -> tuple[type[Exception], ...]:
    """What the driver and Django raise, for `except`."""
    from django.db.backends.postgresql.base import Database  # type: ignore[attr-defined]
    from django.db.utils import Error

    return (Database.Error, Error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refused(server: Server, database: str, error: BaseException) -> exceptions.ServerError:
    """The error for a login that failed."""
    text = " ".join(str(error).split())
    remedies = {
        "password authentication failed": f'Check USER and PASSWORD of DATABASES["{server.alias}"].',
        "no password supplied": f'Set PASSWORD in DATABASES["{server.alias}"], or a passfile in its OPTIONS.',
        "does not exist": f'Check DATABASES["{server.alias}"], and PGCLONE_CONN_DB for the maintenance database.',
        "no pg_hba.conf entry": f'Let this user, host and database in by pg_hba.conf, or check DATABASES["{server.alias}"].',
        "SSL": f'Check the ssl options in the OPTIONS of DATABASES["{server.alias}"] and the server\'s ssl.',
        "too many": "Close connections, or raise the limit, and try again.",
    }
    remedy = next(
        (remedy for words, remedy in remedies.items() if words in text),
        f'Is the server running? Check HOST and PORT of DATABASES["{server.alias}"].',
    )
    return exceptions.ServerError(f'Cannot connect to database "{database}" on {server}: {text}', remedy)


def _quote(value: str) -> str:
    """A value of a conninfo string (PostgreSQL docs, 34.1.1.1)."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
