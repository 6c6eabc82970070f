"""The swap, on real servers, with clients that do not let go."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from freezegun import freeze_time

from pgclone import exceptions
from pgclone.database import connection, names
from pgclone.database import swap as swap_module
from pgclone.database.connection import Server
from pgclone.database.swap import Swapped, check_names, swap
from tests.fixtures import POSTGRES_15, World

RUN = "0123456789ab"
TEMP = names.Marker("temp", "app", RUN)

LONG = "x" * 63
NAMES = [LONG, "é" * 31, "quo\"te's", "a b;c$d%s\\", "-dash", "a=b", "Ünïcödé-数据库", "{braces}"]


@pytest.fixture
def app(world: World) -> World:
    """A primary, and what is to take its place."""
    world.create("app", "old")
    world.create("app__temp", "new", marker=TEMP)
    return world


def run_swap(world: World, **changes: Any) -> Swapped:
    options = {"database": "app", "restored": "app__temp", "run": RUN, "keep": False, **changes}
    return swap(world.alias("app", user=options.pop("user", "postgres")), **options)


def state(world: World) -> list[Any]:
    """Every database as the catalogue has it."""
    return world.sql(
        """SELECT datname::text, oid::bigint, datdba::bigint, datconnlimit, datistemplate, datallowconn, datacl::text,
        shobj_description(oid, 'pg_database') FROM pg_database ORDER BY oid"""
    )


def marker(world: World, database: str) -> names.Marker | None:
    return names.parse_marker(
        world.value("SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", [database])
    )


class Clients:
    """Threads that connect, look, and connect again, all the time."""

    def __init__(self, server: Server, *databases: str, count: int = 1) -> None:
        self.seen: dict[int, list[str]] = {}
        self.longest_gap = 0.0
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(server, database, number))
            for number, database in enumerate(databases * count)
        ]

    def _run(self, server: Server, database: str, number: int) -> None:
        seen = self.seen[number] = []
        last = time.monotonic()
        while not self._stop.is_set():
            with contextlib.suppress(exceptions.ServerError):
                with contextlib.closing(server.open(database)) as session:
                    for _ in range(5):
                        seen.append(session.value("SELECT value FROM public.content"))
                        now = time.monotonic()
                        self.longest_gap = max(self.longest_gap, now - last)
                        last = now

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        for _ in range(500):
            if all(self.seen.get(number) for number in range(len(self._threads))):
                return self
            time.sleep(0.01)
        raise AssertionError("the clients do not get in")

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


# What a swap does


def test_the_restored_database_gets_the_name_and_the_old_one_is_left_to_be_dropped(app: World) -> None:
    assert run_swap(app) == Swapped("app__swap", ("app__swap",))
    assert app.content("app") == "new"
    assert app.content("app__swap") == "old"
    assert marker(app, "app__swap") == names.Marker("swap", "app", RUN)
    assert marker(app, "app") is None
    assert app.oid("app__temp") is None


def test_what_a_crashed_swap_left_is_moved_out_of_the_way(app: World) -> None:
    app.create("app__swap", "ancient", marker=names.Marker("swap", "app", "ba9876543210"))
    result = run_swap(app)
    assert result.old_database == "app__swap"
    work, swapped = result.leftovers
    assert swapped == "app__swap"
    assert names.run_of_work_name(work) == RUN
    assert app.content(work) == "ancient"
    assert app.content("app__swap") == "old"


def test_a_reversible_swap_keeps_the_old_database_and_a_copy_of_the_new_one(app: World) -> None:
    app.create(names.work_name(RUN), "copy of new")
    copy = next(name for name in app.databases() if names.run_of_work_name(name))
    assert run_swap(app, keep=True, post=copy) == Swapped("app__pre", ())
    assert [app.content(name) for name in ("app", "app__pre", "app__post")] == ["new", "old", "copy of new"]
    assert marker(app, "app__pre") == names.Marker("pre", "app", RUN)
    assert marker(app, "app__post") == names.Marker("post", "app", RUN)
    assert app.oid(copy) is None


def test_a_second_reversible_swap_replaces_what_the_first_one_kept(app: World) -> None:
    app.create("copy1", "copy1", marker=TEMP)
    run_swap(app, keep=True, post="copy1")
    app.create("app__temp", "newer", marker=TEMP)
    app.create("copy2", "copy2", marker=TEMP)
    check_names(app.session, "app", keep=True)
    result = run_swap(app, keep=True, post="copy2")
    assert [app.content(name) for name in ("app", "app__pre", "app__post")] == ["newer", "new", "copy2"]
    assert result.old_database == "app__pre"
    assert [app.content(name) for name in result.leftovers] == ["old", "copy1"]
    assert all(names.run_of_work_name(name) == RUN for name in result.leftovers)


def test_a_missing_primary_is_made(world: World) -> None:
    world.create("app__temp", "new", marker=TEMP)
    assert run_swap(world) == Swapped(None, ())
    assert world.content("app") == "new"
    assert marker(world, "app") is None


def test_a_missing_primary_leaves_the_only_copy_alone(world: World) -> None:
    world.create("app__temp", "new", marker=TEMP)
    world.create("app__pre", "the only copy", marker=names.Marker("pre", "app", RUN))
    assert run_swap(world, keep=True) == Swapped(None, ())
    assert world.content("app__pre") == "the only copy"


def test_a_template_stays_one_and_the_old_one_can_be_dropped(app: World) -> None:
    app.run("ALTER DATABASE {} IS_TEMPLATE true", "app")
    run_swap(app)
    is_template = "SELECT datistemplate FROM pg_database WHERE datname = %s"
    assert app.value(is_template, ["app"]) is True
    app.run("DROP DATABASE {}", "app__swap")


def test_it_works_while_a_test_holds_the_clock(app: World) -> None:
    with freeze_time("2026-01-01"), Clients(app.alias("app"), "app", count=2):
        run_swap(app)
    assert app.content("app") == "new"


@pytest.mark.parametrize("name", NAMES)
def test_any_name(world: World, name: str) -> None:
    world.create(name, "old")
    temp = world.create(names.derive(name, "temp"), "new", marker=names.Marker("temp", name, RUN))
    result = run_swap(world, database=name, restored=temp, keep=True)
    assert result == Swapped(names.derive(name, "pre"), ())
    assert world.content(name) == "new"
    assert world.content(names.derive(name, "pre")) == "old"
    assert marker(world, names.derive(name, "pre")) == names.Marker("pre", name, RUN)


# Clients


def test_clients_that_come_back_all_the_time(app: World) -> None:
    turns = 5
    with Clients(app.alias("app"), "app", count=6) as clients:
        for _ in range(turns):
            assert run_swap(app, attempts=2).old_database == "app__swap"
            app.run("ALTER DATABASE {} RENAME TO {}", "app__swap", "app__temp")
            app.mark("app__temp", TEMP)
    for seen in clients.seen.values():
        assert set(seen) == {"old", "new"}
        assert sum(a != b for a, b in itertools.pairwise(seen)) <= turns  # never back and forth
    assert clients.longest_gap < 2


def test_the_gate_opens_for_an_empty_database_only(app: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rename finds a session, PostgreSQL looks again after 100 ms only, and all clients wait so long."""
    closed, at_the_opening = swap_module._closed, []

    @contextlib.contextmanager
    def observed(gate: connection.Session, database: str) -> Iterator[None]:
        with closed(gate, database):
            yield
            sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
            renaming = "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
            at_the_opening.append((database, app.value(sessions, [database]), app.value(renaming, [gate.pid]) > 0))

    monkeypatch.setattr(swap_module, "_closed", observed)
    with Clients(app.alias("app"), "app", count=4):
        run_swap(app, attempts=1)
    assert at_the_opening == [("app__temp", 0, True), ("app", 0, True)]


