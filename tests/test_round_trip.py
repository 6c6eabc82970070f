"""Everything that a database can hold comes back as it was: a pg_dump of before and after is the judge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgclone import plan
from pgclone.testing.postgres import Server
from tests.fixtures import POSTGRES_15
from tests.project import Done, Project, open_project

EVERYTHING = """
CREATE EXTENSION hstore; CREATE EXTENSION pg_trgm;
CREATE SCHEMA "Odd schema";
CREATE TYPE mood AS ENUM ('sad', 'ok', 'it''s "fine"');
CREATE DOMAIN positive AS int CHECK (value > 0);
CREATE TYPE pair AS (a int, b text);
CREATE TABLE typed (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, m mood, p positive, c pair, h hstore, f float8, d date,
    r int4range, a text[], j jsonb, b bytea, twice int GENERATED ALWAYS AS (p * 2) STORED, gone text,
    EXCLUDE USING gist (r WITH &&));
ALTER TABLE typed DROP COLUMN gone;
INSERT INTO typed (m, p, c, h, f, d, r, a, j, b) VALUES
    ('it''s "fine"', 7, '(1,"x,y")', 'k=>"v\\"w"', 0.1 + 0.2, '2026-02-01',
     '[1,5)', '{NULL,"a\\\\b","NULL"}', '{"k": "\\u00e9\\n"}', '\\xdeadbeef'),
    (NULL, NULL, NULL, NULL, 'NaN', 'infinity', NULL, '{}', 'null', '');
CREATE INDEX ON typed USING gin (j); CREATE INDEX "partial; --" ON typed ((p + 1)) WHERE p > 3;
CREATE TABLE empty_columns (); INSERT INTO empty_columns DEFAULT VALUES; INSERT INTO empty_columns DEFAULT VALUES;
CREATE TABLE only_generated (a int GENERATED ALWAYS AS (1) STORED, b text GENERATED ALWAYS AS ('x') STORED);
INSERT INTO only_generated DEFAULT VALUES; INSERT INTO only_generated DEFAULT VALUES;
CREATE TABLE only_dropped (gone int); INSERT INTO only_dropped VALUES (1), (2); ALTER TABLE only_dropped DROP COLUMN gone;
CREATE TABLE "Odd schema"."weird ""name"" %s" ("col ""x""; DROP" text, "Ünïcode" int);
INSERT INTO "Odd schema"."weird ""name"" %s" VALUES (E'tab\\tnew\\nline\\\\.', 1), ('\\.', 2), (NULL, 3), ('', 4),
    (E'\\r\\n\\b\\f\\v', 5), ('\\N', 6), (E'\\n\\\\.\\n', 7), (' \\\\ ', 8);
