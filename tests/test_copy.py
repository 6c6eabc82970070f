"""copy: a second database on the same server, of the same rows; never at another database's expense."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pgclone
from pgclone import exceptions
from pgclone.database import databases
from pgclone.database.connection import Server, Session, find_server
from pgclone.testing import postgres as private
from tests.fixtures import POSTGRES_15, World, start
from tests.project import Project, open_project


@pytest.fixture(scope="module")
def shared(postgres: private.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project for tests that leave its database alone."""
    with open_project(postgres, tmp_path_factory.mktemp("copy"), name="shared") as project:
        yield project


@pytest.fixture
def app(shared: Project) -> Iterator[Project]:
    """The same, with this process in it; copies are gone after the test."""
    before = shared.databases()
    with shared.here():
        yield shared
    for name in set(shared.databases()) - set(before):
        shared.server.run("dropdb", "--force", "--", name)


def made(app: Project) -> list[str]:
    """The databases that were made, work names and all."""
    return [name for name in app.databases() if name != "shared"]


def oid(app: Project, name: str) -> str:
    return app.sql(f"SELECT oid FROM pg_database WHERE datname = '{name}'")


def test_a_copy_has_the_same_rows_and_is_a_database_of_its_own(app: Project) -> None:
    assert pgclone.copy(":mine") == ":mine"
    assert app.digest("mine") == app.digest()
    app.sql("DELETE FROM app_review", "mine")
    assert app.digest("mine") != app.digest()
    assert made(app) == ["mine"]


def test_a_new_copy_takes_the_place_of_an_older_one(app: Project) -> None:
    pgclone.copy(":mine")
    app.sql("DELETE FROM app_review", "mine")
    older = oid(app, "mine")
    pgclone.copy(":mine")
    assert app.digest("mine") == app.digest()
    assert oid(app, "mine") != older
    assert made(app) == ["mine"]


def test_an_older_copy_stays_when_the_new_one_fails(app: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    pgclone.copy(":mine")
    older = oid(app, "mine")
    with monkeypatch.context() as patched:
        patched.setattr(databases, "_open", lambda *_: 1 / 0)  # after the renames, before the commit
        with pytest.raises(ZeroDivisionError):
            pgclone.copy(":mine")
    assert (oid(app, "mine"), made(app)) == (older, ["mine"])


def test_an_older_copy_is_replaced_though_clients_use_it(app: Project) -> None:
    pgclone.copy(":mine")
    older = oid(app, "mine")
    with clients(app, "mine", 5) as seen:
        pgclone.copy(":mine")
    assert oid(app, "mine") != older
    assert set(seen) == {50}


def test_a_database_that_pgclone_did_not_make_is_left_alone(app: Project) -> None:
    app.server.run("createdb", "theirs")
    theirs = oid(app, "theirs")
    with pytest.raises(exceptions.NotPossible) as refused:
        pgclone.copy(":theirs")
    assert str(refused.value) == (
        'Database "theirs" exists already, and pgclone did not make it.\n'
        "Choose another name, or replace it with --replace."
    )
    assert (oid(app, "theirs"), made(app)) == (theirs, ["theirs"])


def test_a_database_that_pgclone_did_not_make_is_replaced_when_told_to(app: Project) -> None:
    app.server.run("createdb", "theirs")
    pgclone.copy(":theirs", replace=True)
    assert app.digest("theirs") == app.digest()
    assert made(app) == ["theirs"]


@pytest.mark.parametrize("kind", ["pre", "post", "temp", "swap"])
def test_what_belongs_to_a_restore_of_another_database_is_left_alone(app: Project, kind: str) -> None:
    from pgclone.database.names import Marker

    app.server.run("createdb", f"other__{kind}")
    app.sql(f"COMMENT ON DATABASE other__{kind} IS '{Marker(kind, 'other', '0' * 12)}'")  # type: ignore[arg-type]
    with pytest.raises(exceptions.NotPossible, match=f'exists already, and it is the __{kind} of "other"'):
        pgclone.copy(f":other__{kind}")
    assert made(app) == [f"other__{kind}"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("mine", 'Copy target must start with ":"'),
        (":", 'Copy target must start with ":"'),
        ("", 'Copy target must start with ":"'),
        (":pre", ":pre and :post are reserved names. Please use a different copy target name."),
        (":post", ":pre and :post are reserved names. Please use a different copy target name."),
        (":shared", "Target database cannot be the same as source database."),
        (":shared__temp", '"shared__temp" is a reserved name. Please use a different copy target name.'),
        (":shared__swap", '"shared__swap" is a reserved name. Please use a different copy target name.'),
        (":shared__pre", '"shared__pre" is a reserved name. Please use a different copy target name.'),
        (":postgres", '"postgres" is a reserved name. Please use a different copy target name.'),
        (":template0", '"template0" is a reserved name. Please use a different copy target name.'),
        (
            ":pgclone_work_0123456789ab_abcdef",
            '"pgclone_work_0123456789ab_abcdef" is a reserved name. Please use a different copy target name.',
        ),
        (":" + "é" * 32, f'":{"é" * 32}" is no name for a database: PostgreSQL takes at most 63 bytes.'),
    ],
)
def test_names_that_a_copy_cannot_have(app: Project, key: str, message: str) -> None:
    with pytest.raises(exceptions.PgcloneError) as refused:
        pgclone.copy(key, replace=True)
    assert refused.value.cause == message
    assert made(app) == []


