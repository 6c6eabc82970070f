"""What the catalogue of a database says: tables, extensions, migrations, foreign keys. Reads only."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pgclone import exceptions
from pgclone.archive import ForeignKey, Table
from pgclone.database.connection import Session
from pgclone.plan import LARGE, Candidate, Relation

_ORDINARY = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
_NOT_OF_EXTENSION = """NOT EXISTS (SELECT FROM pg_depend e WHERE e.deptype = 'e' AND e.objid = c.oid
                                   AND e.classid = 'pg_class'::regclass)"""

# The server's functions for sizes open what they look at: they wait while somebody changes it, and with ten thousand tables that
# takes as long as a fifth of the dump. So they are asked about what the estimates of VACUUM and ANALYZE call large, or not know.
_CHANGING = """c.oid IN (SELECT relation FROM pg_locks WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock'
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""
_BLOCK = "current_setting('block_size')::bigint"
_HEAP = f"CASE WHEN {_CHANGING} THEN c.relpages * {_BLOCK} ELSE coalesce(pg_relation_size(c.oid), 0) END"
_ESTIMATE = f"(c.relpages + coalesce((SELECT t.relpages FROM pg_class t WHERE t.oid = c.reltoastrelid), 0)) * {_BLOCK}"
_IS_KNOWN = """c.reltuples > 0 AND coalesce((SELECT t.reltuples >= 0 AND (t.relpages > 0
    OR current_setting('server_version_num')::int >= 140000) FROM pg_class t WHERE t.oid = c.reltoastrelid), true)"""
_BYTES = f"""CASE WHEN {_CHANGING} OR ({_IS_KNOWN} AND {_ESTIMATE} < {LARGE} / 4) THEN {_ESTIMATE}
    ELSE coalesce(pg_relation_size(c.oid), 0) +
        CASE c.reltoastrelid WHEN 0 THEN 0 ELSE coalesce(pg_relation_size(c.reltoastrelid), 0) END END"""


@dataclass(frozen=True)
class Shape:
    """Encoding, locale and size in bytes of a database."""

    encoding: str
    collate: str
    ctype: str
    size: int


def shape(session: Session) -> Shape:
    rows = session.execute(
        """SELECT pg_encoding_to_char(encoding)::text, datcollate::text, datctype::text, pg_database_size(oid)
        FROM pg_database WHERE datname = current_database()"""
    )
    return Shape(*rows[0])


def server_version(session: Session) -> str:
    return str(session.value("SELECT current_setting('server_version')"))


def extensions(session: Session) -> dict[str, str]:
    """Installed extensions and their versions."""
    return dict(session.execute("SELECT extname::text, extversion FROM pg_extension ORDER BY extname"))


def missing_extensions(session: Session, wanted: Iterable[str]) -> list[str]:
    """Those of the wanted extensions that the server cannot install."""
    available = {name for (name,) in session.execute("SELECT name::text FROM pg_available_extensions")}
    return sorted(set(wanted) - available)


def migrations(session: Session) -> dict[str, str]:
    """The last applied migration of each Django app; none where there is no table of migrations."""
    from django.db.backends.postgresql.psycopg_any import sql

    schema = session.value(
        f"""SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relname = 'django_migrations' AND c.relkind = 'r' AND {_ORDINARY}
        ORDER BY n.nspname = 'public' DESC, n.nspname LIMIT 1"""
    )
    if schema is None:
        return {}
    query = sql.SQL("SELECT DISTINCT ON (app) app::text, name::text FROM {} ORDER BY app, id DESC")
    return dict(session.execute(query.format(sql.Identifier(schema, "django_migrations"))))


def tables(session: Session, excluded: Sequence[Relation]) -> tuple[Table, ...]:
    """The tables and materialized views that pg_dump dumps, with estimates of their rows and bytes."""
    rows = session.execute(
        f"""SELECT format('%s.%s', n.nspname, c.relname), greatest(c.reltuples, 0)::bigint,
            CASE c.relkind WHEN 'p' THEN 0 ELSE {_BYTES} END, c.oid
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'm') AND {_ORDINARY} AND {_NOT_OF_EXTENSION} ORDER BY n.nspname, c.relname"""
    )
    oids = {relation.oid for relation in excluded}
    return tuple(Table(name, count, size, oid in oids) for name, count, size, oid in rows)


def sizes(session: Session, excluded: Sequence[Relation]) -> dict[int, int]:
    """The bytes of all tables whose rows are dumped, by their OIDs, without waiting for any lock."""
    rows = session.execute(
        f"""SELECT c.oid, {_BYTES} FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND {_ORDINARY} AND {_NOT_OF_EXTENSION} AND NOT c.oid = ANY(%s::oid[])""",
        [[relation.oid for relation in excluded]],
    )
    return dict(rows)


def candidates(session: Session, sizes: Mapping[int, int]) -> tuple[Candidate, ...]:
    """Those of the tables that COPY can dump and load as pg_dump does.

    pg_dump keeps what it treats in a way of its own: unlogged tables, which a standby cannot read, and leaves of tables that are
    partitioned by the hash of an enum, whose rows can only be loaded through the root, as they hash differently in another
    database.
    """
    rows = session.execute(
        f"""SELECT c.oid, n.nspname::text, c.relname::text,
            ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0
                  AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum),
            {_HEAP} / {_BLOCK}
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am m ON m.oid = c.relam AND m.amname = 'heap'
        WHERE c.oid = ANY(%s::oid[]) AND c.relpersistence = 'p' AND NOT EXISTS (
            SELECT FROM pg_partition_ancestors(c.oid) r JOIN pg_partitioned_table p ON p.partrelid = r.relid
            JOIN pg_opclass o ON o.oid = ANY(p.partclass) WHERE p.partstrat = 'h' AND o.opcname = 'enum_ops')""",
        [list(sizes)],
    )
    return tuple(
        Candidate(oid, schema, name, tuple(columns), sizes[oid], blocks) for oid, schema, name, columns, blocks in rows
    )


def changing(session: Session, tables: Collection[int]) -> list[Relation]:
    """Those of the tables that somebody changes at this moment."""
    rows = session.execute(
        f"""SELECT c.oid, n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND {_CHANGING}"""
    )
    return [Relation(*row) for row in rows if row[0] in tables]


def locked(session: Session) -> set[int]:
    """The OIDs of the tables that this session has locked."""
    return {
        oid
        for (oid,) in session.execute(
            "SELECT relation::oid FROM pg_locks WHERE locktype = 'relation' AND granted AND pid = pg_backend_pid()"
        )
    }


def analyzable(session: Session) -> list[tuple[Relation, bool]]:
    """What ANALYZE of the whole database looks at, the largest first, and whether it is partitioned.

    Partitions go with the table that they belong to.
    """
    rows = session.execute(
        """SELECT c.oid, n.nspname::text, c.relname::text, c.relkind = 'p'
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition AND NOT c.relisshared AND c.relpersistence <> 't'
        AND n.nspname <> 'pg_toast' ORDER BY c.relkind = 'p' DESC, pg_relation_size(c.oid) DESC, c.oid"""
    )
    return [(Relation(*row[:3]), row[3]) for row in rows]


def analyze(session: Session, relation: Relation, partitioned: bool) -> None:
    """Bring the statistics of a table, and of its partitions, up to date."""
    from django.db.backends.postgresql.psycopg_any import sql

    # Since 18, children by inheritance would go with their parent, and a second time on their own.
    only = "ONLY " if session.version >= 180000 and not partitioned else ""
    session.execute(sql.SQL("ANALYZE " + only + "{}").format(sql.Identifier(relation.schema, relation.name)))


def find_tables(session: Session, models: Mapping[str, str], patterns: Sequence[str]) -> tuple[Relation, ...]:
    """The tables that models and patterns mean, partitions included. Runs inside the session's transaction.

    Args:
        models: The quoted name of the table, by the name of the model.
        patterns: As `pg_dump --exclude-table-data` and psql's `\\d` take them.

    Raises:
        ValueError: A model has no table in this database, or a pattern matches none.
    """
    session.execute("SET LOCAL search_path TO DEFAULT")  # the project's own, for names without a schema
    found: dict[int, None] = {}
    for model, table in models.items():
        oid = session.value("SELECT to_regclass(%s)::oid", [table])
        if oid is None:
            raise exceptions.ValueError(
                f'The table {table} of the model "{model}" is not in the database.',
                "Migrate it, or leave the model out of --exclude.",
            )
        found[oid] = None
    for pattern in patterns:
        schema, name = _expressions(pattern)
        rows = session.execute(
            """SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'p', 'm', 'f') AND c.relname ~ %s
            AND CASE WHEN %s THEN n.nspname ~ %s ELSE pg_table_is_visible(c.oid) END""",
            [name, schema is not None, schema or ""],
        )
        if not rows:
            raise exceptions.ValueError(
                f"No table matches {pattern!r}.", "Check --exclude-table: its rows would have been dumped."
            )
        found |= dict.fromkeys(oid for (oid,) in rows)
    relations = session.execute(
        """WITH RECURSIVE excluded AS (
            SELECT unnest(%s::oid[]) AS oid
            UNION SELECT i.inhrelid FROM excluded e JOIN pg_class p ON p.oid = e.oid AND p.relkind = 'p'
                  JOIN pg_inherits i ON i.inhparent = e.oid)
        SELECT c.oid, n.nspname::text, c.relname::text
        FROM excluded JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY 2, 3""",
        [list(found)],
    )
    session.execute("SET LOCAL search_path = ''")
    return tuple(Relation(*row) for row in relations)


def dangling_foreign_keys(session: Session, excluded: Sequence[Relation]) -> tuple[ForeignKey, ...]:
    """Foreign keys from tables that are dumped to tables (or partitions of them) whose rows are left out."""
    rows = session.execute(
        """WITH RECURSIVE missing AS (
            SELECT unnest(%s::oid[]) AS oid
            UNION SELECT i.inhparent FROM missing m JOIN pg_class p ON p.oid = m.oid AND p.relispartition
                  JOIN pg_inherits i ON i.inhrelid = m.oid)
        SELECT k.oid, n.nspname::text, c.relname::text, k.conname::text,
               (SELECT format('%%s.%%s', rn.nspname, r.relname) FROM pg_class r
                JOIN pg_namespace rn ON rn.oid = r.relnamespace WHERE r.oid = k.confrelid), c.relkind = 'p'
        FROM pg_constraint k JOIN missing ON missing.oid = k.confrelid
        JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE k.contype = 'f' AND k.conparentid = 0 AND NOT k.conrelid = ANY(%s::oid[]) ORDER BY 2, 3, 4""",
        [[relation.oid for relation in excluded], [relation.oid for relation in excluded]],
    )
    return tuple(ForeignKey(*row) for row in rows)


def objects(session: Session) -> set[tuple[str, str]]:
    """What a database holds, as an archive's table of contents writes it: (`INDEX`, `public book_title_idx`)."""
    rows = session.execute(
        f"""SELECT CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'S' THEN 'SEQUENCE'
               WHEN 'f' THEN 'FOREIGN TABLE' WHEN 'i' THEN 'INDEX' WHEN 'I' THEN 'INDEX' ELSE 'TABLE' END,
               format('%s %s', n.nspname, c.relname)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f', 'i', 'I') AND {_ORDINARY}
        UNION ALL
        SELECT CASE k.contype WHEN 'f' THEN 'FK CONSTRAINT' WHEN 'c' THEN 'CHECK CONSTRAINT' ELSE 'CONSTRAINT' END,
               format('%s %s %s', n.nspname, c.relname, k.conname)
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE {_ORDINARY}
        UNION ALL
        SELECT 'TRIGGER', format('%s %s %s', n.nspname, c.relname, t.tgname)
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE NOT t.tgisinternal AND {_ORDINARY}"""
    )
    # pg_dump replaces line breaks in names, as they would break its list.
    return {(kind, re.sub(r"[\r\n]", " ", tag)) for kind, tag in rows}


def _expressions(pattern: str) -> tuple[str | None, str]:
    """The regular expressions for schema and name that psql makes of a pattern (psql docs, Patterns)."""
    parts = [""]
    quoted = False
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == '"':
            if quoted and pattern[position + 1 : position + 2] == '"':
                parts[-1] += '"'
                position += 1
            else:
                quoted = not quoted
        elif quoted:
            parts[-1] += "\\" + character if character in "|*+?()[]{}.^$\\" else character
        elif character == ".":
            parts.append("")
        else:
            parts[-1] += {"*": ".*", "?": ".", "$": "\\$"}.get(character, character.lower())
        position += 1
    if quoted or len(parts) > 2 or not all(parts):
        raise exceptions.ValueError(
            f"{pattern!r} is not a pattern for tables.", 'Write it as name, schema.name, or "Quoted Name".'
        )
    *schema, name = (f"^({part})$" for part in parts)
    return (schema[0] if schema else None), name
