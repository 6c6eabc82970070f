"""Vetoes the restore of a database in which nobody is a superuser."""

from __future__ import annotations

from pgclone.api import PgcloneError, Target, hookimpl


@hookimpl
def pre_swap(target: Target) -> None:
    with target.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM auth_user WHERE is_superuser AND is_active")
        (superusers,) = cursor.fetchone()
    if superusers == 0:
        raise PgcloneError(
            f'Nobody could administrate the restored database "{target.name}": it has no superuser.',
            "Restore a dump that has one.",
        )
