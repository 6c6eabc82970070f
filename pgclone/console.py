"""Turns the events of a run into the lines that a person reads on stderr."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

_LINES = {
    "dump_started": 'Dumping database "{alias}" to "{key}"',
    "dump_committed": 'Database "{alias}" dumped to "{key}" ({bytes:,} bytes)',
    "foreign_key_dangles": "Foreign key {foreign_key}: it will come back NOT VALID where rows are missing",
    "restore_started": 'Restoring "{key}" beside database "{alias}"',
    "restore_finished": 'Database "{database}" restored from "{key}"',
    "restore_error_harmless": "Ignored, as it is harmless: {entry}: {error}",
    "restore_error_allowed": "Ignored, as you allowed it: {entry}: {error}",
    "indexes_one_by_one": "Indexes and constraints are built one at a time: {why}",
    "foreign_key_not_valid": "Foreign key {foreign_key} is NOT VALID",
    "foreign_key_missing": "Foreign key {foreign_key} is missing",
    "dump_without_manifest": '"{key}" has no manifest: its completeness rests on pg_restore alone',
    "swapped": 'Swapped in as "{database}"',
    "lock_awaited": 'Waiting for another run on database "{database}" to end: {holder}',
    "sessions_ended": 'Sessions on database "{database}" that were ended: {count}',
    "copy_started": 'Copying database "{alias}" to "{key}"',
    "copy_finished": 'Database "{alias}" copied to "{key}"',
    "left_over_deleted": 'Deleted "{key}", which a dead run had left',
    "left_over_not_deleted": "Left-overs of dead runs that stay: {count}. {error}",
    "left_overs_not_removed": "Unfinished uploads of dead runs may be left in {location}: {error}",
    "upload_left": "An unfinished upload of {object} was left: {error}",
    "database_not_dropped": 'Database "{database}" could not be dropped: {error}',
    "databases_left": "Databases of this run could not be dropped, the next run will: {error}",
    "hook_failed": 'The {hook} hook of the plugin "{plugin}" failed: {error}',
    "command_finished": 'Ran "manage.py {command}"',
    "plugin_failed": "{error}",
    "pg_dump_warned": "{line}",
}


class _Handler(logging.Handler):
    def __init__(self, show: Callable[[str, int], None], least: int, seen: set[str]) -> None:
        super().__init__(min(least, logging.INFO))
        self._show, self._least, self._seen = show, least, seen

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", "")
        self._seen.add(event)
        if record.levelno >= self._least:
            template = _LINES.get(event)
            fields: dict[str, Any] = getattr(record, "fields", {})
            self._show(template.format_map(fields) if template else record.getMessage(), record.levelno)


@contextlib.contextmanager
def show_events(show: Callable[[str, int], None], verbosity: int, seen: set[str]) -> Iterator[None]:
    """Show the events of the block, a line each, with the level of the log.

    Args:
        verbosity: 0 shows warnings alone, 2 and more show details.
        seen: Gets the names of all events, shown or not.
    """
    logger = logging.getLogger("pgclone")
    level = logger.level
    handler = _Handler(show, {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG), seen)
    logger.addHandler(handler)
    logger.setLevel(min(handler.level, level) if level else handler.level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
