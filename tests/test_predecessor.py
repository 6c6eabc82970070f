"""What projects that come from django-pgclone 3.8 rely on: its functions, commands, settings, messages and dumps."""

from __future__ import annotations

import builtins
import inspect
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from freezegun import freeze_time

import pgclone
from pgclone import exceptions
from pgclone.testing import postgres as private
from tests.project import ROOT, Project, open_project


@pytest.fixture(scope="module")
def shared(postgres: private.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project for tests that leave its rows as they are, with a second alias."""
    with open_project(postgres, tmp_path_factory.mktemp("predecessor"), name="shared") as project:
        postgres.run("createdb", "-T", "shared", "second")
        project.aliases["second"] = postgres.settings("second")
        yield project


@pytest.fixture
def app(shared: Project, tmp_path: Path) -> Iterator[Project]:
    """The same with a folder of its own for dumps, and this process in it."""
    shared.dumps = tmp_path / "dumps"
    with shared.here():
        yield shared


# Functions

SIGNATURES: dict[str, dict[str, Any]] = {
    "dump": {
        "exclude": None,
        "pre_dump_hooks": None,
        "instance": None,
        "database": None,
        "storage_location": None,
        "config": None,
    },
    "ls": {
        "dump_key": None,
        "instances": False,
        "databases": False,
        "configs": False,
        "local": False,
        "database": None,
        "storage_location": None,
        "config": None,
    },
    "restore": {
        "dump_key": None,
        "pre_swap_hooks": None,
        "reversible": None,
        "database": None,
        "storage_location": None,
        "config": None,
    },
    "copy": {"dump_key": inspect.Parameter.empty, "database": None, "config": None},
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_the_functions_take_what_they_took(function: str) -> None:
    parameters = inspect.signature(getattr(pgclone, function)).parameters
    for name, default in SIGNATURES[function].items():
        kind = parameters[name].POSITIONAL_OR_KEYWORD if name == "dump_key" else parameters[name].KEYWORD_ONLY
        assert (parameters[name].default, parameters[name].kind) == (default, kind)


def test_the_functions_return_keys(app: Project) -> None:
    key = pgclone.dump(exclude=["app.Review"], instance="prod", database="default", pre_dump_hooks=["check"])
    assert key.startswith("prod/default/none/")
    assert pgclone.ls() == [key]
    assert pgclone.ls(instances=True) == ["prod"]
    assert pgclone.restore("prod", database="second", pre_swap_hooks=[], reversible=False) == key
    assert pgclone.copy(":mine", database="second") == ":mine"
    assert app.sql("SELECT count(*) FROM app_review", "mine") == "0"
    assert pgclone.__version__


def test_errors_are_of_the_classes_that_callers_catch(app: Project) -> None:
    assert issubclass(exceptions.KeyError, exceptions.Error) and issubclass(exceptions.KeyError, builtins.KeyError)
    for error, builtin, call in [
        (exceptions.RuntimeError, builtins.RuntimeError, lambda: pgclone.restore("nothing")),
        (exceptions.RuntimeError, builtins.RuntimeError, lambda: pgclone.restore(":nothing")),
        (exceptions.ValueError, builtins.ValueError, lambda: pgclone.restore()),
        (exceptions.ValueError, builtins.ValueError, lambda: pgclone.dump(config="nothing")),
        (exceptions.ValueError, builtins.ValueError, lambda: pgclone.dump(database="nothing")),
        (exceptions.ValueError, builtins.ValueError, lambda: pgclone.ls(instances=True, local=True)),
        (exceptions.ValueError, builtins.ValueError, lambda: pgclone.copy("mine")),
    ]:
        with pytest.raises(error) as caught:  # type: ignore[var-annotated]
            call()
        assert isinstance(caught.value, exceptions.Error) and isinstance(caught.value, builtin)


# Commands


def test_call_command_takes_flags_or_keywords(app: Project, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("pgclone", "dump", "-i", "flags", "-e", "app.Review", "auth.User")
    call_command("pgclone", "dump", instance="keywords", exclude=["app.Review"], database="default", verbosity=0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "keywords" not in captured.err
    call_command("pgclone", "ls", instances=True)
    assert capsys.readouterr().out == "flags\nkeywords\n"
    call_command("pgclone", "restore", "flags", database="second", pre_swap_hooks=[])
    call_command("pgclone", "restore", dump_key="keywords", database="second", pre_swap_hooks=[], skip_checks=True)
    call_command("pgclone", "copy", ":mine", "--database=second")
    assert app.sql("SELECT count(*) FROM app_review", "mine") == "0"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["restore"], "Must provide a dump key or prefix to restore."),
        (["restore", "nothing"], 'Could not find a dump key matching prefix "nothing"'),
        (["restore", "a/b/c/x.dump"], 'Could not find a dump key matching prefix "a/b/c/x.dump"'),
        (
            ["restore", ":nothing"],
            'Local database "nothing" does not exist. Use "pgclone ls --local" to see local database keys.',
        ),
        (["dump", "-c", "x"], '"x" is not a valid configuration in settings.PGCLONE_CONFIGS.'),
        (["ls", "-c", "x"], '"x" is not a valid configuration in settings.PGCLONE_CONFIGS.'),
        (["dump", "-d", "x"], '"x" is not a valid database. Use one from settings.DATABASES.'),
        (
            ["ls", "--local", "--configs"],
            'Can only use one of "instances", "databases", "configs", or "local".',
        ),
        (["copy", "x"], 'Copy target must start with ":"'),
        (["copy", ":pre"], ":pre and :post are reserved names. Please use a different copy target name."),
    ],
)
def test_messages_begin_what_is_on_stderr(
    app: Project, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        call_command("pgclone", *argv)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.splitlines()[0]) == (1, "", message)


@pytest.mark.parametrize(
    "flags", [["-e", "app.Review", "auth.User"], ["-e", "app.Review", "-e", "auth.User"], ["--exclude=app.Review"]]
)
def test_models_are_excluded_one_by_one_or_at_once(app: Project, flags: list[str]) -> None:
    assert app.call("dump", *flags).status == 0
    pgclone.restore("prod", as_name=":mine", pre_swap_hooks=[])
    assert app.sql("SELECT count(*) FROM app_review", "mine") == "0"
    assert app.books("mine") == 50


def test_hooks_all_run_in_their_order_whatever_way_they_are_given(app: Project) -> None:
    one_by_one = app.call("dump", "--pre-dump-hook", "check", "--pre-dump-hook", "diffsettings")
    at_once = app.call("dump", "--pre-dump-hook", "check", "diffsettings")
    for done in (one_by_one, at_once):
        assert done.status == 0
        assert ran(done.err) == ["check", "diffsettings"]
    done = app.call("restore", "prod", "-d", "second", "--pre-swap-hook", "showmigrations", "--pre-swap-hook", "check")
    assert ran(done.err) == ["showmigrations", "check"]


def test_a_hook_flag_without_a_value_means_no_hooks(app: Project) -> None:
    app.call("dump", PGCLONE_PRE_DUMP_HOOKS=["check"])
    assert ran(app.call("dump", PGCLONE_PRE_DUMP_HOOKS=["check"]).err) == ["check"]
    assert ran(app.call("dump", "--pre-dump-hook", PGCLONE_PRE_DUMP_HOOKS=["check"]).err) == []
    assert ran(app.call("restore", "prod", "-d", "second").err) == ["migrate"]
    assert ran(app.call("restore", "prod", "-d", "second", "--pre-swap-hook").err) == []


def test_djangos_own_options_are_understood_behind_the_command(project: Project) -> None:
    done = project.pgclone("dump", "--settings=tests.settings", "-v", "0", "--no-color", "--skip-checks", "--traceback")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert len(project.keys()) == 1


# Settings and configurations


def test_every_setting_counts(app: Project, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "PGCLONE_ALLOW_DUMP": True,
        "PGCLONE_ALLOW_RESTORE": True,
        "PGCLONE_ALLOW_COPY": True,
        "PGCLONE_CONN_DB": "template1",
        "PGCLONE_DATABASE": "second",
        "PGCLONE_EXCLUDE": ["app.Review"],
        "PGCLONE_INSTANCE": "stag.ing",
        "PGCLONE_LOCK_TIMEOUT": 5000,
        "PGCLONE_PRE_DUMP_HOOKS": ["check"],
        "PGCLONE_PRE_SWAP_HOOKS": ["showmigrations"],
        "PGCLONE_REVERSIBLE": True,
        "PGCLONE_S3_CONFIG": {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"},
        "PGCLONE_S3_ENDPOINT_URL": "https://localhost:1",
        "PGCLONE_STATEMENT_TIMEOUT": 60_000,
        "PGCLONE_STORAGE_LOCATION": f"{tmp_path}/elsewhere",
        "PGCLONE_VALIDATE_DUMP_KEYS": True,
    }
    dumped = app.call("dump", **settings)
    assert ran(dumped.err) == ["check"]
    (key,) = app.call("ls", **settings).lines
    assert key.startswith("stag_ing/second/none/")
    assert (tmp_path / "elsewhere" / key).exists()
    restored = app.call("restore", "stag_ing/", **settings)
    assert ran(restored.err) == ["showmigrations"]
    assert app.call("copy", ":mine", **settings).status == 0
    assert {"second__pre", "second__post", "mine"} <= set(app.databases())
    assert app.sql("SELECT count(*) FROM app_review", "second") == "0"


def test_every_key_of_a_configuration_counts(app: Project, tmp_path: Path) -> None:
    configs = {
        "every": {
            "database": "second",
            "dump_key": "staging/second",
            "exclude": ["app.Review"],
            "instance": "staging",
            "pre_dump_hooks": ["check"],
            "pre_swap_hooks": ["showmigrations"],
            "reversible": True,
            "storage_location": f"{tmp_path}/elsewhere",
        }
    }
    assert ran(app.call("dump", "-c", "every", PGCLONE_CONFIGS=configs).err) == ["check"]
    (key,) = app.call("ls", "--config", "every", PGCLONE_CONFIGS=configs).lines
    assert key.startswith("staging/second/every/")
    assert (tmp_path / "elsewhere" / key).exists()
    assert ran(app.call("restore", "-c", "every", PGCLONE_CONFIGS=configs).err) == ["showmigrations"]
    assert app.call("copy", ":mine", "-c", "every", PGCLONE_CONFIGS=configs).status == 0
    assert {"second__pre", "second__post", "mine"} <= set(app.databases())


def test_a_flag_that_changes_the_dump_takes_the_configurations_name_off_it(app: Project) -> None:
    configs = {"nightly": {"instance": "web"}}
    for flags, label in [([], "nightly"), (["-e", "app.Review"], "none"), (["--pre-dump-hook"], "none")]:
        app.call("dump", "-c", "nightly", *flags, PGCLONE_CONFIGS=configs)
        assert pgclone.ls()[0].startswith(f"web/default/{label}/")


def test_the_instance_is_looked_up_at_each_dump(app: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, segment in [("web-1", "web-1"), ("db.example.org", "db_example_org")]:
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert app.call("dump", PGCLONE_INSTANCE=None).status == 0
        assert pgclone.ls()[0].startswith(f"{segment}/default/none/")


# A clock that stands still


def test_everything_works_while_a_test_holds_the_clock(app: Project) -> None:
    rows = app.digest()
    with freeze_time("2026-02-03 04:05:06"):
        first, second = pgclone.dump(), pgclone.dump()
        pgclone.restore(first, reversible=True)
        pgclone.restore(":pre")
        pgclone.copy(":mine")
        pgclone.restore(second)
        assert pgclone.ls() == [second, first]
    assert first == "prod/default/none/2026-02-03-04-05-06-000000.dump"
    assert second == "prod/default/none/2026-02-03-04-05-06-000001.dump"
    assert app.digest() == rows


def test_it_works_when_the_clock_stood_still_before_anything_was_imported(project: Project) -> None:
    script = """
import freezegun
with freezegun.freeze_time("2026-02-03 04:05:06"):
    import django
    django.setup()
    import pgclone
    print(pgclone.dump(), pgclone.dump(), pgclone.restore("prod", reversible=True), pgclone.restore(":post"))
with freezegun.freeze_time("2026-02-04"):
    print(pgclone.dump())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=project.environment({}), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folder = "prod/default/none"
    assert done.stdout.split() == [
        f"{folder}/2026-02-03-04-05-06-000000.dump",
        f"{folder}/2026-02-03-04-05-06-000001.dump",
        f"{folder}/2026-02-03-04-05-06-000001.dump",
        ":post",
        f"{folder}/2026-02-04-00-00-00-000000.dump",
    ]
    assert project.books() == 50


def test_the_time_in_a_key_is_utc_wherever_the_project_is(app: Project) -> None:
    with freeze_time("2026-02-03 04:05:06"):
        assert app.call("dump", TIME_ZONE="Asia/Tokyo").status == 0
    assert pgclone.ls() == ["prod/default/none/2026-02-03-04-05-06-000000.dump"]


# Its dumps

OLD = "prod/default/none/2024-01-02-03-04-05-678901.dump"


def old_dump(project: Project, *, piped: bool) -> tuple[Path, int]:
    """A dump as django-pgclone 3.8 made it: into a file, or through a pipe (S3). Gives its path and size without tail.

    The tail is a second table of contents, which pg_dump appends to a file that it was given as its standard output.
    """
    path = project.dumps / OLD
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = [str(project.server.bin / "pg_dump"), "-Fc", "--no-acl", "--no-owner", f"--dbname={project.name}"]
    done = subprocess.run(argv, env=project.server.environ(), check=True, stdout=subprocess.PIPE)
    path.write_bytes(done.stdout)
    if not piped:
        with path.open("wb") as file:
            subprocess.run(argv, env=project.server.environ(), check=True, stdout=file)
    return path, len(done.stdout)


@pytest.mark.parametrize("piped", [False, True])
def test_its_dumps_restore(project: Project, piped: bool) -> None:
    rows = project.digest()
    old_dump(project, piped=piped)
    project.fill(3)
    done = project.call("restore", "prod/default")
    assert done.status == 0, done.err
    assert f'"{OLD}" has no manifest: its completeness rests on pg_restore alone' in done.err
    assert project.digest() == rows
    assert project.databases() == ["shop"]


@pytest.mark.parametrize("piped", [False, True])
def test_its_dumps_do_not_restore_when_they_are_truncated(project: Project, piped: bool) -> None:
    path, size = old_dump(project, piped=piped)
    project.fill(3)
    rows = project.digest()
    whole = path.read_bytes()
    with project.here():
        for length in (0, 3, 100, size // 4, size // 2, size - size // 8, size - 200, size - 20, size - 1):
            path.write_bytes(whole[:length])
            with pytest.raises((exceptions.CorruptDump, exceptions.ToolFailed)):
                pgclone.restore(OLD)
            assert project.digest() == rows
            assert project.databases() == ["shop"]


def test_the_tail_of_its_dumps_is_not_needed(project: Project) -> None:
    rows = project.digest()
    path, size = old_dump(project, piped=False)
    project.fill(3)
    whole = path.read_bytes()
    assert len(whole) > size
    path.write_bytes(whole[:size])
    assert project.call("restore", OLD).status == 0
    assert project.digest() == rows


def ran(err: str) -> list[str]:
    """The management commands that were run, as the command line tells."""
    return [line.split()[-1].rstrip('"') for line in err.splitlines() if line.startswith('Ran "manage.py ')]
