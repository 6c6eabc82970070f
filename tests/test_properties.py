"""What belongs to a database: `pg_dump --create` is the judge of what has been carried over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from pgclone import exceptions
from pgclone.database import names, properties
from pgclone.database.properties import Setting, creation_options, read, replay, split_list, unreplayable
from tests.fixtures import POSTGRES_15, World
from tests.test_swap import RUN, TEMP, Clients, run_swap

VERSIONS = [18, 15] if POSTGRES_15.exists() else [18]


def printed(world: World, database: str) -> list[str]:
    """What pg_dump prints of the database itself, its name aside, without the lines that differ at each run."""
    dump = world.server.run("pg_dump", "--create", "--schema-only", "-d", database)
    lines = [line.replace(database, "app") for line in dump.splitlines() if not line.startswith(("\\", "--"))]
    return [line for line in lines if line]


def replayed(world: World, source: str, target: str) -> None:
    found = read(world.session, source)
    assert found
    with world.session.transaction():
        replay(world.session, found, target)


@pytest.fixture
def rich(world: World) -> Iterator[World]:
    """A database with everything that one can have."""
    for role in ("owner", 're"ad er', "grantor", "grandchild"):
        world.role(role)
    world.create("app", "old")
    for statement in (
        "ALTER DATABASE app OWNER TO owner",
        "ALTER DATABASE app CONNECTION LIMIT 33",
        "COMMENT ON DATABASE app IS 'it''s 100% \\ ours'",
        'ALTER DATABASE app SET search_path = "$user", public, "we""ird, one"',
        "ALTER DATABASE app SET temp_tablespaces = pg_default, ''",
        "ALTER DATABASE app SET session_preload_libraries = auto_explain, 'auto_explain'",
        "ALTER DATABASE app SET work_mem = '64MB'",
        "ALTER DATABASE app SET default_transaction_isolation = 'repeatable read'",
        "ALTER DATABASE app SET datestyle = 'SQL, DMY'",
        "ALTER DATABASE app SET timezone = 'Europe/Berlin'",
        "ALTER DATABASE app SET log_min_duration_statement = 0",
        "ALTER DATABASE app SET app.tenant = 'o''ne, two = \"three\" %s \\'",
        'ALTER DATABASE app SET "My"."Setting" = \'\'',
        'ALTER ROLE "re""ad er" IN DATABASE app SET search_path = a, b',
        "ALTER ROLE owner IN DATABASE app SET statement_timeout = '5s'",
        "REVOKE ALL ON DATABASE app FROM PUBLIC",
        'GRANT CONNECT ON DATABASE app TO "re""ad er"',
        "GRANT CONNECT, TEMPORARY ON DATABASE app TO grantor WITH GRANT OPTION",
        "GRANT CREATE ON DATABASE app TO PUBLIC",
        "REVOKE CREATE ON DATABASE app FROM owner",
        "SET ROLE grantor; GRANT CONNECT ON DATABASE app TO grandchild WITH GRANT OPTION; RESET ROLE",
        "SET ROLE grandchild; GRANT CONNECT ON DATABASE app TO PUBLIC; RESET ROLE",
    ):
        world.session.execute(statement)
    yield world


def test_replay_gives_everything_that_pg_dump_prints(rich: World) -> None:
    rich.create("other", "old")
    before = printed(rich, "app")
    assert printed(rich, "other") != before
    replayed(rich, "app", "other")
    assert printed(rich, "other") == before
    assert "ALTER DATABASE app SET search_path TO '$user', 'public', 'we\"ird, one';" in before  # the judge sees it


def test_a_swap_carries_everything_over(rich: World) -> None:
    rich.create("app__temp", "new", marker=TEMP)
    before = printed(rich, "app")
    run_swap(rich)
    assert rich.content("app") == "new"
    assert printed(rich, "app") == before


def test_what_changes_until_the_last_moment_is_carried_over(world: World) -> None:
    world.create("app", "old")
    world.create("app__temp", "new", marker=TEMP)
    run_swap(world, lock_still_held=lambda: world.run("ALTER DATABASE app CONNECTION LIMIT 44"))
    found = read(world.session, "app")
    assert found and found.connection_limit == 44


def test_grants_that_nobody_changed_stay_unchanged(world: World) -> None:
    world.create("app")
    world.create("other")
    replayed(world, "app", "other")
    assert world.value("SELECT datacl FROM pg_database WHERE datname = 'other'") is None


def test_no_grants_at_all_are_not_the_default_ones(world: World) -> None:
    world.create("app")
    world.create("other")
    world.run("REVOKE ALL ON DATABASE app FROM PUBLIC, postgres")
    replayed(world, "app", "other")
    assert world.value("SELECT datacl::text FROM pg_database WHERE datname = 'other'") == "{}"


def test_a_marker_is_no_comment_to_carry_over(world: World) -> None:
    world.create("app", marker=names.Marker("copy", "x", RUN))
    world.create("other", marker=TEMP)
    replayed(world, "app", "other")
    found = read(world.session, "other")
    assert found and found.comment is None


def test_flags(world: World) -> None:
    world.create("app")
    world.create("other")
    world.run("ALTER DATABASE app IS_TEMPLATE true ALLOW_CONNECTIONS false CONNECTION LIMIT 0")
    replayed(world, "app", "other")
    found = read(world.session, "other")
    assert found and (found.is_template, found.allow_connections, found.connection_limit) == (True, False, 0)


def test_an_invalid_database_is_not_made_again(world: World) -> None:
    """A DROP DATABASE that was interrupted leaves a connection limit of -2, which no statement sets."""
    world.create("app")
    world.create("other")
    world.run("UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'app'")
    found = read(world.session, "app")
    assert found and found.connection_limit == -2
    with world.session.transaction():
        replay(world.session, found, "other")
    world.run("UPDATE pg_database SET datconnlimit = -1 WHERE datname = 'app'")
    found = read(world.session, "other")
    assert found and found.connection_limit == -1


def test_what_a_hook_set_stays(world: World) -> None:
    world.create("app")
    world.create("other")
    world.run("ALTER DATABASE app SET work_mem = '5MB'")
    world.run("ALTER DATABASE other SET work_mem = '1MB'")
    world.run("ALTER DATABASE other SET app.hook = 'x'")
    replayed(world, "app", "other")
    found = read(world.session, "other")
    assert found and set(found.settings) == {Setting(None, "work_mem", "5MB"), Setting(None, "app.hook", "x")}


def test_security_labels_are_read_and_what_their_provider_refuses_is_said(world: World) -> None:
    world.create("app")
    world.run("INSERT INTO pg_shseclabel SELECT oid, 'pg_database'::regclass, 'selinux', 'secret' FROM pg_database "
              "WHERE datname = 'app'")  # fmt: skip
    found = read(world.session, "app")
    assert found and found.labels == (properties.Label("selinux", "secret"),)
    assert unreplayable(world.session, found) == [
        'Security label of provider "selinux" cannot be carried over: security label provider "selinux" is not '
        'loaded. Remedy: ALTER ROLE "postgres" SUPERUSER'
    ]
    world.run("DELETE FROM pg_shseclabel")


def test_there_is_none(world: World) -> None:
    assert read(world.session, "nowhere") is None


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("", []),
        ('""', [""]),
        ('"$user", public', ["$user", "public"]),
        ('a,"b, ""c""" ,d', ["a", 'b, "c"', "d"]),
        ("$libdir/x", ["$libdir/x"]),
    ],
)
def test_lists(value: str, parts: list[str]) -> None:
    assert split_list(value) == parts


