"""Who may import what, where import-linter (pyproject.toml) is too coarse, and what an import costs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pgclone"

ONLY_IN = {
    "django.conf": ("conf.py", "testing/"),
    "django.db": ("database/", "testing/"),
}
"""Parts of Django, and the files that may import them. import-linter knows `django` as a whole only."""

HEAVY = ("boto3", "botocore", "google.cloud", "psycopg", "psycopg2", "rich", "smart_open", "subprocess")


@pytest.mark.parametrize("module", ONLY_IN)
def test_parts_of_django_are_imported_where_they_belong(module: str) -> None:
    elsewhere = [
        f"{file}:{line} imports {imported}"
        for file, line, imported in imports()
        if f"{imported}.".startswith(f"{module}.") and not file.startswith(ONLY_IN[module])
    ]
    assert elsewhere == []


def test_importing_pgclone_needs_no_settings_and_loads_little() -> None:
    loaded = modules_after("import pgclone; pgclone.dump, pgclone.ls, pgclone.restore, pgclone.copy, pgclone.hookimpl")
    assert among(loaded, *HEAVY, "structlog", "django.conf", "django.db", "pgclone.plugins", "backports.zstd") == []


def test_the_plugin_api_needs_no_settings() -> None:
    assert among(modules_after("import pgclone.api"), *HEAVY, "structlog", "django.conf", "django.db") == []


def test_a_project_with_the_app_starts_without_what_only_runs_need() -> None:
    setup = """
        import django
        from django.conf import settings
        settings.configure(INSTALLED_APPS=[{apps}])
        django.setup()
    """
    without, with_it = (modules_after(setup.format(apps=apps)) for apps in ("", "'pgclone'"))
    added = with_it - without
    assert among(added, *HEAVY, "structlog", "backports.zstd", "pgclone.recipes", "pgclone.plugins") == []


def imports() -> Iterator[tuple[str, int, str]]:
    """Every import in the package: file, line and full name. `from a import b` may import a.b."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file, node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield from ((file, node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def modules_after(source: str) -> set[str]:
    """The modules that are loaded after `source` ran in an interpreter without settings."""
    environ = {key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}
    lines = [line.strip() for line in source.strip().splitlines()]
    script = "\n".join([*lines, "import json, sys", "print(json.dumps(sorted(sys.modules)))"])
    done = subprocess.run([sys.executable, "-c", script], env=environ, check=True, stdout=subprocess.PIPE, text=True)
    return set(json.loads(done.stdout))


def among(loaded: set[str], *modules: str) -> list[str]:
    return sorted(name for name in loaded if f"{name}.".startswith(tuple(f"{module}." for module in modules)))
