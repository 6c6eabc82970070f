"""Management commands as hooks: `--pre-dump-hook`, and `--pre-swap-hook` with `migrate` by default."""

from __future__ import annotations

from pgclone.api import Run, Target, hookimpl


@hookimpl(tryfirst=True)
def pre_dump(run: Run, source: Target) -> None:
    for command in run.options["pre_dump_hooks"]:
        source.call_command(command)


@hookimpl(tryfirst=True)
def pre_swap(run: Run, target: Target) -> None:
    for command in run.options["pre_swap_hooks"]:
        target.call_command(command)
