"""The story of a dump."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from importlib.metadata import version

from pgclone import archive, exceptions, keys, parts, process, streams
from pgclone.archive import Manifest, Part
from pgclone.conf import DUMP, Options
from pgclone.crew import Crew, crew
from pgclone.database import catalogue, models, route
from pgclone.events import log
from pgclone.host import Storage
from pgclone.plan import Chunk
from pgclone.recipes.project import Project, Reporter, check_commands, open_project, running
from pgclone.recipes.source import Source, open_source, survey
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
        process.require_new_enough(tools, session)
    models.find_tables(project.server, options.exclude)  # refuses what is no model
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

        # 4. Plan, and export a snapshot: the manifest, pg_dump and all parts see the same database.
        with project.server.connect(project.database) as session:
            found = survey(project, session)
            log.info("dump_started", alias=options.database, database=project.database, key=key)
            with open_source(project, tools, session, found) as source:
                # 5. Stream pg_dump and the parts through the codec into storage; write the manifest; commit.
                raw, size = _write(project, run, source, storage, key, codec, level)

        # 6. It is there: tell everyone.
        log.info("dump_committed", alias=options.database, database=project.database, key=key, bytes=size, raw=raw)
        project.host.tell("post_dump", run=run, key=key, size=size)
    return key


def plan(options: Options) -> Iterator[str]:
    """What a dump would do, for people. Nothing is written, and no hook is called."""
    project = open_project(DUMP, options)
    with project.server.connect(project.database) as session:
        yield from survey(project, session).plan.describe()


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
    project: Project, run: Run, source: Source, storage: Storage, key: str, codec: Codec | None, level: int
) -> tuple[int, int]:
    """Write the dump, its parts and its manifest, and commit all. An exception anywhere leaves nothing that is listed.

    Returns:
        Bytes before and after compression.
    """
    report = Reporter(project, run, source.shape.size)
    exporter = source.export()
    done: list[Part] = []
    manifest = None

    def dump_part(number: int, chunk: Chunk, workers: Crew) -> None:
        done.append(parts.dump_part(exporter, storage, key, number, chunk, codec, level, report, workers))

    tasks = [functools.partial(dump_part, number, chunk) for number, chunk in enumerate(source.plan.chunks, 1)]
    try:
        with streams.store(storage, key, source.shape.size) as stored:
            with crew(tasks, project.options.jobs - 1) as workers:
                with streams.encode(stored, codec, level) as sink:
                    with source.pg_dump(workers) as dumping:
                        while block := dumping.read(BLOCK):
                            sink.write(block)
                            report(len(block))
                workers.hire()
                workers.wait(lambda: report(0))
            manifest = _describe(
                project, source, key, codec, sink.raw_size, stored.digest, sorted(done, key=lambda part: part.number)
            )
            archive.check_parts(storage, key, manifest.parts)
            archive.write_manifest(storage, manifest)
    except BaseException:
        archive.discard(storage, key, done, manifest)
        raise
    for foreign in manifest.foreign_keys:
        log.warning("foreign_key_dangles", foreign_key=str(foreign))
    raw = manifest.raw_size + sum(part.raw_size for part in manifest.parts)
    return raw, manifest.stored_size + sum(part.stored_size for part in manifest.parts)


def _describe(
    project: Project,
    source: Source,
    key: str,
    codec: Codec | None,
    raw_size: int,
    stored: Digest,
    parts: Sequence[Part],
) -> Manifest:
    session, excluded, shape = source.session, source.excluded, source.shape
    return Manifest(
        key=key,
        created=datetime.now(timezone.utc).isoformat(),
        pgclone=version("pgclone"),
        pg_dump=source.tools.text,
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
        parts=tuple(parts),
        plugins={plugin.name: plugin.version for plugin in project.host.plugins},
    )
