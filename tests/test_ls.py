"""ls: which dumps there are, newest first, and nothing else on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

import pgclone
from pgclone import exceptions
from tests.project import Project

OLDEST = "zoo/default/none/2025-01-01-00-00-00-000000.dump"
ALPHA = "alpha/default/none/2026-02-03-04-05-06-000001.dump"
NIGHTLY = "prod/default/nightly/2026-02-03-04-05-06-000002.dump"
REPLICA = "prod/replica/none/2026-11-22-10-00-00-000000.dump"
NEWEST = "prod/default/none/2026-11-22-10-00-00-000001.dump"
DUMPS = [NEWEST, REPLICA, NIGHTLY, ALPHA, OLDEST]

OTHERS = [
    "README.txt",
    "prod/notes.dump",
    "prod/default/none/backup.sql",
    "a/b/c/d/e/2026-11-22-10-00-00-000000.dump",
]
HIDDEN = [
    f"{NEWEST}.json",
    f"{NEWEST}.parts/00000",
    f"{NEWEST}.parts/00001",
    "prod/default/none/2026-11-23-10-00-00-000000.dump.json",
    "prod/default/none/.2026-11-24-10-00-00-000000.dump.1a2b3c4d.partial",
]


@pytest.fixture
def dumps(tmp_path: Path) -> Iterator[Path]:
    """A folder of dumps among other things, and the project's storage location."""
    folder = tmp_path / "dumps"
    fill(folder, *DUMPS, *OTHERS, *HIDDEN)
    with override_settings(PGCLONE_STORAGE_LOCATION=folder):
        yield folder


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_dumps_are_listed_newest_first_and_nothing_else(dumps: Path) -> None:
    assert pgclone.ls() == DUMPS


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("prod", [NEWEST, REPLICA, NIGHTLY]),
        ("prod/", [NEWEST, REPLICA, NIGHTLY]),
        ("prod/default", [NEWEST, NIGHTLY]),
        ("prod/default/none/", [NEWEST]),
        ("prod/default/none/2026-11", [NEWEST]),
        ("prod/default/none/2026-12", []),
        ("pro", []),
        ("prod/def", []),
        ("default", []),
        ("nowhere/", []),
        (NEWEST, [NEWEST]),
    ],
)
def test_a_prefix_selects_whole_segments_and_beginnings_of_the_time(dumps: Path, prefix: str, found: list[str]) -> None:
    assert pgclone.ls(prefix) == found


@pytest.mark.parametrize(
    ("switch", "prefix", "found"),
    [
        ("instances", None, ["alpha", "prod", "zoo"]),
        ("instances", "prod", ["prod"]),
        ("databases", None, ["default", "replica"]),
        ("databases", "alpha/", ["default"]),
        ("configs", None, ["nightly", "none"]),
        ("configs", "prod/default/nightly", ["nightly"]),
        ("configs", "nowhere", []),
    ],
)
def test_segments_are_listed_once_and_sorted(dumps: Path, switch: str, prefix: str | None, found: list[str]) -> None:
    assert pgclone.ls(prefix, **{switch: True}) == found


def test_names_that_are_no_keys_can_be_listed_after_the_dumps(dumps: Path) -> None:
    with override_settings(PGCLONE_VALIDATE_DUMP_KEYS=False):
        assert pgclone.ls() == [*DUMPS, *sorted(OTHERS, reverse=True)]
        assert pgclone.ls("prod/default/none") == [NEWEST, "prod/default/none/backup.sql"]
        assert pgclone.ls(instances=True) == ["alpha", "prod", "zoo"]


@pytest.mark.parametrize(
    "switches", [{"instances": True, "local": True}, {"databases": True, "configs": True, "instances": True}]
)
def test_one_switch_at_most(dumps: Path, switches: Mapping[str, bool]) -> None:
    with pytest.raises(exceptions.ValueError) as refused:
        pgclone.ls(**switches)  # type: ignore[arg-type]
    assert str(refused.value) == 'Can only use one of "instances", "databases", "configs", or "local".'