def test_clients_of_everything_that_is_renamed(app: World) -> None:
    run_swap(app, keep=True, post=app.create("copy1", "copy", marker=TEMP))
    app.create("app__temp", "newer", marker=TEMP)
    app.create("copy2", "copy2", marker=TEMP)
    with Clients(app.alias("app"), "app", "app__pre", "app__post", "app__temp", "copy2", count=2):
        run_swap(app, keep=True, post="copy2", attempts=3)
    assert [app.content(name) for name in ("app", "app__pre", "app__post")] == ["newer", "new", "copy2"]


def test_a_client_that_reads_nothing_any_more_is_ended(app: World) -> None:
    copy = "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 1000000)) TO STDOUT"
    frozen = subprocess.Popen(
        [str(app.server.bin / "psql"), "-X", "-d", "app", "-c", copy],
        env=app.server.environ(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert frozen.stdout and frozen.stdout.read(1) == b"x"
        frozen.send_signal(signal.SIGSTOP)
        for _ in range(200):
            if app.value("SELECT wait_event FROM pg_stat_activity WHERE query LIKE 'COPY%%'", []) == "ClientWrite":
                break
            time.sleep(0.02)
        run_swap(app, attempts=1)
    finally:
        frozen.kill()
        frozen.communicate()
    assert app.content("app") == "new"


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_backend_that_cannot_be_ended_costs_clients_a_second_and_the_swap_nothing(app: World) -> None:
    before = state(app)
    with app.connect("app", application="stuck one") as stuck:
        with stopped(stuck.pid), Clients(app.alias("app"), "app", count=2) as clients:
            with pytest.raises(exceptions.SwapFailed, match=rf'"app" is used .*pid {stuck.pid} .*stuck one'):
                run_swap(app, attempts=1)
            time.sleep(0.1)
    assert clients.longest_gap < 2
    assert state(app) == before


def test_a_superusers_session_is_named_and_nothing_happens(world: World) -> None:
    role = world.role("plain", "CREATEDB")
    world.create("app", "old", options="OWNER plain")
    world.create("app__temp", "new", marker=TEMP, options="OWNER plain")
    before = state(world)
    with world.connect("app", application="night report") as session:
        with pytest.raises(exceptions.SwapFailed) as caught:
            started = time.monotonic()
            run_swap(world, user=role, attempts=1)
        assert time.monotonic() - started < 1  # not the whole timeout
        assert session.value("SELECT 1") == 1
    assert f"pid {session_pid(caught.value)}" in str(caught.value)
    assert 'role "postgres", night report' in caught.value.cause
    assert "pg_terminate_backend" in caught.value.remedy
    assert state(world) == before
    run_swap(world, user=role)


def session_pid(error: exceptions.SwapFailed) -> str:
    return error.cause.partition("pid ")[2].split()[0]


def test_a_superusers_session_that_ends_is_waited_for(world: World) -> None:
    role = world.role("plain", "CREATEDB")
    world.create("app", "old", options="OWNER plain")
    world.create("app__temp", "new", marker=TEMP, options="OWNER plain")
    session = world.alias("app").open("app")
    closing = threading.Timer(0.4, session.close)
    closing.start()
    try:
        run_swap(world, user=role)
    finally:
        closing.join()
    assert world.content("app") == "new"


def test_a_plain_owner_does_it_all_under_load(world: World) -> None:
    role = world.role("plain", "CREATEDB")
    world.create("app", "old", options="OWNER plain")
    world.run("ALTER DATABASE app SET search_path = public, pg_catalog")
    for name, content in {"app__temp": "new", "copy": "copy"}.items():
        world.create(name, content, marker=TEMP, options="OWNER plain")
    for name in ("app", "app__temp", "copy"):
        world.sql("GRANT SELECT ON public.content TO plain", database=name)
    with Clients(world.alias("app", user=role), "app", count=4):
        assert run_swap(world, user=role, keep=True, post="copy").old_database == "app__pre"
    assert world.content("app") == "new"
    owner = "SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = 'app'"
    assert world.value(owner) == "plain"


# What it refuses before it touches anything


@pytest.mark.parametrize(("kind", "keep"), [("pre", True), ("post", True), ("swap", False)])
def test_a_database_that_it_did_not_make_is_not_moved(app: World, kind: Any, keep: bool) -> None:
    name = app.create(names.derive("app", kind), "theirs")
    for mark in (None, names.Marker("copy", "app", RUN), names.Marker(kind, "other", RUN), "by hand"):
        app.mark(name, mark)
        before = state(app)
        with pytest.raises(exceptions.NotPossible, match=f'"{name}" is in the way'):
            run_swap(app, keep=keep)
        with pytest.raises(exceptions.NotPossible, match=f'"{name}" is in the way'):
            check_names(app.session, "app", keep=keep)
        assert state(app) == before


def test_only_what_it_made_is_swapped_in(app: World) -> None:
    app.create("theirs", "theirs")
    before = state(app)
    with app.connect("theirs") as session:
        with pytest.raises(exceptions.NotPossible, match='"theirs"'):
            run_swap(app, restored="theirs")
        assert session.value("SELECT 1") == 1
    with pytest.raises(exceptions.NotPossible, match='"nowhere" does not exist'):
        run_swap(app, restored="nowhere")
    assert state(app) == before


def test_what_would_be_lost_with_the_old_database_refuses(app: World) -> None:
    app.sql("CREATE SUBSCRIPTION orders CONNECTION 'dbname=x' PUBLICATION x WITH (connect = false, slot_name = NONE)",
            database="app")  # fmt: skip
    app.sql("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')", database="app")
    with app.connect("app") as session:
        session.execute("BEGIN")
        session.execute("SELECT pg_current_xact_id()")
        session.execute("PREPARE TRANSACTION 'two''phase'")
    before = state(app)
    try:
        with pytest.raises(exceptions.NotPossible) as caught:
            run_swap(app)
        for words in ('DROP SUBSCRIPTION "orders"', "pg_drop_replication_slot('cdc')", "COMMIT PREPARED 'two''phase'"):
            assert words in str(caught.value)
        assert state(app) == before
    finally:
        app.sql("DROP SUBSCRIPTION orders", database="app")


def test_a_lost_lock_stops_it_while_the_primary_is_untouched(app: World) -> None:
    before = state(app)
    with app.connect("app") as client:

        def lost() -> None:
            assert client.value("SELECT 1") == 1  # nobody was cut off yet
            assert app.content("app") == "old"  # and new clients get in
            raise exceptions.Locked("lost")

        with pytest.raises(exceptions.Locked, match="lost"):
            run_swap(app, lock_still_held=lost)
        assert client.value("SELECT 1") == 1
    assert state(app) == before


def test_a_primary_that_became_another_database_meanwhile_stays(app: World) -> None:
    def replace() -> None:
        app.run("ALTER DATABASE {} RENAME TO {}", "app", "elsewhere")
        app.create("app", "another")

    with pytest.raises(exceptions.SwapFailed, match='"app" was replaced by someone else'):
        run_swap(app, lock_still_held=replace)
    assert app.content("app") == "another"
    assert app.content("elsewhere") == "old"
    assert app.content("app__temp") == "new"


# Whatever dies


class Unplugged:
    """Sessions whose connection is lost right before or right after they send COMMIT."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
        self.left = 1
        execute = connection.Session.execute

        def unreliable(session: connection.Session, query: Any, params: Any = None) -> Any:
            if query == "COMMIT" and self.left:
                self.left -= 1
                if after:
                    execute(session, query, params)
                session.close()
                raise exceptions.ServerError("server closed the connection unexpectedly")
            return execute(session, query, params)

        monkeypatch.setattr(connection.Session, "execute", unreliable)


def test_an_answer_that_is_lost_is_not_taken_for_a_failure(app: World, monkeypatch: pytest.MonkeyPatch) -> None:
    unplugged = Unplugged(monkeypatch, after=True)
    assert run_swap(app, attempts=1).old_database == "app__swap"
    assert unplugged.left == 0
    assert app.content("app") == "new"


def test_a_commit_that_never_arrived_is_tried_again(app: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(app)
    Unplugged(monkeypatch, after=False)
    with pytest.raises(exceptions.SwapFailed, match="closed the connection"):
        run_swap(app, attempts=1)
    assert state(app) == before
    Unplugged(monkeypatch, after=False)
    run_swap(app, attempts=2)
    assert app.content("app") == "new"


@pytest.mark.parametrize("application", ["pgclone swap"])
def test_sessions_that_the_server_ends_are_replaced(app: World, application: str) -> None:
    """All three sessions are terminated in the middle of the first attempt."""
    calls = []

    def terminate() -> None:
        calls.append(1)
        if len(calls) == 1:
            ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = %s"
            assert app.value(ended, [application]) == 3

    run_swap(app, lock_still_held=terminate)
    assert len(calls) == 2
    assert app.content("app") == "new"


def _swap_in_child(server: Server, ready: Any, stop_in: str | None) -> None:
    """Swap; with `stop_in`, freeze at the end of the first call of that function."""
    if stop_in:
        original = getattr(swap_module, stop_in)

        def frozen(*args: Any) -> Any:
            result = original(*args)
            ready.send("frozen")
            os.kill(os.getpid(), signal.SIGSTOP)
            return result

        setattr(swap_module, stop_in, frozen)
    ready.send("ready")
    swap(server, database="app", restored="app__temp", run=RUN, keep=False, attempts=1)


class Children:
    """Processes that swap, one after the other, each to be killed or stopped."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.server = world.alias("app")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.test_swap", "django.db.backends.postgresql.base"])
        self.swapped = 0

    @contextlib.contextmanager
    def swapping(self, stop_in: str | None = None) -> Iterator[int]:
        """The process ID of one that begins in this moment, or freezes in this moment."""
        ours, theirs = self.context.Pipe()
        child = self.context.Process(target=_swap_in_child, args=(self.server, theirs, stop_in))
        child.start()
        try:
            assert ours.recv() == "ready"
            assert not stop_in or ours.recv() == "frozen"
            assert child.pid
            yield child.pid
        finally:
            child.kill()
            child.join()
            child.close()
            ours.close()
            theirs.close()

    def seconds_until_reachable(self) -> float:
        started = time.monotonic()
        for _ in range(1000):
            with contextlib.suppress(exceptions.ServerError):
                with contextlib.closing(self.server.open("app")) as session:
                    assert session.value("SELECT value FROM public.content") in ("a", "b")
                    return time.monotonic() - started
            time.sleep(0.002)
        raise AssertionError("nobody gets in")

    def put_back(self) -> None:
        """Either nothing has happened or all of it; then make what is needed for the next one."""
        found = {
            name: self.world.content(name)
            for name in self.world.databases()
            if name.startswith(("app", "pgclone_work"))
        }
        assert found.keys() in ({"app", "app__temp"}, {"app", "app__swap"}), found
        assert set(found.values()) == {"a", "b"}
        if "app__swap" in found:
            self.swapped += 1
            assert marker(self.world, "app") is None
            self.world.run("ALTER DATABASE {} RENAME TO {}", "app__swap", "app__temp")
            self.world.mark("app__temp", TEMP)
        assert marker(self.world, "app__temp") == TEMP

    def kill_at_random(self, times: int) -> float:
        """Returns the longest time in seconds that the primary could not be reached."""
        with self.swapping():  # the first one pays for the start of the fork server
            time.sleep(0.5)
        self.put_back()
        longest, span = 0.0, 0.2
        for _ in range(times):
            done = self.swapped
            with self.swapping() as pid:
                time.sleep(random.uniform(0, span))
                with contextlib.suppress(ProcessLookupError):  # it was done
                    os.kill(pid, signal.SIGKILL)
                longest = max(longest, self.seconds_until_reachable())
            self.put_back()
            span *= 0.9 if self.swapped > done else 1.05  # about a third come after the commit
        return longest


