"""The story of a restore."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from pgclone import archive, exceptions, keys, load, parts, process, streams, verdict
from pgclone.archive import Manifest
from pgclone.conf import RESTORE, Options
from pgclone.database import catalogue, databases, properties, rights, route
from pgclone.database.lock import Lock, lock, take
from pgclone.database.names import DERIVED, Marker, derive
from pgclone.database.properties import Properties
from pgclone.database.swap import check_names, swap
from pgclone.events import log
from pgclone.host import Storage
from pgclone.load import Loading
from pgclone.parts import Reader, Rows
from pgclone.process import Tools
from pgclone.recipes.project import (
    Project,
    Reporter,
    check_commands,
    check_local_name,
    check_unconfigured,
    open_project,
    running,
)
from pgclone.toc import MAGIC
from pgclone.types import Codec, Run, Target

Build = Callable[[Lock, Run, str], None]
"""Makes the database that is to be swapped in, under the temporary name, and proves it."""


def restore(options: Options) -> str:
    """Restore a dump, or a local database, and return its key."""
    # 1. Find everything that is named, and refuse what cannot work.
    if not options.dump_key:
        raise exceptions.ValueError("Must provide a dump key or prefix to restore.", "See which there are: pgclone ls")
    project = open_project(RESTORE, options)
    check_commands(options.pre_swap_hooks)
    verdict.check_allowed(options.allow_errors)
    databases.check_strategy(options.strategy)
    as_name = check_local_name(project, options.as_name) if options.as_name else None
    local = options.dump_key.startswith(":")
    keep = options.reversible and not local and not as_name
    with running(RESTORE, project, options.dump_key) as run:
        if local:
            key = options.dump_key
            build = _local_build(project, key)
        else:
            storage = project.host.storage(run.location)
            key = _resolve(storage, options)
            run = replace(run, key=key)
            build = _dump_build(project, storage, key)
        with locked(project, run, as_name, keep) as held:
            # 2. Build the database beside the primary one, and prove it.
            primary = properties.read(held.session, project.database)
            log.info("restore_started", alias=options.database, database=project.database, key=key)
            temporary = derive(project.database, "temp")
            build(held, run, temporary)

            # 3. Take it through the hooks.
            with _routed(project, held, primary, temporary) as (target, prove):
                if not local:
                    project.host.call("post_restore", before=prove, run=run, target=target)
                project.host.call("pre_swap", before=prove, run=run, target=target)

            # 4. Leave it under a name of its own, or swap it in.
            if as_name:
                _hand_over(held, run, temporary, as_name, project.database, options.replace)
            else:
                _swap_in(project, held, run, temporary, keep)
                if not local and not keep:
                    _drop_reversible_copies(project, held)
    log.info("restore_finished", alias=options.database, database=as_name or project.database, key=key)
    return key


def _resolve(storage: Storage, options: Options) -> str:
    """The key that a key or prefix means: the newest dump of one database."""
    wanted = keys.check(options.dump_key)
    exact = wanted.endswith(".dump")
    prefix = "" if exact else wanted.rstrip("/")
    names = [entry.key for entry in archive.list_entries(storage, wanted if exact else prefix)]
    found = [name for name in names if keys.matches(name, wanted) and (exact or keys.parse(name))]
    if not found or (exact and wanted not in found):
        raise exceptions.KeyNotFound(
            f'Could not find a dump key matching prefix "{wanted}"',
            f'See which there are in "{storage.location}": pgclone ls',
        )
    if exact:
        return wanted
    aliases = sorted({key.database for name in found if (key := keys.parse(name))})
    own = keys.clean(options.database)
    if len(aliases) > 1:
        if own not in aliases:
            raise exceptions.ValueError(
                f'The prefix "{wanted}" matches dumps of more than one database: {", ".join(aliases)}.',
                "Add the database to the prefix: instance/database",
            )
        found = [name for name in found if (key := keys.parse(name)) and key.database == own]
    return keys.newest_first(found)[0]


def _dump_build(project: Project, storage: Storage, key: str) -> Build:
    """Look at a dump, refuse what cannot work, and return what builds a database from it."""
    options = project.options
    tools = process.find_tools(options.bin_dir)
    project.server.conninfo(project.database)  # refuses what pg_restore cannot be told
    manifest = archive.read_manifest(storage, key)
    if manifest is not None:
        _check_manifest(project, tools, manifest)
        archive.check_parts(storage, key, manifest.parts)
    loading = Loading(options.owner, options.acl, options.allow_errors, options.allow_missing_fk, options.jobs)
    foreign_keys = manifest.foreign_keys if manifest else ()

    def find_codec(head: bytes) -> Codec | None:
        if manifest is not None:
            return project.host.codec(manifest.codecs[0]) if manifest.codecs else None
        if head.startswith(MAGIC):
            archive.check_unmanifested(storage, key)
            return None
        raise _unproven(key)

    def build(held: Lock, run: Run, temporary: str) -> None:
        with (
            streams.open_source(storage, key, find_codec) as source,
            load.open_archive(tools, source.read) as contents,
        ):
            if manifest is None and not contents.compressed:
                raise _unproven(key)
            primary = properties.read(held.session, project.database)
            marker = Marker("temp", project.database, run.id)
            work = databases.create(held.session, run.id, template=options.template, like=primary)
            databases.mark(held.session, work, marker)
            report = Reporter(project, run, _raw_size(manifest))
            report(source.raw_size)
            rows = _rows_beside(held, storage, key, manifest, source.codec)
            stream = Reader(source.read, lambda _: load.prove(manifest, key, source.drain(), source.raw_size))
            encoding = manifest.encoding if manifest else ""
            load.load_rows(tools, project.server, work, contents, stream, rows, encoding, loading, report)
            load.build_indexes(tools, project.server, work, contents, foreign_keys, loading)
            absent = load.absent_foreign_keys(project.server, work, foreign_keys)
            load.prove_objects(project.server, work, contents, loading, absent)
            load.analyze(project.server, work, options.jobs)
            # Only now: the work name is this run's alone, also when another one has begun because the lock was lost.
            held.verify()
            databases.publish(held.session, work, temporary, marker)

    return build


def _raw_size(manifest: Manifest | None) -> int | None:
    return manifest.raw_size + sum(part.raw_size for part in manifest.parts) if manifest else None


def _rows_beside(held: Lock, storage: Storage, key: str, manifest: Manifest | None, codec: Codec | None) -> list[Rows]:
    """The parts of a dump, the largest first."""
    ordered = sorted(manifest.parts if manifest else (), key=lambda part: -part.raw_size)
    return [parts.stored(storage, key, part, codec, held.session) for part in ordered]


def _unproven(key: str) -> exceptions.CorruptDump:
    """The error for a dump that only its manifest could prove complete. Those of django-pgclone are compressed by pg_dump."""
    return exceptions.CorruptDump(
        f'The dump "{key}" has no manifest, so that it cannot be proven complete.',
        "If you must, restore it by hand into a database of its own: docs/archive-format.md shows how.",
    )


def _check_manifest(project: Project, tools: Tools, manifest: Manifest) -> None:
    """Refuse a dump that the tools, the plugins or the server here cannot deal with."""
    if tools.version < int(manifest.pg_dump.partition(".")[0]):
        raise exceptions.ToolFailed(
            f"pg_restore {tools.text} ({tools.pg_restore}) is older than the pg_dump {manifest.pg_dump} that made the dump.",
            "Install client tools at least as new, or set PGCLONE_BIN_DIR to their folder.",
        )
    with project.server.connect() as session:
        missing = [
            name
            for name in catalogue.missing_extensions(session, manifest.extensions)
            if not any(f"EXTENSION - {name} ".startswith(f"{entry} ") for entry in project.options.allow_errors)
        ]
    if missing:
        raise exceptions.NotPossible(
            f"The server {project.server} does not have the extensions {', '.join(missing)}, which the dump needs.",
            f'Install them there, or allow them to fail: --allow-error "EXTENSION - {missing[0]}"',
        )


def _local_build(project: Project, key: str) -> Build:
    """What builds a database by copying a local one."""
    name = derive(project.database, "pre" if key == ":pre" else "post") if key in (":pre", ":post") else key[1:]
    if name == project.database:
        raise exceptions.ValueError(
            f'"{key}" is the database "{project.options.database}" itself.', "Name a copy of it."
        )
    with project.server.connect() as session:
        if not name or databases.find(session, name) is None:
            raise exceptions.DatabaseNotFound(
                f'Local database "{name}" does not exist. Use "pgclone ls --local" to see local database keys.'
            )

    def build(held: Lock, run: Run, temporary: str) -> None:
        options = project.options
        route.close_connections(project.server, name)
        work, ended = databases.copy(
            project.server, held.session, run.id, source=name, strategy=options.strategy, kill=options.kill
        )
        if ended:
            log.info("sessions_ended", database=name, count=ended)
        databases.publish(held.session, work, temporary, Marker("temp", project.database, run.id))

    return build


@contextlib.contextmanager
def locked(project: Project, run: Run, as_name: str | None, keep: bool = False) -> Iterator[Lock]:
    """Hold the lock of the database, refuse what the swap could not do, clear what dead runs left.

    At the end, whatever happened, drop what the run made and did not hand over.
    """
    options, server, database = project.options, project.server, project.database
    check_unconfigured(*(derive(database, kind) for kind in DERIVED))

    def waiting(holder: str) -> None:
        log.warning("lock_awaited", database=database, holder=holder)

    with contextlib.ExitStack() as stack:
        held = stack.enter_context(lock(server, database, wait=options.wait, waiting=waiting))
        if as_name:
            stack.enter_context(lock(server, as_name, wait=options.wait, waiting=waiting))
            _check_target(held, as_name, options.replace)
        else:
            rights.check(server, held.session, database)
            check_names(held.session, database, keep=keep)
        take(held.session, f"run:{run.id}")
        for name in [*databases.left_overs(held.session, database)]:
            _drop_quietly(held, name)
        if (temporary := databases.find(held.session, derive(database, "temp"))) and not temporary.temporary:
            raise databases.foreign(temporary.name)
        stack.callback(_drop_remains, project, run)
        yield held


def _check_target(held: Lock, name: str, replace: bool) -> None:
    """Only an older copy makes room for a new one without being told to."""
    found = databases.find(held.session, name)
    if found is None or replace or (found.marker and found.marker.kind == "copy"):
        return
    marker = found.marker
    whose = f'it is the __{marker.kind} of "{marker.source}"' if marker else "pgclone did not make it"
    raise exceptions.NotPossible(
        f'Database "{name}" exists already, and {whose}.', "Choose another name, or replace it with --replace."
    )


@contextlib.contextmanager
def _routed(
    project: Project, held: Lock, primary: Properties | None, temporary: str
) -> Iterator[tuple[Target, Callable[[], None]]]:
    user = held.session.value("SELECT session_user::text")
    settings = [setting for setting in primary.settings if setting.role in (None, user)] if primary else []
    settings.sort(key=lambda setting: setting.role is not None)  # the role's own win
    with route.route(project.server, temporary, settings) as routed:
        yield routed


def _hand_over(held: Lock, run: Run, temporary: str, name: str, source: str, replace: bool) -> None:
    held.verify()
    databases.end_sessions(held.session, temporary)
    databases.publish(held.session, temporary, name, Marker("copy", source, run.id), replace=replace)


def _swap_in(project: Project, held: Lock, run: Run, temporary: str, keep: bool) -> None:
    """Make the temporary database the primary one, in one transaction."""
    post = None
    if keep:
        post, _ = databases.copy(
            project.server, held.session, run.id, source=temporary, strategy=project.options.strategy
        )
        databases.mark(held.session, post, Marker("temp", project.database, run.id))
    route.close_connections(project.server, project.database)
    held.verify()
    log.debug("swap_started", database=project.database)
    swapped = swap(
        project.server,
        database=project.database,
        restored=temporary,
        run=run.id,
        keep=keep,
        post=post,
        lock_still_held=held.verify,
    )
    log.info("swapped", database=project.database, old=swapped.old_database if keep else None)
    for name in swapped.leftovers:
        _drop_quietly(held, name)
    project.host.tell("post_swap", run=run, old_database=swapped.old_database if keep else None)


def _drop_reversible_copies(project: Project, held: Lock) -> None:
    _drop_quietly(held, derive(project.database, "pre"))
    _drop_quietly(held, derive(project.database, "post"))


def _drop_quietly(held: Lock, name: str) -> None:
    """Drop what nobody needs any more; what cannot be dropped now is left to the next run."""
    try:
        databases.drop(held.session, name)
    except exceptions.PgcloneError as error:
        log.warning("database_not_dropped", database=name, error=str(error))


def _drop_remains(project: Project, run: Run) -> None:
    try:
        with project.server.connect() as session:
            session.execute("SET lock_timeout = '10s'")  # of a session of this run that was interrupted twice
            for name in [*databases.remains(session, run.id)]:
                databases.end_sessions(session, name)
                databases.drop(session, name)
    except exceptions.PgcloneError as error:
        log.warning("databases_left", run=run.id, error=str(error))
