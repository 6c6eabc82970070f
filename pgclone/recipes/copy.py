"""The story of a copy."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from pgclone import load, parts, process, verdict
from pgclone.conf import COPY, Options
from pgclone.crew import crew
from pgclone.database import databases, properties, route
from pgclone.database.lock import Lock
from pgclone.database.names import Marker
from pgclone.events import log
from pgclone.load import Loading
from pgclone.recipes.project import Project, Reporter, check_local_name, open_project, running
from pgclone.recipes.restore import locked
from pgclone.recipes.source import Source, open_source, survey
from pgclone.toc import Contents
from pgclone.types import Run


def copy(options: Options) -> str:
    """Copy the primary database to another one on the same server, and return its key."""
    # 1. Refuse what cannot work.
    project = open_project(COPY, options)
    key = options.dump_key
    name = check_local_name(project, key)
    databases.check_strategy(options.strategy)
    verdict.check_allowed(options.allow_errors)
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
    """Dump and restore without a storage in between: what a snapshot shows, while others work on. Nothing is left out."""
    options, server = replace(project.options, exclude=(), exclude_tables=()), project.server
    project = replace(project, options=options)
    tools = process.find_tools(options.bin_dir)
    process.require_new_enough(tools, held.session)
    loading = Loading(owner=True, acl=True, allow_errors=options.allow_errors, jobs=options.jobs)
    primary = properties.read(held.session, project.database)
    work = databases.create(held.session, run.id, template=options.template, like=primary)
    databases.mark(held.session, work, Marker("temp", project.database, run.id))
    with contextlib.ExitStack() as stack:
        with server.connect(project.database) as session:
            with open_source(project, tools, session, survey(project, session)) as source:
                contents = _copy_rows(project, run, held, source, work, loading, stack)
        load.build_indexes(tools, server, work, contents, (), loading)
        load.prove_objects(server, work, contents, loading, ())
    load.analyze(server, work, options.jobs)
    held.verify()
    return work


def _copy_rows(
    project: Project, run: Run, held: Lock, source: Source, work: str, loading: Loading, stack: contextlib.ExitStack
) -> Contents:
    """Copy tables and rows. The source's locks may go then; the head of the archive stays until the stack ends."""
    with crew([], 0) as watchers, source.pg_dump(watchers) as archive:
        contents = stack.enter_context(load.open_archive(source.tools, archive.read))
        exporter = source.export()
        rows = [parts.exported(exporter, chunk, held.session) for chunk in source.plan.chunks]
        report = Reporter(project, run, source.shape.size)
        encoding = source.shape.encoding
        load.load_rows(source.tools, project.server, work, contents, archive, rows, encoding, loading, report)
    return contents
