"""manage.py pgclone: dump, ls, restore, copy, doctor, plugins. Arguments come from the table of options in `pgclone.conf`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

import pgclone
from pgclone import conf, exceptions
from pgclone.conf import Option
from pgclone.console import show_events


class Command(BaseCommand):
    help = "Dump, list, restore and copy Postgres databases."
    requires_system_checks: list[str] = []
    stealth_options = ("skip_checks",)

    def add_arguments(self, parser: CommandParser) -> None:
        commands = parser.add_subparsers(dest="subcommand", required=True, metavar="command")
        for name, summary in _SUMMARIES.items():
            subparser = commands.add_parser(name, help=summary, description=summary, parents=[_general_arguments()])
            _ARGUMENTS[name](subparser)
            for option in conf.TABLE:
                if name in option.commands:
                    _add_option(subparser, option)
            if name != "plugins":
                subparser.add_argument(
                    "-c", "--config", help="Take defaults from this configuration (PGCLONE_CONFIGS)."
                )

    def handle(self, *_: Any, subcommand: str, **options: Any) -> None:
        call, names = _CALLS[subcommand]
        seen: set[str] = set()
        with self._ends_reported(subcommand, seen), show_events(self._show, options["verbosity"], seen):
            with closing(call(**{name: options[name] for name in names})) as lines:
                for line in lines:
                    self.stdout.write(line)

    def _show(self, text: str, level: int) -> None:
        """Write a line on stderr; only warnings and errors have a colour there."""
        coloured = level >= logging.WARNING and self.stderr.isatty()
        self.stderr.write(text, style_func=self.style.WARNING if coloured else str)

    @contextmanager
    def _ends_reported(self, subcommand: str, seen: set[str]) -> Iterator[None]:
        """Errors and interruptions end with a message on stderr and an exit status, never with a traceback."""
        try:
            yield
        except exceptions.PgcloneError as error:
            self.stderr.write(str(error))
            sys.exit(1)
        except KeyboardInterrupt:
            self.stderr.write(f"Interrupted. {_state(subcommand, seen)}".rstrip())
            sys.exit(128 + signal.SIGINT)
        except exceptions.Terminated as error:
            name = signal.Signals(int(error.code or 0) - 128).name
            self.stderr.write(f"Ended by {name}. {_state(subcommand, seen)}".rstrip())
            raise


def _state(subcommand: str, seen: set[str]) -> str:
    """What an interrupted command leaves, as far as the events tell."""
    for event, state in _STATES.items():
        if event in seen:
            return state
    return _UNTOUCHED.get(subcommand, "")


def _general_arguments() -> CommandParser:
    """Django's own options, which are understood behind the subcommand as well."""
    parser = CommandParser(add_help=False, argument_default=argparse.SUPPRESS)
    for flag in ("--settings", "--pythonpath"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--traceback", "--no-color", "--force-color", "--skip-checks"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "-v",
        "--verbosity",
        type=int,
        choices=range(4),
        metavar="N",
        help="What to tell: 0 warnings alone, 1 what is done (default), 2 every detail.",
    )
    return parser


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    if not option.flags:
        parser.add_argument(option.name, nargs="?", help=option.help)
    elif option.type is bool and not option.default and option.setting is None and not option.in_config:
        parser.add_argument(*option.flags, dest=option.name, action="store_true", default=None, help=option.help)
    elif option.type is bool:
        parser.add_argument(
            *option.flags,
            dest=option.name,
            action=argparse.BooleanOptionalAction,
            default=None,
            help=option.help,
        )
    elif option.type is tuple:
        parser.add_argument(
            *option.flags,
            dest=option.name,
            nargs="*",
            action="extend",
            metavar=option.metavar,
            help=option.help,
        )
    else:
        parser.add_argument(*option.flags, dest=option.name, type=option.type, metavar=option.metavar, help=option.help)


def _ls_arguments(parser: argparse.ArgumentParser) -> None:
    for segment in ("instances", "databases", "configs"):
        parser.add_argument(f"--{segment}", action="store_true", help=f"Only list {segment}.")
    parser.add_argument("--local", action="store_true", help="Only list local databases.")


def _copy_arguments(parser: argparse.ArgumentParser) -> None:
    # Optional for argparse: call_command(..., dump_key=...) cannot give it otherwise.
    parser.add_argument("dump_key", nargs="?", metavar=":name", help="The database to make.")


def _dump_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", action="store_true", help="Show what would be dumped in parallel, and dump nothing.")


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _silent(call: Any) -> Any:
    """Keys are the result in Python; on the command line, the events tell."""

    def run(**options: Any) -> Iterator[str]:
        call(**options)
        yield from ()

    return run


def _ls(**options: Any) -> Iterator[str]:
    yield from pgclone.ls(**options)


def _dump(*, plan: bool, **options: Any) -> Iterator[str]:
    if plan:
        from pgclone.recipes import dump

        yield from dump.plan(conf.resolve(**options))
    else:
        pgclone.dump(**options)


def _doctor(**options: Any) -> Iterator[str]:
    from pgclone.recipes import doctor

    yield from doctor.doctor(conf.resolve(**options))


def _plugins() -> Iterator[str]:
    from pgclone import host

    built = host.build(conf.resolve())
    for plugin in built.plugins:
        version = f" {plugin.version}" if plugin.version else ""
        yield f"{plugin.name} ({plugin.origin}{version}): {', '.join(plugin.hooks) or 'no hooks'}"
    built.require_all()


def _options(command: str) -> list[str]:
    return [option.name for option in conf.TABLE if command in option.commands] + ["config"]


_STATES = {
    "swapped": "The restored database had been swapped in already.",
    "swap_started": "It was about to be swapped in: the database is as it was, or the restored one.",
    "dump_committed": "The dump had been listed already.",
    "copy_finished": "The copy had been made already.",
}
_UNTOUCHED = {
    "dump": "No dump was listed.",
    "restore": "The database is as it was.",
    "copy": "No copy was made.",
}
_SUMMARIES = {
    "ls": "List dumps, or local databases.",
    "dump": "Dump a database into storage.",
    "restore": "Restore a dump or a local database, and swap it in.",
    "copy": "Copy a database on its server.",
    "doctor": "Try whether a storage location can do all that pgclone needs.",
    "plugins": "List the plugins, in the order in which their hooks are called.",
}
_ARGUMENTS = {
    "ls": _ls_arguments,
    "dump": _dump_arguments,
    "restore": _no_arguments,
    "copy": _copy_arguments,
    "doctor": _no_arguments,
    "plugins": _no_arguments,
}
_CALLS: dict[str, tuple[Any, list[str]]] = {
    "ls": (_ls, [*_options(conf.LS), "instances", "databases", "configs", "local"]),
    "dump": (_dump, [*_options(conf.DUMP), "plan"]),
    "restore": (_silent(pgclone.restore), _options(conf.RESTORE)),
    "copy": (_silent(pgclone.copy), [*_options(conf.COPY), "dump_key"]),
    "doctor": (_doctor, _options(conf.DOCTOR)),
    "plugins": (_plugins, []),
}
