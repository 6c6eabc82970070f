"""One private PostgreSQL server for all tests, started when the first test wants it.

`PGCLONE_TEST_DRIVER=psycopg2` runs everything on psycopg2; otherwise Django picks psycopg 3.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("PGCLONE_TEST_DRIVER") == "psycopg2":
    sys.modules["psycopg"] = None  # type: ignore[assignment]

os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"

from pgclone.database.connection import Server, Session
from pgclone.testing import postgres as private
from tests.project import Project, open_project

POSTGRES_15 = Path("/usr/lib/postgresql/15/bin")

# Nothing here has to survive a power failure.
CONFIG = {"fsync": "off", "max_prepared_transactions": "10", "wal_level": "logical", "max_wal_senders": "5"}


def pytest_configure(config: pytest.Config) -> None:
    from django.conf import settings

    assert settings.DATABASES  # pytest-django sets Django up if the settings have been read by now


@contextlib.contextmanager
def start(bin: Path | None = None) -> Iterator[private.Server]:
    """A server for tests. In memory where that has room: databases are made three times as fast there."""
    memory, config, patch = Path("/dev/shm"), CONFIG, pytest.MonkeyPatch()
    if memory.is_dir() and os.access(memory, os.W_OK):
        system = os.statvfs(memory)
        # Root runs a copy of the binaries from there.
        if system.f_bavail * system.f_frsize > 4 << 30 and not system.f_flag & os.ST_NOEXEC:
            patch.setattr(tempfile, "tempdir", str(memory))
            config = {**CONFIG, "max_wal_size": "512MB"}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(private.start(bin, config=config))
        finally:
            patch.undo()
        yield server


@pytest.fixture(scope="session")
def postgres(django_db_blocker: Any) -> Iterator[private.Server]:
    """PostgreSQL 18, and the alias `default` of this and of child processes pointing to database `app` on it."""
    from django.db import connections

    with start() as server, django_db_blocker.unblock():
        settings = server.settings("app")
        os.environ["PGCLONE_TEST_DATABASE"] = json.dumps(settings)
        connections.settings["default"].update(settings)
        yield server
        connections.close_all()
        del os.environ["PGCLONE_TEST_DATABASE"]


@pytest.fixture(scope="session")
def servers(postgres: private.Server) -> Iterator[Callable[[int], private.Server]]:
    """Servers by major version, each started once: `servers(15)`."""
    with contextlib.ExitStack() as stack:
        running = {18: postgres}

        def find(version: int) -> private.Server:
            if version not in running:
                bin = POSTGRES_15 if version == 15 else private.embedded(version)
                running[version] = stack.enter_context(start(bin))
            return running[version]

        yield find


class World:
    """A server as a test uses it: SQL as the superuser, roles and databases that are gone after the test."""

    def __init__(self, server: private.Server) -> None:
        self.server = server
        self._roles: list[str] = []
        self.session = self.alias("postgres").open("postgres", application="test")
        self._before = set(self.databases())

    def alias(self, name: str, *, user: str = "postgres", **changes: Any) -> Server:
        """pgclone's own view of the server, logged in as `user`."""
        settings = self.server.settings(name, USER=user, **changes)
        return Server("default", {"OPTIONS": {}, "TIME_ZONE": None, "AUTOCOMMIT": True, **_DEFAULTS, **settings})

    def sql(self, statement: str, params: Sequence[object] | None = None, *, database: str = "postgres") -> list[Any]:
        if database == "postgres":
            return self.session.execute(statement, params)
        with self.connect(database) as session:
            return session.execute(statement, params)

    def value(self, statement: str, params: Sequence[object] | None = None, *, database: str = "postgres") -> Any:
        rows = self.sql(statement, params, database=database)
        return rows[0][0] if rows else None

    @contextlib.contextmanager
    def connect(self, database: str, user: str = "postgres", application: str = "test") -> Iterator[Session]:
        with self.alias(database, user=user).connect(database, application=application) as session:
            yield session

    def role(self, name: str, options: str = "") -> str:
        """A role that can log in, with the server's password."""
        self.run("CREATE ROLE {} LOGIN PASSWORD %L " + options, name)
        self._roles.append(name)
        return name

    def run(self, statement: str, *identifiers: str) -> None:
        """A statement with identifiers for {}; %L is the password."""
        from django.db.backends.postgresql.psycopg_any import sql

        text = sql.SQL(statement.replace("%L", "{password}")).format(
            *map(sql.Identifier, identifiers), password=sql.Literal(self.server.password)
        )
        self.session.execute(text)

    def create(self, name: str, content: str = "", *, marker: object = None, options: str = "") -> str:
        """A database with one table, `content`, that says what it is; and a marker, if it is to be ours."""
        self.run("CREATE DATABASE {} TEMPLATE template0 " + options, name)
        if content:
            with self.connect(name) as session:
                session.execute("CREATE TABLE public.content AS SELECT %s::text AS value", [content])
        if marker:
            self.mark(name, marker)
        return name

    def mark(self, name: str, marker: object) -> None:
        from django.db.backends.postgresql.psycopg_any import sql

        comment = sql.SQL("COMMENT ON DATABASE {} IS {}")
        self.session.execute(comment.format(sql.Identifier(name), sql.Literal(marker and str(marker))))

    def content(self, name: str) -> str:
        return str(self.value("SELECT value FROM public.content", database=name))

    def databases(self) -> list[str]:
        return [name for (name,) in self.sql("SELECT datname::text FROM pg_database ORDER BY datname")]

    def oid(self, name: str) -> int | None:
        value = self.value("SELECT oid::bigint FROM pg_database WHERE datname = %s", [name])
        return None if value is None else int(value)

    def drop(self, name: str) -> None:
        self.run("ALTER DATABASE {} IS_TEMPLATE false", name)
        self.run("DROP DATABASE {} WITH (FORCE)", name)

    def clear(self) -> None:
        from django.db.backends.postgresql.psycopg_any import sql

        for gid, database in self.sql("SELECT gid, database::text FROM pg_prepared_xacts"):
            with self.connect(database) as session:
                session.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        self.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        for name in set(self.databases()) - self._before:
            self.drop(name)
        for name in reversed(self._roles):
            self.run("DROP OWNED BY {}", name)
            self.run("DROP ROLE {}", name)
        self.session.close()


_DEFAULTS = {"ATOMIC_REQUESTS": False, "CONN_MAX_AGE": 0, "CONN_HEALTH_CHECKS": False, "TEST": {}}


@pytest.fixture
def world(postgres: private.Server) -> Iterator[World]:
    """PostgreSQL 18, left as it was found."""
    world = World(postgres)
    yield world
    world.clear()


@pytest.fixture
def worlds(servers: Callable[[int], private.Server]) -> Iterator[Callable[[int], World]]:
    """The same for a version."""
    with contextlib.ExitStack() as stack:

        def find(version: int) -> World:
            world = World(servers(version))
            stack.callback(world.clear)
            return world

        yield find


@pytest.fixture
def project(postgres: private.Server, tmp_path: Path) -> Iterator[Project]:
    """A Django project with its database on PostgreSQL 18."""
    with open_project(postgres, tmp_path) as project:
        yield project
