"""The main job of pgclone, on a small shop: `make demo`.

Starts a private PostgreSQL 18, fills the shop in examples/shop, then dumps, breaks and restores its database.
Every command is printed as you would type it. The server is gone at the end; the dump stays in .demo/, or where SHOP_DUMPS
says (a folder, or what a plugin serves: s3://bucket/prefix/).
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pgclone.testing import postgres

ROOT = Path(__file__).resolve().parent.parent
SHOP = ROOT / "examples" / "shop"
DUMPS = ROOT / ".demo" / "dumps"
LOCATION = os.environ.get("SHOP_DUMPS", f"{DUMPS.relative_to(ROOT)}/")

ROWS = 40_000
BOLD, DIM, GREEN, RED = "\033[1m", "\033[2m", "\033[32m", "\033[31m"
COLOURS = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class Wrong(Exception):
    """The demo did not go as it should."""


class Shop:
    """The shop's project, at a prompt."""

    def __init__(self, server: postgres.Server) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DJANGO_", "PYTHONPATH"))}
        path = [str(Path(sys.executable).parent), str(server.bin), os.environ.get("PATH", os.defpath)]
        self.environ = {
            **inherited,
            "PATH": os.pathsep.join(path),
            "PGHOST": server.host,
            "PGPORT": str(server.port),
            "PGUSER": "shop",
            "PGPASSWORD": "shop",
            "SHOP_DUMPS": os.environ.get("SHOP_DUMPS", str(DUMPS)),
        }

    def run(self, command: str, stdout: int | None = None) -> str:
        """Show a command and what it says."""
        show(f"$ {command}", BOLD)
        argv, quiet = shlex.split(command), subprocess.DEVNULL
        done = subprocess.run(argv, cwd=SHOP, env=self.environ, stdin=quiet, stdout=stdout, text=True)
        said = done.stdout or ""
        print(said, end="", flush=True)
        require(done.returncode == 0, f"This command failed, with exit status {done.returncode}: {command}")
        return said.strip()

    def ask(self, command: str) -> str:
        """Show a command and what it says, and return that."""
        return self.run(command, subprocess.PIPE)

    def report(self) -> str:
        """The state of the shop."""
        return self.ask("python manage.py report")

    def pgclone(self, command: str) -> None:
        self.run(f"python manage.py pgclone {command}")


def main() -> None:
    begun = time.monotonic()
    shutil.rmtree(DUMPS, ignore_errors=True)
    heading("A shop on a private PostgreSQL 18")
    with postgres.start() as server:
        server.psql("CREATE ROLE shop LOGIN CREATEDB PASSWORD 'shop'")
        server.psql("CREATE DATABASE shop OWNER shop")
        tour(Shop(server))
    seconds = time.monotonic() - begun
    show(f"\nAll of it went as it should, in {seconds:.0f} seconds. The server is stopped.", GREEN)
    show(f"The dump is in {LOCATION}, the project in {SHOP.relative_to(ROOT)}/.", DIM)


def tour(shop: Shop) -> None:
    shop.run("python manage.py migrate --verbosity 0")
    shop.run(f"python manage.py fill --rows {ROWS}")
    healthy = shop.report()

    heading("Dump the database")
    shop.pgclone("dump")
    keys = shop.ask("python manage.py pgclone ls").split()
    require(len(keys) == 1 and keys[0].startswith("demo/default/none/"), "One dump should be listed.")

    heading("An accident: two statements without a WHERE")
    shop.run('psql shop -c "UPDATE catalog_product SET price = 1" -c "DELETE FROM catalog_orderline"')
    damaged = shop.report()
    require(damaged != healthy, "The accident should show.")

    heading("Restore the latest dump, and keep what is replaced")
    shop.pgclone("restore demo --reversible")
    require(shop.report() == healthy, "The shop should be as it was dumped.")

    heading("Back to before the restore, and forth again")
    shop.pgclone("restore :pre")
    require(shop.report() == damaged, "The shop should be as it was before the restore.")
    shop.pgclone("restore :post")
    require(shop.report() == healthy, "The shop should be as it was after the restore.")

    heading("A local copy before something risky")
    shop.pgclone("copy :backup")
    shop.run('psql shop -c "DROP TABLE catalog_orderline, catalog_order"')
    shop.pgclone("restore :backup")
    require(shop.report() == healthy, "The shop should be as it was copied.")
    copies = shop.ask("python manage.py pgclone ls --local").split()
    require({":backup", ":shop__pre", ":shop__post"} <= {*copies}, "The copies should be listed.")

    heading("The same dump for developers: a hook masks the customers")
    shop.pgclone("restore --config masked")
    masked = shop.ask('psql shop -c "SELECT name, email, city FROM catalog_customer ORDER BY id LIMIT 2"')
    require("Customer 1 " in masked and "mail.test" not in masked, "The customers should be masked.")
    require(shop.report() == healthy, "Nothing else should have changed.")


def heading(text: str) -> None:
    show(f"\n== {text}", GREEN)


def show(text: str, colour: str) -> None:
    print(f"{colour}{text}\033[0m" if COLOURS else text, flush=True)


def require(holds: bool, expectation: str) -> None:
    if not holds:
        raise Wrong(expectation)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C: the server is stopped on the way out
        signal.signal(number, lambda *_: sys.exit(1))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some terminals cannot show every name
    try:
        main()
    except Wrong as error:
        show(f"\n{error}", RED)
        sys.exit(1)
    except KeyboardInterrupt:
        show("\nInterrupted. The server is stopped.", RED)
        sys.exit(130)
