"""What `manage.py check` says of the plugin's settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from django.core.checks import CheckMessage, Error

from pgclone.api import PgcloneError
from pgclone_gcs.settings import read_settings


def check(settings: Any) -> list[CheckMessage]:
    """Unknown keys and wrong values of `PGCLONE_GCS` (E001), and a file of credentials that cannot be read (E002)."""
    try:
        path = read_settings().credentials_file
    except PgcloneError as error:
        return [Error(error.cause, hint=error.remedy or None, id="pgclone_gcs.E001")]
    if path and not (Path(path).is_file() and os.access(path, os.R_OK)):
        what = f'settings.PGCLONE_GCS["credentials_file"] names {path}, which is no file that can be read.'
        return [Error(what, hint="Mend the path, or what the user of this process may read.", id="pgclone_gcs.E002")]
    return []
