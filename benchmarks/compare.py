"""Measures pgclone beside its predecessor and the tools that people use instead, on one database, in turn, in one run.

    python benchmarks/compare.py --gigabytes 1.5 --rounds 3
    python benchmarks/compare.py --only dump,restore --contenders "pgclone*" "pg_*"

    dump      pgclone, django-pgclone, django-dbbackup, pg_dump: to local files
    restore   the same, and pg_restore: from local files
    copy      pgclone, django-pgclone, DSLR, createdb, pgcopydb: on the same server
    s3        pgclone: to and from a private S3 at 30 ms, beside local files
    memory    pgclone: the peak of its memory while it dumps 20 GB (or --gigabytes) with four jobs
    ls        pgclone ls with 1,000 dumps, beside manage.py check

Each contender is a process of its own, measured with all its descendants (gauge.py). Before each, what the others have
made is deleted, the disks are synchronized and the server makes a checkpoint, so that nobody pays for somebody else.
Prints medians, ratios and targets, and writes a table and a chart for each suite. Other tools are installed into
.bench; what cannot be installed is left out, and that is said.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import populate
import report
from contenders import SOURCE, Bench, Contender, Job
from report import Results
from store import start_s3
from tools import PASSWORD, USER, Unavailable, list_versions

from pgclone.testing import postgres
from pgclone.testing.postgres import Server

GIGABYTES = 1.5
MEMORY_GIGABYTES = 20.0
KEYS = 1000
LS_ROUNDS = 10

TITLES = {
    "dump": "Dump",
    "restore": "Restore",
    "copy": "Copy",
    "s3": "Dump and restore with S3 beside local files",
    "memory": "Memory of a large dump",
    "ls": "List 1,000 dumps",
}

# Vacuum and analyze come when they like, and would be somebody's.
CONFIG = {"autovacuum": "off"}
UNSAFE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}


class Failed(Exception):
    """A contender did not do its work."""


@dataclass(frozen=True)
class Choice:
    """What is asked for on the command line."""

    suites: tuple[str, ...]
    contenders: tuple[str, ...]
    gigabytes: float | None
    rounds: int
    memory: bool
    results: Path


def main() -> int:
    choice = parse_arguments()
    every: list[Results] = []
    on_shop = [suite for suite in choice.suites if suite != "memory"]
    if on_shop:
        gigabytes = choice.gigabytes or GIGABYTES
        with open_bench(choice.memory, CONFIG) as bench:
            if on_shop != ["ls"]:
                say(f"Making a database of {gigabytes:g} GB")
                populate.build(bench.server, SOURCE, USER, gigabytes)
            for suite in on_shop:
                every.append(run_suite(bench, suite, choice, gigabytes))
    if "memory" in choice.suites:
        gigabytes = choice.gigabytes or MEMORY_GIGABYTES
        with open_bench(choice.memory, {**CONFIG, **UNSAFE}) as bench:
            say(f"Making a database whose dump is {gigabytes:g} GB before compression")
            populate.build_wide(bench.server, SOURCE, USER, gigabytes)
            every.append(run_suite(bench, "memory", choice, gigabytes))
    say(f"\nTargets, for two cores and {GIGABYTES} GB\n\n{report.tabulate_targets(every)}")
    return 1 if any(reason.startswith("failed") for results in every for reason in results.missing.values()) else 0


def parse_arguments() -> Choice:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, help=f"of the database ({GIGABYTES}; memory: {MEMORY_GIGABYTES:g})")
    parser.add_argument(
        "--rounds", type=int, default=3, help=f"of each suite; memory: always 1, ls: {LS_ROUNDS} at least"
    )
    parser.add_argument("--only", default=",".join(TITLES), help="suites, with commas between them")
    parser.add_argument(
        "--contenders", nargs="+", default=["*"], metavar="PATTERN", help="names, which may have * in them"
    )
    parser.add_argument("--memory", action="store_true", help="everything in /dev/shm, not on the disk")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    options = parser.parse_args()
    suites = tuple(options.only.split(","))
    if unknown := set(suites) - {*TITLES}:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}. There are {', '.join(TITLES)}.")
    return Choice(
        tuple(suite for suite in TITLES if suite in suites),
        tuple(options.contenders),
        options.gigabytes,
        options.rounds,
        options.memory,
        options.results,
    )


@contextmanager
def open_bench(memory: bool, config: dict[str, str]) -> Iterator[Bench]:
    """A server, and a folder for everything else, on the disk or in memory."""
    tempfile.tempdir = "/dev/shm" if memory else None
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgclone-bench-")))
        server = stack.enter_context(postgres.start(config=config))
        server.psql(f"CREATE ROLE {USER} SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
        yield Bench(server, root, perform=lambda job: measure(server, root, job))


def run_suite(bench: Bench, suite: str, choice: Choice, gigabytes: float) -> Results:
    rounds = {"memory": 1, "ls": max(LS_ROUNDS, choice.rounds)}.get(suite, choice.rounds)
    say(f"\n{TITLES[suite]}, {rounds} round{'s' * (rounds > 1)}")
    with ExitStack() as stack:
        stack.callback(bench.forget)
        contenders = [
            contender
            for contender in list_contenders(bench, suite, stack)
            if any(fnmatchcase(contender.name, pattern) for pattern in choice.contenders)
        ]
        runs, missing = run_rounds(bench, contenders, rounds)
    ours = frozenset(contender.name for contender in contenders if contender.ours)
    results = Results(suite, TITLES[suite], runs, ours, missing, lambda name: find_reference(suite, name, list(runs)))
    say(f"\n{report.tabulate(results)}")
    for name, reason in missing.items():
        say(f"{name}: {reason}")
    facts = {
        **list_versions(bench.server),
        "place": "memory" if choice.memory else "disk",
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "rounds": str(rounds),
        **describe_database(bench, suite, gigabytes),
    }
    report.write(results, facts, choice.results)
    return results


def list_contenders(bench: Bench, suite: str, stack: ExitStack) -> Sequence[Contender]:
    if suite in ("s3", "memory"):
        store = stack.enter_context(start_s3())
        return bench.s3_contenders(store) if suite == "s3" else bench.memory_contenders(store)
    if suite == "ls":
        return bench.ls_contenders(KEYS)
    return {"dump": bench.dump_contenders, "restore": bench.restore_contenders, "copy": bench.copy_contenders}[suite]()


def find_reference(suite: str, name: str, names: Sequence[str]) -> str:
    """Whom a contender is compared with: local files for S3, `check` for `ls`, else the last pgclone of the table."""
    if suite == "s3":
        return f"{name.partition(',')[0]}, files"
    if suite == "ls":
        return "manage.py check"
    if suite == "copy":
        return "pgclone copy"
    return next((one for one in ("pgclone --jobs 2", "pgclone") if one in names), "")


def describe_database(bench: Bench, suite: str, gigabytes: float) -> dict[str, str]:
    if suite == "ls":
        return {"dumps": str(KEYS)}
    size = float(bench.server.psql(f"SELECT pg_database_size('{SOURCE}')")) / 1e9
    asked = {"--gigabytes": f"{gigabytes:g}", "database": f"{size:.2f} GB"}
    if suite == "memory":
        return asked
    largest = float(bench.server.psql("SELECT pg_total_relation_size('event')", SOURCE)) / 1e9
    return {**asked, "tables": f"{bench.shape.tables}, the largest has {largest / size:.0%} of the bytes"}


def run_rounds(
    bench: Bench, contenders: Sequence[Contender], rounds: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """The runs of each contender, and why others are missing: one that fails once does not go on."""
    runs: dict[str, list[dict[str, float]]] = {}
    missing: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for contender in contenders:
            if contender.name in missing:
                continue
            try:
                with contender.prepare() as job:
                    settle(bench.server)
                    numbers = measure(bench.server, bench.root, job)
                    verify(bench, job)
                    numbers |= job.count()
            except Unavailable as error:
                missing[contender.name] = f"was skipped: {error}"
            except Failed as error:
                missing[contender.name] = (
                    f"was skipped, since it does not work here: {error}" if contender.guest else f"failed: {error}"
                )
            else:
                runs.setdefault(contender.name, []).append(numbers)
                say(f"  {number}  {contender.name:40} {numbers['wall']:8.2f} s")
            if contender.name in missing:
                runs.pop(contender.name, None)
                say(f"  {number}  {contender.name:40} {missing[contender.name]}")
    return {contender.name: runs[contender.name] for contender in contenders if contender.name in runs}, missing


def settle(server: Server) -> None:
    """Nobody pays for what others have left to write."""
    server.psql("CHECKPOINT")
    os.sync()


def measure(server: Server, root: Path, job: Job) -> dict[str, float]:
    """Run a job in the gauge."""
    log = root / "log"
    log.unlink(missing_ok=True)
    postmaster = int((server.data / "postmaster.pid").read_text().splitlines()[0])
    order: dict[str, Any] = {
        "steps": [{"pipeline": step.pipeline, "output": step.output and str(step.output)} for step in job.steps],
        "environ": dict(job.environ),
        "folder": str(job.folder),
        "log": str(log),
        "watched": {"server": [postmaster], "store": job.store},
    }
    gauge = [sys.executable, "-S", str(Path(__file__).with_name("gauge.py"))]
    done = subprocess.run(gauge, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout)
    said = log.read_text(errors="replace") if log.exists() else ""
    if answer["failed"]:
        raise Failed(f"{answer['failed']} failed: {' '.join(said.split())[-300:]}")
    if answer["escaped"]:
        raise Failed(f"it left {answer['escaped']} processes behind")
    numbers = {key: float(answer[key]) for key in ("wall", "client", "largest", "python")}
    return (
        numbers | {"server": answer["watched"]["server"]} | ({"store": answer["watched"]["store"]} if job.store else {})
    )


def verify(bench: Bench, job: Job) -> None:
    """What was restored or copied has all tables, indexes and foreign keys, and the rows of the largest table."""
    if job.makes is None:
        return
    names = [name for name in bench.databases() if fnmatchcase(name, job.makes)]
    if len(names) != 1:
        raise Failed(f"it made {names or 'nothing'}")
    with contextlib.suppress(subprocess.CalledProcessError):
        if populate.describe(bench.server, names[0]) == bench.shape:
            return
    raise Failed("what it made is not complete")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
