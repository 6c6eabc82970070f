"""Writes docs/options.md from the table of options and the command-line parser: `python docs/generate.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pgclone.conf import TABLE, Option

PAGE = Path(__file__).with_name("options.md")

HEAD = """# Options

An option is a flag on the command line, an argument in Python, a key of a configuration in `PGCLONE_CONFIGS`, and a
setting. What wins: flag or argument > configuration > setting > default. This page is generated from the table in
`pgclone/conf.py`.

## Options of the commands

| option | flag | commands | setting | default | what it does |
|---|---|---|---|---|---|
"""

MIDDLE = """
`PGCLONE_CONFIGS` is a dict of configurations, by name. A configuration is a dict of options:

    PGCLONE_CONFIGS = {"nightly": {"instance": "prod", "storage_location": "/backups/", "exclude": ["sessions.Session"]}}

## Settings of the project

| setting | default | what it does |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    commands = "".join(_command_row(option) for option in TABLE if option.commands)
    project = "".join(_setting_row(option) for option in TABLE if not option.commands)
    return HEAD + commands + MIDDLE + project


def _command_row(option: Option) -> str:
    name = f"`{option.name}`" + ("" if option.in_config else " (not in configurations)")
    flags = ", ".join(f"`{flag}`" for flag in option.flags) or "positional"
    if option.type is bool:
        flags += f", `--no-{option.flags[-1].removeprefix('--')}`"
    setting = f"`{option.setting}`" if option.setting else "none"
    return f"| {name} | {flags} | {', '.join(option.commands)} | {setting} | {_default(option)} | {option.help} |\n"


def _setting_row(option: Option) -> str:
    return f"| `{option.setting}` | {_default(option)} | {option.help} |\n"


def _default(option: Option) -> str:
    default: Any = option.default
    if callable(default):
        return "found"
    return "none" if default in ("", None, ()) else f"`{list(default) if isinstance(default, tuple) else default!r}`"


if __name__ == "__main__":
    PAGE.write_text(page())
