"""Routes Django to one database while hooks run, and keeps their queries away from every other.

Django keeps connections by thread and alias, and pools of psycopg 3 by alias alone: a fresh wrapper of an alias with a
pool would get the primary database. So routed connections have no pool and no persistence, and threads that hooks
start get routed connections as well.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pgclone import exceptions
from pgclone.database.connection import Server, driver_error, refused
from pgclone.database.properties import Setting
from pgclone.events import log
from pgclone.types import Target


def refuse_in_atomic() -> None:
    """Refuse to run inside `atomic()`: the transaction would be cut off by the swap, and is invisible to pg_dump.

    Raises:
        Forbidden: A connection of this thread is in a transaction.
    """
    from django.db import connections

    for connection in connections.all(initialized_only=True):
        if connection.in_atomic_block:
            raise exceptions.Forbidden(
                f'pgclone cannot run inside a transaction, and database "{connection.alias}" is in one (atomic()).',
                "Call it outside atomic() and ATOMIC_REQUESTS; in tests, use TransactionTestCase or django_db(transaction=True).",
            )


def close_connections(server: Server, database: str) -> None:
    """Close this process's connections and pools to a database, which a swap would end anyway: they open again on use."""
    from django.db import connections

    for connection in connections.all(initialized_only=True):
        settings = connection.settings_dict
        same = all(settings.get(key) == server.settings.get(key) for key in ("HOST", "PORT"))
        if connection.vendor == "postgresql" and same and settings["NAME"] == database:
            connection.close()
            if hasattr(connection, "close_pool"):
                connection.close_pool()


@contextlib.contextmanager
def route(
    server: Server, database: str, settings: Sequence[Setting] = ()
) -> Iterator[tuple[Target, Callable[[], None]]]:
    """Route `default` and the server's alias to `database`, and refuse queries on all other aliases.

    Args:
        settings: Settings of the primary database that the sessions take over (its search_path, say): the temporary
            database gets them only at the swap.

    Returns:
        The target for hooks, and a function that proves the routing: it raises unless both aliases are on `database`, in no
        transaction. It is called again at the end of the block.
    """
    from django.db import DEFAULT_DB_ALIAS, connections
    from django.db.utils import load_backend

    wrapper_class = load_backend(server.settings["ENGINE"]).DatabaseWrapper
    routed_aliases = {DEFAULT_DB_ALIAS, server.alias}
    older_threads = {*threading.enumerate()} - {threading.current_thread()}  # their identifiers are used again
    made: list[Any] = []
    original_create = connections.create_connection

    def connect(alias: str) -> Any:
        options = {key: value for key, value in server.settings["OPTIONS"].items() if key != "pool"}
        changes = {"NAME": database, "CONN_MAX_AGE": 0, "CONN_HEALTH_CHECKS": False, "OPTIONS": options}
        wrapper = wrapper_class({**server.settings, **changes}, alias)
        begin = wrapper.init_connection_state

        def begin_with_settings() -> None:
            begin()
            _apply(wrapper, settings)

        wrapper.init_connection_state = begin_with_settings
        made.append(wrapper)
        return wrapper

    def create(alias: str) -> Any:
        """What new threads get; those that ran before belong to somebody else, a web server's requests perhaps."""
        if threading.current_thread() in older_threads:
            return original_create(alias)
        if alias in routed_aliases:
            return connect(alias)
        wrapper = original_create(alias)
        wrapper.execute_wrappers.append(_refuse)
        return wrapper

    def cursor() -> Any:
        return connections[server.alias].cursor()

    def prove() -> None:
        for alias in sorted(routed_aliases):
            wrapper = connections[alias]
            try:
                with wrapper.cursor() as cursor:
                    cursor.execute("SELECT current_database()")
                    (current,) = cursor.fetchone()
            except driver_error() as error:
                raise refused(server, database, error) from error
            if current != database:
                raise exceptions.HookFailed(
                    f'The connection "{alias}" is on database "{current}" instead of "{database}".',
                    "Is a hook, a database router, a pool or a middleware changing connections?",
                )
            if wrapper.in_atomic_block or (wrapper.settings_dict["AUTOCOMMIT"] and not wrapper.autocommit):
                raise exceptions.HookFailed(
                    f'A hook has left a transaction open on the connection "{alias}": what it did would be lost.',
                    "Let it commit.",
                )

    def call_command(name: str, *arguments: Any, **options: Any) -> str:
        prove()
        output = _call_command(server.alias, name, *arguments, **options)
        log.info("command_finished", command=name, output=output)
        return output

    with contextlib.ExitStack() as stack:
        before = {alias: connections[alias] for alias in connections}
        for alias, connection in before.items():
            stack.enter_context(connection.execute_wrapper(_refuse))
            if alias in routed_aliases:
                stack.callback(connections.__setitem__, alias, connection)
                connections[alias] = connect(alias)
        stack.callback(setattr, connections, "create_connection", original_create)
        connections.create_connection = create  # type: ignore[method-assign]
        stack.callback(_close, made)
        yield Target(database, cursor, call_command), prove
        prove()


def _refuse(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    alias = context["connection"].alias
    raise exceptions.HookFailed(
        f'A hook queried the database "{alias}", which it may not: hooks see the database they are run for, and no other.',
        "Restrict the hook to that database.",
    )


def _apply(connection: Any, settings: Sequence[Setting]) -> None:
    for setting in settings:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT set_config(%s, %s, false)", [setting.name, setting.value])
        except Exception as error:  # noqa: BLE001  a superuser's setting, or one that is only read at the login
            log.debug("setting_not_applied", name=setting.name, error=str(error))
            if not connection.get_autocommit():
                connection.rollback()


def _call_command(alias: str, name: str, *arguments: Any, **options: Any) -> str:
    """Run a management command and return what it printed, which belongs neither on stdout nor before an error message."""
    from django.core.management import call_command, get_commands, load_command_class

    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            app = get_commands()[name]
            command = load_command_class(app, name) if isinstance(app, str) else app
            if any(action.dest == "database" for action in command.create_parser("manage.py", name)._actions):
                options.setdefault("database", alias)
            call_command(command, *arguments, **options)
    except exceptions.Terminated:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            return output.getvalue()
        said = "\n".join(output.getvalue().strip().splitlines()[-12:])
        reason = f"exit status {error.code}" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        raise exceptions.HookFailed(
            f'The management command "{name}" failed: {reason}', f"It had printed:\n{said}" if said else ""
        ) from error
    return output.getvalue()


def _close(connections: list[Any]) -> None:
    for connection in connections:
        connection.inc_thread_sharing()
        with contextlib.suppress(Exception):  # of a thread that ended with an error of its own
            connection.close()
