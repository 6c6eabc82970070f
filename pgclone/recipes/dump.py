"""The story of a dump."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from importlib.metadata import version

from pgclone import archive, exceptions, keys, process, streams
from pgclone.archive import Manifest
from pgclone.conf import DUMP, Options
from pgclone.database import catalogue, models, route
from pgclone.database.catalogue import Relation
from pgclone.database.connection import Session
from pgclone.events import log
from pgclone.host import Storage
from pgclone.process import Tools
from pgclone.recipes.project import Project, Reporter, check_commands, open_project, running
from pgclone.streams import BLOCK, Digest
from pgclone.types import Codec, Run


def dump(options: Options) -> str:
    """Dump a database into storage and return the dump's key."""
    # 1. Find everything that is named, and refuse what cannot work.
    project = open_project(DUMP, options)
    tools = process.find_tools(options.bin_dir)
    project.server.conninfo(project.database)  # refuses what pg_dump cannot be told
    codec = project.host.codec(options.codec) if options.codec != "none" else None
    level = _find_level(codec, options.level)
    with project.server.connect(project.database) as session:
        _require_new_enough(tools, session)
    tables_of_models = models.find_tables(project.server, options.exclude)
    check_commands(options.pre_dump_hooks)

    # 2. Clear what dead runs left, and find a free key.
    name = keys.make(
        instance=options.instance,
        database=options.database,
        config=options.config,
        now=datetime.now(timezone.utc),
    )
    with running(DUMP, project, str(name)) as run:
        storage = project.host.storage(run.location)
        archive.sweep(storage, name.instance, timedelta(seconds=options.sweep_after))
        key = archive.free_key(storage, name)

        # 3. Hooks may look at the database, change it, or refuse.
        with route.route(project.server, project.database) as (target, prove):
            project.host.call("pre_dump", before=prove, run=run, source=target)

        # 4. Export a snapshot: the manifest and pg_dump see the same database.
        with project.server.connect(project.database) as session, _snapshot(session) as snapshot:
            excluded = catalogue.find_tables(session, tables_of_models, options.exclude_tables)
            log.info("dump_started", alias=options.database, database=project.database, key=key)

            # 5. Stream pg_dump through the codec into storage; write the manifest; commit.
            size, stored = _write(project, run, tools, session, snapshot, storage, key, codec, level, excluded)

        # 6. It is there: tell everyone.
        log.info(
            "dump_committed",
            alias=options.database,
            database=project.database,
            key=key,
            bytes=stored.size,
            raw=size,
        )
        project.host.tell("post_dump", run=run, key=key, size=stored.size)
    return key


def _find_level(codec: Codec | None, wanted: int | None) -> int:
    if codec is None:
        return 0
    level = codec.default_level if wanted is None else wanted
    if codec.levels is not None and level not in codec.levels:
        raise exceptions.ValueError(
            f'The codec "{codec.name}" has no level {level}.', f"It takes {codec.levels[0]} to {codec.levels[-1]}."
        )
    return level


def _write(
    project: Project,
    run: Run,
    tools: Tools,
    session: Session,
    snapshot: str,
    storage: Storage,
    key: str,
    codec: Codec | None,
    level: int,
    excluded: tuple[Relation, ...],
) -> tuple[int, Digest]:
    """Write the dump and its manifest, and commit both. An exception anywhere leaves nothing that is listed."""
    shape = catalogue.shape(session)
    report = Reporter(project, run, shape.size)
    manifest = None
    try:
        with streams.store(storage, key, shape.size) as stored:
            with streams.encode(stored, codec, level) as sink:
                with process.pg_dump(
                    tools,
                    project.server.conninfo(project.database),
                    snapshot=snapshot,
                    excluded=[relation.pattern for relation in excluded],
                    encoding=shape.encoding,
                    lock_timeout=project.options.lock_timeout,
                ) as output:
                    while block := output.read(BLOCK):
                        sink.write(block)
                        report(sink.raw_size)
            manifest = _describe(project, tools, session, key, codec, excluded, sink.raw_size, stored.digest)
            archive.write_manifest(storage, manifest)
    except BaseException:
        if manifest:
            archive.discard_manifest(storage, manifest)
        raise
    for foreign in manifest.foreign_keys:
        log.warning("foreign_key_dangles", foreign_key=str(foreign))
    return sink.raw_size, stored.digest


def _describe(
    project: Project,
    tools: Tools,
    session: Session,
    key: str,
    codec: Codec | None,
    excluded: tuple[Relation, ...],
    raw_size: int,
    stored: Digest,
) -> Manifest:
    shape = catalogue.shape(session)
    return Manifest(
        key=key,
        created=datetime.now(timezone.utc).isoformat(),
        pgclone=version("pgclone"),
        pg_dump=tools.text,
        server=catalogue.server_version(session),
        codecs=(codec.name,) if codec else (),
        raw_size=raw_size,
        stored_size=stored.size,
        sha256=stored.sha256,
        encoding=shape.encoding,
        collate=shape.collate,
        ctype=shape.ctype,
        extensions=catalogue.extensions(session),
        migrations=catalogue.migrations(session),
        tables=catalogue.tables(session, excluded),
        foreign_keys=catalogue.dangling_foreign_keys(session, excluded),
        plugins={plugin.name: plugin.version for plugin in project.host.plugins},
    )


@contextlib.contextmanager
def _snapshot(session: Session) -> Iterator[str]:
    """Export the snapshot of a transaction that stays open for the time of the block. Gives its name."""
    with session.transaction("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"):
        yield session.value("SELECT pg_export_snapshot()")


def _require_new_enough(tools: Tools, session: Session) -> None:
    server = catalogue.server_version(session)
    if tools.version < session.version // 10000:
        raise exceptions.ToolFailed(
            f"pg_dump {tools.text} ({tools.pg_dump}) is too old for the server, which is {server}.",
            f"Install client tools of PostgreSQL {session.version // 10000} or newer, or set PGCLONE_BIN_DIR to their folder.",
        )
