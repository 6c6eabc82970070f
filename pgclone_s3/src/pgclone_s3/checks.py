"""What `manage.py check` says of the plugin's settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from django.core.checks import CheckMessage, Error, Warning

from pgclone.api import PgcloneError
from pgclone_s3.settings import read_environment, read_settings


def check(settings: Any) -> list[CheckMessage]:
    """Unknown keys and wrong values, of `PGCLONE_S3` (E001) and `PGCLONE_S3_CONFIG` (E002, W001)."""
    return [
        *_wrong(read_settings, "pgclone_s3.E001"),
        *_wrong(read_environment, "pgclone_s3.E002"),
        *_unknown(settings),
    ]


def _wrong(read: Any, id: str) -> Iterator[CheckMessage]:
    try:
        read()
    except PgcloneError as error:
        yield Error(error.cause, hint=error.remedy or None, id=id)


def _unknown(settings: Any) -> Iterator[CheckMessage]:
    given = getattr(settings, "PGCLONE_S3_CONFIG", None)
    if not given or not isinstance(given, dict):
        return
    from pgclone_s3.session import known_variables

    known = known_variables()
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            yield Warning(
                f'PGCLONE_S3_CONFIG has "{name}", which is not read.',
                hint=f'Did you mean "{close[0]}"?' if close else "It takes the AWS_* variables that boto3 knows.",
                id="pgclone_s3.W001",
            )
