"""The story of a list."""

from __future__ import annotations

from pgclone import archive, exceptions, keys
from pgclone import host as hosts
from pgclone.conf import Options
from pgclone.database import databases
from pgclone.database.names import run_of_work_name
from pgclone.events import log
from pgclone.locations import parse_location
from pgclone.recipes.project import find_server


def ls(options: Options, *, instances: bool, databases: bool, configs: bool, local: bool) -> list[str]:
    """List dump keys, newest first, or one of their segments, sorted, or the databases of the server."""
    # 1. Refuse what contradicts itself.
    if sum([instances, databases, configs, local]) > 1:
        raise exceptions.ValueError('Can only use one of "instances", "databases", "configs", or "local".')

    # 2. The databases of the server are no matter of storage.
    if local:
        return _list_local(options)

    # 3. List the storage. A plugin that cannot be loaded is reported, and does not matter otherwise.
    host = hosts.build(options)
    for failure in host.failures:
        log.warning("plugin_failed", error=str(failure.as_error()))
    storage = host.storage(parse_location(options.storage_location))
    prefix = keys.check(options.dump_key).rstrip("/")
    names = [entry.key for entry in archive.list_entries(storage, prefix) if keys.matches(entry.key, options.dump_key)]

    # 4. Pick and sort.
    parsed = [key for name in names if (key := keys.parse(name))]
    if instances:
        return sorted({key.instance for key in parsed})
    if databases:
        return sorted({key.database for key in parsed})
    if configs:
        return sorted({key.config for key in parsed})
    if options.validate_dump_keys:
        names = [str(key) for key in parsed]
    return keys.newest_first(names)


def _list_local(options: Options) -> list[str]:
    with find_server(options).connect() as session:
        found = databases.list_databases(session)
    return [f":{database.name}" for database in found if run_of_work_name(database.name) is None]