def test_a_location_without_dumps_is_empty(tmp_path: Path) -> None:
    assert pgclone.ls(storage_location=str(tmp_path)) == []
    assert pgclone.ls("prod", storage_location=str(tmp_path / "not" / "there" / "yet")) == []


def test_the_location_is_the_arguments_or_the_configurations_or_the_settings(dumps: Path, tmp_path: Path) -> None:
    fill(tmp_path / "config", ALPHA)
    fill(tmp_path / "argument", OLDEST)
    configs = {"mine": {"storage_location": str(tmp_path / "config"), "dump_key": "alpha"}}
    with override_settings(PGCLONE_CONFIGS=configs):
        assert pgclone.ls() == DUMPS
        assert pgclone.ls(config="mine") == [ALPHA]
        assert pgclone.ls("zoo", config="mine") == []
        assert pgclone.ls("zoo", config="mine", storage_location=str(tmp_path / "argument")) == [OLDEST]


def test_a_location_may_be_a_link_and_so_may_the_folders_in_it(tmp_path: Path) -> None:
    fill(tmp_path / "disk", "default/none/2026-02-03-04-05-06-000001.dump")
    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps" / "prod").symlink_to(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "dumps")
    found = ["prod/default/none/2026-02-03-04-05-06-000001.dump"]
    assert pgclone.ls(storage_location=str(tmp_path / "link")) == found
    assert pgclone.ls("prod", storage_location=str(tmp_path / "link")) == found


def test_a_link_that_leads_round_in_a_circle_is_no_trap(tmp_path: Path) -> None:
    fill(tmp_path, ALPHA)
    (tmp_path / "alpha" / "again").symlink_to(tmp_path)
    assert pgclone.ls(storage_location=str(tmp_path)) == [ALPHA]


@pytest.mark.parametrize("form", ["{}", "{}/", "{}//", "file://{}"])
def test_a_location_may_end_with_a_slash_or_not(dumps: Path, form: str) -> None:
    assert pgclone.ls(storage_location=form.format(dumps)) == DUMPS


@pytest.mark.parametrize("key", ["../dumps/prod", "/etc", "prod/../../dumps", "prod//default"])
def test_nothing_outside_the_location_is_listed(dumps: Path, key: str) -> None:
    with pytest.raises(exceptions.ValueError, match="cannot leave it"):
        pgclone.ls(key)


def test_a_plugin_that_cannot_be_loaded_is_reported_and_does_no_harm(dumps: Path) -> None:
    project = Project(server=None, name="", dumps=dumps)  # type: ignore[arg-type]  # ls needs no server
    out, err = call("ls", "prod", PGCLONE_PLUGINS=["no.such.module"])
    assert out.splitlines() == [NEWEST, REPLICA, NIGHTLY]
    assert err.startswith('The plugin "no.such.module" (PGCLONE_PLUGINS) cannot be loaded: ModuleNotFoundError')
    assert project.stored()  # nothing was removed


def test_the_databases_of_the_server_are_listed_as_keys_for_restores(project: Project) -> None:
    with project.here():
        project.server.run("createdb", "odd name")
        found = pgclone.ls(local=True)
    assert found == sorted(found)
    assert {":shop", ":odd name", ":postgres", ":template1"} <= set(found)


def test_on_the_command_line_stdout_has_the_keys_alone(project: Project) -> None:
    fill(project.dumps, *DUMPS, *HIDDEN)
    done = project.pgclone("ls", "prod/")
    assert (done.status, done.lines, done.err) == (0, [NEWEST, REPLICA, NIGHTLY], "")
    done = project.call("ls", "--instances")
    assert (done.status, done.out, done.err) == (0, "alpha\nprod\nzoo\n", "")
    done = project.call("ls", "--instances", "--local")
    assert (done.status, done.out) == (1, "")
    assert done.err == 'Can only use one of "instances", "databases", "configs", or "local".\n'


def call(*argv: str, **settings: Any) -> tuple[str, str]:
    from io import StringIO

    from django.core.management import call_command

    out, err = StringIO(), StringIO()
    with override_settings(**settings):
        call_command("pgclone", *argv, stdout=out, stderr=err)
    return out.getvalue(), err.getvalue()