CREATE TABLE "Odd schema".U&"two\\000Alines\\005C.'; :x %" (U&"\\005C.\\000A:'y' %s" text DEFAULT 'z');
INSERT INTO "Odd schema".U&"two\\000Alines\\005C.'; :x %" VALUES ('\\.'), ('x');
CREATE TABLE measure (at date, v int) PARTITION BY RANGE (at);
CREATE TABLE measure_1 PARTITION OF measure FOR VALUES FROM ('2026-01-01') TO ('2026-07-01');
CREATE TABLE measure_rest PARTITION OF measure DEFAULT; CREATE INDEX ON measure (v);
INSERT INTO measure VALUES ('2026-03-03', 1), ('2027-01-01', 2);
CREATE TABLE moods (m mood) PARTITION BY HASH (m);
CREATE TABLE moods_0 PARTITION OF moods FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE moods_1 PARTITION OF moods FOR VALUES WITH (MODULUS 2, REMAINDER 1); INSERT INTO moods VALUES ('sad'), ('ok');
CREATE TABLE parent (id int); CREATE TABLE child (extra text) INHERITS (parent);
INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2, 'x');
CREATE UNLOGGED TABLE scratch (id int); INSERT INTO scratch VALUES (1);
CREATE TABLE spaced (id int); INSERT INTO spaced VALUES (1); CREATE UNLOGGED TABLE "spaced out" AS SELECT 2 AS id;
CREATE SEQUENCE lonely START 5 INCREMENT 3; SELECT nextval('lonely'), nextval('lonely');
CREATE VIEW books AS SELECT b.title, a.name FROM app_book b JOIN app_author a ON a.id = b.author_id;
CREATE MATERIALIZED VIEW counted AS SELECT count(*) AS n FROM books; CREATE UNIQUE INDEX ON counted (n);
CREATE MATERIALIZED VIEW counted_twice AS SELECT n * 2 AS n FROM counted; CREATE MATERIALIZED VIEW never AS SELECT 1 WITH NO DATA;
CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    new.a := array_append(new.a, 'pg_restore: error: no'); RETURN new; END $$;
CREATE TRIGGER noting BEFORE INSERT OR UPDATE ON typed FOR EACH ROW EXECUTE FUNCTION noted();
ALTER TABLE typed DISABLE TRIGGER noting;
CREATE TABLE secret (owner text, v text); INSERT INTO secret VALUES ('alice', 'a'), ('bob', 'b');
ALTER TABLE secret ENABLE ROW LEVEL SECURITY; ALTER TABLE secret FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON secret USING (owner = current_user);
CREATE RULE quiet AS ON DELETE TO secret DO INSTEAD NOTHING;
CREATE STATISTICS typed_stats (dependencies) ON m, p FROM typed;
CREATE TEXT SEARCH CONFIGURATION plain (COPY = simple);
CREATE COLLATION "c2" (provider = libc, locale = 'C');
CREATE AGGREGATE total (int) (sfunc = int4pl, stype = int, initcond = '0');
CREATE PUBLICATION every_table FOR ALL TABLES;
CREATE EVENT TRIGGER watch ON ddl_command_start WHEN TAG IN ('DROP FUNCTION') EXECUTE FUNCTION watching();
COMMENT ON TABLE typed IS 'pg_restore: error: "quoted" %s'; COMMENT ON COLUMN typed.m IS E'two\\nlines';
SELECT lo_from_bytea(4711, 'large object'); SELECT lo_from_bytea(4712, ''); COMMENT ON LARGE OBJECT 4711 IS 'blob';
CREATE ROLE reader; GRANT SELECT ON typed TO reader; GRANT UPDATE (m) ON typed TO reader WITH GRANT OPTION;
ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO reader;
CREATE ROLE keeper; GRANT ALL ON SCHEMA public TO keeper; ALTER TABLE parent OWNER TO keeper;
"""

EVENT_FUNCTION = "CREATE FUNCTION watching() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$;"


def describe(project: Project, *flags: str, database: str = "") -> str:
    """The whole database as pg_dump prints it; its random key for \\restrict left out, and the rows of each table sorted."""
    # The rows of `moods` belong to another partition in every database. The text is in the encoding of the database.
    command = ("pg_dump", "--no-sync", "--exclude-table-data=moods_*", *flags, database or project.name)
    text = project.server.run(*command, encoding="latin1")
    text = re.sub(r"^\\(un)?restrict .*$", "", text, flags=re.MULTILINE)
    rows = r"(^COPY [^;]+ FROM stdin;\n)(.*?)(^\\\.\n)"
    return re.sub(rows, lambda found: found[1] + _sorted(found[2]) + found[3], text, flags=re.MULTILINE | re.DOTALL)


def _sorted(rows: str) -> str:
    return "".join(f"{row}\n" for row in sorted(rows.split("\n")[:-1]))


@pytest.fixture(scope="module")
def full(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with everything in its database, for tests that leave it so."""
    with open_project(postgres, tmp_path_factory.mktemp("full"), name="full", books=300) as project:
        project.sql(EVENT_FUNCTION)
        for statement in EVERYTHING.split(";\n"):
            if statement.strip():
                project.sql(statement)
        yield project
    postgres.psql("DROP ROLE reader")
    postgres.psql("DROP ROLE keeper")


def check_the_rest(full: Project, database: str = "") -> None:
    """What pg_dump does not print, or not the same every time."""
    assert full.sql("SELECT encode(lo_get(4711), 'escape'), lo_get(4712) = ''", database or None) == "large object|t"
    assert full.sql("SELECT string_agg(m::text, ' ' ORDER BY m) FROM moods", database or None) == "sad ok"


