"""The wheel and the sdist: what is in them, and that each is all a project needs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MANAGE = """\
import sys
from django.conf import settings
from django.core.management import execute_from_command_line

settings.configure(INSTALLED_APPS=["pgclone"])
execute_from_command_line(sys.argv)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT))
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_the_wheel_has_the_whole_package_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {*wheel.namelist()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pgclone").rglob("*.py")}
    assert sources | {"pgclone/py.typed"} <= names
    assert {"pgclone/testing/postgres.py", "pgclone/management/commands/pgclone.py"} <= names
    (licence,) = [name for name in names if name.endswith("/LICENSE")]
    assert {name.partition("/")[0] for name in names} == {"pgclone", licence.partition("/")[0]}
    assert not [name for name in names if "__pycache__" in name]


def test_the_sdist_has_what_it_lists_and_nothing_else(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pgclone").rglob("*.py")}
    assert sources | {"pgclone/py.typed", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= names
    top = {name.partition("/")[0] for name in names}
    listed = {
        "pgclone",
        "tests",
        "conftest.py",
        "docs",
        "examples",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "pyproject.toml",
    }
    assert top <= listed | {"PKG-INFO", ".gitignore"}  # these two hatchling adds
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.parametrize(("name", "entry"), [("s3", "s3 = pgclone_s3"), ("gcs", "gcs = pgclone_gcs")])
def test_a_plugin_of_this_repository_is_a_distribution_of_its_own(name: str, entry: str, tmp_path: Path) -> None:
    folder = ROOT / f"pgclone_{name}"
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(folder))
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {*wheel.namelist()}
        (metadata,) = [name for name in names if name.endswith("/entry_points.txt")]
        assert entry in wheel.read(metadata).decode().splitlines()
    source = folder / "src"
    sources = {file.relative_to(source).as_posix() for file in source.rglob("*.py")}
    assert sources | {f"pgclone_{name}/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {f"pgclone_{name}", metadata.partition("/")[0]}


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_into_an_empty_environment(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", symlinks=True)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-warn-script-location",
        str(built[kind]),
    )

    probe = "import pgclone; print(pgclone.__file__, pgclone.dump, pgclone.restore, pgclone.ls, pgclone.copy)"
    assert str(tmp_path) in run(str(python), "-c", probe, cwd=tmp_path)

    (tmp_path / "manage.py").write_text(MANAGE)
    usage = run(str(python), "manage.py", "pgclone", "--help", cwd=tmp_path)
    assert all(command in usage for command in ("dump", "ls", "restore", "copy"))


def run(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout
