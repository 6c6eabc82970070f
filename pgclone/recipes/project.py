"""What every recipe begins with: the project's plugins, server and database, and the frame of a run."""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pgclone import conf, exceptions
from pgclone import host as hosts
from pgclone.conf import Options
from pgclone.database import connection, route
from pgclone.database.connection import Server
from pgclone.database.names import DERIVED, MAX_BYTES, derive, new_run, run_of_work_name
from pgclone.events import log
from pgclone.host import Host
from pgclone.locations import parse_location
from pgclone.process import signals_raise
from pgclone.types import Failed, Finished, Progress, Run

_PROGRESS_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Project:
    """Where a recipe works: its options, plugins, server, and the name of the alias's database."""

    options: Options
    host: Host
    server: Server
    database: str


def open_project(command: str, options: Options) -> Project:
    """Load the plugins and find the server, or refuse.

    Raises:
        Forbidden: `PGCLONE_ALLOW_<COMMAND>` is False, or a transaction is open.
        PluginError: A plugin cannot be loaded.
        ValueError: An option names something that does not exist.
    """
    if not getattr(options, f"allow_{command}"):
        raise exceptions.Forbidden(
            f"{command.capitalize()} not allowed.",
            f"settings.PGCLONE_ALLOW_{command.upper()} is False in this installation.",
        )
    server = find_server(options)
    route.refuse_in_atomic()
    host = hosts.build(options)
    host.require_all()
    return Project(options, host, server, connection.database_name(server))


def find_server(options: Options) -> Server:
    """The server of the alias that the options name."""
    timeouts = {"statement_timeout": options.statement_timeout, "lock_timeout": options.lock_timeout}
    return connection.find_server(
        options.database,
        maintenance=options.conn_db,
        timeouts={name: value for name, value in timeouts.items() if value},
    )


def check_commands(names: Sequence[str]) -> None:
    """Refuse hooks that are no management commands, before anything is done.

    Raises:
        ValueError: One is not.
    """
    from django.core.management import get_commands

    known = get_commands()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise exceptions.ValueError(
                f'The hook "{name}" is not a management command.',
                f'Did you mean "{close[0]}"?' if close else "",
            )


def check_local_name(project: Project, key: str) -> str:
    """The database that `:name` names, if a copy may have that name.

    Raises:
        ValueError: It may not.
    """
    if not key.startswith(":") or key == ":":
        raise exceptions.ValueError('Copy target must start with ":"', "Write it as :name.")
    if key in (":pre", ":post"):
        raise exceptions.ValueError(":pre and :post are reserved names. Please use a different copy target name.")
    name = key[1:]
    if name == project.database:
        raise exceptions.ValueError("Target database cannot be the same as source database.")
    if len(name.encode()) > MAX_BYTES or "\0" in name:
        raise exceptions.ValueError(f'":{name}" is no name for a database: PostgreSQL takes at most {MAX_BYTES} bytes.')
    reserved = [derive(project.database, kind) for kind in DERIVED]
    reserved += ["template0", "template1", project.options.conn_db]
    if name in reserved or run_of_work_name(name) is not None:
        raise exceptions.ValueError(f'"{name}" is a reserved name. Please use a different copy target name.')
    check_unconfigured(name)
    return name


def check_unconfigured(*names: str) -> None:
    """Refuse to use the names of databases that the project is configured with.

    Raises:
        RuntimeError: One is.
    """
    for alias, database in (conf.setting("DATABASES") or {}).items():
        if database.get("NAME") in names:
            raise exceptions.RuntimeError(
                f'pgclone cannot use the name "{database["NAME"]}": it is the database "{alias}" in settings.DATABASES.',
                "Rename one of the two.",
            )


@contextlib.contextmanager
def running(command: str, project: Project, key: str) -> Iterator[Run]:
    """The frame of a run: signals raise, and plugins hear how it ended."""
    options = project.options
    run = Run(
        id=new_run(),
        command=command,
        alias=project.server.alias,
        database=project.database,
        location=parse_location(options.storage_location),
        key=key,
        config=options.config,
        options=MappingProxyType(vars(options)),
    )
    with signals_raise():
        try:
            yield run
        except BaseException as error:
            project.host.tell("on_event", run=run, event=Failed(error))
            if isinstance(error, SystemExit) and not isinstance(error, exceptions.Terminated):
                # the caller would take status 0 for success
                raise exceptions.PluginError(f"A plugin tried to end the process: SystemExit({error}).") from error
            raise
        project.host.tell("on_event", run=run, event=Finished())


class Reporter:
    """Counts bytes, in whichever thread, and tells plugins of every 16 MiB, in the thread that it was made in."""

    def __init__(self, project: Project, run: Run, total: int | None) -> None:
        self._project, self._run, self._total = project, run, total
        self._thread = threading.current_thread()
        self._mutex = threading.Lock()
        self._done = self._told = 0

    def __call__(self, count: int) -> None:
        with self._mutex:
            self._done += count
        if self._done - self._told >= _PROGRESS_BYTES and threading.current_thread() is self._thread:
            self._told = self._done
            self._project.host.tell("on_event", run=self._run, event=Progress(self._told, self._total))
            log.debug("progress", done=self._told, total=self._total)
