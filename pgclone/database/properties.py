"""What belongs to a database and not to what is in it: read from one, given to another.

A restore makes a new database. Its owner, its grants, its settings and whatever else `pg_dump --create` prints
beside the contents have to come from the database that it replaces.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pgclone import exceptions
from pgclone.database import names
from pgclone.database.connection import Session

if TYPE_CHECKING:
    from psycopg import sql


@dataclass(frozen=True)
class Grant:
    """One privilege on a database; `grantee` None is PUBLIC."""

    grantor: str
    grantee: str | None
    privilege: str
    grantable: bool


@dataclass(frozen=True)
class Setting:
    """A setting for all sessions in the database, or for those of one role in it.

    Args:
        value: As the server keeps it (PostgreSQL docs, 53.14), lists as text.
    """

    role: str | None
    name: str
    value: str


@dataclass(frozen=True)
class Label:
    """A security label, and the module that reads it."""

    provider: str
    label: str


@dataclass(frozen=True)
class Properties:
    """Everything that belongs to one database.

    Args:
        provider: Where its collation comes from; None before PostgreSQL 15, where that is always libc.
        locale: The locale of the providers icu and builtin.
        connection_limit: -1 is none, -2 a database whose DROP was interrupted (PostgreSQL docs, 53.15).
        acl: Its grants; None if nobody ever changed the default ones, which is not the same as an empty list.
    """

    name: str
    oid: int
    owner: str
    encoding: str
    provider: Literal["libc", "icu", "builtin"] | None
    collate: str
    ctype: str
    locale: str | None
    icu_rules: str | None
    tablespace: str
    connection_limit: int
    is_template: bool
    allow_connections: bool
    comment: str | None
    acl: tuple[Grant, ...] | None
    settings: tuple[Setting, ...]
    labels: tuple[Label, ...]


def read(session: Session, database: str) -> Properties | None:
    """The properties of a database; None if the server has none of this name."""
    # Columns that not every version has are taken from the row as JSON, so that they are NULL where there are none.
    rows = session.execute(
        """SELECT d.oid::bigint, pg_get_userbyid(d.datdba)::text, pg_encoding_to_char(d.encoding)::text,
            CASE j->>'datlocprovider' WHEN 'c' THEN 'libc' WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' END,
            d.datcollate::text, d.datctype::text, coalesce(j->>'datlocale', j->>'daticulocale'), j->>'daticurules',
            t.spcname::text, d.datconnlimit, d.datistemplate, d.datallowconn,
            shobj_description(d.oid, 'pg_database'), d.datacl IS NULL
        FROM pg_database AS d JOIN pg_tablespace AS t ON t.oid = d.dattablespace, to_jsonb(d) AS j
        WHERE d.datname = %s""",
        [database],
    )
    if not rows:
        return None
    *values, default_acl = rows[0]
    oid = values[0]
    grants = session.execute(
        """SELECT pg_get_userbyid(a.grantor)::text,
            CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee)::text END, a.privilege_type, a.is_grantable
        FROM pg_database AS d, aclexplode(d.datacl) WITH ORDINALITY AS a
        WHERE d.oid = %s ORDER BY a.ordinality""",
        [oid],
    )
    settings = session.execute(
        """SELECT r.rolname::text, split_part(line, '=', 1), substr(line, strpos(line, '=') + 1)
        FROM pg_db_role_setting AS s LEFT JOIN pg_roles AS r ON r.oid = s.setrole,
            unnest(s.setconfig) WITH ORDINALITY AS u (line, position)
        WHERE s.setdatabase = %s ORDER BY r.rolname NULLS FIRST, u.position""",
        [oid],
    )
    labels = session.execute(
        """SELECT provider, label FROM pg_shseclabel
        WHERE objoid = %s AND classoid = 'pg_database'::regclass ORDER BY provider""",
        [oid],
    )
    values += [
        None if default_acl else tuple(Grant(*row) for row in grants),
        tuple(Setting(*row) for row in settings),
        tuple(Label(*row) for row in labels),
    ]
    return Properties(database, *values)


def creation_options(properties: Properties) -> sql.Composed:
    """The options of CREATE DATABASE for what cannot be changed later: encoding, locale and tablespace.

    They need a template that fits any encoding and locale, which template0 does.
    """
    from django.db.backends.postgresql.psycopg_any import sql

    options = {
        "ENCODING": properties.encoding,
        "LC_COLLATE": properties.collate,
        "LC_CTYPE": properties.ctype,
    }
    if properties.provider:
        options["LOCALE_PROVIDER"] = properties.provider
    if properties.locale and properties.provider in ("icu", "builtin"):
        options[f"{properties.provider}_locale".upper()] = properties.locale
    if properties.icu_rules:
        options["ICU_RULES"] = properties.icu_rules
    composed = [sql.SQL(f"{name} {{}}").format(sql.Literal(value)) for name, value in options.items()]
    # Whoever names a tablespace needs a right to it, even if it is the one that the database gets anyway.
    if properties.tablespace != "pg_default":
        composed.append(sql.SQL("TABLESPACE {}").format(sql.Identifier(properties.tablespace)))
    return sql.SQL(" ").join(composed)  # type: ignore[no-any-return]


def replay(session: Session, properties: Properties, database: str) -> None:
    """Give the database these properties, in the transaction that the caller has opened.

    Settings and grants that `database` has beside them stay: a hook may have made them.

    Raises:
        ServerError: The role may not do one of it (see `unreplayable`). The transaction is to be rolled back.
    """
    for step in _steps(properties, database):
        _send(session, step)


def unreplayable(session: Session, properties: Properties) -> list[str]:
    """What the session's role may not give to another database: a sentence each, with the statement that helps.

    A plain owner may do most of it. The rest depends on versions, extensions and rights granted one by one, so
    the server itself is asked: the statements are sent to the very database, where they change nothing, and
    rolled back. They take no lock that any client, old or new, would wait for.

    Args:
        session: A maintenance session whose role has the rights of the database's owner.

    Raises:
        ServerError: Another session kept the database locked all the time.
    """
    me = session.value("SELECT current_user::text")
    to_try = [step for step in _steps(properties, properties.name) if step.remedy]
    return [*_not_to_create(session, properties, me)] + [
        f"{step.what} cannot be carried over: {refusal}. Remedy: {step.remedy.replace(_ME, quoted(me))}"
        for step, refusal in _try(session, to_try)
    ]


def quoted(identifier: str) -> str:
    """An identifier as it is written in a statement, for messages."""
    return '"' + identifier.replace('"', '""') + '"'


@dataclass(frozen=True)
class _Step:
    """One statement of a replay.

    Args:
        what: What it carries over, for people.
        role: The role to send it as, if not the session's own.
        remedy: The statement that helps if it is refused; empty if every owner may send it.
    """

    what: str
    statement: sql.Composable
    role: str | None = None
    remedy: str = ""


_ME = "CURRENT_USER"  # stands for the role in a remedy

# Lists of names: as one literal, each would be a list of one name (variable_is_guc_list_quote in PostgreSQL's
# src/bin/pg_dump/dumputils.c).
_LISTS = frozenset(
    {
        "local_preload_libraries",
        "search_path",
        "session_preload_libraries",
        "shared_preload_libraries",
        "temp_tablespaces",
        "unix_socket_directories",
    }
)

_TRIES = 20
_PAUSE_SECONDS = 0.2
_BUSY = frozenset({"55P03", "3D000", "40P01", "XX000"})
"""Locked, renamed or changed by another session in this moment."""


def _steps(properties: Properties, database: str) -> Iterator[_Step]:
    """The statements that give `database` the properties, in an order in which they work."""
    from django.db.backends.postgresql.psycopg_any import sql

    name, owner = sql.Identifier(database), sql.Identifier(properties.owner)
    yield _Step("The owner", sql.SQL("ALTER DATABASE {} OWNER TO {}").format(name, owner))
    yield _Step(
        "The connection limit",
        sql.SQL("ALTER DATABASE {} WITH CONNECTION LIMIT {} IS_TEMPLATE {} ALLOW_CONNECTIONS {}").format(
            name,
            sql.Literal(max(properties.connection_limit, -1)),
            sql.Literal(properties.is_template),
            sql.Literal(properties.allow_connections),
        ),
    )
    comment = None if names.parse_marker(properties.comment) else properties.comment
    yield _Step("The comment", sql.SQL("COMMENT ON DATABASE {} IS {}").format(name, sql.Literal(comment)))
    if properties.acl is not None:
        yield _Step("The grants", sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
        yield _Step("The grants", sql.SQL("REVOKE ALL ON DATABASE {} FROM {}").format(name, owner))
        for grant in _in_order(properties.acl, properties.owner):
            yield _grant(grant, properties.owner, name)
    for setting in properties.settings:
        yield _setting(setting, name)
    for label in properties.labels:
        yield _Step(
            f'Security label of provider "{label.provider}"',
            sql.SQL("SECURITY LABEL FOR {} ON DATABASE {} IS {}").format(
                sql.Identifier(label.provider), name, sql.Literal(label.label)
            ),
            remedy=f"ALTER ROLE {_ME} SUPERUSER",
        )


def _grant(grant: Grant, owner: str, database: sql.Identifier) -> _Step:
    from django.db.backends.postgresql.psycopg_any import sql

    grantee = f"role {quoted(grant.grantee)}" if grant.grantee else "PUBLIC"
    by_other = grant.grantor != owner
    return _Step(
        f"{grant.privilege} for {grantee}, granted by role {quoted(grant.grantor)},",
        sql.SQL("GRANT {} ON DATABASE {} TO {} {}").format(
            sql.SQL(grant.privilege),
            database,
            sql.Identifier(grant.grantee) if grant.grantee else sql.SQL("PUBLIC"),
            sql.SQL("WITH GRANT OPTION" if grant.grantable else ""),
        ),
        role=grant.grantor if by_other else None,
        remedy=f"GRANT {quoted(grant.grantor)} TO {_ME}" if by_other else "",
    )


def _in_order(acl: Iterable[Grant], owner: str) -> Iterator[Grant]:
    """The grants, each after the one that lets its grantor grant."""
    waiting, may_grant = list(acl), {(owner, "CREATE"), (owner, "TEMPORARY"), (owner, "CONNECT")}
    while waiting:
        grant = next((g for g in waiting if (g.grantor, g.privilege) in may_grant), waiting[0])
        waiting.remove(grant)
        if grant.grantable and grant.grantee:
            may_grant.add((grant.grantee, grant.privilege))
        yield grant


def _setting(setting: Setting, database: sql.Identifier) -> _Step:
    from django.db.backends.postgresql.psycopg_any import sql

    parts = setting.name.split(".")
    values = [setting.value]
    if setting.name.lower() in _LISTS:
        values = split_list(setting.value) or [""]
    if setting.role is None:
        what = f"Setting {setting.name}"
        where = sql.SQL("ALTER DATABASE {}").format(database)
        remedy = f"GRANT SET ON PARAMETER {'.'.join(map(quoted, parts))} TO {_ME} (PostgreSQL 15 and later)"
    else:
        what = f"Setting {setting.name} of role {quoted(setting.role)}"
        where = sql.SQL("ALTER ROLE {} IN DATABASE {}").format(sql.Identifier(setting.role), database)
        remedy = f"ALTER ROLE {_ME} CREATEROLE; GRANT {quoted(setting.role)} TO {_ME} WITH ADMIN OPTION"
    return _Step(
        what,
        sql.SQL("{} SET {} TO {}").format(
            where, sql.SQL(".").join(map(sql.Identifier, parts)), sql.SQL(", ").join(map(sql.Literal, values))
        ),
        remedy=remedy,
    )


def split_list(value: str) -> list[str]:
    """The names in the value of a list setting, `"$user", public` (SplitGUCList in PostgreSQL's varlena.c)."""
    return [
        quoted_name.replace('""', '"') if plain_name == "" else plain_name
        for quoted_name, plain_name in re.findall(r'"((?:[^"]|"")*)"|([^\s,"]+)', value)
    ]


def _send(session: Session, step: _Step) -> None:
    if step.role is None:
        session.execute(step.statement)
        return
    # Grants keep who made them. A member may SET ROLE; SET SESSION AUTHORIZATION is for superusers only.
    me = session.value("SELECT current_setting('role')")
    session.execute("SELECT set_config('role', %s, true)", [step.role])
    session.execute(step.statement)
    session.execute("SELECT set_config('role', %s, true)", [me])


def _not_to_create(session: Session, properties: Properties, me: str) -> Iterator[str]:
    """What a role must be allowed, beside CREATEDB, to make such a database and give it to its owner."""
    owner, tablespace = properties.owner, properties.tablespace
    if not session.value("SELECT pg_has_role(%s, %s)", [owner, _become(session)]):
        yield (
            f"Owner {quoted(owner)} cannot be carried over: role {quoted(me)} may not become it. "
            f"Remedy: GRANT {quoted(owner)} TO {quoted(me)}"
        )
    may_create = "SELECT has_tablespace_privilege(%s, 'CREATE')"
    if tablespace != "pg_default" and not session.value(may_create, [tablespace]):
        yield (
            f"Tablespace {quoted(tablespace)} cannot be carried over: role {quoted(me)} may not create in it. "
            f"Remedy: GRANT CREATE ON TABLESPACE {quoted(tablespace)} TO {quoted(me)}"
        )


def _become(session: Session) -> str:
    """The kind of membership that SET ROLE needs."""
    return "SET" if session.version >= 160000 else "MEMBER"


def _try(session: Session, steps: Sequence[_Step]) -> list[tuple[_Step, str]]:
    """The steps that the server refuses, with what it says. Another session may be in the way for a while."""
    for left in reversed(range(_TRIES)):
        try:
            return _try_once(session, steps)
        except exceptions.ServerError as error:
            if error.sqlstate not in _BUSY or not left:
                raise
        time.sleep(_PAUSE_SECONDS)
    return []


def _try_once(session: Session, steps: Sequence[_Step]) -> list[tuple[_Step, str]]:
    refused = []
    session.execute("BEGIN")
    try:
        session.execute("SET LOCAL lock_timeout = '200ms'")
        for step in steps:
            session.execute("SAVEPOINT step")
            try:
                _send(session, step)
            except exceptions.ServerError as error:
                if error.sqlstate is None or error.sqlstate in _BUSY:
                    raise
                session.execute("ROLLBACK TO SAVEPOINT step")
                refused.append((step, str(error.__cause__).splitlines()[0]))
    finally:
        with contextlib.suppress(exceptions.ServerError):  # a lost connection has rolled back already
            session.execute("ROLLBACK")
    return refused