def done(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


def dump(project: Project, *flags: str) -> str:
    """Dump, and return the new key."""
    before = set(project.stored())
    done(project.call("dump", *flags))
    (key,) = [name for name in project.stored() if name not in before and name.endswith(".dump")]
    return key


def parts(project: Project, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((project.dumps / f"{key}.json").read_text())["parts"]
    assert len(found) == len([name for name in project.stored() if name.startswith(f"{key}.parts/")])
    return found


@pytest.fixture
def everything_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a table is, its rows become parts: one for each block."""
    make = plan.make
    monkeypatch.setattr(plan, "LARGE", 0)
    monkeypatch.setattr(plan, "CHUNK", 1)
    monkeypatch.setattr(plan, "make", lambda tables, total, jobs, **more: make(tables, 1 << 60, jobs, **more))


TYPICAL = {
    "typed",
    "empty_columns",
    "only_generated",
    "only_dropped",
    'weird "name" %s',
    "two\nlines\\.'; :x %",
    "measure_1",
}
TYPICAL |= {"measure_rest", "parent", "child", "secret", "spaced", "app_book", "django_session"}


def test_everything_comes_back(full: Project) -> None:
    before = describe(full)
    key = dump(full, "--jobs", "1")
    done(full.call("restore", key, "--owner", "--acl", "--pre-swap-hook", "--jobs", "2"))
    assert describe(full) == before
    check_the_rest(full)
    assert parts(full, key) == []


@pytest.mark.usefixtures("everything_in_parts")
def test_everything_comes_back_from_parts(full: Project) -> None:
    before = describe(full)
    key = dump(full, "--jobs", "2")
    done(full.call("restore", key, "--owner", "--acl", "--pre-swap-hook", "--jobs", "3"))
    assert describe(full) == before
    check_the_rest(full)
    tables = [part["table"] for part in parts(full, key)]
    assert {*tables} >= TYPICAL and tables.count("app_book") > 2
    # What pg_dump treats in a way of its own stays with it.
    assert {*tables}.isdisjoint({"scratch", "spaced out", "moods_0", "moods_1", "counted", "measure", "moods"})


@pytest.mark.usefixtures("everything_in_parts")
def test_everything_goes_into_an_online_copy(full: Project) -> None:
    before = describe(full)
    done(full.call("copy", ":mine", "--online", "--jobs", "2"))
    assert describe(full, database="mine") == before
    check_the_rest(full, "mine")


def test_owners_and_privileges_stay_out_unless_asked_for(full: Project) -> None:
    done(full.call("restore", dump(full), "--pre-swap-hook", "--as", ":bare"))
    assert full.sql("SELECT relowner::regrole FROM pg_class WHERE relname = 'parent'", "bare") == "postgres"
    assert full.sql("SELECT relacl FROM pg_class WHERE relname = 'typed'", "bare") == ""


def test_statistics_are_there_after_the_restore(full: Project) -> None:
    done(full.call("restore", dump(full), "--pre-swap-hook", "--as", ":bare", "--jobs", "3"))
    tables = "FROM pg_class WHERE relkind IN ('r', 'p', 'm') AND relnamespace >= 'public'::regnamespace"
    assert full.sql(f"SELECT relname {tables} AND reltuples < 0 AND relname <> 'never'", "bare") == ""
    assert full.sql("SELECT reltuples FROM pg_class WHERE relname = 'app_book'", "bare") == "300"
    ranges = (
        "SELECT tablename, inherited FROM pg_stats WHERE tablename ~ '^(measure|parent)' AND attname IN ('v', 'id')"
    )
    assert full.sql(f"{ranges} ORDER BY 1, 2", "bare").splitlines() == [
        *("measure|t", "measure_1|f", "measure_rest|f", "parent|f", "parent|t")
    ]


# Settings that change what COPY reads and writes


def dump_and_restore_as_a_role_with(project: Project, setting: str, value: str) -> str:
    project.sql(f"ALTER ROLE postgres SET {setting} = {value}")
    try:
        key = dump(project, "--jobs", "2")
        done(project.call("restore", key, "--pre-swap-hook", "--jobs", "2"))
    finally:
        project.server.psql(f"ALTER ROLE postgres RESET {setting}")
    return key


@pytest.mark.usefixtures("everything_in_parts")
def test_arrays_with_nulls_come_back_though_the_role_would_take_them_for_words(project: Project) -> None:
    """An unlogged table stays in the archive."""
    for kind, table in (("", "a_part"), ("UNLOGGED", "no_part")):
        project.sql(
            f"CREATE {kind} TABLE {table} AS SELECT '{{NULL,\"NULL\"}}'::text[] AS words, '{{NULL}}'::int[] AS numbers"
        )
    before = describe(project)
    key = dump_and_restore_as_a_role_with(project, "array_nulls", "off")
    assert "a_part" in [part["table"] for part in parts(project, key)]
    assert describe(project) == before


@pytest.mark.usefixtures("everything_in_parts")
def test_fragments_of_xml_come_back_though_the_role_wants_documents(
    servers: Callable[[int], Server], tmp_path: Path
) -> None:
    """On a server that has XML."""
    with open_project(servers(17), tmp_path, books=0) as project:
        project.sql(
            "CREATE TABLE fragment AS SELECT xmlparse(content 'text <b/> and ' || n) AS x FROM generate_series(1, 9) n"
        )
        before = describe(project)
        key = dump_and_restore_as_a_role_with(project, "xmloption", "document")
        assert "fragment" in [part["table"] for part in parts(project, key)]
        assert describe(project) == before


# Encodings


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def encoded(postgres: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Project]:
    """A project whose database has another encoding."""
    with open_project(postgres, tmp_path, books=0) as project:
        make_database(project, request.param)
        yield project


def make_database(project: Project, encoding: str) -> None:
    project.server.run("dropdb", "--if-exists", "shop")
    project.server.run("createdb", "-T", "template0", "-E", encoding, "--locale=C", "shop")


def test_other_encodings_survive(encoded: Project) -> None:
    encoding = encoded.sql("SHOW server_encoding")
    encoded.sql(
        f"SET client_encoding = {encoding}; CREATE TABLE t (v text);"
        f"INSERT INTO t VALUES (convert_from('\\x6fe9', '{encoding}'))"
    )
    if encoding == "LATIN1":  # names as well, a foreign key to missing rows among them
        encoded.sql(
            r"""CREATE TABLE U&"Caf\00E9" (U&"\00E9" int PRIMARY KEY); INSERT INTO U&"Caf\00E9" VALUES (1);
            CREATE TABLE child (id int CONSTRAINT U&"cl\00E9" REFERENCES U&"Caf\00E9"); INSERT INTO child VALUES (1)"""
        )
    key = dump(encoded, *(["--exclude-table", '"Café"'] if encoding == "LATIN1" else []))
    restored = done(encoded.call("restore", key, "--pre-swap-hook"))
    assert ("clé" in restored.err) == (encoding == "LATIN1")
    assert encoded.sql(f"SET client_encoding = {encoding}; SELECT convert_to(v, '{encoding}') FROM t") == "\\x6fe9"
    assert encoded.sql("SHOW server_encoding") == encoding


CAFE = {"SQL_ASCII": 'CREATE TABLE "Café" ("é" text)', "LATIN1": r'CREATE TABLE U&"Caf\00E9" (U&"\00E9" text)'}


@pytest.fixture
def cafe(encoded: Project, everything_in_parts: None) -> str:
    """The key of a dump with rows and names that are not ASCII, in parts."""
    encoding = encoded.sql("SHOW server_encoding")
    encoded.sql(CAFE[encoding])
    rows = f"SELECT convert_from('\\x6fe9', '{encoding}') || n FROM generate_series(1, 3000) AS n"
    of_the_table = "FROM pg_class WHERE relname LIKE 'Caf%' AND relkind = 'r'"
    name = encoded.sql(f"SELECT relname::text::bytea {of_the_table}")
    assert bytes.fromhex(name[2:]) == "Café".encode("latin1" if encoding == "LATIN1" else "utf8")
    encoded.sql(f"DO $do$ BEGIN EXECUTE format($$INSERT INTO %I {rows}$$, (SELECT relname {of_the_table})); END $do$")
    key = dump(encoded, "--jobs", "2")
    found = parts(encoded, key)
    assert len(found) > 2 and all((part["table"], part["columns"]) == ("Café", ["é"]) for part in found)
    return key


def test_parts_in_other_encodings_survive_with_their_names(encoded: Project, cafe: str) -> None:
    before = describe(encoded)
    assert "oé17\n" in before
    done(encoded.call("restore", cafe, "--pre-swap-hook", "--jobs", "2"))
    assert describe(encoded) == before


def test_parts_move_to_an_encoding_that_has_their_characters(encoded: Project, cafe: str) -> None:
    """Bytes that say nothing of their characters do not move."""
    encoding = encoded.sql("SHOW server_encoding")
    make_database(encoded, "UTF8")
    restored = encoded.call("restore", cafe, "--pre-swap-hook", "--jobs", "2")
    if encoding == "LATIN1":
        assert done(restored)
        assert encoded.sql("""SELECT count(*), max("é") FROM "Café" """) == "3000|oé999"
    else:
        assert restored.status == 1
        assert (
            'The rows of public.Café could not be loaded: invalid byte sequence for encoding "UTF8": 0xe9'
            in restored.err
        )
        assert encoded.databases() == ["shop"]


# Other servers


@pytest.mark.usefixtures("everything_in_parts")
@pytest.mark.parametrize("version", [17, *([15] if POSTGRES_15.exists() else [])])
def test_a_dump_moves_to_an_older_server(
    project: Project, servers: Callable[[int], Server], tmp_path: Path, version: int
) -> None:
    """pg_restore sends a server before 17 a setting that it does not know."""
    key = dump(project, "--jobs", "2")
    assert len(parts(project, key)) > 10
    with open_project(servers(version), tmp_path, books=0) as older:
        older.settings["PGCLONE_BIN_DIR"] = str(project.server.bin)
        restored = done(older.call("restore", key, "--jobs", "2"))
        for words in ("harmless: INITIALIZING", "Indexes and constraints are built one at a time: pg_restore 18"):
            assert (words in restored.err) == (version < 17)
        assert older.digest() == project.digest()
