"""copy --online: a second database of what one snapshot shows, while everybody goes on with their work."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import pgclone
from pgclone import exceptions, load, plan, process
from pgclone.database import databases
from pgclone.database.connection import Session, find_server
from pgclone.testing import postgres as private
from tests.faults import Fault
from tests.forks import Forks
from tests.project import Done, Project, open_project
from tests.tools import make_tools

PROMPTLY = 15
"""Seconds, on a machine that has much to do: what hangs here hangs for a minute."""


@pytest.fixture(scope="module")
def shared(postgres: private.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose books and reviews are large enough for parts; tests leave its database as it is."""
    with open_project(postgres, tmp_path_factory.mktemp("online"), name="shared") as project:
        project.fill(3000)
        # No part: what outgrows the archive's head and the pipe to pg_restore.
        project.sql("CREATE UNLOGGED TABLE long AS SELECT repeat(n::text, 20) FROM generate_series(1, 20000) AS n")
        yield project


@pytest.fixture
def app(shared: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """The same, with this process in it; copies are gone after the test."""
    for name in ("LARGE", "SMALL_CHUNK", "CHUNK"):
        monkeypatch.setattr(plan, name, 65536)
    with shared.here():
        yield shared
    for name in made(shared):
        shared.server.run("dropdb", "--force", "--", name)


def made(app: Project) -> list[str]:
    """The databases that were made, work names and all."""
    return [name for name in app.databases() if name != "shared"]


class Parts(list[str]):
    """The statements that copy rows out of one database and into another."""

    def of(self, words: str) -> list[str]:
        return [statement for statement in self if words in statement]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    seen = Parts()

    def watched(call: Any) -> Any:
        def copy(tools: Any, conninfo: Any, statements: Sequence[str], *more: Any) -> Any:
            seen.extend(statement for statement in statements if statement.startswith("COPY"))
            return call(tools, conninfo, statements, *more)

        return copy

    for name in ("copy_out", "copy_in"):
        monkeypatch.setattr(process, name, watched(getattr(process, name)))
    return seen


@contextlib.contextmanager
def session(app: Project, database: str = "shared") -> Iterator[Session]:
    with find_server("default", maintenance="postgres").connect(database, application="test") as session:
        yield session


def sessions(app: Project) -> list[str]:
    """The applications of those who are connected to the source."""
    text = app.sql("SELECT application_name FROM pg_stat_activity WHERE datname = 'shared' AND pid <> pg_backend_pid()")
    return text.splitlines()


# What it does


def test_a_copy_is_made_beside_a_transaction_that_goes_on(app: Project, parts: Parts) -> None:
    with session(app) as other:
        other.execute("BEGIN")
        other.execute("UPDATE public.app_author SET name = 'not yet'")
        done = app.call("copy", ":mine", "--online", "--jobs", "2")
        assert done.status == 0, done.err
        assert "ended" not in done.err
        other.execute("ROLLBACK")
    assert app.digest("mine") == app.digest()
    assert app.sql("SELECT reltuples FROM pg_class WHERE relname = 'app_review'", "mine") == "3050"
    assert len(parts.of("TO STDOUT")) == len(parts.of("FROM STDIN")) >= 3
    assert (made(app), sessions(app)) == (["mine"], [])
    assert not app.dumps.exists()


def test_one_job_copies_without_parts_and_no_kill_is_what_it_does_anyway(app: Project, parts: Parts) -> None:
    with session(app) as other:
        pgclone.copy(":mine", online=True, kill=False, jobs=1)
        assert other.value("SELECT 1") == 1
    assert app.digest("mine") == app.digest()
    assert app.sql("SELECT count(*) FROM long", "mine") == "20000"
    assert parts == []


TRANSFERS = """
CREATE TABLE purse AS SELECT id, 100 AS money, repeat('leather', 9) AS made_of FROM generate_series(1, 5000) AS id;
ALTER TABLE purse ADD PRIMARY KEY (id);
CREATE TABLE till AS SELECT 0 AS money; CREATE TABLE receipt (purse int);
"""


def test_a_copy_is_what_one_snapshot_shows_while_money_goes_from_hand_to_hand(app: Project, parts: Parts) -> None:
    """From the rows of parts to those of other parts, and to a table of the archive."""
    app.sql(TRANSFERS)
    begun, over = threading.Barrier(4), threading.Event()
    counts: list[int] = []

    def spend() -> None:
        chance, count = random.Random(), 0
        with session(app) as customer:
            while not over.is_set():
                payer, payee = chance.sample(range(1, 5001), 2)
                with customer.transaction():
                    customer.execute("UPDATE public.purse SET money = money - 2 WHERE id = %s", [payer])
                    customer.execute("UPDATE public.purse SET money = money + 1 WHERE id = %s", [payee])
                    customer.execute("UPDATE public.till SET money = money + 1")
                    customer.execute("INSERT INTO public.receipt VALUES (%s)", [payer])
                count += 1
                if count == 1:
                    begun.wait(30)
        counts.append(count)

    customers = [threading.Thread(target=spend) for _ in range(3)]
    for customer in customers:
        customer.start()
    begun.wait(30)
    try:
        pgclone.copy(":mine", online=True, jobs=3)
    finally:
        over.set()
        for customer in customers:
            customer.join()
        receipts = int(app.sql("SELECT count(*) FROM receipt"))
        app.sql("DROP TABLE purse, till, receipt")
    assert len(parts.of('"purse"')) >= 4
    seen = "SELECT sum(money), (SELECT money FROM till), (SELECT count(*) FROM receipt) FROM purse"
    purses, till, seen_receipts = map(int, app.sql(seen, "mine").split("|"))
    assert purses + till == 500_000
    assert till == seen_receipts < receipts == sum(counts)


SETTINGS = {
    "datestyle": "'SQL, DMY'",
    "intervalstyle": "sql_standard",
    "extra_float_digits": "-10",
    "bytea_output": "escape",
    "default_transaction_isolation": "serializable",
    "idle_in_transaction_session_timeout": "'1ms'",
}


def test_what_dumps_leave_out_is_copied(app: Project) -> None:
    with app.here(PGCLONE_EXCLUDE=["app.Review"], PGCLONE_EXCLUDE_TABLES=["app_book"]):
        pgclone.copy(":mine", online=True, jobs=2)
    assert app.digest("mine") == app.digest()


def test_somebody_who_looks_into_the_work_database_is_no_obstacle(
    app: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = contextlib.ExitStack()
    publish = databases.publish

    def watched(session: Session, work: str, *args: Any, **more: Any) -> str | None:
        watching.enter_context(find_server("default", maintenance="postgres").connect(work))
        return publish(session, work, *args, **more)

    monkeypatch.setattr(databases, "publish", watched)
    with watching:
        pgclone.copy(":mine", online=True, jobs=2)
    assert app.digest("mine") == app.digest()


def test_the_locks_on_the_source_are_gone_when_indexes_are_built(app: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[str] = []
    build = load.build_indexes

    def watched(*args: Any, **more: Any) -> None:
        held.append(
            app.sql(
                "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation WHERE c.relname = 'app_review'"
            )
        )
        build(*args, **more)

    monkeypatch.setattr(load, "build_indexes", watched)
    pgclone.copy(":mine", online=True, jobs=2)
    assert held == ["0"]


def test_settings_of_the_role_and_the_database_change_no_value(app: Project, parts: Parts) -> None:
    app.sql(
        """CREATE TABLE delicate AS SELECT date '2026-02-01' + n AS d, n / 3.0::float8 AS f, interval '-1 day -2:03' * n AS i,
            ARRAY[NULL, n::text, 'NULL'] AS a, '\\x00ff'::bytea AS b, now() AS t FROM generate_series(1, 3000) AS n"""
    )
    digest = "SELECT md5(string_agg(delicate::text, '|' ORDER BY d)) FROM delicate"
    before = app.sql(digest)
    # Here, and not in the copy, which would read what it has written itself; and in the copy as well what matters there.
    settings = [f"IN DATABASE shared SET {name} = {value}" for name, value in SETTINGS.items()]
    app.sql(";".join(f"ALTER ROLE postgres {setting}" for setting in [*settings, "SET array_nulls = off"]))
    try:
        pgclone.copy(":mine", online=True, jobs=2)
    finally:
        app.sql("ALTER ROLE postgres RESET ALL; ALTER ROLE postgres IN DATABASE shared RESET ALL")
        app.sql("DROP TABLE delicate")
    assert parts.of('"delicate"')
    assert app.sql(digest, "mine") == before


# A copy like any other


def test_a_copy_can_be_restored_and_is_replaced_by_a_newer_one(
    project: Project, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LARGE", 8192)
    with project.here():
        pgclone.copy(":mine", online=True, jobs=2)
        project.fill(5)
        assert pgclone.restore(":mine", pre_swap_hooks=[]) == ":mine"
        assert (project.books(), project.books("mine")) == (50, 50)
        project.fill(5)
        pgclone.copy(":mine", online=True, jobs=2)
        assert (project.books(), project.books("mine")) == (55, 55)
    assert parts
    assert project.databases() == ["mine", "shop"]


def test_a_database_that_pgclone_did_not_make_is_replaced_only_when_told_to(app: Project) -> None:
    app.server.run("createdb", "theirs")
    with pytest.raises(exceptions.NotPossible, match="exists already, and pgclone did not make it"):
        pgclone.copy(":theirs", online=True)
    assert app.sql("SELECT count(*) FROM pg_class WHERE relname = 'app_book'", "theirs") == "0"
    pgclone.copy(":theirs", online=True, replace=True)
    assert app.digest("theirs") == app.digest()
    assert made(app) == ["theirs"]


def test_the_tools_must_be_as_new_as_the_server(app: Project) -> None:
    done = app.call("copy", ":mine", "--online", PGCLONE_BIN_DIR=str(private.embedded(17)))
    assert done.status == 1
    assert "is too old for the server, which is 18." in done.err
    assert made(app) == []


# Failures


def failed(app: Project, *words: str, tools: Path | None = None) -> Done:
    """A copy fails, says why in words, and leaves nothing: neither databases nor sessions, and an older copy as it was."""
    app.server.run("createdb", "older")
    app.sql("""COMMENT ON DATABASE older IS 'pgclone {"kind": "copy", "source": "shared", "run": "0123456789ab"}'""")
    with session(app) as other:
        begun = time.monotonic()
        changes = {"PGCLONE_BIN_DIR": str(tools)} if tools else {}
        done = app.call("copy", ":older", "--online", "--jobs", "2", **changes)
        assert time.monotonic() - begun < PROMPTLY
        assert other.value("SELECT 1") == 1
    assert done.status == 1
    assert [word for word in words if word not in done.err] == [] and "Traceback" not in done.err, done.err
    assert made(app) == ["older"]
    assert app.sql("SELECT count(*) FROM pg_class WHERE relname = 'app_book'", "older") == "0"
    assert sessions(app) == []
    return done


READS = "any(word.endswith(' TO STDOUT') for word in sys.argv)"
LOADS = "any(word.endswith(' FROM STDIN') for word in sys.argv)"
"""Which end of a part a psql is told to be."""

HALF = """
import time
if '--version' in sys.argv: exact()
process = subprocess.Popen([tool, *sys.argv[1:]], stdout=subprocess.PIPE)
sys.stdout.buffer.write(process.stdout.read(400_000))
sys.stdout.flush()
"""
"""A pg_dump that has written more than fits into the pipe to pg_restore."""

STALLS = f"{HALF}time.sleep(60)"
GOES_ON = f"{HALF}for _ in range(3000): sys.stdout.buffer.write(bytes(65536)), time.sleep(0.02)"

BROKEN = {
    "pg_dump at once": (
        {"pg_dump": "sys.exit('pg_dump: error: no such thing')"},
        "pg_dump failed with status 1: pg_dump: error: no such thing",
    ),
    "pg_dump in its first bytes": ({"pg_dump": "die(after=90_000, status=1)"}, "pg_dump failed with status 1"),
    "pg_dump in the middle": ({"pg_dump": "die(after=400_000, by=9)"}, "pg_dump was killed by signal 9"),
    "pg_dump at its end": ({"pg_dump": "die(status=3)"}, "pg_dump failed with status 3"),
    "pg_restore": ({"pg_restore": "die(after=90_000, by=9, section='data')"}, "pg_restore was killed by signal 9"),
    "psql that reads": (
        {"psql": f"if {READS}: die(after=9_000, by=9)\nexact()"},
        "could not be dumped: psql was killed by signal 9",
    ),
    "psql at the end of its rows": (
        {"psql": f"if {READS}: die(status=1)\nexact()"},
        "could not be dumped: psql failed with status 1",
    ),
    "psql while pg_dump stalls": (
        {"pg_dump": STALLS, "psql": f"if {LOADS}: sys.exit('psql: gone')\nexact()"},
        "could not be loaded: psql failed with status 1: psql: gone",
    ),
    "pg_restore while pg_dump goes on": (
        {"pg_dump": GOES_ON, "pg_restore": "die(after=90_000, by=9, section='data')"},
        "pg_restore was killed by signal 9",
    ),
}


@pytest.mark.parametrize(("broken", "words"), BROKEN.values(), ids=BROKEN)
def test_a_tool_that_fails_fails_the_copy(app: Project, tmp_path: Path, broken: dict[str, str], words: str) -> None:
    failed(app, words, tools=make_tools(tmp_path, app.server.bin, **broken))


def test_a_table_that_may_not_be_read_is_named(app: Project) -> None:
    app.sql("CREATE ROLE clerk LOGIN CREATEDB PASSWORD 'secret'")
    app.database |= {"USER": "clerk", "PASSWORD": "secret"}
    try:
        done = app.call("copy", ":mine", "--online")
    finally:
        app.database.clear()
        app.sql("DROP ROLE clerk")
    assert done.status == 1
    assert "permission denied for table" in done.err


def test_a_row_that_the_copy_refuses_is_named_with_its_table(app: Project) -> None:
    app.sql("ALTER TABLE app_book ADD CONSTRAINT home CHECK (current_database() = 'shared')")
    try:
        failed(app, "The rows of public.app_book could not be loaded", 'violates check constraint "home"')
    finally:
        app.sql("ALTER TABLE app_book DROP CONSTRAINT home")


def test_entries_that_may_fail_are_allowed_as_for_restores(app: Project) -> None:
    app.sql(
        """CREATE FUNCTION picky(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
        $$ BEGIN IF current_database() <> 'shared' THEN RAISE 'elsewhere'; END IF; RETURN $1; END $$"""
    )
    app.sql("CREATE INDEX picky_index ON app_author (public.picky(name))")
    try:
        failed(app, "elsewhere", "--allow-error", "With --jobs 1, each error has its entry.")
        allowed = app.call("copy", ":mine", "--online", "--allow-error", "INDEX public picky_index")
    finally:
        app.sql("DROP FUNCTION picky CASCADE")
    assert allowed.status == 0 and "Ignored, as you allowed it: INDEX public picky_index" in allowed.err
    assert app.digest("mine") == app.digest()


def test_a_loading_that_fails_is_not_taken_for_a_reading_that_fails(
    app: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part is longer than a pipe, so that it is still being read."""
    monkeypatch.setattr(plan, "CHUNK", 1 << 30)
    app.sql("CREATE TABLE wide AS SELECT repeat(n::text, 50) FROM generate_series(1, 20000) AS n")
    try:
        tools = make_tools(tmp_path, app.server.bin, psql=f"if {LOADS}: sys.exit('psql: gone')\nexact()")
        done = failed(app, "The rows of public.wide could not be loaded: psql failed", tools=tools)
    finally:
        app.sql("DROP TABLE wide")
    assert "could not be dumped" not in done.err


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(large=65536) as forks:
        yield forks


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault("child: psql started", "SIGINT", 2), 130),
        (Fault("child: psql started", "SIGTERM", 3), 143),
        (Fault('while: ANALYZE ONLY "public"."app_review"', "SIGKILL"), -9),
    ],
    ids=str,
)
def test_a_copy_that_is_ended_leaves_nothing_or_what_the_next_one_clears(
    app: Project, forks: Forks, fault: Fault, status: int
) -> None:
    with session(app) as other:
        done = forks.run(app, "pgclone", "copy", ":mine", "--online", "--jobs", "2", faults=[fault])
        assert done.status == status, done.err
        assert other.value("SELECT 1") == 1
    assert "mine" not in made(app)
    assert status == -9 or made(app) == []
    pgclone.copy(":mine", online=True, jobs=2)
    assert app.digest("mine") == app.digest()
    assert (made(app), sessions(app)) == (["mine"], [])
