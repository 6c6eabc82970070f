"""Errors: they name the object, the cause and the remedy, on stderr, with exit status 1; no traceback, nothing left."""

from __future__ import annotations

import contextlib
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import pgclone
from pgclone import exceptions, hookimpl
from pgclone.testing import postgres as private
from tests.project import ROOT, Project, open_project


@pytest.fixture(scope="module")
def shared(postgres: private.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with one dump, for tests in which nothing may happen to either."""
    with open_project(postgres, tmp_path_factory.mktemp("errors"), name="shared") as project:
        with project.here():
            pgclone.dump()
        yield project


@pytest.fixture
def app(shared: Project) -> Iterator[Project]:
    """The same. At the end it must be as it was: its databases, its rows, its dumps, and nobody connected."""
    before = (shared.stored(), shared.databases(), shared.digest())
    yield shared
    shared.database.clear()
    shared.aliases.clear()
    assert (shared.stored(), shared.databases(), shared.digest()) == before
    assert shared.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name ~ 'pgclone|pg_dump'") == "0"


def refuse(app: Project, *argv: str, **settings: Any) -> list[str]:
    """The lines on stderr of a command that fails before it does anything."""
    done = app.call(*argv, **settings)
    assert (done.status, done.out) == (1, "")
    assert "Traceback" not in done.err
    return done.err.splitlines()


NAMES: dict[str, tuple[Sequence[str], dict[str, Any], list[str]]] = {
    "database alias": (
        ["dump", "-d", "defualt"],
        {},
        ['"defualt" is not a valid database. Use one from settings.DATABASES.', "There are: default."],
    ),
    "configuration": (
        ["dump", "-c", "nigthly"],
        {"PGCLONE_CONFIGS": {"nightly": {}}},
        ['"nigthly" is not a valid configuration in settings.PGCLONE_CONFIGS.', "There are: nightly."],
    ),
    "configuration, without any": (
        ["restore", "-c", "nigthly"],
        {},
        ['"nigthly" is not a valid configuration in settings.PGCLONE_CONFIGS.', "There are none."],
    ),
    "configuration key": (
        ["dump", "-c", "nightly"],
        {"PGCLONE_CONFIGS": {"nightly": {"exlude": []}}},
        ['settings.PGCLONE_CONFIGS["nightly"] has the key "exlude", which is no option.', 'Did you mean "exclude"?'],
    ),
    "model": (["dump", "-e", "app.Bok"], {}, ['"app.Bok" is not a model.', "Did you mean app.Book?"]),
    "model without app": (["dump", "-e", "x"], {}, ['"x" is not a model.', "Write it as app_label.Model."]),
    "table": (
        ["dump", "--exclude-table", "nothing_*"],
        {},
        ["No table matches 'nothing_*'.", "Check --exclude-table: its rows would have been dumped."],
    ),
    "pattern": (
        ["dump", "--exclude-table", 'a.b.c"'],
        {},
        ["'a.b.c\"' is not a pattern for tables.", 'Write it as name, schema.name, or "Quoted Name".'],
    ),
    "pre-dump hook": (
        ["dump", "--pre-dump-hook", "migrat"],
        {},
        ['The hook "migrat" is not a management command.', 'Did you mean "migrate"?'],
    ),
    "pre-swap hook": (
        ["restore", "prod", "--pre-swap-hook", "no_such_command"],
        {},
        ['The hook "no_such_command" is not a management command.'],
    ),
    "codec": (
        ["dump", "--codec", "zip"],
        {},
        ['There is no codec "zip".', "There are: none, zstd. Others come with plugins."],
    ),
    "level": (
        ["dump", "--level", "99"],
        {},
        ['The codec "zstd" has no level 99.', "It takes -131072 to 22."],
    ),
    "strategy": (
        ["copy", ":mine", "--strategy", "magic"],
        {},
        ['"magic" is not a strategy for copies.', "Use wal_log or file_copy."],
    ),
    "scheme": (
        ["dump", "-s", "ftp://host/dumps"],
        {},
        [
            'No plugin serves the storage location "ftp://host/dumps".',
            "Check its spelling, or install the plugin for it.",
        ],
    ),
    "scheme of S3": (
        ["ls", "-s", "s3://bucket/dumps"],
        {"PGCLONE_DISABLED_PLUGINS": ["s3"]},
        ['No plugin serves the storage location "s3://bucket/dumps".', "Install it: pip install 'pgclone[s3]'"],
    ),
    "bucket": (
        ["ls", "-s", "s3://"],
        {},
        ['The storage location "s3://" names no bucket.', "Write it as s3://bucket/prefix/."],
    ),
    "storage location": (
        ["ls"],
        {"PGCLONE_STORAGE_LOCATION": ""},
        ["The storage location is empty.", "Set PGCLONE_STORAGE_LOCATION, or leave it out."],
    ),
    "key, not given": (
        ["restore"],
        {},
        ["Must provide a dump key or prefix to restore.", "See which there are: pgclone ls"],
    ),
    "key that leaves the location": (
        ["restore", "../prod/x.dump"],
        {},
        [
            '"../prod/x.dump" is not a dump key or prefix: keys are relative to the storage location and cannot leave it.',
            'Use a key or prefix that "pgclone ls" shows.',
        ],
    ),
    "local database": (
        ["restore", ":nothing"],
        {},
        ['Local database "nothing" does not exist. Use "pgclone ls --local" to see local database keys.'],
    ),
    "the database itself": (
        ["restore", ":shared"],
        {},
        ['":shared" is the database "default" itself.', "Name a copy of it."],
    ),
    "reserved name": (
        ["copy", ":pre"],
        {},
        [":pre and :post are reserved names. Please use a different copy target name."],
    ),
    "data, allowed to fail": (
        ["restore", "prod", "--allow-error", "TABLE DATA public app_book"],
        {},
        ['--allow-error "TABLE DATA public app_book": errors of data are never allowed.', "Leave it out."],
    ),
    "setting": (
        ["dump"],
        {"PGCLONE_REVERSIBLE": "yes"},
        ["settings.PGCLONE_REVERSIBLE is 'yes', but must be True or False."],
    ),
    "two switches": (
        ["ls", "--configs", "--local"],
        {},
        ['Can only use one of "instances", "databases", "configs", or "local".'],
    ),
}


@pytest.mark.parametrize("what", NAMES)
def test_what_is_wrong_is_named_with_its_remedy(app: Project, what: str) -> None:
    argv, settings, lines = NAMES[what]
    assert refuse(app, *argv, **settings) == lines


@pytest.mark.parametrize("key", ["prdo", "prod/default/none/2020", "prod/default/none/2026-01-01-00-00-00-000000.dump"])
def test_a_key_that_is_not_there_is_named_with_the_location(app: Project, key: str) -> None:
    assert refuse(app, "restore", key) == [
        f'Could not find a dump key matching prefix "{key}"',
        f'See which there are in "{app.dumps}": pgclone ls',
    ]


def test_a_prefix_of_several_databases_is_refused_with_their_names(app: Project, tmp_path: Path) -> None:
    for alias in ("alpha", "beta"):
        path = tmp_path / "prod" / alias / "none" / "2026-01-01-00-00-00-000000.dump"
        path.parent.mkdir(parents=True)
        path.touch()
    assert refuse(app, "restore", "prod", "-s", str(tmp_path)) == [
        'The prefix "prod" matches dumps of more than one database: alpha, beta.',
        "Add the database to the prefix: instance/database",
    ]


@pytest.mark.parametrize("command", ["dump", "restore", "copy"])
def test_a_command_that_the_settings_forbid_does_nothing(app: Project, command: str) -> None:
    setting = f"PGCLONE_ALLOW_{command.upper()}"
    argv = {"dump": ["dump"], "restore": ["restore", "prod"], "copy": ["copy", ":mine"]}[command]
    assert refuse(app, *argv, **{setting: False}) == [
        f"{command.capitalize()} not allowed.",
        f"settings.{setting} is False in this installation.",
    ]


# The server

COMMANDS = [["dump"], ["restore", "prod"], ["restore", ":mine"], ["copy", ":mine"], ["ls", "--local"]]


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_a_server_that_is_not_there(app: Project, argv: list[str]) -> None:
    app.database.update(HOST="127.0.0.1", PORT="1")
    first, remedy = refuse(app, *argv)
    assert re.match(r'Cannot connect to database "(shared|postgres)" on 127\.0\.0\.1:1: .*[Cc]onnection refused', first)
    assert remedy == 'Is the server running? Check HOST and PORT of DATABASES["default"].'


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_a_wrong_password(app: Project, argv: list[str]) -> None:
    app.database.update(PASSWORD="not the s3cret")
    first, remedy = refuse(app, *argv)
    assert re.match(r'Cannot connect to database "(shared|postgres)" on .*: .*password authentication failed', first)
    assert remedy == 'Check USER and PASSWORD of DATABASES["default"].'
    assert "s3cret" not in first


def test_a_database_that_does_not_exist(app: Project) -> None:
    app.database.update(NAME="gone")
    first, remedy = refuse(app, "dump")
    assert first.startswith('Cannot connect to database "gone" on 127.0.0.1:')
    assert 'database "gone" does not exist' in first
    assert remedy == 'Check DATABASES["default"], and PGCLONE_CONN_DB for the maintenance database.'


def test_a_name_that_postgresql_would_cut_off(app: Project) -> None:
    app.database.update(NAME="é" * 40)
    assert refuse(app, "dump") == [
        f'The NAME of DATABASES["default"] has 80 bytes, and PostgreSQL takes at most 63: "{"é" * 40}".',
        "Name the database as the server does: pgclone ls --local",
    ]


def test_a_maintenance_database_that_does_not_exist(app: Project) -> None:
    first, remedy = refuse(app, "copy", ":mine", PGCLONE_CONN_DB="gone")
    assert first.startswith('Cannot connect to database "gone" on ')
    assert remedy == 'Check DATABASES["default"], and PGCLONE_CONN_DB for the maintenance database.'


def test_a_database_without_a_name(app: Project) -> None:
    app.database.update(NAME="")
    assert refuse(app, "dump") == [
        'DATABASES["default"] has no NAME.',
        "Name the database there, or a service in its OPTIONS.",
    ]


def test_a_database_that_is_not_postgresql(app: Project) -> None:
    app.aliases["lite"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    for argv in (["dump"], ["restore", "prod"], ["copy", ":mine"], ["ls", "--local"]):
        assert refuse(app, *argv, "-d", "lite") == [
            'Database "lite" is not a PostgreSQL database, but SQLite.',
            "Choose another one with --database.",
        ]


def test_a_project_without_databases(app: Project) -> None:
    app.database.update(ENGINE="django.db.backends.dummy")
    assert refuse(app, "dump") == [
        'Database "default" has no ENGINE in settings.DATABASES.',
        "Choose another one with --database.",
    ]


def test_a_password_of_a_certificate_cannot_be_handed_to_the_client_tools(app: Project) -> None:
    app.database.update(OPTIONS={"sslpassword": "s3cret"})
    for argv in (["dump"], ["restore", "prod"]):
        first, remedy = refuse(app, *argv)
        assert first.startswith('DATABASES["default"]["OPTIONS"]["sslpassword"] cannot be handed to pg_dump')
        assert remedy.endswith('name it with OPTIONS["service"].')
        assert "s3cret" not in first + remedy


def test_no_command_runs_inside_a_transaction(app: Project) -> None:
    from django.db import transaction

    with app.here():
        for call in (pgclone.dump, lambda: pgclone.restore("prod"), lambda: pgclone.copy(":mine")):
            with transaction.atomic(), pytest.raises(exceptions.Forbidden) as refused:
                call()
            assert refused.value.cause == (
                'pgclone cannot run inside a transaction, and database "default" is in one (atomic()).'
            )
        with transaction.atomic():
            assert len(pgclone.ls()) == 1


# The client tools


@pytest.fixture
def tool(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a tool of that name in a folder of tools, which it returns."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def write(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        return folder

    write("psql", "exit 1")
    return write


@pytest.mark.parametrize("argv", [["dump"], ["restore", "prod"]], ids=" ".join)
def test_client_tools_that_are_missing(
    app: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    remedy = "Install PostgreSQL's client tools (Debian: postgresql-client), or set PGCLONE_BIN_DIR to their folder."
    assert refuse(app, *argv, PGCLONE_BIN_DIR=str(tmp_path)) == [f"pg_dump was not found in {tmp_path}.", remedy]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refuse(app, *argv, PGCLONE_BIN_DIR="") == ["pg_dump was not found on PATH.", remedy]


def test_a_pg_restore_that_is_missing(app: Project, tool: Callable[[str, str], Path]) -> None:
    folder = tool("pg_dump", f'exec {app.server.bin}/pg_dump "$@"')
    first = refuse(app, "restore", "prod", PGCLONE_BIN_DIR=str(folder))[0]
    assert first == f"pg_restore was not found in {folder}."


def test_a_pg_dump_that_is_too_old(app: Project, tool: Callable[[str, str], Path]) -> None:
    tool("pg_restore", "echo 'pg_restore (PostgreSQL) 9.6.24'")
    folder = tool("pg_dump", "echo 'pg_dump (PostgreSQL) 9.6.24'")
    first, remedy = refuse(app, "dump", PGCLONE_BIN_DIR=str(folder))
    assert re.fullmatch(
        rf"pg_dump 9\.6 \({re.escape(str(folder))}/pg_dump\) is too old for the server, which is 18\.\d+\.", first
    )
    assert remedy == ("Install client tools of PostgreSQL 18 or newer, or set PGCLONE_BIN_DIR to their folder.")


def test_a_pg_restore_that_is_older_than_the_dump(app: Project, tool: Callable[[str, str], Path]) -> None:
    tool("pg_restore", "echo 'pg_restore (PostgreSQL) 15.6'")
    folder = tool("pg_dump", "echo 'pg_dump (PostgreSQL) 15.6'")
    first, remedy = refuse(app, "restore", "prod", PGCLONE_BIN_DIR=str(folder))
    assert first.startswith(f"pg_restore 15.6 ({folder}/pg_restore) is older than the pg_dump 18.")
    assert remedy == "Install client tools at least as new, or set PGCLONE_BIN_DIR to their folder."


def test_a_tool_that_is_something_else(app: Project, tool: Callable[[str, str], Path]) -> None:
    tool("pg_restore", "exit 0")
    folder = tool("pg_dump", "exit 0")
    assert refuse(app, "dump", PGCLONE_BIN_DIR=str(folder)) == [
        f"{folder}/pg_dump is not pg_dump: it does not tell its version.",
        "Reinstall PostgreSQL's client tools.",
    ]


def test_a_pg_dump_that_fails_says_why(app: Project, tool: Callable[[str, str], Path]) -> None:
    real = app.server.bin
    tool("pg_restore", f'exec {real}/pg_restore "$@"')
    script = (
        f'[ "$1" = --version ] && exec {real}/pg_dump --version\necho "pg_dump: error: the moon is full" >&2; exit 3'
    )
    folder = tool("pg_dump", script)
    lines = refuse(app, "dump", PGCLONE_BIN_DIR=str(folder))
    assert lines[-1] == "pg_dump failed with status 3: pg_dump: error: the moon is full"


# The storage location


def test_a_location_that_is_a_file(app: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for argv in (["dump"], ["ls"], ["restore", "prod"]):
        lines = refuse(app, *argv, "-s", str(tmp_path / "file"))
        assert lines[-1] == f"{tmp_path / 'file'} cannot be listed: Not a directory"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_location_that_cannot_be_written(app: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for location in (tmp_path / "file" / "dumps", tmp_path / ("long" * 100), Path("/proc/dumps")):
        lines = refuse(app, "dump", "-s", str(location))
        assert re.search(
            rf"{re.escape(str(location))} could not be written: (Not a directory|File name too long|No such file)"
            rf"|{re.escape(str(location))} cannot be listed: (Not a directory|File name too long)",
            lines[-1],
        )


# Arguments in Python


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pgclone.dump(exclude="app.Book"), "exclude is 'app.Book', but must be a list of strings."),
        (lambda: pgclone.dump(level="3"), "level is '3', but must be a whole number."),  # type: ignore[arg-type]
        (lambda: pgclone.dump(pre_dump_hooks=[1]), "pre_dump_hooks is [1], but must be a list of strings."),  # type: ignore[list-item]
        (lambda: pgclone.restore("prod", reversible="yes"), "reversible is 'yes', but must be True or False."),  # type: ignore[arg-type]
        (lambda: pgclone.restore(["prod"]), "dump_key is ['prod'], but must be a string."),  # type: ignore[arg-type]
        (lambda: pgclone.copy(":mine", kill=1), "kill is 1, but must be True or False."),  # type: ignore[arg-type]
        (lambda: pgclone.ls(database=["default"]), "database is ['default'], but must be a string."),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_the_wrong_type_are_named(app: Project, call: Callable[[], object], message: str) -> None:
    with app.here(), pytest.raises(exceptions.ValueError) as refused:
        call()
    assert str(refused.value) == message


def test_the_command_lines_own_errors_have_djangos_exit_status(app: Project) -> None:
    done = app.pgclone("dump", "--level", "high")
    assert done.status == 2
    assert done.err.endswith("error: argument --level: invalid int value: 'high'\n")


# From outside


def test_a_process_ends_with_status_1_and_no_traceback(app: Project) -> None:
    done = app.pgclone("restore", "nothing")
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines()[0] == 'Could not find a dump key matching prefix "nothing"'
    assert "Traceback" not in done.err


SIGNALS = {signal.SIGINT: (130, "Interrupted."), signal.SIGTERM: (143, "Ended by SIGTERM.")}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("argv", "begins", "state"),
    [
        (["dump"], "Dumping database", "No dump was listed."),
        (["restore", "prod", "--pre-swap-hook", "check"], "Restoring", "The database is as it was."),
        (["copy", ":mine"], "Copying database", "No copy was made."),
    ],
    ids=["dump", "restore", "copy"],
)
def test_a_signal_ends_a_command_in_one_line_and_leaves_nothing(
    app: Project, number: signal.Signals, argv: list[str], begins: str, state: str
) -> None:
    status, word = SIGNALS[number]
    with held_up(app, argv[0]):
        process = app.start("pgclone", *argv, PGCLONE_PLUGINS=["tests.test_errors:SLEEPER"])
        assert process.stderr
        line = process.stderr.readline()
        assert line.startswith(begins), line + process.stderr.read()
        time.sleep(0.3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, f"{word} {state}\n")


class Sleeper:
    """A plugin that holds a restore up when the database is there, before the hooks."""

    @hookimpl
    def post_restore(self) -> None:
        time.sleep(60)


SLEEPER = Sleeper()


class Interrupter:
    """A plugin at which somebody presses Ctrl-C, after the fact."""

    @hookimpl
    def post_dump(self) -> None:
        raise KeyboardInterrupt

    @hookimpl
    def post_swap(self) -> None:
        raise KeyboardInterrupt


INTERRUPTER = Interrupter()


@pytest.mark.parametrize("verbosity", ["0", "1"])
def test_an_interruption_after_the_fact_says_what_has_happened(project: Project, verbosity: str) -> None:
    plugins = ["tests.test_errors:INTERRUPTER"]
    done = project.call("-v", verbosity, "dump", PGCLONE_PLUGINS=plugins)
    assert (done.status, done.err.splitlines()[-1]) == (130, "Interrupted. The dump had been listed already.")
    (key,) = project.call("ls").lines
    project.fill(5)
    done = project.call("-v", verbosity, "restore", key, PGCLONE_PLUGINS=plugins)
    last = "Interrupted. The restored database had been swapped in already."
    assert (done.status, done.err.splitlines()[-1]) == (130, last)
    assert (project.books(), project.databases()) == (50, ["shop"])


@contextlib.contextmanager
def held_up(app: Project, command: str) -> Iterator[None]:
    """A lock at which pg_dump or CREATE DATABASE waits for its end."""
    statement = {
        "dump": "LOCK TABLE app_book IN ACCESS EXCLUSIVE MODE",
        "copy": "COMMENT ON DATABASE shared IS 'renamed soon'",
        "restore": "SELECT",
    }[command]
    database = "shared" if command == "dump" else "postgres"
    environ = {**app.server.environ(), "PGDATABASE": database, "PGAPPNAME": "holder"}
    with subprocess.Popen(
        [str(app.server.bin / "psql"), "-XAtq"], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as psql:
        assert psql.stdin and psql.stdout
        psql.stdin.write(f"BEGIN; {statement}; SELECT 'held';\n")
        psql.stdin.flush()
        while psql.stdout.readline() != "held\n":
            assert psql.poll() is None
        yield
        psql.communicate("ROLLBACK;\n", timeout=30)


# The words


def test_every_event_that_is_told_has_words_of_its_own() -> None:
    from pgclone import console

    folders = (ROOT / "pgclone", ROOT / "pgclone_s3" / "src", ROOT / "pgclone_gcs" / "src")
    sources = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    told = {name for text in sources for name in re.findall(r'log\.(?:info|warning|error)\(\s*"(\w+)"', text)}
    assert told - set(console._LINES) == set()
    assert set(console._LINES) - told == set()


def test_no_module_prints() -> None:
    found = [path for path in (ROOT / "pgclone").rglob("*.py") if re.search(r"\bprint\(", path.read_text())]
    assert found == []