def test_a_database_of_the_project_is_never_replaced(app: Project) -> None:
    app.server.run("createdb", "reports")
    reports = oid(app, "reports")
    app.aliases["reports"] = app.server.settings("reports")
    try:
        with app.here(), pytest.raises(exceptions.RuntimeError) as refused:
            pgclone.copy(":reports", replace=True)
    finally:
        app.aliases.clear()
    assert refused.value.cause == (
        'pgclone cannot use the name "reports": it is the database "reports" in settings.DATABASES.'
    )
    assert oid(app, "reports") == reports


class Attempts(list[tuple[str, str | None]]):
    """The strategy and the server's file_copy_method of each copy that it was told to make."""

    first_meets: BaseException | None = None


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    attempts, execute = Attempts(), Session.execute

    def watched(session: Session, query: Any, params: Any = None) -> list[Any]:
        text = query if isinstance(query, str) else query.as_string(session._connection)
        if text.startswith('CREATE DATABASE "pgclone_work_'):
            strategy = re.search(r"STRATEGY '(\w+)'", text)
            method = execute(session, "SELECT current_setting('file_copy_method', true)")[0][0]
            attempts.append((strategy[1] if strategy else "", method))
            if attempts.first_meets and len(attempts) == 1:
                raise attempts.first_meets
        return execute(session, query, params)

    monkeypatch.setattr(Session, "execute", watched)
    return attempts


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every database is a big one."""
    monkeypatch.setattr(databases, "_WORTH_A_CHECKPOINT", 0)


def copy_source(world: World, user: str = "postgres") -> None:
    alias = world.alias("source", user=user)
    with alias.connect() as session:
        databases.copy(alias, session, "0123456789ab", source="source")


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.event for record in caplog.records]  # type: ignore[attr-defined]


def wal_of_a_copy(app: Project) -> int:
    """How many bytes a copy writes to the server's WAL."""
    begin = app.sql("SELECT pg_current_wal_lsn()")
    pgclone.copy(":mine")
    return int(app.sql(f"SELECT pg_current_wal_lsn() - '{begin}'::pg_lsn"))


def test_a_small_database_is_copied_through_the_wal(app: Project, attempts: Attempts) -> None:
    assert wal_of_a_copy(app) > 2_000_000
    assert attempts == [("wal_log", "copy")]


@pytest.mark.usefixtures("big")
def test_the_files_of_a_big_database_are_cloned(app: Project, attempts: Attempts) -> None:
    assert wal_of_a_copy(app) < 2_000_000
    assert attempts == [("file_copy", "clone")]
    assert app.digest("mine") == app.digest()


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("version", [17, *([15] if POSTGRES_15.exists() else [])])
def test_the_files_of_a_big_database_are_copied_where_the_server_cannot_clone(
    worlds: Callable[[int], World], version: int, attempts: Attempts
) -> None:
    world = worlds(version)
    world.create("source")
    copy_source(world)
    assert attempts == [("file_copy", None)]


@pytest.mark.usefixtures("big")
def test_before_postgresql_15_there_is_nothing_to_choose(
    world: World, attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "version", 140000)
    world.create("source")
    copy_source(world)
    assert attempts == [("", "copy")]


@pytest.mark.usefixtures("big")
def test_the_server_chooses_where_the_role_may_not_see_the_size(world: World, attempts: Attempts) -> None:
    owner = world.role("pgclone_owner", "CREATEDB")
    world.create("source", options=f"OWNER {owner}")
    world.sql(f"REVOKE CONNECT ON DATABASE source FROM public, {owner}")
    copy_source(world, owner)
    assert attempts == [("", "copy")]


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("strategy", ["wal_log", "file_copy"])
def test_the_strategy_is_the_callers_choice(app: Project, attempts: Attempts, strategy: str) -> None:
    pgclone.copy(":mine", strategy=strategy)
    assert attempts == [(strategy, "copy")]
    assert app.digest("mine") == app.digest()


