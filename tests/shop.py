"""A shop whose databases are watched: what they hold before and after each fault, and who else lives on the server."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pgclone.testing.postgres import Server
from tests.faults import Tally, wait_until
from tests.forks import Forks
from tests.project import Done, Project, open_project

BYSTANDERS = {
    "shop__temp_x": None,
    "shop2__temp": 'pgclone {"kind": "temp", "source": "shop2", "run": "0123456789ab"}',
    "warehouse": "pgclone was here",
    "rescued": 'pgclone {"kind": "temp", "source": "shop", "run": "0123456789ab"}',
    "pgclone_work_mine": None,
    "broken__temp": 'pgclone {"kind": "temp"',
}
"""Databases that pgclone must leave alone, and their comments: a `rescued` one was renamed by its user."""

State = dict[str, str]
"""What each database of the shop holds, as a hash."""

_PARTS = " UNION ALL ".join(
    f"SELECT md5(coalesce(string_agg(t::text, '|' ORDER BY id), '')) AS part FROM {table} AS t"
    for table in ("app_author", "app_book", "app_review", "auth_user", "django_migrations")
)
_CONTENT = f"SELECT md5(string_agg(part, '|' ORDER BY part)) FROM ({_PARTS}) AS parts"


@dataclass(frozen=True)
class Command:
    """A command of pgclone, and the state that it leaves: `gives` maps names to the names whose content they get."""

    argv: tuple[str, ...]
    gives: Mapping[str, str]
    removes: tuple[str, ...] = ()

    def after(self, state: State, dumped: str) -> State:
        sources = {**state, "the dump": dumped}
        kept = {name: content for name, content in state.items() if name not in self.removes}
        return {**kept, **{name: sources[source] for name, source in self.gives.items()}}


PLAIN = Command(("restore", "prod/default"), {"shop": "the dump"}, ("shop__pre", "shop__post"))
REVERSIBLE = Command(
    ("restore", "prod/default", "--reversible"),
    {"shop": "the dump", "shop__pre": "shop", "shop__post": "the dump"},
)
UNDO = Command(("restore", ":pre"), {"shop": "shop__pre"})
LOCAL = Command(("restore", ":backup"), {"shop": "backup"})
ASIDE = Command(("restore", "prod/default", "--as", ":yesterday"), {"yesterday": "the dump"})
COPY = Command(("copy", ":backup"), {"backup": "shop"})

COMMANDS = {
    "plain": PLAIN,
    "reversible": REVERSIBLE,
    "undo": UNDO,
    "local": LOCAL,
    "as": ASIDE,
    "copy": COPY,
}


@contextlib.contextmanager
def open_shop(
    server: Server, folder: Path, forks: Forks, tally: Tally, also: str = "", **settings: object
) -> Iterator[Shop]:
    """A shop with more rows than fit into an archive's head. `also` is SQL for what else is in its database."""
    with open_project(server, folder) as project:
        project.settings |= settings
        project.fill(3000)
        if also:
            project.sql(also)
        yield Shop(project, forks, tally).open()


@dataclass
class Shop:
    """The project's databases, a dump of an older state of it, and bystanders."""

    project: Project
    forks: Forks
    tally: Tally
    dumped: str = ""
    _sales: int = 0
    _bystanders: dict[str, str] = field(default_factory=dict)

    def open(self) -> Shop:
        done = self.run("dump")
        assert done.status == 0, done.err
        self.dumped = self.content("shop")
        for name, comment in BYSTANDERS.items():
            self.project.server.run("createdb", "-T", "template0", name)
            if comment:
                self.project.sql(f"COMMENT ON DATABASE {name} IS '{comment}'")
        self._bystanders = self._oids()
        self.sell()
        return self

    def run(self, *argv: str, **options: object) -> Done:
        return self.forks.run(self.project, "pgclone", *argv, **options)  # type: ignore[arg-type]

    def special(self, *flags: str) -> Path:
        """A dump of its own, which the commands on the shop's do not find."""
        done = self.run("dump", "--instance", "special", *flags)
        assert done.status == 0, done.err
        return self.project.dumps / self.run("ls", "special").lines[0]

    def sell(self) -> None:
        """Change the shop's rows, so that each state of it is another one."""
        self._sales += 1
        self.project.sql(f"UPDATE app_author SET name = 'sale {self._sales}'")

    def content(self, database: str) -> str:
        return self.project.sql(_CONTENT, database)

    def state(self) -> State:
        """What the databases hold that the shop's people know by name."""
        return {
            name: self.content(name)
            for name in self.project.databases()
            if name not in BYSTANDERS and name not in ("shop__temp", "shop__swap") and "pgclone_work_" not in name
        }

    def left_over(self) -> list[str]:
        """Databases that only a run that is at work has."""
        return [
            name
            for name in self.project.databases()
            if name in ("shop__temp", "shop__swap")
            or (name.startswith("pgclone_work_") and name != "pgclone_work_mine")
        ]

    def check(self, command: Command, before: State, *, clean: bool = False) -> None:
        """The databases are as they were or as the command leaves them, and nothing between.

        Where the command removes databases at its end, some of them may be left.

        Args:
            clean: The run had the opportunity to remove what it made.
        """
        wait_until(self._reachable, seconds=10)
        state, after = self.state(), command.after(before, self.dumped)
        problems = []
        if state != before and not (after.items() <= state.items() and state.items() <= {**before, **after}.items()):
            problems.append(f"{_named(before, after, state)}")
        if clean and (left := self.left_over()):
            problems.append(f"{', '.join(left)} were left")
        self._report(problems)

    def check_unchanged(self, before: State) -> None:
        """Nothing has changed, and nothing was left."""
        problems = []
        if (state := self.state()) != before:
            problems.append(f"{_named(before, {}, state)}")
        if left := self.left_over():
            problems.append(f"{', '.join(left)} were left")
        self._report(problems)

    def check_next_run(self, command: Command) -> None:
        """The next run succeeds, and clears what the dead one has left, and nothing else."""
        before = self.state()
        done = self.run(*command.argv)
        state, after = self.state(), command.after(before, self.dumped)
        problems = []
        if done.status != 0:
            problems.append(f"the next run failed: {done.err}")
        elif state != after:
            problems.append(f"after the next run: {_named(before, after, state)}")
        if left := self.left_over():
            problems.append(f"the next run left {', '.join(left)}")
        if self._bystanders.items() - self._oids().items():
            problems.append(f"bystanders are gone: {self._bystanders.items() - self._oids().items()}")
        self._report(problems)
        self.sell()

    def _report(self, problems: list[str]) -> None:
        self.tally.lost += len(problems)
        assert problems == []

    def _oids(self) -> dict[str, str]:
        rows = self.project.sql("SELECT datname, oid FROM pg_database", "postgres").splitlines()
        return {name: oid for name, oid in (row.split("|") for row in rows) if name in BYSTANDERS}

    def _reachable(self) -> bool:
        try:
            return self.project.sql("SELECT 1") == "1"
        except subprocess.CalledProcessError:
            return False


def _named(before: State, after: State, state: State) -> str:
    known = {content: f"{name} before" for name, content in before.items()}
    known |= {content: f"{name} afterwards" for name, content in after.items() if content not in known}
    return f"databases are now { ({name: known.get(content, 'unknown') for name, content in state.items()}) }"
