"""A Django project as its users have it: a database with rows, a folder of dumps, and `manage.py` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from pgclone.testing.postgres import Server

TEMPLATE = "pgclone_tests_template"
"""A migrated database, made once, that projects copy."""

ROOT = Path(__file__).parent.parent


@dataclass
class Done:
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@dataclass
class Project:
    """The database `name` on `server`, dumps in `dumps`, and the settings that `manage.py` runs with."""

    server: Server
    name: str
    dumps: Path
    settings: dict[str, Any] = field(default_factory=dict)
    database: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further databases in settings.DATABASES, beside `default`."""
    others: frozenset[str] = frozenset()
    """The databases of the server that were there before."""

    def manage(self, *argv: str, **settings: Any) -> Done:
        """Run a management command to its end. Keywords are settings."""
        process = self.start(*argv, **settings)
        out, err = process.communicate(timeout=300)
        return Done(process.returncode, out, err)

    def start(self, *argv: str, **settings: Any) -> subprocess.Popen[str]:
        """Start a management command."""
        return subprocess.Popen(
            [sys.executable, "-m", "django", *argv],
            env=self.environment(settings),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def environment(self, settings: Mapping[str, Any]) -> dict[str, str]:
        own = self.server.settings(self.name, **self.database)
        keep = {
            key: value for key, value in os.environ.items() if not key.startswith("PG") or key == "PGCLONE_TEST_DRIVER"
        }
        return {
            **keep,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "PGCLONE_TEST_DATABASE": json.dumps(own),
            "PGCLONE_TEST_SETTINGS": json.dumps(
                {"DATABASES": {"default": own, **self.aliases}, **self._merged(settings)}
            ),
            **self.environ,
        }

    def _merged(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "PGCLONE_INSTANCE": "prod",
            "PGCLONE_STORAGE_LOCATION": str(self.dumps),
            "PGCLONE_BIN_DIR": str(self.server.bin),
            **self.settings,
            **settings,
        }

    def pgclone(self, *argv: str, **settings: Any) -> Done:
        return self.manage("pgclone", *argv, **settings)

    @contextlib.contextmanager
    def here(self, **settings: Any) -> Iterator[None]:
        """Let this process be one of the project: its settings, its database. Keywords are settings."""
        from django.db import connections
        from django.test import override_settings

        databases = dict(connections.settings)
        connections.close_all()
        own = self.server.settings(self.name, **self.database)
        for alias, entry in {"default": own, **self.aliases}.items():
            connections.settings[alias] = {**databases["default"], **entry}
        self._forget_connections()
        try:
            with override_settings(**self._merged(settings)):
                yield
        finally:
            connections.close_all()
            connections.settings.clear()
            connections.settings.update(databases)
            self._forget_connections()

    def call(self, *argv: str, **settings: Any) -> Done:
        """Like `pgclone`, but in this process, which takes a tenth of the time."""
        from django.core.management import call_command

        out, err, status = StringIO(), StringIO(), 0
        with self.here(**settings):
            try:
                call_command("pgclone", *argv, stdout=out, stderr=err)
            except SystemExit as error:
                status = int(error.code or 0)
        return Done(status, out.getvalue(), err.getvalue())

    @staticmethod
    def _forget_connections() -> None:
        """Django keeps a connection for each alias, with the settings that it had when it was first asked for."""
        from django.db import connections

        for connection in connections.all(initialized_only=True):
            if hasattr(connection, "close_pool"):
                connection.close_pool()
            del connections[connection.alias]

    def dump(self, *argv: str, **settings: Any) -> str:
        """Dump, and return the new key."""
        before = set(self.keys())
        done = self.pgclone("dump", *argv, **settings)
        assert done.status == 0, done.err
        (key,) = set(self.keys()) - before
        return key

    def restore(self, *argv: str, **settings: Any) -> Done:
        """Restore, and insist on success."""
        done = self.pgclone("restore", *argv, **settings)
        assert done.status == 0, done.err
        return done

    def keys(self) -> list[str]:
        done = self.pgclone("ls")
        assert done.status == 0, done.err
        return done.lines

    def sql(self, statement: str, database: str | None = None) -> str:
        return self.server.psql(statement, database or self.name)

    def fill(self, books: int) -> None:
        """Add an author with this many books, each with a review."""
        self.sql(
            f"""WITH author AS (INSERT INTO app_author (name) VALUES ('Zoë "O''Neil" \\ 100%') RETURNING id),
            book AS (INSERT INTO app_book (title, author_id, published)
                     SELECT 'Book ' || n, id, date '2020-01-31' + n % 365 FROM author, generate_series(1, {books}) n RETURNING id)
            INSERT INTO app_review (book_id, text, stars) SELECT id, repeat('fine; ', 20), id % 5 FROM book"""
        )

    def books(self, database: str | None = None) -> int:
        return int(self.sql("SELECT count(*) FROM app_book", database))

    def databases(self) -> list[str]:
        """The databases of this project: its own, and what was made from it."""
        return [name for name in database_names(self.server) if name not in self.others]

    def stored(self) -> list[str]:
        """Everything in the folder of dumps, hidden files too."""
        return sorted(str(path.relative_to(self.dumps)) for path in self.dumps.rglob("*") if path.is_file())

    def digest(self, database: str | None = None) -> str:
        """All rows of the project's tables, as one hash."""
        parts = [
            self.sql(f"SELECT md5(coalesce(string_agg(t::text, '|' ORDER BY id), '')) FROM {table} t", database)
            for table in ("app_author", "app_book", "app_review", "auth_user")
        ]
        return "".join(parts)


def database_names(server: Server) -> list[str]:
    names: list[str] = json.loads(server.psql("SELECT json_agg(datname ORDER BY datname) FROM pg_database"))
    return names


@contextlib.contextmanager
def open_project(server: Server, folder: Path, name: str = "shop", books: int = 50) -> Iterator[Project]:
    """A project with rows. At the end, its databases and all others that it made are dropped."""
    before = set(database_names(server))
    if TEMPLATE not in before:
        migrated = Project(server, TEMPLATE, folder)
        server.run("createdb", "-T", "template0", TEMPLATE)
        done = migrated.manage("migrate", "-v0")
        assert done.status == 0, done.err
        before.add(TEMPLATE)
    server.run("createdb", "-T", TEMPLATE, "--", name)
    project = Project(server, name, folder / "dumps", others=frozenset(before))
    try:
        if books:
            project.fill(books)
        yield project
    finally:
        for left in set(database_names(server)) - before:
            server.run("dropdb", "--force", "--", left)