@pytest.mark.usefixtures("big")
def test_the_method_of_the_callers_strategy_is_the_servers_choice(app: Project, attempts: Attempts) -> None:
    app.database["OPTIONS"] = {"options": "-c file_copy_method=clone"}
    try:
        with app.here():
            pgclone.copy(":mine", strategy="file_copy")
    finally:
        app.database.clear()
    assert attempts == [("file_copy", "clone")]


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("sqlstate", ["XX000", "58030", "42501"])  # of EXDEV or EOPNOTSUPP, EIO, EPERM
def test_what_cannot_be_cloned_is_copied(
    world: World, attempts: Attempts, caplog: pytest.LogCaptureFixture, sqlstate: str
) -> None:
    caplog.set_level(logging.DEBUG, "pgclone")
    attempts.first_meets = exceptions.ServerError("could not clone file", sqlstate=sqlstate)
    world.create("source")
    copy_source(world)
    assert attempts == [("file_copy", "clone"), ("file_copy", "copy")]
    assert events(caplog) == ["copying", "clone_not_possible", "copying"]


@pytest.mark.usefixtures("big")
def test_a_file_system_that_cannot_clone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "pgclone")

    def copy_on_a_server_that_cannot() -> list[str]:
        refuse_copy_file_range()
        with start() as server:
            world = World(server)
            world.create("source")
            copy_source(world)
            world.clear()
        return events(caplog)

    with ThreadPoolExecutor(1) as pool:  # whose thread and its children are refused the call, and nobody else
        assert pool.submit(copy_on_a_server_that_cannot).result() == ["copying", "clone_not_possible", "copying"]


class Instruction(ctypes.Structure):
    """Of a filter of system calls (struct sock_filter)."""

    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]


