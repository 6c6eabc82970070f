"""How long nobody gets an answer while databases are swapped under load.

    python benchmarks/swap_gap.py [--swaps 100] [--clients 20] [--bin DIR ...]

Clients query the primary and reconnect in a tight loop while one swap after the other takes place. The gap of a swap
is the longest time in which no client at all got an answer; beside it, the longest time that one client had to wait.
"""

from __future__ import annotations

import argparse
import array
import itertools
import multiprocessing
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import django
from django.conf import settings

from pgclone import exceptions
from pgclone.database import names
from pgclone.database.connection import Server
from pgclone.database.swap import swap
from pgclone.testing import postgres

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
QUERIES = 5
PROCESSES = 2
RESOLUTION = 0.0002  # seconds between two answers of a client that are both written down


@dataclass(frozen=True)
class Result:
    version: str
    failures: list[str]
    seconds: list[float]
    gaps: list[float]
    waits: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument(
        "--bin", type=Path, action="append", help="binaries of a server (default: 18, and 15 if it is there)"
    )
    options = parser.parse_args()
    settings.configure(USE_TZ=True)
    django.setup()
    servers = options.bin or [postgres.embedded(), *([DEBIAN_15] if DEBIAN_15.is_dir() else [])]
    print(f"{options.swaps} swaps under {options.clients} clients, in milliseconds\n")
    print(f"{'PostgreSQL':12}{'failures':>9}{'swap':>8}{'max':>7}{'gap':>8}{'max':>7}{'client':>9}{'max':>7}")
    failed = 0
    for binaries in servers:
        result = measure(binaries, options.swaps, options.clients)
        columns = [
            f(values) * 1000 for values in (result.seconds, result.gaps, result.waits) for f in (statistics.median, max)
        ]
        print(
            f"{result.version:12}{len(result.failures):9}"
            + "".join(f"{c:{w}.0f}" for c, w in zip(columns, (8, 7, 8, 7, 9, 7)))
        )
        print(*result.failures, sep="\n", file=sys.stderr, end="")
        failed += len(result.failures)
    print("\nswap: the whole call; gap: no client got an answer; client: one client got none (median and maximum)")
    return 1 if failed else 0


def measure(binaries: Path, swaps: int, clients: int) -> Result:
    with postgres.start(binaries) as private:
        trust(private)
        server = Server("default", {**private.settings("app"), **COMPLETED}, "postgres")
        private.psql("CREATE DATABASE app")
        private.psql("CREATE DATABASE app__temp TEMPLATE app")
        load = Load(private, clients)
        failures, windows = [], []
        for number in range(swaps):
            private.psql(f"COMMENT ON DATABASE app__temp IS '{names.Marker('temp', 'app', '0' * 12)}'")
            started = time.monotonic()
            try:
                swap(server, database="app", restored="app__temp", run="0" * 12, keep=False)
                ended = time.monotonic()
            except exceptions.PgcloneError as error:
                failures.append(f"swap {number}: {error}")
                ended = time.monotonic()
            else:  # the old database is the next one to be swapped in
                time.sleep(0.3)
                private.psql("ALTER DATABASE app__swap RENAME TO app__temp")
            windows.append((started, ended))
        answers = load.stop()
        version = private.psql("SHOW server_version").split()[0]
    together = sorted(itertools.chain.from_iterable(answers))
    return Result(
        version,
        failures,
        [end - begin for begin, end in windows],
        [longest_gap(together, begin, end + 0.3) for begin, end in windows],
        [max(longest_gap(one, begin, end + 0.3) for one in answers) for begin, end in windows],
    )


COMPLETED: dict[str, Any] = {
    "OPTIONS": {}, "TIME_ZONE": None, "AUTOCOMMIT": True, "ATOMIC_REQUESTS": False,
    "CONN_MAX_AGE": 0, "CONN_HEALTH_CHECKS": False, "TEST": {},
}  # fmt: skip


def trust(private: postgres.Server) -> None:
    """Let everybody in without a password: hashing it would be most of the load."""
    (private.data / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 trust\n")
    private.psql("SELECT pg_reload_conf()")


def longest_gap(answers: Any, begin: float, end: float) -> float:
    """The longest time between two answers of which the first, or both, came within the window."""
    near = [t for t in answers if begin - 0.3 <= t <= end]
    return max((b - a for a, b in zip([begin - 0.3, *near], [*near, end])), default=end - begin)


class Load:
    """Clients in threads of a few processes, so that they do not wait for each other's interpreter."""

    def __init__(self, private: postgres.Server, clients: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        dsn = f"host={private.sockets} port={private.port} user={private.user} dbname=app"
        for number in range(PROCESSES):
            ours, theirs = context.Pipe()
            count = len(range(number, clients, PROCESSES))
            process = context.Process(target=work, args=(theirs, dsn, count))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def stop(self) -> list[Any]:
        """The times of the answers, client by client."""
        for pipe in self._pipes:
            pipe.send("stop")
        answers = [one for pipe in self._pipes for one in pipe.recv()]
        for process in self._processes:
            process.join()
        return answers


def work(pipe: Connection, dsn: str, count: int) -> None:
    try:
        import psycopg2 as driver
    except ImportError:
        import psycopg as driver  # type: ignore[no-redef]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libpq says there that it was cut off
    stop = threading.Event()
    answers = [array.array("d") for _ in range(count)]

    def client(times: Any) -> None:
        last = 0.0
        while not stop.is_set():
            try:
                connection = driver.connect(dsn)
                try:
                    cursor = connection.cursor()
                    for _ in range(QUERIES):
                        cursor.execute("SELECT 1")
                        now = time.monotonic()
                        if now - last > RESOLUTION:
                            times.append(now)
                            last = now
                finally:
                    connection.close()
            except driver.Error:
                pass

    threads = [threading.Thread(target=client, args=(times,)) for times in answers]
    for thread in threads:
        thread.start()
    while not all(answers):
        time.sleep(0.01)
    pipe.send("ready")
    pipe.recv()
    stop.set()
    for thread in threads:
        thread.join()
    pipe.send(answers)


if __name__ == "__main__":
    sys.exit(main())
