"""The story of a copy."""

from __future__ import annotations

from pgclone.conf import COPY, Options
from pgclone.database import databases, route
from pgclone.database.names import Marker
from pgclone.events import log
from pgclone.recipes.project import check_local_name, open_project, running
from pgclone.recipes.restore import locked


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
        route.close_connections(project.server, project.database)
        work, ended = databases.copy(
            project.server,
            held.session,
            run.id,
            source=project.database,
            strategy=options.strategy,
            kill=options.kill,
        )
        if ended:
            log.info("sessions_ended", database=project.database, count=ended)

        # 3. Give it its name; an older copy of that name goes with it.
        marker = Marker("copy", project.database, run.id)
        databases.publish(held.session, work, name, marker, replace=options.replace)
    log.info("copy_finished", alias=options.database, database=project.database, key=key)
    return key
