"""Clone the Postgres databases of a Django project: dump, ls, restore and copy.

The four functions are what `manage.py pgclone` calls. An argument that is None takes its value from the configuration,
the settings or the default, in this order (`pgclone.conf`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgclone.api import hookimpl

__all__ = ["copy", "dump", "hookimpl", "ls", "restore"]


def dump(
    *,
    exclude: Sequence[str] | None = None,
    exclude_tables: Sequence[str] | None = None,
    pre_dump_hooks: Sequence[str] | None = None,
    instance: str | None = None,
    database: str | None = None,
    storage_location: str | None = None,
    codec: str | None = None,
    level: int | None = None,
    jobs: int | None = None,
    config: str | None = None,
) -> str:
    """Dump a database into storage.

    Returns:
        The key of the dump.

    Raises:
        pgclone.exceptions.PgcloneError: It could not be dumped. No key is listed.
    """
    given = dict(locals())
    from pgclone import conf
    from pgclone.recipes import dump as recipe

    return recipe.dump(conf.resolve(**given))


def ls(
    dump_key: str | None = None,
    *,
    instances: bool = False,
    databases: bool = False,
    configs: bool = False,
    local: bool = False,
    database: str | None = None,
    storage_location: str | None = None,
    config: str | None = None,
) -> list[str]:
    """List dump keys, newest first; or instances, databases or configs, sorted; or the local databases of the server.

    Args:
        dump_key: List only what begins with these segments.
    """
    from pgclone import conf
    from pgclone.recipes import ls as recipe

    options = conf.resolve(config, dump_key=dump_key, database=database, storage_location=storage_location)
    return recipe.ls(options, instances=instances, databases=databases, configs=configs, local=local)


def restore(
    dump_key: str | None = None,
    *,
    pre_swap_hooks: Sequence[str] | None = None,
    reversible: bool | None = None,
    as_name: str | None = None,
    owner: bool | None = None,
    acl: bool | None = None,
    allow_missing_fk: bool | None = None,
    allow_errors: Sequence[str] | None = None,
    replace: bool | None = None,
    strategy: str | None = None,
    kill: bool | None = None,
    wait: bool | None = None,
    jobs: int | None = None,
    database: str | None = None,
    storage_location: str | None = None,
    config: str | None = None,
) -> str:
    """Restore a dump, or a local database (`:name`), and swap it in.

    Args:
        dump_key: A key, or a prefix: the newest dump that it matches.

    Returns:
        The key that was restored.

    Raises:
        pgclone.exceptions.PgcloneError: It could not be restored. The primary database is as it was.
    """
    given = dict(locals())
    from pgclone import conf
    from pgclone.recipes import restore as recipe

    return recipe.restore(conf.resolve(**given))


def copy(
    dump_key: str,
    *,
    strategy: str | None = None,
    kill: bool | None = None,
    replace: bool | None = None,
    wait: bool | None = None,
    online: bool | None = None,
    allow_errors: Sequence[str] | None = None,
    jobs: int | None = None,
    database: str | None = None,
    config: str | None = None,
) -> str:
    """Copy a database to `:name` on the same server.

    Returns:
        The key of the copy, which `restore` takes.

    Raises:
        pgclone.exceptions.PgcloneError: It could not be copied.
    """
    given = dict(locals())
    from pgclone import conf
    from pgclone.recipes import copy as recipe

    return recipe.copy(conf.resolve(**given))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pgclone")
    if name == "hookimpl":
        from pgclone.api import hookimpl

        return hookimpl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