# Created the same


LOCALES = [
    (18, "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'POSIX' LOCALE_PROVIDER libc"),
    (18, "ENCODING 'UTF8' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' LOCALE 'C'"),
]
if POSTGRES_15.exists():  # the wheel has no ICU
    LOCALES += [
        (15, "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'POSIX'"),
        (15, "ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'de-u-co-phonebk' LOCALE 'C'"),
    ]


@pytest.mark.parametrize(("version", "options"), LOCALES)
def test_creation_options_give_the_same_encoding_and_locale(
    worlds: Callable[[int], World], version: int, options: str
) -> None:
    from django.db.backends.postgresql.psycopg_any import sql

    world = worlds(version)
    world.create("app", options=options)
    found = read(world.session, "app")
    assert found
    world.session.execute(sql.SQL("CREATE DATABASE other TEMPLATE template0 {}").format(creation_options(found)))
    assert printed(world, "other") == printed(world, "app")


def test_icu_rules_are_created_too(world: World) -> None:
    """PostgreSQL 16 and later, with ICU: there is none here to try it on."""
    found = properties.Properties(
        "app", 1, "me", "UTF8", "icu", "C", "C", "de", "&V << w", "pg_default", -1, False, True, None, None, (), ()
    )
    text = creation_options(found).as_string(world.session._connection)
    assert "LOCALE_PROVIDER 'icu' ICU_LOCALE 'de' ICU_RULES '&V << w'" in " ".join(text.split())


