"""Plugins as strangers ship them: distributions, pip-installed beside pgclone into a fresh environment."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import django
import pytest

from tests.project import ROOT, Project
from tests.sftp import PASSWORD, run

SETTINGS = """\
import json, os
SECRET_KEY = "not a secret"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "pgclone"]
DATABASES = {"default": json.loads(os.environ["PGCLONE_TEST_DATABASE"])}
globals().update(json.loads(os.environ["PGCLONE_TEST_SETTINGS"]))
"""


@dataclass
class Installed(Project):
    """A project that runs on a Python where pgclone and its plugins are installed, and knows nothing of this checkout."""

    python: Path = field(default=Path())

    def start(self, *argv: str, **settings: Any) -> subprocess.Popen[str]:
        environ = {**self.environment(settings), "DJANGO_SETTINGS_MODULE": "shop_settings"}
        return subprocess.Popen(
            [str(self.python), "-m", "django", *argv],
            env={key: value for key, value in environ.items() if key != "PYTHONPATH"},
            cwd=self.dumps.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with pgclone and three plugins."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    plugins = [str(ROOT / "tests" / "plugins" / name) for name in ("pgclone-memo", "pgclone-veto")]
    plugins += [str(ROOT / "examples" / "pgclone-sftp")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--disable-pip-version-check",
         "--no-compile", f"{ROOT}[psycopg2]", f"Django=={django.__version__}", *plugins],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return python


@pytest.fixture
def shop(project: Project, python: Path, tmp_path: Path) -> Installed:
    """Dumps go to memo://shelf/dumps/. The database has a superuser, so that there is nothing to veto."""
    (tmp_path / "shop_settings.py").write_text(SETTINGS)
    project.sql(
        "INSERT INTO auth_user (username, password, is_superuser, is_staff, is_active, first_name, last_name, email,"
        " date_joined) VALUES ('zoe', '', true, true, true, '', '', '', now())"
    )
    settings = {
        "PGCLONE_STORAGE_LOCATION": "memo://shelf/dumps/",
        "PGCLONE_MEMO_FOLDER": str(tmp_path / "memos"),
    }
    return Installed(project.server, project.name, tmp_path / "dumps", settings, others=project.others, python=python)


@pytest.fixture
def broken_veto(python: Path) -> Iterator[None]:
    """The environment, for as long as an update of pgclone-veto went wrong."""
    (module,) = python.parent.parent.glob("lib/python*/site-packages/pgclone_veto/__init__.py")
    source = module.read_text()
    module.write_text("import a_module_that_nobody_installed\n")
    yield
    module.write_text(source)


def superusers(shop: Installed) -> str:
    return shop.sql("SELECT count(*) FROM auth_user WHERE is_superuser")


def test_what_runs_is_what_was_installed(shop: Installed) -> None:
    script = "import pgclone, pgclone_memo, pgclone_veto; print(pgclone.__file__, pgclone_memo.__file__, pgclone_veto.__file__)"
    done = shop.manage("shell", "-c", script)
    assert done.status == 0, done.err
    assert all(path.startswith(str(shop.python.parent.parent)) for path in done.lines[-1].split())
    assert str(ROOT) + os.sep not in done.lines[-1]


def test_a_scheme_of_an_installed_plugin_stores_lists_and_restores(shop: Installed, tmp_path: Path) -> None:
    before = shop.digest()
    key = shop.dump()
    assert shop.keys() == [key]
    stored = sorted(path.name for path in (tmp_path / "memos" / "shelf").glob("dumps*"))
    quoted = key.replace("/", "%2F")
    assert stored == [f"dumps%2F{quoted}", f"dumps%2F{quoted}.json"]
    shop.sql("DELETE FROM app_review")
    shop.restore(key)
    assert shop.digest() == before


def test_the_example_of_a_storage_plugin_is_one_to_install(shop: Installed, tmp_path: Path) -> None:
    with run(tmp_path / "sftp") as server:
        shop.environ["HOME"] = str(server.home)
        shop.settings |= {"PGCLONE_STORAGE_LOCATION": f"{server.url}/dumps", "PGCLONE_SFTP": {"password": PASSWORD}}
        key = shop.dump()
        assert server.files() == [f"dumps/{key}", f"dumps/{key}.json"]


def test_an_installed_plugin_vetoes_a_restore(shop: Installed) -> None:
    shop.sql("UPDATE auth_user SET is_superuser = false")
    key = shop.dump()
    shop.sql("UPDATE auth_user SET is_superuser = true")
    before = shop.digest()
    done = shop.pgclone("restore", key)
    assert (done.status, done.out) == (1, "")
    assert 'Nobody could administrate the restored database "shop__temp": it has no superuser.' in done.err
    assert "Restore a dump that has one." in done.err
    assert "Traceback" not in done.err
    assert (shop.digest(), shop.databases()) == (before, ["shop"])

    shop.restore(key, PGCLONE_DISABLED_PLUGINS=["veto"])
    assert superusers(shop) == "0"


def test_plugins_are_listed_in_the_order_of_calls(shop: Installed) -> None:
    done = shop.pgclone("plugins")
    assert (done.status, done.err) == (0, "")
    assert done.lines == [
        "veto (distribution pgclone-veto 0.4): pre_swap",
        "sftp (distribution pgclone-sftp 1.0): delete_key, list_keys, storage_open",
        "memo (distribution pgclone-memo 1.2.3): check_settings, delete_key, list_keys, storage_open",
        "commands (built in): pre_dump, pre_swap",
        "zstd (built in): codecs",
        "files (built in): delete_key, list_keys, storage_open",
    ]
    disabled = shop.pgclone("plugins", PGCLONE_DISABLED_PLUGINS=["veto", "commands"])
    assert [line.split()[0] for line in disabled.lines] == ["sftp", "memo", "zstd", "files"]


def test_an_installed_plugin_checks_its_settings(shop: Installed) -> None:
    assert shop.manage("check").status == 0
    done = shop.manage("check", PGCLONE_MEMO_FOLDER="")
    assert done.status == 1
    assert "(pgclone_memo.E001) PGCLONE_MEMO_FOLDER is missing." in done.err


@pytest.mark.usefixtures("broken_veto")
def test_a_plugin_that_cannot_be_imported_stops_what_it_could_have_stopped(shop: Installed) -> None:
    reason = (
        'The plugin "veto" (distribution pgclone-veto) cannot be loaded: '
        "ModuleNotFoundError: No module named 'a_module_that_nobody_installed'"
    )
    key = shop.dump(PGCLONE_DISABLED_PLUGINS=["veto"])
    before = shop.digest()
    for command in (["dump"], ["restore", key], ["copy", ":other"]):
        done = shop.pgclone(*command)
        assert (done.status, done.out) == (1, ""), command
        assert reason in done.err
        assert "Traceback" not in done.err
    assert (shop.digest(), shop.databases()) == (before, ["shop"])

    listed = shop.pgclone("ls")
    assert (listed.status, listed.lines) == (0, [key])
    assert reason in listed.err

    check = shop.manage("check")
    assert check.status == 1
    assert f"(pgclone.E002) {reason}" in check.err

    plugins = shop.pgclone("plugins")
    assert plugins.status == 1
    assert [line.split()[0] for line in plugins.lines] == ["sftp", "memo", "commands", "zstd", "files"]
    assert reason in plugins.err
