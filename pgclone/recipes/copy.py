"""The story of a copy."""

from __future__ import annotations

import contextlib

from pgclone import load, parts, process
from pgclone.conf import COPY, Options
from pgclone.crew import crew
from pgclone.database import databases, properties, route
from pgclone.database.lock import Lock
from pgclone.database.names import Marker
from pgclone.events import log
from pgclone.load import Loading
from pgclone.parts import Reader
from pgclone.recipes.project import Project, Reporter, check_local_name, open_project, running
from pgclone.recipes.restore import locked
from pgclone.recipes.source import open_source
from pgclone.streams import BLOCK
from pgclone.types import Run


def copy(options: Options) -> str:
    """Copy the primary database to another one on the same server, and return its key."""
    # 1. Refuse what cannot work.
    project = open_project(COPY, options)
    key = options.dump_key
    name = check_local_name(project, key)
    databases.check_strategy(options.strategy)
    with running(COPY, project, key) as run, locked(project, run, name) as held:
        # 2. Copy, under a work name.
        log.info("copy_started", alias=options.database, database=project.database, key=key)
        work = _copy_online(project, run, held) if options.online else _copy_files(project, run, held)

        # 3. Give it its name; an older copy of that name goes with it.
        marker = Marker("copy", project.database, run.id)
        databases.publish(held.session, work, name, marker, replace=options.replace)
    log.info("copy_finished", alias=options.database, database=project.database, key=key)
    return key


def _copy_files(project: Project, run: Run, held: Lock) -> str:
    """Let the server copy the files of the database, which nobody may use meanwhile."""
    route.close_connections(project.server, project.database)
    work, ended = databases.copy(
        project.server,
        held.session,
        run.id,
        source=project.database,
        strategy=project.options.strategy,
        kill=project.options.kill,
    )
    if ended:
        log.info("sessions_ended", database=project.database, count=ended)
    return work


def _copy_online(project: Project, run: Run, held: Lock) -> str:
    """Dump and restore without a storage in between: what a snapshot shows, while others work on."""
    options, server = project.options, project.server
    tools = process.find_tools(options.bin_dir)
    process.require_new_enough(tools, held.session)
    loading = Loading(owner=True, acl=True, jobs=options.jobs)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(server.connect(project.database))
        source = stack.enter_context(open_source(project, tools, session))
        primary = properties.read(held.session, project.database)
        work = databases.create(held.session, run.id, template=options.template, like=primary)
        databases.mark(held.session, work, Marker("temp", project.database, run.id))
        watchers = stack.enter_context(crew([], 0))
        dumping = stack.enter_context(contextlib.ExitStack())
        read = dumping.enter_context(source.pg_dump(watchers))
        contents = stack.enter_context(load.open_archive(tools, read))

        def prove(_: int) -> None:
            while read(BLOCK):  # pg_restore may have had enough before the end
                pass
            dumping.close()

        exporter = source.export()
        rows = [parts.exported(exporter, chunk, session) for chunk in source.plan.chunks]
        archive = Reader(lambda: read(BLOCK), prove)
        report = Reporter(project, run, source.shape.size)
        load.load(tools, server, work, contents, archive, rows, source.shape.encoding, (), loading, report)
        load.prove_objects(server, work, contents, loading, ())
    load.analyze(server, work, options.jobs)
    held.verify()
    return work