def test_creation_options_give_the_same_tablespace(world: World) -> None:
    from django.db.backends.postgresql.psycopg_any import sql

    world.session.execute("SET allow_in_place_tablespaces = on")
    world.run("CREATE TABLESPACE {} LOCATION ''", 'fast "one"')
    try:
        world.create("app", options='TABLESPACE "fast ""one"""')
        found = read(world.session, "app")
        assert found and found.tablespace == 'fast "one"'
        world.session.execute(sql.SQL("CREATE DATABASE other TEMPLATE template0 {}").format(creation_options(found)))
        other = read(world.session, "other")
        assert other and other.tablespace == found.tablespace
        role = world.role("plain", "CREATEDB")
        world.run("ALTER DATABASE app OWNER TO plain")
        with world.connect("postgres", user=role) as session:
            found = read(session, "app")
            assert found
            assert [line for line in unreplayable(session, found) if "GRANT CREATE ON TABLESPACE" in line]
    finally:
        world.drop("app")
        world.drop("other")
        world.run("DROP TABLESPACE {}", 'fast "one"')


def test_a_plain_role_may_create_one_like_its_own(world: World) -> None:
    from django.db.backends.postgresql.psycopg_any import sql

    role = world.role("plain", "CREATEDB")
    world.create("app", options="OWNER plain")
    with world.connect("postgres", user=role) as session:
        found = read(session, "app")
        assert found
        session.execute(sql.SQL("CREATE DATABASE other TEMPLATE template0 {}").format(creation_options(found)))


# What cannot be carried over is known before


def test_a_superuser_may_carry_everything_over_and_finding_out_changes_nothing(rich: World) -> None:
    found = read(rich.session, "app")
    assert found
    with Clients(rich.alias("app"), "app", count=2):
        assert unreplayable(rich.session, found) == []
    assert read(rich.session, "app") == found


def test_what_a_plain_owner_may_not_is_exactly_what_is_said(rich: World) -> None:
    role = rich.role("plain", "CREATEDB")
    rich.run("GRANT owner TO plain")
    rich.create("other", "old", options="OWNER plain")
    with rich.connect("postgres", user=role) as session:
        found = read(session, "app")
        assert found
        said = unreplayable(session, found)
        assert {sentence.partition(" cannot be carried over")[0] for sentence in said} == {
            'CONNECT for role "grandchild", granted by role "grantor",',
            'CONNECT for PUBLIC, granted by role "grandchild",',
            "Setting log_min_duration_statement",
            "Setting session_preload_libraries",
            "Setting app.tenant",
            "Setting My.Setting",
            'Setting statement_timeout of role "owner"',
            'Setting search_path of role "re""ad er"',
        }
        with pytest.raises(exceptions.ServerError), session.transaction():
            replay(session, found, "other")
    for sentence in said:
        for statement in sentence.partition("Remedy: ")[2].replace(" (PostgreSQL 15 and later)", "").split("; "):
            rich.run(statement)
    with rich.connect("postgres", user=role) as session:
        assert unreplayable(session, found) == []
        with session.transaction():
            replay(session, found, "other")
    assert printed(rich, "other") == printed(rich, "app")
    for name in ("log_min_duration_statement", "session_preload_libraries", "app.tenant", '"My"."Setting"'):
        rich.run(f"REVOKE ALL ON PARAMETER {name} FROM plain")


def test_an_owner_that_the_role_may_not_become(world: World) -> None:
    role = world.role("plain", "CREATEDB")
    world.role("owner")
    world.create("app", options="OWNER owner")
    world.run("GRANT owner TO plain WITH INHERIT TRUE, SET FALSE")
    with world.connect("postgres", user=role) as session:
        found = read(session, "app")
        assert found
        assert unreplayable(session, found) == [
            'Owner "owner" cannot be carried over: role "plain" may not become it. Remedy: GRANT "owner" TO "plain"'
        ]


def test_finding_out_waits_for_a_rename_to_end(world: World) -> None:
    world.create("app")
    world.run("ALTER DATABASE app SET work_mem = '5MB'")
    found = read(world.session, "app")
    assert found
    with world.connect("postgres") as other:
        other.execute("BEGIN")
        other.execute("ALTER DATABASE app RENAME TO elsewhere")
        ending = threading.Timer(0.5, lambda: other.execute("ROLLBACK"))
        ending.start()
        assert unreplayable(world.session, found) == []
        ending.join()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version(worlds: Callable[[int], World], version: int) -> None:
    world = worlds(version)
    world.create("app", "old")
    world.create("app__temp", "new", marker=TEMP)
    world.run("ALTER DATABASE app SET search_path = a, b")
    world.run("REVOKE CONNECT ON DATABASE app FROM PUBLIC")
    before = printed(world, "app")
    run_swap(world)
    assert world.content("app") == "new"
    assert printed(world, "app") == before
