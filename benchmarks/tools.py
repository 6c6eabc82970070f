"""The tools that are measured: Django projects with one of the apps, and what has to be installed for the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from pgclone.testing.postgres import Server

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = ROOT / ".bench"
USER = PASSWORD = (
    "bench"  # django-pgclone puts the password into a URL on a shell's command line: it has to be safe there
)

PGCLONE_SETTINGS = """
import json, os
SECRET_KEY = "benchmark"
INSTALLED_APPS = ["pgclone"]
DATABASES = {"default": json.loads(os.environ["BENCH_DATABASE"])}
PGCLONE_STORAGE_LOCATION = os.environ["BENCH_STORAGE"]
PGCLONE_INSTANCE = "bench"
PGCLONE_PRE_SWAP_HOOKS = []
"""

# The connector for PostgreSQL is pg_dump's custom format by default, which pg_dump compresses.
DBBACKUP_SETTINGS = """
import json, os
SECRET_KEY = "benchmark"
INSTALLED_APPS = ["dbbackup"]
DATABASES = {"default": json.loads(os.environ["BENCH_DATABASE"])}
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    "dbbackup": {
        "BACKEND": "django.core.files.storage.FileSystemStorage",
        "OPTIONS": {"location": os.environ["BENCH_STORAGE"]},
    },
}
"""


@dataclass(frozen=True)
class Step:
    """Commands, connected by pipes; the last one may write to a file."""

    pipeline: tuple[tuple[str, ...], ...]
    output: Path | None = None


class Unavailable(Exception):
    """A contender cannot take part here."""


@dataclass(frozen=True)
class Project:
    """A Django project with one of the apps, and the Python that has it installed."""

    server: Server
    root: Path
    python: Path
    app: str
    settings: str
    _flags: dict[tuple[str, str], bool] = field(default_factory=dict, compare=False)

    def step(self, *command: str) -> Step:
        return Step(((str(self.python), "-m", "django", *command),))

    def environ(self, database: str, storage: str, **further: str) -> dict[str, str]:
        # In a folder of its own, since Python looks for the package `pgclone` in the working directory first.
        folder = self.root / "settings"
        folder.mkdir(exist_ok=True)
        module = f"bench_{self.app}"
        (folder / f"{module}.py").write_text(self.settings)
        return {
            **self.server.environ(),
            "PYTHONPATH": str(folder),
            "DJANGO_SETTINGS_MODULE": module,
            "BENCH_DATABASE": json.dumps(self.server.settings(database, USER=USER, PASSWORD=PASSWORD)),
            "BENCH_STORAGE": storage,
            "SHELL": "/bin/bash",  # which django-pgclone runs its commands with
            **further,
        }

    def has_flag(self, command: str, flag: str) -> bool:
        key = (command, flag)
        if key not in self._flags:
            (argv,) = self.step(self.app, command, "--help").pipeline
            done = subprocess.run(
                argv, env=self.environ("postgres", "."), cwd=self.root, stdout=subprocess.PIPE, text=True, check=True
            )
            self._flags[key] = flag in done.stdout
        return self._flags[key]


def install(name: str, *packages: str) -> Path:
    """The folder of programs of a virtual environment with these packages."""
    folder = INSTALLED / name
    done = folder / ".installed"
    if not done.exists() or done.read_text() != " ".join(packages):
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)
        done.write_text(" ".join(packages))
    return folder / "bin"


def find_pgcopydb() -> Path:
    """The one that is installed, or Debian's package, unpacked without installing it."""
    found = shutil.which("pgcopydb")
    if found:
        return Path(found)
    folder = INSTALLED / "pgcopydb"
    command = folder / "usr" / "bin" / "pgcopydb"
    if not command.exists():
        if not shutil.which("apt-get") or not shutil.which("dpkg"):
            raise Unavailable("pgcopydb is not installed.")
        folder.mkdir(parents=True, exist_ok=True)
        apt = ["apt-get", "-q", "download", "pgcopydb"]
        if subprocess.run(apt, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            raise Unavailable("pgcopydb is not installed, and apt-get cannot download it.")
        (package,) = folder.glob("*.deb")
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    return command


def list_versions(server: Server) -> dict[str, str]:
    """What a reader needs to know of the machine and the tools."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    changed = _ask("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": _first_match(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()),
        "memory": f"{memory:.0f} GiB",
        "system": f"{os.uname().sysname} {os.uname().release}",
        "PostgreSQL": server.psql("SHOW server_version"),
        "Python": sys.version.split()[0],
        "pgclone": (_ask("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown")
        + " and changes" * bool(changed),
        **_list_installed(),
    }


def _list_installed() -> dict[str, str]:
    """The tools that have taken part in this run or an earlier one."""
    versions = {
        distribution.name: distribution.version
        for name in ("django-pgclone", "django-dbbackup", "dslr")
        for distribution in metadata.distributions(
            path=[str(path) for path in (INSTALLED / name).glob("lib/python*/site-packages")]
        )
        if distribution.name.lower() == name
    }
    if shutil.which("zstd"):
        versions["zstd"] = _first_match(r"v([\d.]+)", _ask("zstd", "--version"))
    with suppress(Unavailable):
        versions["pgcopydb"] = _first_match(r"version (\S+)", _ask(str(find_pgcopydb()), "--version"))
    return versions


def _ask(*argv: str) -> str:
    """What a program says; nothing if it fails."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return "" if done.returncode else done.stdout.strip()


def _first_match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "unknown"
