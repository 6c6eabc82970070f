"""Names, paths, passwords and connection options as no sane project has them, and PostgreSQL allows them."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pgclone
from pgclone import exceptions, plan
from pgclone.database.names import derive
from pgclone.testing import postgres as private
from tests.fixtures import World
from tests.project import Project, open_project

BAIT = "'\"; DROP TABLE x; --$(id)`id`%s%%{0}\\n&|<>é数"
"""What a shell, SQL, a format string or a conninfo string would trip over. It is 63 bytes at most, as a name."""

DATABASES = [
    BAIT,
    'quo\'te"s"',
    " spaces, backslash \\",
    "100% %s %(x)s %% $HOME ${x} {} {0}",
    "a/b/../c;d|e&f",
    "Ünïcödé-数据库-🐘",
    "--help",
    "a=b",
    "host=nowhere dbname='x'",
    "postgresql://x:y@nowhere/z",
    "line\nbreak\ttab",
    "UPPER.dotted",
    "x" * 63,
    "é" * 31 + "x",
    "x" * 57,  # with __temp it has 63
    "x" * 58,
]


@pytest.mark.parametrize("name", DATABASES)
def test_databases_of_any_name_go_through_everything(postgres: private.Server, tmp_path: Path, name: str) -> None:
    copy = name[::-1].strip("x") + "+" if len(name.encode()) < 60 else "copy"
    with open_project(postgres, tmp_path, name=name, books=3) as project, project.here():
        key = pgclone.dump()
        project.fill(4)
        pgclone.restore(key, reversible=True)
        assert [project.books(each) for each in (name, derive(name, "pre"), derive(name, "post"))] == [3, 7, 3]
        pgclone.restore(":pre")
        assert project.books() == 7
        assert pgclone.copy(f":{copy}") == f":{copy}"
        pgclone.restore(":post")
        assert (project.books(), project.books(copy)) == (3, 7)
        pgclone.restore(f":{copy}")
        assert project.books() == 7
        assert f":{name}" in pgclone.ls(local=True)
        pgclone.restore(key)
        assert project.sql("SELECT count(*) FROM app_book") == "3"
        assert set(project.databases()) == {name, copy}


@pytest.fixture(scope="module")
def shared(postgres: private.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project that every test leaves with its fifty books."""
    with open_project(postgres, tmp_path_factory.mktemp("odd"), name="shared") as project:
        yield project


@pytest.fixture
def app(shared: Project, tmp_path: Path) -> Iterator[Project]:
    """The same with a folder of its own for dumps, and with the settings of its database as they were."""
    shared.dumps = tmp_path / "dumps"
    yield shared
    assert shared.books() == 50
    shared.database.clear()
    shared.aliases.clear()


def cycle(project: Project, **options: Any) -> str:
    """Dump, damage, restore with a copy kept, go back, copy. The rows are what they were at the end."""
    with project.here():
        rows = project.digest()
        key = pgclone.dump(**options)
        project.sql("DELETE FROM app_review")
        pgclone.restore(key, database=options.get("database"), reversible=True)
        assert project.digest() == rows
        pgclone.restore(":post")
        pgclone.copy(":mine")
        assert project.digest("mine") == project.digest() == rows
    return key


# What keys are made of


@pytest.mark.parametrize("name", [BAIT, "../../..", "..", "/etc/passwd", ":pre", "-rf", "", "\n", "naïve"])
def test_instances_aliases_and_configurations_of_any_name_make_proper_keys(app: Project, name: str) -> None:
    app.aliases[name] = app.server.settings("shared")
    with app.here(PGCLONE_CONFIGS={name: {"codec": "none"}}, PGCLONE_INSTANCE=name):
        key = pgclone.dump(database=name, config=name)
        assert re.fullmatch(r"([\w-]+/){3}[\d-]+\.dump", key, re.ASCII)
        assert pgclone.ls() == [key]
        assert pgclone.restore(key, as_name=":mine", pre_swap_hooks=[]) == key
    assert sorted(app.stored()) == [key, f"{key}.json"]


# Where dumps lie


@pytest.mark.parametrize(
    "folder", [BAIT.replace("/", ""), "-rf", " ", "~", "line\nbreak", "a:b", "*?[x]", "x.dump", "%2e"]
)
def test_storage_folders_of_any_name(
    app: Project, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    location = f"{folder}/more"
    with app.here(PGCLONE_STORAGE_LOCATION=location):
        key = pgclone.dump()
        assert (tmp_path / folder / "more" / key).is_file()
        assert pgclone.ls() == [key]
        assert pgclone.restore("prod", as_name=":mine", pre_swap_hooks=[]) == key
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("key", ["../secret.dump", "prod/../../secret.dump", "/etc/passwd", "prod/default/..", "."])
def test_no_key_leaves_the_location(app: Project, tmp_path: Path, key: str) -> None:
    (tmp_path / "secret.dump").write_bytes(b"PGDMP")
    with app.here(), pytest.raises(exceptions.ValueError, match="cannot leave it"):
        pgclone.restore(key)


# Who logs in, and how

ROLES = [
    ("we\"ird r'ole\\; $x é", BAIT),
    ("-dash", " leading and trailing "),
    ("a=b", "postgresql://x:y@z"),
    ("%s", "é数🐘"),
]


@pytest.mark.parametrize(("role", "password"), ROLES)
def test_roles_and_passwords_of_any_characters(app: Project, world: World, role: str, password: str) -> None:
    with owner(app, world, role, password):
        app.database.update(USER=role, PASSWORD=password)
        cycle(app)


def test_a_password_in_the_options(app: Project, world: World) -> None:
    with owner(app, world, "someone", BAIT):
        app.database.update(USER="someone", PASSWORD="", OPTIONS={"password": BAIT})
        cycle(app)


def test_a_passfile(app: Project, world: World, tmp_path: Path) -> None:
    passfile = tmp_path / "pass file's"
    escaped = app.server.password.replace("\\", "\\\\").replace(":", "\\:")
    passfile.write_text(f"*:*:*:postgres:{escaped}\n")
    passfile.chmod(0o600)
    app.database.update(PASSWORD="", OPTIONS={"passfile": str(passfile)})
    cycle(app)


@pytest.mark.parametrize("named", ["", "shared"])
def test_a_service_file(app: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    services, passfile = tmp_path / "services", tmp_path / "passfile"
    services.write_text(
        f"[shop]\nhost={app.server.host}\nport={app.server.port}\nuser=postgres\ndbname=shared\npassfile={passfile}\n"
    )
    escaped = app.server.password.replace("\\", "\\\\").replace(":", "\\:")
    passfile.write_text(f"*:*:*:*:{escaped}\n")
    passfile.chmod(0o600)
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    app.database.update(NAME=named, USER="", PASSWORD="", HOST="", PORT="", OPTIONS={"service": "shop"})
    cycle(app)


def test_a_socket(app: Project) -> None:
    app.database.update(HOST=str(app.server.sockets))
    cycle(app)


CONNECTING: list[dict[str, Any]] = [
    {"sslmode": "disable"},
    {"sslmode": "prefer", "sslrootcert": "/no/such/file", "gssencmode": "disable"},
    {"connect_timeout": 5},
    {"connect_timeout": "5", "keepalives_idle": 60, "application_name": BAIT[:60]},
    {
        "options": "-c search_path=public -c work_mem=5MB -c datestyle=ISO,DMY -c intervalstyle=postgres -c client_encoding=UTF8"
    },
    {"client_encoding": "UTF8", "target_session_attrs": "read-write"},
]


@pytest.mark.parametrize("options", CONNECTING, ids=lambda options: " ".join(options))
def test_options_of_connections(app: Project, options: dict[str, Any]) -> None:
    app.database.update(OPTIONS=options)
    cycle(app)


def test_a_pool(app: Project) -> None:
    from django.db.backends.postgresql.psycopg_any import is_psycopg3

    # psycopg2 has none: there, connections that stay open stand for it.
    app.database.update(
        {"OPTIONS": {"pool": {"min_size": 1, "max_size": 3}}} if is_psycopg3 else {"CONN_MAX_AGE": None}
    )
    from tests.app.models import Book

    with app.here():
        assert Book.objects.count() == 50
    cycle(app)
    with app.here():
        assert Book.objects.count() == 50


def test_encryption_that_the_server_does_not_have(app: Project) -> None:
    app.database.update(OPTIONS={"sslmode": "require"})
    for argv in (["dump"], ["copy", ":mine"]):
        done = app.call(*argv)
        assert done.status == 1
        first, remedy = done.err.splitlines()
        assert re.match(
            'Cannot connect to database "(shared|postgres)" on .*server does not support SSL, but SSL was', first
        )
        assert remedy == 'Check the ssl options in the OPTIONS of DATABASES["default"] and the server\'s ssl.'


def test_a_search_path_in_the_options(app: Project) -> None:
    app.sql('CREATE SCHEMA "odd ""schema"; ALTER TABLE app_review SET SCHEMA "odd ""schema"')
    try:
        app.database.update(OPTIONS={"options": '-c search_path="odd\\ \\"\\"schema",public'})
        with app.here():
            from tests.app.models import Review

            assert Review.objects.count() == 50
            pgclone.dump(exclude=["app.Review"])
            pgclone.restore("prod", reversible=True)
            assert Review.objects.count() == 0
            pgclone.restore(":pre")
            assert Review.objects.count() == 50
    finally:
        app.sql('ALTER TABLE "odd ""schema".app_review SET SCHEMA public; DROP SCHEMA "odd ""schema"')


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_role_that_is_assumed_after_the_login(
    app: Project, world: World, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(plan, "LARGE", 4096)
    monkeypatch.setitem(app.settings, "PGCLONE_JOBS", jobs)
    with owner(app, world, "the owner", "irrelevant"):
        world.run("ALTER ROLE {} NOLOGIN", "the owner")
        # The login may do nothing on its own: neither psql nor the tools must forget the role.
        world.run("GRANT {} TO {} WITH INHERIT FALSE", "the owner", world.role("just a login"))
        app.database.update(USER="just a login", OPTIONS={"assume_role": "the owner"})
        cycle(app)
        assert bool([name for name in app.stored() if ".parts/" in name]) == (jobs > 1)
        assert app.sql("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'shared'") == "the owner"
        assert app.sql("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'") == "the owner"


@contextlib.contextmanager
def owner(app: Project, world: World, role: str, password: str) -> Iterator[None]:
    """A role that may create databases, and owns the project's."""
    from django.db.backends.postgresql.psycopg_any import sql

    for left in {"shared__pre", "shared__post", "mine"} & set(world.databases()):
        world.drop(left)  # which belong to somebody else
    world.role(role, "CREATEDB")
    name = sql.Identifier(role)
    with world.connect("postgres") as session:
        session.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(name, sql.Literal(password)))
        session.execute(sql.SQL("ALTER DATABASE shared OWNER TO {}").format(name))
    with world.connect("shared") as session:
        session.execute(sql.SQL("GRANT ALL ON SCHEMA public TO {}").format(name))
        tables = session.execute("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in tables:
            session.execute(sql.SQL("ALTER TABLE public.{} OWNER TO {}").format(sql.Identifier(table), name))
    try:
        yield
    finally:
        for database in {"shared", "shared__pre", "shared__post", "mine"} & set(world.databases()):
            with world.connect(database) as session:
                session.execute(sql.SQL("REASSIGN OWNED BY {} TO postgres").format(name))
                session.execute(sql.SQL("DROP OWNED BY {}").format(name))


# What is in the database

TABLES = [
    "line\u2028break\x85and\x0cpage",  # what Python takes for line breaks, and pg_restore does not
    "100% %s %(x)s",
    'quo"te',
    "quo'te",
    "dotted.na.me",
    "line\nbreak",
    "tab\tand \\ back\\slash",
    "dollar$ $1 ${x}",
    "(paren)[b]{c}*?+|^",
    "-dash",
    "MiXed",
    " spaces ",
    "-- comment; /* */",
    "数据🐘",
    "x" * 63,
]


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def rows(project: Project, schema: str, database: str) -> dict[str, int]:
    return {
        table: int(project.sql(f"SELECT count(*) FROM {quoted(schema)}.{quoted(table)}", database)) for table in TABLES
    }


@pytest.fixture
def zoo(app: Project) -> Iterator[Project]:
    """Every odd table in an odd schema, with a row, an odd column, index and check."""
    app.sql('CREATE SCHEMA "sch.e ma%"')
    for table in TABLES:
        column, full = quoted(table), f'"sch.e ma%".{quoted(table)}'
        app.sql(f"CREATE TABLE {full} (id serial PRIMARY KEY, {column} text CHECK ({column} <> 'no'))")
        app.sql(f"CREATE INDEX ON {full} ({column})")
        app.sql(f"INSERT INTO {full} ({column}) VALUES ('%s \"\\' || E'\\n\\t')")
    yield app
    app.sql('DROP SCHEMA "sch.e ma%" CASCADE')


def test_tables_of_any_name_come_back(zoo: Project) -> None:
    with zoo.here():
        pgclone.restore(pgclone.dump(), as_name=":mine", pre_swap_hooks=[])
    assert rows(zoo, "sch.e ma%", "mine") == dict.fromkeys(TABLES, 1)
    count = "SELECT count(*) FROM pg_indexes WHERE schemaname = 'sch.e ma%'"
    assert zoo.sql(count, "mine") == zoo.sql(count) == str(2 * len(TABLES))


def test_quoted_patterns_exclude_the_tables_that_they_name_and_no_others(zoo: Project) -> None:
    half = TABLES[::2]
    with zoo.here():
        key = pgclone.dump(exclude_tables=[f'"sch.e ma%".{quoted(table)}' for table in half])
        pgclone.restore(key, as_name=":mine", pre_swap_hooks=[])
    assert rows(zoo, "sch.e ma%", "mine") == {table: 0 if table in half else 1 for table in TABLES}
    assert zoo.books("mine") == 50


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("sch*.MIXED", []),
        ('"sch.e ma%".mi*', []),
        ('sch*."Mi"*', ["MiXed"]),
        ('"sch.e ma%".??????', ['quo"te', "quo'te"]),
        ("sch*.*quo*", ['quo"te', "quo'te"]),
        ('*."100% %s %(x)s"', ["100% %s %(x)s"]),
        ("sch*.(*|-*", []),
        ("app_rev*", ["app_review"]),
        ("public.app_review", ["app_review"]),
        ("APP_REVIEW", ["app_review"]),
    ],
)
def test_patterns_mean_what_they_mean_to_psql(zoo: Project, pattern: str, excluded: list[str]) -> None:
    psql = [line.split("|")[1] for line in described(zoo, pattern)]
    assert sorted(psql) == sorted(excluded)
    with zoo.here():
        if not excluded:
            with pytest.raises(exceptions.PgcloneError):
                pgclone.dump(exclude_tables=[pattern])
            return
        key = pgclone.dump(exclude_tables=[pattern])
    manifest = json.loads((zoo.dumps / f"{key}.json").read_text())
    assert sorted(t["name"].rpartition(".")[2] for t in manifest["tables"] if t["excluded"]) == sorted(excluded)


def described(project: Project, pattern: str) -> list[str]:
    import subprocess

    done = subprocess.run(
        [str(project.server.bin / "psql"), "-XAtq", "-d", project.name, "-c", f"\\dt {pattern}"],
        env=project.server.environ(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    return [line for line in done.stdout.splitlines() if line.count("|") == 3]


def test_partitions_are_excluded_with_their_table(app: Project) -> None:
    app.sql('CREATE TABLE "Ev.ents" (day date) PARTITION BY RANGE (day)')
    for year in (2025, 2026):
        app.sql(
            f'CREATE TABLE "Ev.ents %{year}" PARTITION OF "Ev.ents" '
            f"FOR VALUES FROM ('{year}-01-01') TO ('{year + 1}-01-01')"
        )
        app.sql(f"INSERT INTO \"Ev.ents\" VALUES ('{year}-05-05')")
    try:
        with app.here():
            for pattern, left in [('"Ev.ents"', 0), ('public."Ev.ents %2025"', 1)]:
                pgclone.restore(pgclone.dump(exclude_tables=[pattern]), as_name=":mine", pre_swap_hooks=[])
                assert app.sql('SELECT count(*) FROM "Ev.ents"', "mine") == str(left)
                assert app.sql("SELECT count(*) FROM pg_inherits", "mine") == "2"
    finally:
        app.sql('DROP TABLE "Ev.ents"')


def test_foreign_keys_of_any_name_come_back_not_valid(app: Project) -> None:
    app.sql('CREATE SCHEMA "a.b"; CREATE TABLE "a.b"."par.ent" (id int PRIMARY KEY)')
    app.sql('CREATE TABLE "a.b"."chi\nld %" (id int CONSTRAINT "f.k ""1""\n%s" REFERENCES "a.b"."par.ent")')
    app.sql('INSERT INTO "a.b"."par.ent" VALUES (1); INSERT INTO "a.b"."chi\nld %" VALUES (1)')
    app.sql('COMMENT ON CONSTRAINT "f.k ""1""\n%s" ON "a.b"."chi\nld %" IS \'it\'\'s odd\'')
    try:
        with app.here():
            key = pgclone.dump(exclude_tables=['"a.b"."par.ent"'])
            pgclone.restore(key, as_name=":mine", pre_swap_hooks=[])
        state = "SELECT convalidated FROM pg_constraint WHERE contype = 'f' AND conrelid = '\"a.b\".\"chi\nld %\"'::regclass"
        assert (app.sql(state), app.sql(state, "mine")) == ("t", "f")
    finally:
        app.sql('DROP SCHEMA "a.b" CASCADE')


# Secrets


def test_the_password_shows_in_no_process_list_output_or_file(project: Project, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    project.environ["PGCLONE_TEST_LARGE"] = "8192"
    for name in ("pg_dump", "pg_restore", "psql"):
        script = tools / name
        script.write_text(
            f'#!/bin/sh\ncat /proc/[0-9]*/cmdline > "{tools}/$$.list" 2> /dev/null\nexec {project.server.bin}/{name} "$@"\n'
        )
        script.chmod(0o755)
    said = []
    copies = (["copy", ":mine"], ["copy", ":other", "--online"])
    for argv in (["dump"], ["restore", "prod", "--reversible"], *copies, ["ls", "--local"], ["plugins"]):
        done = project.pgclone(*argv, "-v", "3", PGCLONE_BIN_DIR=str(tools))
        assert done.status == 0, done.err
        said.append(done.out + done.err)
    lists = [path.read_bytes() for path in tools.glob("*.list")]
    assert any(b"--format=custom" in text and b"--snapshot=" in text for text in lists)
    assert any(b"--section=data" in text for text in lists)
    assert any(b"COPY " in text for text in lists)
    stored = [(project.dumps / name).read_bytes() for name in project.stored()]
    for text in [*lists, *stored, *map(str.encode, said)]:
        assert not shown(project.server.password, text)


def test_the_password_shows_in_no_error(app: Project) -> None:
    password = app.server.password
    wrong: list[dict[str, Any]] = [
        {"PASSWORD": f"not {password}"},
        {"PORT": "1"},
        {"HOST": "no such host"},
        {"USER": "nobody"},
        {"NAME": "gone"},
        {"OPTIONS": {"sslmode": "require"}},
        {"OPTIONS": {"no_such_option": "x"}},
        {"OPTIONS": {"sslmode": "perhaps"}},
        {"OPTIONS": {"service": "gone"}},
        {"OPTIONS": {"options": "-c nonsense=1"}},
        {"OPTIONS": {"assume_role": "nobody"}},
    ]
    for changes in wrong:
        app.database.clear()
        app.database.update(changes)
        for call in (pgclone.dump, lambda: pgclone.copy(":mine")):
            with app.here(), pytest.raises(exceptions.PgcloneError) as caught:
                call()
            told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
            assert not shown(password, told.encode()), changes


def shown(password: str, text: bytes) -> bool:
    """Whether a password is in a text, as it is or quoted for a URL, JSON, Python, SQL or a conninfo string."""
    forms = {
        password,
        urllib.parse.quote(password),
        urllib.parse.quote_plus(password),
        json.dumps(password)[1:-1],
        repr(password)[1:-1],
        password.replace("'", "''"),
        password.replace("\\", "\\\\").replace("'", "\\'"),
    }
    return any(form.encode() in text for form in forms)


def test_a_password_that_is_shown_would_be_found() -> None:
    assert shown("a'b\\c", rb"dbname=x password='a\'b\\c'")
    assert not shown("a'b\\c", b"dbname=x")
