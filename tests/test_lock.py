"""Locks: one run at a time, whatever becomes of the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import pytest
from freezegun import freeze_time

from pgclone import exceptions
from pgclone.database.connection import Server
from pgclone.database.lock import is_free, lock, take
from tests.fixtures import World
from tests.test_swap import NAMES

HOLDERS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"


def test_it_is_held_to_the_end_of_the_block(world: World) -> None:
    server = world.alias("app")
    with lock(server, "app") as held:
        held.verify()
        assert not is_free(world.session, "app")
        assert held.session.value("SELECT 1") == 1
        with lock(server, "another", wait=False):
            pass
    with lock(server, "app", wait=False):
        pass
    assert world.value(HOLDERS) == 0


@pytest.mark.parametrize("name", NAMES)
def test_any_name(world: World, name: str) -> None:
    server = world.alias(name)
    with lock(server, name) as held:
        held.verify()
        with pytest.raises(exceptions.Locked), lock(server, name, wait=False):
            pass


def test_who_may_not_wait_is_told_who_is_at_work(world: World) -> None:
    server = world.alias("app")
    with lock(server, "app") as held:
        with pytest.raises(exceptions.Locked) as caught, lock(server, "app", wait=False):
            pass
        assert f"pid {held.session.pid}" in caught.value.cause
    assert 'database "app"' in caught.value.cause
    assert 'role "postgres" since 20' in caught.value.cause
    assert caught.value.remedy


def test_a_plain_role_sees_the_holder_too(world: World) -> None:
    role = world.role("plain")
    with lock(world.alias("app"), "app") as held:
        with pytest.raises(exceptions.Locked, match=f'pid {held.session.pid} of role "postgres"'):
            with lock(world.alias("app", user=role), "app", wait=False):
                pass
        assert not is_free(world.session, "app")


def test_who_waits_says_so_once_and_gets_it(world: World) -> None:
    server = world.alias("app")
    said: list[str] = []
    got = threading.Event()

    def second() -> None:
        with lock(server, "app", waiting=said.append):
            got.set()

    with freeze_time("2026-01-01"), lock(server, "app") as held:
        thread = threading.Thread(target=second)
        thread.start()
        assert not got.wait(1)
        assert len(said) == 1
        assert f"pid {held.session.pid}" in said[0]
    assert got.wait(2)
    thread.join()
    assert len(said) == 1


def test_a_lost_lock_is_noticed(world: World) -> None:
    with lock(world.alias("app"), "app") as held:
        world.sql("SELECT pg_terminate_backend(%s)", [held.session.pid])
        with pytest.raises(exceptions.Locked, match='"app" was lost'):
            held.verify()


def test_a_lock_that_a_connection_pooler_gave_away_is_noticed(world: World) -> None:
    with lock(world.alias("app"), "app") as held:
        held.session.execute("SELECT pg_advisory_unlock_all()")
        with pytest.raises(exceptions.Locked):
            held.verify()


def test_looking_takes_no_lock(world: World) -> None:
    assert is_free(world.session, "run:0123456789ab")
    world.session.execute("BEGIN")
    assert is_free(world.session, "run:0123456789ab")
    assert world.value(HOLDERS) == 0
    world.session.execute("COMMIT")


def test_one_session_holds_several(world: World) -> None:
    server = world.alias("app")
    with lock(server, "app") as held:
        assert take(held.session, "run:0123456789ab")
        assert not take(world.session, "run:0123456789ab")
        assert not is_free(world.session, "run:0123456789ab")
    assert is_free(world.session, "run:0123456789ab")


def _hold(server: Server, pipe: Any) -> None:
    with lock(server, "app") as held:
        pipe.send("held")
        held.session.execute("SELECT pg_sleep(60)")


def test_kill_9_of_the_holder_frees_it_even_in_the_middle_of_a_statement(world: World) -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    child = context.Process(target=_hold, args=(world.alias("app"), theirs))
    child.start()
    assert ours.recv() == "held"
    assert not is_free(world.session, "app")
    time.sleep(0.1)
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    started = time.monotonic()
    with lock(world.alias("app"), "app"):
        assert time.monotonic() - started < 2
    child.join()
