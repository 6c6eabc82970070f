"""Errors of pg_restore that are known to be harmless are named and ignored; all others end the restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgclone.testing.postgres import Server
from tests.fixtures import POSTGRES_15
from tests.project import Project, open_project


@pytest.fixture
def plain(project: Project) -> Iterator[Project]:
    """The project as a role that owns its database and may create others, and can do nothing else."""
    project.sql("CREATE ROLE plain LOGIN CREATEDB PASSWORD 'plain'; ALTER DATABASE shop OWNER TO plain")
    yield project
    for name in project.databases():
        project.server.run("dropdb", "--force", "--", name)
    project.server.psql("DROP ROLE plain")


def test_the_comment_on_an_extension_that_the_template_brings_is_harmless(plain: Project) -> None:
    """Where a plain role may not create an extension, the template has it; its comment is its owner's."""
    plain.sql("CREATE EXTENSION pg_stat_statements")
    key = plain.dump()
    plain.database |= {"USER": "plain", "PASSWORD": "plain"}
    refused = plain.pgclone("restore", key)
    assert refused.status == 1
    assert "EXTENSION pg_stat_statements" in refused.err and "permission denied" in refused.err
    plain.server.run("createdb", "-T", "template0", "prepared")
    plain.sql("CREATE EXTENSION pg_stat_statements", "prepared")
    plain.sql("ALTER DATABASE prepared IS_TEMPLATE true")
    try:
        done = plain.restore(key, PGCLONE_TEMPLATE="prepared")
    finally:
        plain.server.psql("ALTER DATABASE prepared IS_TEMPLATE false")
    assert "Ignored, as it is harmless: " in done.err and "COMMENT - EXTENSION pg_stat_statements" in done.err
    assert plain.books() == 50


@pytest.mark.soak
@pytest.mark.parametrize("version", [15] if POSTGRES_15.exists() else [])
def test_a_setting_that_an_older_server_does_not_know_is_harmless(
    project: Project, servers: Callable[[int], Server], tmp_path: Path, version: int
) -> None:
    """pg_restore 18 sends `SET transaction_timeout` to a server of 15."""
    key = project.dump()
    with open_project(servers(version), tmp_path, books=0) as older:
        older.settings["PGCLONE_BIN_DIR"] = str(project.server.bin)
        done = older.restore(key)
        assert "Ignored, as it is harmless: INITIALIZING" in done.err
        assert older.digest() == project.digest()
