"""A dump restores with stock tools, as docs/archive-format.md says."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from tests.project import Project

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_dump_restores_with_stock_tools(project: Project, codec: str) -> None:
    key = project.dump("--codec", codec)
    stored = (project.dumps / key).read_bytes()
    manifest = json.loads((project.dumps / f"{key}.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(stored).hexdigest()
    assert manifest["stored_size"] == len(stored)
    archive = zstd.decompress(stored) if codec == "zstd" else stored
    assert manifest["raw_size"] == len(archive)
    project.server.run("createdb", "-T", "template0", "rescued")
    subprocess.run(
        [project.server.bin / "pg_restore", "--no-owner", "--no-acl", "-d", "rescued"],
        input=archive,
        env=project.server.environ(),
        check=True,
    )
    assert project.digest("rescued") == project.digest()


def test_the_manifest_tells_what_was_dumped(project: Project) -> None:
    project.sql("CREATE EXTENSION pg_trgm; ANALYZE")
    manifest = json.loads((project.dumps / f"{project.dump('-e', 'app.Review')}.json").read_text())
    tables = {table["name"]: table for table in manifest["tables"]}
    assert manifest["extensions"].keys() == {"pg_trgm", "plpgsql"}
    assert manifest["migrations"]["app"] == "0001_initial"
    assert manifest["server"].startswith("18.") and manifest["pg_dump"].startswith("18.")
    assert (manifest["codecs"], manifest["encoding"]) == (["zstd"], "UTF8")
    assert (tables["public.app_book"]["rows"], tables["public.app_book"]["excluded"]) == (50, False)
    assert tables["public.app_review"]["excluded"]
    assert [key["name"] for key in manifest["foreign_keys"]] == []
    assert {"files", "zstd", "commands"} <= manifest["plugins"].keys()


def test_the_dump_is_one_snapshot_whatever_the_settings_of_the_database(project: Project) -> None:
    """Timeouts that would end the session of the snapshot, and formats that COPY would follow."""
    project.sql(
        """ALTER DATABASE shop SET idle_in_transaction_session_timeout = '1ms'; ALTER DATABASE shop SET statement_timeout = '1ms';
        ALTER DATABASE shop SET datestyle = 'SQL, DMY'; ALTER DATABASE shop SET extra_float_digits = -10"""
    )
    project.server.psql("ALTER DATABASE shop RESET statement_timeout")  # the project's own queries must get through
    before = project.digest()
    project.restore(project.dump(), "--pre-swap-hook")  # psycopg 3 itself cannot read dates of that style
    assert project.digest() == before
