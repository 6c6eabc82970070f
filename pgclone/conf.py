"""All options, in one table, and the only reader of `django.conf.settings`.

The fields of `Options` are the table. Each gives a setting (`PGCLONE_<NAME>`), a key of the configurations in
`PGCLONE_CONFIGS`, a command-line flag and an argument in Python their name, type and default. What wins: flag or
argument > configuration > setting > default.
"""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import os
import socket
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pgclone import exceptions

_Table = TypeVar("_Table")

LS, DUMP, RESTORE, COPY, DOCTOR = "ls", "dump", "restore", "copy", "doctor"
NONE = "none"
"""The label of a dump that no configuration describes."""


@dataclass(frozen=True)
class Option:
    """One row of the table.

    Args:
        name: The key in a configuration and the argument in Python.
        help: What it does, in one sentence.
        default: A value, or a function that finds one.
        type: `str`, `int`, `bool`, or `tuple` for a list of strings.
        flags: On the command line; empty for options that are set in settings alone.
        commands: Which commands take it.
        setting: Its name in the settings; None if it has none.
        in_config: Whether a configuration may give it.
        metavar: What the help shows for its value.
        least: The least number that it may be.
    """

    name: str
    help: str
    default: Any
    type: type
    flags: tuple[str, ...]
    commands: tuple[str, ...]
    setting: str | None
    in_config: bool
    metavar: str | None
    least: int | None


