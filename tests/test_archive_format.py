"""A dump restores with stock tools, as docs/archive-format.md says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pgclone import plan
from pgclone.testing.postgres import Server
from tests.project import ROOT, Project, open_project

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables need not be large to become parts, of two blocks each."""
    for name in ("LARGE", "SMALL_CHUNK", "CHUNK"):
        monkeypatch.setattr(plan, name, 16384)


def dump(project: Project, *flags: str) -> str:
    """Dump, and return the new key."""
    done = project.call("dump", *flags)
    assert done.status == 0, done.err
    (key,) = [name for name in project.stored() if name.endswith(".dump")]
    return key


def read_manifest(project: Project, key: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((project.dumps / f"{key}.json").read_text())
    return manifest


def unpack(described: dict[str, Any], file: Path, codec: str) -> bytes:
    """The bytes inside the codec, if the stored ones are as the manifest describes them."""
    stored = file.read_bytes()
    assert described["sha256"] == hashlib.sha256(stored).hexdigest()
    assert described["stored_size"] == len(stored)
    data = zstd.decompress(stored) if codec == "zstd" else stored
    assert described["raw_size"] == len(data)
    return data


def restore(project: Project, archive: bytes, *sections: str) -> None:
    command = [str(project.server.bin / "pg_restore"), "--no-owner", "--no-acl", "-d", "rescued", *sections]
    subprocess.run(command, input=archive, env=project.server.environ(), check=True)


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_dump_restores_with_stock_tools(project: Project, codec: str) -> None:
    key = dump(project, "--codec", codec, "--jobs", "1")
    project.server.run("createdb", "-T", "template0", "rescued")
    restore(project, unpack(read_manifest(project, key), project.dumps / key, codec))
    assert project.digest("rescued") == project.digest()


AFTER_THE_ROWS = """
CREATE FUNCTION doubling() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO app_author (name) VALUES (new.title); RETURN new; END $$;
CREATE TRIGGER doubling BEFORE INSERT ON app_book FOR EACH ROW EXECUTE FUNCTION doubling();
CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM app_book;
"""


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_dump_with_parts_restores_with_stock_tools(project: Project, codec: str) -> None:
    """First tables and the rows of the archive, then parts, and then what would miss them or double them."""
    project.fill(500)
    project.sql(AFTER_THE_ROWS)
    key = dump(project, "--codec", codec, "--jobs", "2")
    manifest = read_manifest(project, key)
    archive = unpack(manifest, project.dumps / key, codec)
    project.server.run("createdb", "-T", "template0", "rescued")
    restore(project, archive, "--section=pre-data", "--section=data")
    for part in manifest["parts"]:
        rows = unpack(part, project.dumps / f"{key}.parts/{part['number']:05d}", codec)
        columns = ", ".join(part["columns"])
        command = ["psql", "-X", "-d", "rescued", "-c", f"COPY {part['schema']}.{part['table']} ({columns}) FROM STDIN"]
        loading = subprocess.run(command, input=rows, env=project.server.environ(), check=True, stdout=subprocess.PIPE)
        assert loading.stdout.decode() == f"COPY {part['rows']}\n"
    restore(project, archive, "--section=post-data")
    assert project.digest("rescued") == project.digest()
    assert project.sql("SELECT count FROM counted", "rescued") == "550"
    tables = [part["table"] for part in manifest["parts"]]
    assert {*tables} == {"app_review", "app_book"} and tables.count("app_review") > 1


ODD = r"""
CREATE TABLE U&"Caf\00E9" (U&"\00E9 ""x"" %s" text, b int);
INSERT INTO U&"Caf\00E9" SELECT E'tab\t, line\n\\. ' || U&'\00E9' || n, nullif(n, 7) FROM generate_series(1, 2000) AS n;
CREATE TABLE U&"two\000Alines\005C'; :x %" AS SELECT n AS U&"a\0009b\005C\005C" FROM generate_series(1, 2000) AS n;
CREATE TABLE empty_columns (); INSERT INTO empty_columns SELECT FROM generate_series(1, 2000);
"""
DIGESTS = r"""
SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM U&"Caf\00E9" AS t UNION ALL
SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM U&"two\000Alines\005C'; :x %" AS t UNION ALL
SELECT count(*)::text FROM empty_columns
"""


@pytest.fixture
def path(postgres: Server, tmp_path: Path) -> str:
    """A PATH with the server's tools, this Python, and zstd: where it is not installed, with what does the same."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if shutil.which("zstd") is None:
        module = "compression" if sys.version_info >= (3, 14) else "backports"
        script = f"import shutil, sys; from {module} import zstd; file = zstd.open(sys.argv[2])"
        (folder / "zstd").write_text(f"#!{sys.executable}\n{script}; shutil.copyfileobj(file, sys.stdout.buffer)\n")
        (folder / "zstd").chmod(0o755)
    return os.pathsep.join(map(str, (folder, Path(sys.executable).parent, postgres.environ()["PATH"])))


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"])
def test_the_commands_of_the_documentation_restore_a_dump_with_parts(
    postgres: Server, tmp_path: Path, path: str, encoding: str
) -> None:
    page = (ROOT / "docs" / "archive-format.md").read_text()
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", page, re.MULTILINE)
    (commands,) = [textwrap.dedent(block) for block in blocks if "K.parts/" in block]
    with open_project(postgres, tmp_path, books=0) as project:
        project.server.run("dropdb", "shop")
        for name in ("shop", "rescued"):
            project.server.run("createdb", "-T", "template0", "-E", encoding, "--locale=C", name)
        project.sql(ODD)
        key = dump(project, "--jobs", "4")
        assert len({part["table"] for part in read_manifest(project, key)["parts"]}) == 3
        for ending in ("", ".json", ".parts"):
            (project.dumps / f"{key}{ending}").rename(tmp_path / f"K{ending}")
        environ = {**project.server.environ(), "PATH": path}
        subprocess.run(["sh", "-c", commands], cwd=tmp_path, env=environ, check=True)
        assert project.sql(DIGESTS, "rescued") == project.sql(DIGESTS)
        # A part that has lost rows is found.
        first = tmp_path / "K.parts" / "00001"
        first.write_bytes(first.read_bytes()[:-9])
        project.server.run("dropdb", "rescued")
        project.server.run("createdb", "-T", "template0", "-E", encoding, "--locale=C", "rescued")
        done = subprocess.run(["sh", "-c", commands], cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, "K.parts/00001 is damaged.\n")


def test_the_manifest_tells_what_was_dumped(project: Project) -> None:
    project.sql("CREATE EXTENSION pg_trgm; ANALYZE")
    manifest = read_manifest(project, dump(project, "-e", "app.Review"))
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
