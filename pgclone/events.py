"""The log: facts in snake_case with fields, through the standard library's logger `pgclone`.

    log.info("dump_committed", key=key, bytes=n)

The library configures no logging. Records carry the fields as attributes of `record.fields`, for handlers that want
them apart.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

import structlog


def _render(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> tuple[tuple[str, str], dict[str, Any]]:
    """The arguments of the standard library's call."""
    name = event.pop("event")
    exc_info = event.pop("exc_info", None)
    text = " ".join([name, *(f"{key}={value!r}" for key, value in event.items())])
    return ("%s", text), {"exc_info": exc_info, "extra": {"event": name, "fields": dict(event)}}


log: Any = structlog.wrap_logger(
    logging.getLogger("pgclone"),
    wrapper_class=structlog.stdlib.BoundLogger,
    processors=[structlog.stdlib.filter_by_level, _render],
)
