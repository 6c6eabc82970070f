"""Measures dump and restore beside django-pgclone 3.8.0 (from PyPI) on one database, in turn, in one run.

    python benchmarks/beside_predecessor.py --gigabytes 1 --rounds 3

Both use local storage and the same server, and run as `manage.py pgclone …` in processes of their own. Restores are
measured without hooks, with pgclone's ANALYZE included. Prints wall seconds, CPU seconds of the client side, and sizes:
medians, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pgclone.testing.postgres import Server, start

SETTINGS = """
import json, os
SECRET_KEY = "benchmark"
INSTALLED_APPS = ["pgclone"]
DATABASES = {"default": json.loads(os.environ["BENCH_DATABASE"])}
PGCLONE_STORAGE_LOCATION = os.environ["BENCH_STORAGE"]
PGCLONE_INSTANCE = "bench"
PGCLONE_PRE_SWAP_HOOKS = []
"""

# What a Django project has: one large table with text, jsonb and foreign keys, some smaller ones, indexes.
SCHEMA = """
CREATE TABLE customer (id bigint PRIMARY KEY, email text UNIQUE, name text, joined timestamptz, profile jsonb);
CREATE TABLE item (id bigint PRIMARY KEY, customer_id bigint REFERENCES customer, sku text, price numeric(10,2), note text);
CREATE TABLE event (id bigint PRIMARY KEY, customer_id bigint REFERENCES customer, at timestamptz, kind text, payload jsonb);
INSERT INTO customer SELECT n, 'user' || n || '@example.org', 'Name ' || md5(n::text), now() - n * interval '1 minute',
    jsonb_build_object('city', md5((n % 5000)::text), 'tags', array[md5(n::text), 'a', 'b'], 'n', n)
    FROM generate_series(1, {customers}) n;
INSERT INTO item SELECT n, 1 + n % {customers}, 'sku-' || n % 90000, n % 10000 / 7.0, repeat(md5((n * 7)::text) || ' ', 3)
    FROM generate_series(1, {customers} * 4) n;
INSERT INTO event SELECT n, 1 + n % {customers}, now() - n * interval '1 second', 'kind ' || n % 40,
    jsonb_build_object('url', '/path/' || md5((n % 100000)::text), 'ms', n % 3000, 'agent', 'browser ' || n % 50)
    FROM generate_series(1, {customers} * 9) n;
CREATE INDEX ON item (customer_id); CREATE INDEX ON item (sku);
CREATE INDEX ON event (customer_id); CREATE INDEX ON event (at); CREATE INDEX ON event (kind, at);
VACUUM ANALYZE;
"""
CUSTOMERS_PER_GIGABYTE = 285_000


@dataclass(frozen=True)
class Measured:
    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pgclone-bench-") as folder, start() as server:
        root = Path(folder)
        predecessor = install_predecessor(Path(__file__).parent.parent / ".bench")
        pythons = {"pgclone": Path(sys.executable), "django-pgclone 3.8.0": predecessor}
        (root / "bench_settings.py").write_text(SETTINGS)
        # django-pgclone puts the password into a URL on a shell's command line: this one is safe there.
        server.psql("CREATE ROLE bench SUPERUSER LOGIN PASSWORD 'bench'")
        server.psql("CREATE DATABASE bench OWNER bench")
        for statement in SCHEMA.format(customers=int(options.gigabytes * CUSTOMERS_PER_GIGABYTE)).split(";\n"):
            if statement.strip():
                server.psql(statement, "bench")
        size = server.psql("SELECT pg_size_pretty(pg_database_size('bench'))")
        results: dict[tuple[str, str], list[Measured]] = {}
        for _ in range(options.rounds):
            for name, python in pythons.items():
                for command in (["dump"], ["restore", "bench"]):
                    measured = run(root, server, name, python, command)
                    results.setdefault((name, command[0]), []).append(measured)
        report(size, root, results)


def install_predecessor(folder: Path) -> Path:
    """A virtual environment with django-pgclone, which is imported under the same name as this project."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        packages = ["django-pgclone==3.8.0", "psycopg2-binary"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def run(root: Path, server: Server, name: str, python: Path, command: Sequence[str]) -> Measured:
    storage = root / name.split()[0]
    environ = {
        **server.environ(),
        "PYTHONPATH": str(root),
        "DJANGO_SETTINGS_MODULE": "bench_settings",
        "BENCH_DATABASE": json.dumps(server.settings("bench", USER="bench", PASSWORD="bench")),
        "BENCH_STORAGE": f"{storage}/",
        "SHELL": "/bin/bash",
    }
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # In a folder of its own, since Python looks for the package `pgclone` in the working directory first.
    argv = [python, "-m", "django", "pgclone", *command]
    done = subprocess.run(argv, env=environ, cwd=root, capture_output=True, text=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{name} {command[0]} failed: {done.stderr}{done.stdout}")
    return Measured(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def report(size: str, root: Path, results: dict[tuple[str, str], list[Measured]]) -> None:
    print(f"database: {size}, {os.cpu_count()} cores, medians of {len(next(iter(results.values())))} rounds\n")
    print(f"{'':24}{'dump s':>9}{'cpu s':>8}{'MB':>7}{'restore s':>11}{'cpu s':>8}")
    medians = {}
    for name in dict.fromkeys(name for name, _ in results):
        dump, restore = (
            [statistics.median(values) for values in zip(*((m.wall, m.cpu) for m in results[name, command]))]
            for command in ("dump", "restore")
        )
        newest = max((root / name.split()[0]).rglob("*.dump"), key=lambda path: path.stat().st_mtime)
        medians[name] = [*dump, newest.stat().st_size / 1e6, *restore]
        print(f"{name:24}{dump[0]:9.1f}{dump[1]:8.1f}{medians[name][2]:7.0f}{restore[0]:11.1f}{restore[1]:8.1f}")
    ours, theirs = medians.values()
    ratios = [their / our for our, their in zip(ours, theirs)]
    print(f"{'theirs / ours':24}{ratios[0]:9.1f}{ratios[1]:8.1f}{ratios[2]:7.2f}{ratios[3]:11.1f}{ratios[4]:8.1f}")


if __name__ == "__main__":
    main()
