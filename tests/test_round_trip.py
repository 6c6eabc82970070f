"""Everything that a database can hold comes back as it was: a pg_dump of before and after is the judge."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgclone.testing.postgres import Server
from tests.project import Project, open_project

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
     '[1,5)', '{NULL,"a\\\\b"}', '{"k": "\\u00e9\\n"}', '\\xdeadbeef'),
    (NULL, NULL, NULL, NULL, 'NaN', 'infinity', NULL, '{}', 'null', '');
CREATE INDEX ON typed USING gin (j); CREATE INDEX "partial; --" ON typed ((p + 1)) WHERE p > 3;
CREATE TABLE empty_columns (); INSERT INTO empty_columns DEFAULT VALUES;
CREATE TABLE "Odd schema"."weird ""name"" %s" ("col ""x""; DROP" text, "Ünïcode" int);
INSERT INTO "Odd schema"."weird ""name"" %s" VALUES (E'tab\\tnew\\nline\\\\.', 1), ('\\.', 2), (NULL, 3), ('', 4);
CREATE TABLE measure (at date, v int) PARTITION BY RANGE (at);
CREATE TABLE measure_1 PARTITION OF measure FOR VALUES FROM ('2026-01-01') TO ('2026-07-01');
CREATE TABLE measure_rest PARTITION OF measure DEFAULT; CREATE INDEX ON measure (v);
INSERT INTO measure VALUES ('2026-03-03', 1), ('2027-01-01', 2);
CREATE TABLE parent (id int); CREATE TABLE child (extra text) INHERITS (parent);
INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2, 'x');
CREATE UNLOGGED TABLE scratch (id int); INSERT INTO scratch VALUES (1);
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


def describe(project: Project, *flags: str) -> str:
    """The whole database as pg_dump prints it; its random key for \\restrict left out."""
    text = project.server.run("pg_dump", "--no-sync", *flags, project.name)
    return re.sub(r"^\\(un)?restrict .*$", "", text, flags=re.MULTILINE)


@pytest.fixture
def full(project: Project) -> Iterator[Project]:
    project.sql(EVENT_FUNCTION)
    for statement in EVERYTHING.split(";\n"):
        if statement.strip():
            project.sql(statement)
    yield project
    for name in project.databases():
        project.server.run("dropdb", "--force", "--", name)
    project.server.psql("DROP ROLE reader")
    project.server.psql("DROP ROLE keeper")


def test_everything_comes_back(full: Project) -> None:
    before = describe(full)
    full.restore(full.dump(), "--owner", "--acl", "--pre-swap-hook")
    assert describe(full) == before
    assert full.sql("SELECT encode(lo_get(4711), 'escape'), lo_get(4712) = ''").split("|") == ["large object", "t"]


def test_owners_and_privileges_stay_out_unless_asked_for(full: Project) -> None:
    full.restore(full.dump(), "--pre-swap-hook")
    assert full.sql("SELECT relowner::regrole FROM pg_class WHERE relname = 'parent'") == "postgres"
    assert full.sql("SELECT relacl FROM pg_class WHERE relname = 'typed'") == ""


def test_statistics_are_there_after_the_restore(full: Project) -> None:
    full.restore(full.dump(), "--pre-swap-hook")
    assert full.sql("SELECT reltuples FROM pg_class WHERE relname = 'app_book'") == "50"


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_other_encodings_survive(postgres: Server, tmp_path: Path, encoding: str) -> None:
    with open_project(postgres, tmp_path, books=0) as project:
        project.server.run("dropdb", "shop")
        project.server.run("createdb", "-T", "template0", "-E", encoding, "--locale=C", "shop")
        project.sql(
            f"SET client_encoding = {encoding}; CREATE TABLE t (v text);"
            f"INSERT INTO t VALUES (convert_from('\\x6fe9', '{encoding}'))"
        )
        if encoding == "LATIN1":  # names as well, a foreign key to missing rows among them
            project.sql(
                r"""CREATE TABLE U&"Caf\00E9" (U&"\00E9" int PRIMARY KEY); INSERT INTO U&"Caf\00E9" VALUES (1);
                CREATE TABLE child (id int CONSTRAINT U&"cl\00E9" REFERENCES U&"Caf\00E9"); INSERT INTO child VALUES (1)"""
            )
        key = project.dump(*(["--exclude-table", '"Café"'] if encoding == "LATIN1" else []))
        done = project.restore(key, "--pre-swap-hook")
        assert ("clé" in done.err) == (encoding == "LATIN1")
        assert project.sql(f"SET client_encoding = {encoding}; SELECT convert_to(v, '{encoding}') FROM t") == "\\x6fe9"
        assert project.sql("SHOW server_encoding") == encoding


def test_a_dump_moves_to_an_older_server(project: Project, servers: Callable[[int], Server], tmp_path: Path) -> None:
    """pg_restore 18 on a server of 17."""
    key = project.dump()
    with open_project(servers(17), tmp_path, books=0) as older:
        older.settings["PGCLONE_BIN_DIR"] = str(project.server.bin)
        older.restore(key)
        assert older.digest() == project.digest()
