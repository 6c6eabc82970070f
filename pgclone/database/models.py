"""The tables behind Django's models."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pgclone import exceptions
from pgclone.database.connection import Server


def find_tables(server: Server, models: Sequence[str]) -> dict[str, str]:
    """The quoted table names of models (`app.Model`).

    Raises:
        ValueError: There is no such model.
    """
    from django.apps import apps
    from django.db import connections

    quote = connections[server.alias].ops.quote_name
    tables = {}
    for name in models:
        try:
            tables[name] = quote(apps.get_model(name)._meta.db_table)
        except (LookupError, ValueError):
            labels = [model._meta.label for model in apps.get_models(include_auto_created=True)]
            close = difflib.get_close_matches(name, labels, n=1)
            raise exceptions.ValueError(
                f'"{name}" is not a model.',
                f"Did you mean {close[0]}?" if close else "Write it as app_label.Model.",
            ) from None
    return tables
