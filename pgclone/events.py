"""The log: facts in snake_case with fields, through the standard library's logger `pgclone`.

    log.info("dump_committed", key=key, bytes=n)

The library configures no logging. Records carry the fields as attributes of `record.fields`, for handlers that want
them apart.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import MutableMapping
from typing import Any

_LOGGER = logging.getLogger("pgclone")


class _Log:
    """structlog's logger. It takes as long to import as all of pgclone, so that waits until something is to be logged."""

    def __getattr__(self, method: str) -> Any:
        level = getattr(logging, method.upper(), None)
        if isinstance(level, int) and not _LOGGER.isEnabledFor(level):
            return _ignore
        return getattr(_structlog(), method)


log: Any = _Log()


@functools.cache
def _structlog() -> Any:
    import structlog

    return structlog.wrap_logger(
        _LOGGER,
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[structlog.stdlib.filter_by_level, _render],
    )


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _render(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> tuple[tuple[str, str], dict[str, Any]]:
    """The arguments of the standard library's call."""
    name = event.pop("event")
    exc_info = event.pop("exc_info", None)
    text = " ".join([name, *(f"{key}={value!r}" for key, value in event.items())])
    return ("%s", text), {"exc_info": exc_info, "extra": {"event": name, "fields": dict(event)}}