@pytest.fixture
def children(world: World) -> Children:
    world.create("app", "a")
    world.create("app__temp", "b", marker=TEMP)
    return Children(world)


def test_kill_9_leaves_the_old_or_the_new_database_and_nobody_locked_out(children: Children) -> None:
    with Clients(children.server, "app", count=2) as clients:
        assert children.kill_at_random(30) < 1
    assert set().union(*clients.seen.values()) <= {"a", "b"}


@pytest.mark.parametrize("where", ["_end", "_carry_over", "_finish"])
def test_a_frozen_process_lets_clients_go_after_a_second_and_a_half(children: Children, where: str) -> None:
    with children.swapping(stop_in=where):
        assert children.seconds_until_reachable() < 1.8
    children.put_back()
    assert children.swapped == 0


@pytest.mark.parametrize("where", ["_end", "_carry_over", "_finish"])
def test_kill_9_in_the_worst_moments(children: Children, where: str) -> None:
    with children.swapping(stop_in=where) as pid:
        os.kill(pid, signal.SIGKILL)
        assert children.seconds_until_reachable() < 1
    children.put_back()
    assert children.swapped == 0


@pytest.mark.soak
@pytest.mark.parametrize("version", [18, *([15] if POSTGRES_15.exists() else [])])
def test_800_kills(worlds: Callable[[int], World], version: int) -> None:
    world = worlds(version)
    world.create("app", "a")
    world.create("app__temp", "b", marker=TEMP)
    children = Children(world)
    with Clients(children.server, "app", count=2):
        longest = children.kill_at_random(800)
    print(f"PostgreSQL {version}: 800 kills, {children.swapped} came too late, unreachable for {longest:.2f} s at most")
    assert longest < 1
    assert 0 < children.swapped < 800


def test_it_works_on_psycopg2(app: World) -> None:
    script = """
        import sys
        sys.modules["psycopg"] = None
        import django
        django.setup()
        from pgclone.database.connection import find_server
        from pgclone.database.swap import swap
        from django.db.backends.postgresql.psycopg_any import is_psycopg3
        assert not is_psycopg3
        server = find_server("default", maintenance="postgres")
        print(swap(server, database="app", restored="app__temp", run="0123456789ab", keep=False).old_database)
    """
    with Clients(app.alias("app"), "app", count=2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
        )
    assert done.stdout == "app__swap\n", done.stderr
    assert app.content("app") == "new"
