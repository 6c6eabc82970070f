"""What a swap needs is known before anything is touched, all of it at once, with the statements that give it."""

from __future__ import annotations

import subprocess

import pytest

from pgclone import exceptions
from pgclone.database.rights import check
from tests.fixtures import World
from tests.test_swap import NAMES, TEMP, run_swap, state


def problems(world: World, user: str = "plain", database: str = "app") -> list[str]:
    """What `check` complains about, and nothing has changed."""
    before = state(world)
    alias = world.alias(database, user=user)
    try:
        with alias.connect() as session:
            check(alias, session, database)
    except exceptions.NotPossible as error:
        assert error.cause.startswith(f'Role "{user}" cannot replace database "{database}" on 127.0.0.1:')
        assert "Nothing was touched" in error.remedy
        return error.cause.splitlines()[1:]
    finally:
        assert state(world) == before
    return []


@pytest.fixture
def plain(world: World) -> World:
    """A database of a plain role that may create databases."""
    world.role("plain", "CREATEDB")
    world.create("app", "old", options="OWNER plain")
    return world


def test_the_owner_with_createdb_may(plain: World) -> None:
    with plain.connect("app", user="plain"):
        assert problems(plain) == []


def test_a_superuser_may(plain: World) -> None:
    with plain.connect("app"), plain.connect("app", user="plain"):
        assert problems(plain, "postgres") == []


def test_createdb(plain: World) -> None:
    plain.run("ALTER ROLE plain NOCREATEDB")
    (problem,) = problems(plain)
    assert problem == '- The role may not create databases. ALTER ROLE "plain" CREATEDB'
    assert problems(plain, database="nowhere") == [problem]
    plain.run('ALTER ROLE "plain" CREATEDB')
    assert problems(plain) == []


def test_a_missing_primary_needs_createdb_only(plain: World) -> None:
    assert problems(plain, database="nowhere") == []


def test_the_owner(plain: World) -> None:
    plain.role("boss")
    plain.run("ALTER DATABASE app OWNER TO boss")
    (problem,) = problems(plain)
    assert 'GRANT "boss" TO "plain", or ALTER DATABASE "app" OWNER TO "plain"' in problem
    plain.run('GRANT "boss" TO "plain"')
    assert problems(plain) == []
    plain.create("app__temp", "new", marker=TEMP, options="OWNER plain")
    run_swap(plain, user="plain")
    assert plain.value("SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = 'app'") == "boss"


def test_sessions_of_another_role(plain: World) -> None:
    plain.role("reader")
    with plain.connect("app", user="reader", application="reports") as session:
        (problem,) = problems(plain)
        assert f'pid {session.pid} (role "reader", reports)' in problem
        assert problem.endswith('GRANT pg_signal_backend TO "plain"')
        plain.run('GRANT pg_signal_backend TO "plain"')
        assert problems(plain) == []
        plain.create("app__temp", "new", marker=TEMP, options="OWNER plain")
        run_swap(plain, user="plain", attempts=1)


def test_sessions_of_a_superuser(plain: World) -> None:
    plain.run('GRANT pg_signal_backend TO "plain"')
    with plain.connect("app", application="psql") as session:
        (problem,) = problems(plain)
        assert f'Only a superuser can end the session of pid {session.pid} (role "postgres", psql)' in problem
        plain.sql(f"SELECT pg_terminate_backend({session.pid})")
    assert problems(plain) == []


def test_a_prepared_transaction(plain: World) -> None:
    with plain.connect("app", user="plain") as session:
        session.execute("BEGIN")
        session.execute("SELECT pg_current_xact_id()")
        session.execute("PREPARE TRANSACTION 'it''s'")
    (problem,) = problems(plain)
    assert "ROLLBACK PREPARED 'it''s'" in problem


def test_subscriptions_and_slots(plain: World) -> None:
    plain.sql('CREATE SUBSCRIPTION "or ders" CONNECTION \'dbname=x\' PUBLICATION x WITH (connect = false, '
              "slot_name = NONE)", database="app")  # fmt: skip
    plain.sql("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')", database="app")
    try:
        subscription, slot = problems(plain)
        assert 'DROP SUBSCRIPTION "or ders"' in subscription
        assert "SELECT pg_drop_replication_slot('cdc')" in slot
    finally:
        plain.sql('DROP SUBSCRIPTION "or ders"', database="app")


def test_an_active_replication_client(plain: World) -> None:
    plain.sql("SELECT pg_create_logical_replication_slot('cdc', 'test_decoding')", database="app")
    reader = subprocess.Popen(
        [str(plain.server.bin / "pg_recvlogical"), "-d", "app", "--slot", "cdc", "--start", "-f", "/dev/null"],
        env=plain.server.environ(),
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(500):
            if pid := plain.value("SELECT active_pid FROM pg_replication_slots"):
                break
        said = problems(plain, "postgres")
        assert len(said) == 1 and f"used by pid {pid}" in said[0]
    finally:
        reader.terminate()
        reader.wait()
        for _ in range(500):
            if not plain.value("SELECT active_pid FROM pg_replication_slots"):
                break


def test_properties_that_it_may_not_carry_over(plain: World) -> None:
    plain.run("ALTER DATABASE app SET app.tenant = 'x'")
    (problem,) = problems(plain)
    assert problem.startswith("- Setting app.tenant cannot be carried over: permission denied")
    assert 'GRANT SET ON PARAMETER "app"."tenant" TO "plain"' in problem


def test_the_maintenance_database(plain: World) -> None:
    (problem,) = problems(plain, "postgres", "postgres")
    assert "PGCLONE_CONN_DB" in problem


def test_all_of_it_at_once(plain: World) -> None:
    plain.role("boss")
    plain.run("ALTER ROLE plain NOCREATEDB")
    plain.run("ALTER DATABASE app OWNER TO boss")
    plain.sql("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')", database="app")
    with plain.connect("app"), plain.connect("app", user="boss"):
        said = problems(plain)
    assert len(said) == 5
    for words in ("CREATEDB", "cdc", "OWNER TO", "Only a superuser", "pg_signal_backend"):
        assert any(words in line for line in said)


@pytest.mark.parametrize("name", NAMES)
def test_any_name(world: World, name: str) -> None:
    role = world.role(name[:20], "CREATEDB")
    world.create(name)
    with world.alias(name, user=role).connect() as session:
        with pytest.raises(exceptions.NotPossible, match="ALTER DATABASE"):
            check(world.alias(name, user=role), session, name)
