"""Plugins that go wrong, one each: `PGCLONE_PLUGINS = ["tests.bad_plugins:objects"]`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from django.db import connection, connections
from django.db.transaction import atomic

from pgclone.api import Location, Target, hookimpl
from pgclone.plugins import files
from tests.app.models import Author


class Plugin:
    """Hooks in one object."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        vars(self).update({name: hookimpl(hook) for name, hook in hooks.items()})


def _object() -> None:
    raise RuntimeError("not today")


def _fail_afterwards() -> None:
    raise RuntimeError("too late")


def _leave() -> None:
    sys.exit(0)


def _leave_afterwards() -> None:
    sys.exit("too late")


objects = Plugin(pre_dump=_object, post_restore=_object)
vetoes = Plugin(pre_swap=_object)
leaves = Plugin(pre_swap=_leave)
leaves_with_a_status = Plugin(pre_swap=lambda: sys.exit(1))
fails_afterwards = Plugin(post_dump=_fail_afterwards, post_swap=_fail_afterwards)
leaves_afterwards = Plugin(post_dump=_leave_afterwards, post_swap=_leave_afterwards, on_event=_leave_afterwards)


def _kill_the_connection(target: Target) -> None:
    with target.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def _query_another_database() -> None:
    with connections["other"].cursor() as cursor:
        cursor.execute("SELECT 1")


def _go_elsewhere() -> None:
    connection.close()
    connection.settings_dict["NAME"] = "postgres"


def _forget_to_commit() -> None:
    connection.set_autocommit(False)
    Author.objects.update(name="masked")


def _forget_in_a_block() -> None:
    atomic().__enter__()
    Author.objects.update(name="masked")


def _ask_in_threads(target: Target) -> None:
    """Threads that use the ORM, one after the other and at once."""
    found: list[str] = []

    def ask() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_database()")
            found.append(cursor.fetchone()[0])

    for threads in ([threading.Thread(target=ask)], [threading.Thread(target=ask) for _ in range(8)]):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if found != [target.name] * 9:
        raise RuntimeError(f"threads saw {found}")


def _mask_in_a_thread() -> None:
    thread = threading.Thread(target=lambda: Author.objects.update(name="masked"))
    thread.start()
    thread.join()


kills_its_connection = Plugin(pre_swap=_kill_the_connection)
queries_another_database = Plugin(pre_swap=_query_another_database)
goes_elsewhere = Plugin(pre_swap=_go_elsewhere)
forgets_to_commit = Plugin(pre_swap=_forget_to_commit)
forgets_in_a_block = Plugin(pre_swap=_forget_in_a_block)
asks_in_threads = Plugin(pre_swap=_ask_in_threads, post_restore=_ask_in_threads)
masks_in_a_thread = Plugin(pre_swap=_mask_in_a_thread)


class Older:
    """Starts a thread when it is loaded, which has ended when the hook starts its own: they get its identifier."""

    @property
    def asks_in_threads(self) -> Plugin:
        over = threading.Event()
        thread = threading.Thread(target=over.wait, daemon=True)
        thread.start()

        def ask(target: Target) -> None:
            over.set()
            thread.join()
            _ask_in_threads(target)

        return Plugin(pre_swap=ask)


older = Older()


class LeavesAtImport:
    def __getattr__(self, name: str) -> object:
        if name == "anything":
            sys.exit(0)
        raise AttributeError(name)


leaves_at_import = LeavesAtImport()


def _storage(at_commit: Callable[[], None]) -> Plugin:
    def storage_open(location: Location, key: str, mode: Any) -> contextlib.AbstractContextManager[BinaryIO] | None:
        opened = files.storage_open(location, key, mode)
        return opened if opened is None or mode == "rb" or key.endswith(".json") else fail(opened)

    @contextlib.contextmanager
    def fail(opened: contextlib.AbstractContextManager[BinaryIO]) -> Iterator[BinaryIO]:
        with opened as file:
            yield file
            at_commit()

    return Plugin(storage_open=storage_open, list_keys=files.list_keys, delete_key=files.delete_key)


def _lose_the_bucket() -> None:
    raise OSError("the bucket is gone")


fails_at_commit = _storage(_lose_the_bucket)
leaves_at_commit = _storage(_leave)