def refuse_copy_file_range() -> None:
    """Let copy_file_range fail in this thread as on a file system that does not have it (seccomp(2))."""
    number = {"x86_64": 326, "aarch64": 285}[platform.machine()]
    instructions = (Instruction * 4)(
        (0x20, 0, 0, 0),  # load the number of the call
        (0x15, 0, 1, number),  # if it is another one, skip the next instruction
        (0x06, 0, 0, 0x00050000 | errno.EOPNOTSUPP),  # return this error
        (0x06, 0, 0, 0x7FFF0000),  # allow it
    )
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(38, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_NO_NEW_PRIVS
    program = Filter(len(instructions), instructions)
    assert prctl(22, 2, ctypes.byref(program), 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("end", [None, exceptions.ServerError("disk full", sqlstate="53100"), KeyboardInterrupt()])
def test_a_session_clones_for_one_statement_however_that_ends(
    world: World, attempts: Attempts, end: BaseException | None
) -> None:
    attempts.first_meets = end
    world.create("source")
    with world.alias("source").connect() as session:
        with contextlib.suppress(exceptions.ServerError, KeyboardInterrupt):
            databases.copy(world.alias("source"), session, "0123456789ab", source="source")
        assert attempts == [("file_copy", "clone")]
        assert session.value("SHOW file_copy_method") == "copy"


def test_an_unknown_strategy_is_refused(app: Project) -> None:
    with pytest.raises(exceptions.ValueError) as refused:
        pgclone.copy(":mine", strategy="magic")
    assert str(refused.value) == '"magic" is not a strategy for copies.\nUse wal_log or file_copy.'
    assert made(app) == []


def test_sessions_on_the_source_are_ended_and_counted(app: Project) -> None:
    with connected(app, "shared", 3) as sessions:
        done = app.call("copy", ":mine")
        assert 'Sessions on database "shared" that were ended: 3\n' in done.err
        assert sessions() == 0
    assert app.digest("mine") == app.digest()


def test_no_kill_refuses_while_there_are_sessions(app: Project) -> None:
    with connected(app, "shared", 2) as sessions:
        done = app.call("copy", ":mine", "--no-kill")
        assert done.status == 1
        assert done.err.splitlines()[-2:] == [
            'Database "shared" is in use by 2 sessions, and PostgreSQL copies none that is in use.',
            "Close them, or leave --no-kill out to have them ended.",
        ]
        assert sessions() == 2
    assert made(app) == []


def test_no_kill_copies_what_nobody_uses(app: Project) -> None:
    pgclone.copy(":mine", kill=False)
    assert app.digest("mine") == app.digest()


def test_a_copy_is_made_while_ten_clients_reconnect_all_the_time(app: Project) -> None:
    with clients(app, "shared", 10) as seen:
        pgclone.copy(":mine")
        pgclone.copy(":mine", strategy="file_copy")
    assert app.digest("mine") == app.digest()
    assert set(seen) == {50}


def test_a_missing_source_is_named(app: Project) -> None:
    app.database["NAME"] = "gone"
    try:
        with app.here(), pytest.raises(exceptions.DatabaseNotFound) as refused:
            pgclone.copy(":mine")
    finally:
        app.database.clear()
    assert str(refused.value) == (
        'Database "gone" does not exist.\n'
        'Check the NAME of DATABASES["default"], and see which there are: pgclone ls --local'
    )
    assert made(app) == []


def test_this_process_can_go_on_with_its_database_after_a_copy(app: Project) -> None:
    from tests.app.models import Book

    assert Book.objects.count() == 50
    pgclone.copy(":mine")
    assert Book.objects.count() == 50


def test_a_copy_is_not_made_where_the_settings_forbid_it(app: Project) -> None:
    done = app.call("copy", ":mine", PGCLONE_ALLOW_COPY=False)
    assert (done.status, done.err.splitlines()[0]) == (1, "Copy not allowed.")
    assert made(app) == []


def test_the_copys_story_is_told_on_stderr(app: Project) -> None:
    done = app.call("copy", ":mine")
    assert (done.status, done.out) == (0, "")
    assert done.err.splitlines() == ['Copying database "default" to ":mine"', 'Database "default" copied to ":mine"']


def test_a_restored_copy_stays_as_it_is(project: Project) -> None:
    with project.here():
        pgclone.copy(":mine")
        project.fill(5)
        assert pgclone.restore(":mine", reversible=True) == ":mine"
    assert (project.books(), project.books("mine")) == (50, 50)
    assert project.databases() == ["mine", "shop"]
    project.sql("DELETE FROM app_review", "mine")
    assert project.sql("SELECT count(*) > 0 FROM app_review") == "t"


def test_a_dump_can_be_restored_under_another_name_without_a_swap(project: Project) -> None:
    with project.here():
        key = pgclone.dump()
        project.fill(5)
        assert pgclone.restore(key, as_name=":yesterday") == key
        assert (project.books(), project.books("yesterday")) == (55, 50)
        pgclone.copy(":yesterday")  # which replaces what pgclone made
        assert project.books("yesterday") == 55
        assert pgclone.restore(":yesterday", as_name=":again") == ":yesterday"
        assert project.books("again") == 55
    assert project.databases() == ["again", "shop", "yesterday"]


def test_restores_under_another_name_obey_the_rules_of_copies(project: Project) -> None:
    project.server.run("createdb", "theirs")
    with project.here():
        key = pgclone.dump()
        for name in ("theirs", ":pre", ":shop", ":shop__temp", ":postgres", ":theirs"):
            with pytest.raises(exceptions.PgcloneError):
                pgclone.restore(key, as_name=name)
        assert project.databases() == ["shop", "theirs"]
        pgclone.restore(key, as_name=":theirs", replace=True)
    assert project.books("theirs") == 50
    assert project.databases() == ["shop", "theirs"]


@contextlib.contextmanager
def connected(app: Project, database: str, count: int) -> Iterator[Callable[[], int]]:
    """Idle sessions on a database. Gives a function that counts those that still live."""
    server = alias(app)
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(contextlib.closing(server.open(database))) for _ in range(count)]

        def living() -> int:
            count = 0
            for session in sessions:
                with contextlib.suppress(exceptions.ServerError):
                    count += session.value("SELECT 1")
            return count

        yield living


@contextlib.contextmanager
def clients(app: Project, database: str, count: int) -> Iterator[list[int]]:
    """Threads that connect, count the books, and connect again. Gives the counts."""
    server = alias(app)
    seen: list[int] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with contextlib.suppress(exceptions.ServerError), contextlib.closing(server.open(database)) as session:
                seen.append(session.value("SELECT count(*) FROM public.app_book"))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def alias(app: Project) -> Server:
    with app.here():
        return find_server("default", maintenance="postgres")


def test_a_copy_lies_where_dumps_do_not(app: Project, tmp_path: Path) -> None:
    pgclone.copy(":mine")
    assert not app.dumps.exists()