def _option(
    help: str,
    default: Any = None,
    *,
    type: type = str,
    flags: tuple[str, ...] = (),
    on: tuple[str, ...] = (),
    setting: bool = True,
    in_config: bool | None = None,
    metavar: str | None = None,
    least: int | None = None,
) -> Any:
    # An option without a command is the project's: a setting alone.
    row = {"help": help, "default": default, "type": type, "flags": flags, "commands": on, "metavar": metavar}
    return field(
        metadata={**row, "least": least, "setting": setting, "in_config": bool(on) if in_config is None else in_config}
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command was asked to do, resolved. `config` is the label for the dump key."""

    config: str = NONE

    dump_key: str = _option(
        "The dump key or prefix, or :name for a local database.", "", on=(LS, RESTORE), setting=False
    )
    database: str = _option(
        "The database alias to work on.",
        "default",
        flags=("-d", "--database"),
        on=(LS, DUMP, RESTORE, COPY),
        metavar="ALIAS",
    )
    storage_location: str = _option(
        "Where dumps are stored: a folder, or a URL that a plugin serves.",
        ".pgclone/",
        flags=("-s", "--storage-location"),
        on=(LS, DUMP, RESTORE, DOCTOR),
        metavar="LOCATION",
    )
    instance: str = _option(
        "The name of this installation in the dump key (default: the host name).",
        lambda: socket.gethostname(),
        flags=("-i", "--instance"),
        on=(DUMP,),
    )
    exclude: tuple[str, ...] = _option(
        "Models (app.Model) whose rows are left out.",
        (),
        type=tuple,
        flags=("-e", "--exclude"),
        on=(DUMP,),
        metavar="MODEL",
    )
    exclude_tables: tuple[str, ...] = _option(
        "Tables whose rows are left out, as patterns of psql's \\d.",
        (),
        type=tuple,
        flags=("--exclude-table",),
        on=(DUMP,),
        metavar="PATTERN",
    )
    pre_dump_hooks: tuple[str, ...] = _option(
        "Management commands to run on the database before it is dumped.",
        (),
        type=tuple,
        flags=("--pre-dump-hook",),
        on=(DUMP,),
        metavar="COMMAND",
    )
    codec: str = _option(
        "How dumps are compressed: zstd, none, or what a plugin adds.", "zstd", flags=("--codec",), on=(DUMP,)
    )
    level: int | None = _option(
        "The codec's level (default: the codec's own, 2 for zstd).",
        None,
        type=int,
        flags=("--level",),
        on=(DUMP,),
    )
    jobs: int = _option(
        "How many tables are read or loaded at a time (default: one for each core, at most 4).",
        lambda: min(4, _cores()),
        type=int,
        flags=("-j", "--jobs"),
        on=(DUMP, RESTORE, COPY),
        metavar="N",
        least=1,
    )
    pre_swap_hooks: tuple[str, ...] = _option(
        "Management commands to run on the restored database before it is swapped in.",
        ("migrate",),
        type=tuple,
        flags=("--pre-swap-hook",),
        on=(RESTORE,),
        metavar="COMMAND",
    )
    reversible: bool = _option(
        "Keep the databases from before (:pre) and after (:post) the restore.",
        False,
        type=bool,
        flags=("-r", "--reversible"),
        on=(RESTORE,),
    )
    as_name: str = _option(
        "Build and prove the database under this name, and swap nothing in.",
        "",
        flags=("--as",),
        on=(RESTORE,),
        setting=False,
        in_config=False,
        metavar=":NAME",
    )
    owner: bool = _option(
        "Restore the owners of tables and other objects.", False, type=bool, flags=("--owner",), on=(RESTORE,)
    )
    acl: bool = _option(
        "Restore the privileges on tables and other objects.",
        False,
        type=bool,
        flags=("--acl",),
        on=(RESTORE,),
    )
    allow_missing_fk: bool = _option(
        "Leave out foreign keys whose rows were excluded, where the server cannot keep them NOT VALID.",
        False,
        type=bool,
        flags=("--allow-missing-fk",),
        on=(RESTORE,),
        setting=False,
    )
    allow_errors: tuple[str, ...] = _option(
        "Archive entries (as `pg_restore -l` names them) that may fail. Data may not.",
        (),
        type=tuple,
        flags=("--allow-error",),
        on=(RESTORE, COPY),
        setting=False,
        metavar="ENTRY",
    )
    replace: bool = _option(
        "Replace a database of that name even if pgclone did not make it.",
        False,
        type=bool,
        flags=("--replace",),
        on=(RESTORE, COPY),
        setting=False,
        in_config=False,
    )
    strategy: str = _option(
        "How the server copies: wal_log or file_copy (default: the faster for the size, cloning files where it can).",
        "",
        flags=("--strategy",),
        on=(RESTORE, COPY),
    )
    kill: bool = _option(
        "End the sessions on a database that is to be copied.",
        True,
        type=bool,
        flags=("--kill",),
        on=(RESTORE, COPY),
    )
    online: bool = _option(
        "Copy row by row, beside the sessions on the database, instead of ending them.",
        False,
        type=bool,
        flags=("--online",),
        on=(COPY,),
        setting=False,
        in_config=False,
    )
    wait: bool = _option(
        "Wait for another run on the same database.", True, type=bool, flags=("--wait",), on=(RESTORE, COPY)
    )

    allow_dump: bool = _option("Whether this installation may dump.", True, type=bool)
    allow_restore: bool = _option("Whether this installation may restore.", True, type=bool)
    allow_copy: bool = _option("Whether this installation may copy.", True, type=bool)
    conn_db: str = _option(
        "The database to connect to for work on others (default: postgres, or template1 if that one is yours).",
        lambda: _maintenance_database(),
    )
    template: str = _option("The database that restores are created from.", "template0")
    validate_dump_keys: bool = _option("Whether ls hides names that are no dump keys.", True, type=bool)
    sweep_after: int = _option("Seconds after which what a dead run left in storage is removed.", 24 * 3600, type=int)
    statement_timeout: str = _option("statement_timeout of the maintenance statements.", "")
    lock_timeout: str = _option("lock_timeout of the maintenance statements, and of the locks that a dump takes.", "")
    bin_dir: str = _option("The folder of pg_dump, pg_restore and psql (default: found on PATH).", "")
    transfer_memory: int = _option(
        "MiB of memory that all open streams to and from object storage share.", 256, type=int, least=1
    )
    plugins: tuple[str, ...] = _option("Hook modules of the project: dotted names, or module:object.", (), type=tuple)
    disabled_plugins: tuple[str, ...] = _option("Names of plugins that are not loaded.", (), type=tuple)


def _row(item: dataclasses.Field[Any]) -> Option:
    row = dict(item.metadata)
    setting = f"PGCLONE_{item.name.upper()}" if row.pop("setting") else None
    return Option(name=item.name, setting=setting, **row)


TABLE: tuple[Option, ...] = tuple(_row(item) for item in dataclasses.fields(Options) if item.metadata)
"""Every option, in the order of the reference."""

SETTINGS = ("PGCLONE_CONFIGS", *(option.setting for option in TABLE if option.setting))
"""Every setting of the core."""

_LABELLING = ("exclude", "exclude_tables", "pre_dump_hooks", "pre_swap_hooks")


def resolve(config: str | None = None, **given: Any) -> Options:
    """Find the value of every option.

    Args:
        config: The name of a configuration in `PGCLONE_CONFIGS`.
        given: Flags or arguments; None is the same as not given.

    Raises:
        ValueError: An unknown configuration, an unknown key in it, or a value of the wrong type.
    """
    configuration = _configuration(config)
    values = {option.name: _value(option, given.get(option.name), configuration, config) for option in TABLE}
    # What changes a dump's contents beside its configuration makes it a dump of no configuration.
    label = config if config and all(given.get(name) is None for name in _LABELLING) else NONE
    return Options(config=label, **values)


def option(name: str) -> Any:
    """The value of one of the project's options: its setting, or its default."""
    (row,) = (row for row in TABLE if row.name == name)
    return _value(row, None, {}, None)


def check() -> list[exceptions.PgcloneError]:
    """What is wrong with the settings of the core: values of the wrong type, unknown names, broken configurations."""
    errors: list[exceptions.PgcloneError] = []

    def collect(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except exceptions.PgcloneError as error:
            if str(error) not in map(str, errors):  # a wrong setting breaks every configuration
                errors.append(error)
            return None

    for option in TABLE:
        collect(lambda option=option: _value(option, None, {}, None))  # type: ignore[misc]
    for name in collect(configurations) or ():
        collect(lambda name=name: resolve(name))  # type: ignore[misc]
    known = [*SETTINGS, "PGCLONE_S3", "PGCLONE_S3_CONFIG", "PGCLONE_S3_ENDPOINT_URL", "PGCLONE_GCS"]
    for name in dir(settings()):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if name.startswith("PGCLONE_") and name not in known and close:
            errors.append(
                exceptions.ValueError(f"settings.{name} is not a setting of pgclone.", f"Did you mean {close[0]}?")
            )
    return errors


def settings() -> Any:
    """Django's settings."""
    from django.conf import settings

    return settings


def setting(name: str, default: Any = None) -> Any:
    """A value of Django's settings."""
    return getattr(settings(), name, default)


def read_settings(name: str, table: builtins.type[_Table]) -> _Table:
    """A dict in the settings, as the frozen dataclass whose fields are its keys. For plugins with settings of their own.

    Fields are str, int, float, bool or Mapping[str, str], or one of these or None. `field(metadata={"choices": …})` limits
    what a value may be.

    Raises:
        ValueError: It is no dict, or has an unknown key or a value of the wrong type. The value is not shown.
    """
    given = setting(name) or {}
    if not isinstance(given, Mapping):
        raise exceptions.ValueError(f"settings.{name} must be a dict.", f'For example {name} = {{"key": "value"}}.')
    fields = {item.name: item for item in dataclasses.fields(table)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(table)
    values = {}
    for key, value in given.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            raise exceptions.ValueError(
                f'settings.{name} has the key "{key}", which is no option.',
                f'Did you mean "{close[0]}"?' if close else f"There are: {', '.join(fields)}.",
            )
        if not _has_type(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise exceptions.ValueError(
                f'settings.{name}["{key}"] must be {wanted}, and is {builtins.type(value).__name__}.'
            )
        choices = fields[key].metadata.get("choices")
        if value is not None and choices and value not in choices:
            raise exceptions.ValueError(
                f'settings.{name}["{key}"] is none of those that there are.', f"There are: {', '.join(choices)}."
            )
        values[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return table(**values)


def configurations() -> Mapping[str, Mapping[str, Any]]:
    """`PGCLONE_CONFIGS`: options by their names, under the name of a configuration."""
    found = setting("PGCLONE_CONFIGS") or {}
    if not isinstance(found, Mapping) or not all(isinstance(options, Mapping) for options in found.values()):
        raise exceptions.ValueError(
            "settings.PGCLONE_CONFIGS must be a dict of dicts: options under the names of configurations.",
            'For example {"nightly": {"exclude": ["sessions.Session"]}}.',
        )
    return found


def _configuration(name: str | None) -> Mapping[str, Any]:
    if not name:
        return {}
    known = configurations()
    if name not in known:
        raise exceptions.ValueError(
            f'"{name}" is not a valid configuration in settings.PGCLONE_CONFIGS.',
            f"There are: {', '.join(sorted(known))}." if known else "There are none.",
        )
    allowed = {option.name for option in TABLE if option.in_config}
    for key in known[name]:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            raise exceptions.ValueError(
                f'settings.PGCLONE_CONFIGS["{name}"] has the key "{key}", which is no option.',
                f'Did you mean "{close[0]}"?' if close else f"There are: {', '.join(sorted(allowed))}.",
            )
    return known[name]


def _value(option: Option, given: Any, configuration: Mapping[str, Any], config: str | None) -> Any:
    if given is not None and (given != "" or option.type is not str):
        return _typed(option, given, option.name)
    if configuration.get(option.name) is not None:
        return _typed(option, configuration[option.name], f'settings.PGCLONE_CONFIGS["{config}"]["{option.name}"]')
    if option.setting and (value := setting(option.setting)) is not None:
        return _typed(option, value, f"settings.{option.setting}")
    return option.default() if callable(option.default) else option.default


def _typed(option: Option, value: Any, where: str) -> Any:
    """The value as the option's type.

    Raises:
        ValueError: It cannot be that.
    """
    fits, wanted = {
        tuple: (_is_list_of_strings(value), "a list of strings"),
        bool: (isinstance(value, bool), "True or False"),
        int: (isinstance(value, int) and not isinstance(value, bool), "a whole number"),
        str: (isinstance(value, (str, os.PathLike, int)) and not isinstance(value, bool), "a string"),
    }[option.type]
    if not fits:
        raise exceptions.ValueError(f"{where} is {value!r}, but must be {wanted}.")
    if option.least is not None and value < option.least:
        raise exceptions.ValueError(f"{where} is {value!r}, but must be at least {option.least}.")
    return option.type(value)


def _has_type(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_has_type(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Mapping:
        return isinstance(value, Mapping) and all(isinstance(item, str) for pair in value.items() for item in pair)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, {str: (str, os.PathLike), float: (int, float)}.get(hint, hint))


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _maintenance_database() -> str:
    names = {database.get("NAME") for database in (setting("DATABASES") or {}).values()}
    for candidate in ("postgres", "template1"):
        if candidate not in names:
            return candidate
    raise exceptions.ValueError(
        "pgclone could not automatically determine a connection database.",
        "Set PGCLONE_CONN_DB to a database that is not in settings.DATABASES and that pgclone can connect to.",
    )
