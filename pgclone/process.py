"""The only place that starts processes: pg_dump, pg_restore and psql.

Arguments are lists, no shell sees them. Passwords travel in the environment of the child alone. A child never outlives
this process: it is terminated when a block ends with an exception, and on Linux by the kernel when this process is killed.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, BinaryIO, Literal

from pgclone import exceptions
from pgclone.database.connection import Conninfo, Session
from pgclone.events import log

Section = Literal["pre-data", "data", "post-data"]

_STDERR_BYTES = 16 * 1024 * 1024
_PIPE_BYTES = 1024 * 1024
"""What a pipe to or from a tool holds where Linux allows it, so that neither side waits for each few kilobytes."""
_CHATTER = re.compile(rb"pg_restore: (?!error: |warning: |hint: |detail: |while |from TOC entry )")
"""What pg_restore says besides when it is to name the archive entry of each error (--verbose)."""
_GRACE_SECONDS = 5

# Asks the kernel to send SIGTERM when the parent dies (prctl(2), PR_SET_PDEATHSIG = 1), then becomes the tool.
_UNTIL_PARENT_DIES = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]): sys.exit(1)
try: os.execv(sys.argv[2], sys.argv[2:])
except OSError as error: sys.exit(f"{sys.argv[2]} cannot be run: {error.strerror}.")
"""


@dataclass(frozen=True)
class Tools:
    """The client tools of PostgreSQL that were found, and the major version of pg_dump and pg_restore."""

    pg_dump: str
    pg_restore: str
    psql: str
    version: int
    text: str


class Child:
    """A running tool. What it writes to stderr is collected beside it."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.name = name
        self._process = process
        self._stderr = bytearray()
        self._collector = threading.Thread(target=self._collect, name=f"pgclone-{name}-stderr", daemon=True)
        self._collector.start()

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def read(self, size: int) -> bytes:
        """What it has written to its standard output, up to `size` bytes; none at the end."""
        assert isinstance(self.stdout, io.BufferedReader)
        return self.stdout.read1(size)

    def wait(self) -> int:
        """Wait for its end and return its exit status; a negative one is the signal that killed it."""
        status = self._process.wait()
        self._collector.join()
        return status

    def terminate(self) -> None:
        """Send it SIGTERM, which makes the tools cancel their statements in the server, and do not wait."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End it, if need be with SIGKILL."""
        self.terminate()
        for _ in range(_GRACE_SECONDS * 100):  # counted, not timed: tests may hold the clock
            if self._process.poll() is not None:
                return
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def errors(self) -> str:
        """What it wrote to stderr, at most 16 MiB."""
        return self._stderr.decode(errors="replace")

    def _collect(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                if len(self._stderr) < _STDERR_BYTES and not _CHATTER.match(line):
                    self._stderr += line


def find_tools(bin_dir: str = "") -> Tools:
    """Find pg_dump, pg_restore and psql, in `bin_dir` or on PATH.

    Raises:
        ToolFailed: One is missing or does not run.
    """
    paths = {}
    for name in ("pg_dump", "pg_restore", "psql"):
        found = shutil.which(name, path=bin_dir or None)
        if found is None:
            raise exceptions.ToolFailed(
                f"{name} was not found {f'in {bin_dir}' if bin_dir else 'on PATH'}.",
                "Install PostgreSQL's client tools (Debian: postgresql-client), or set PGCLONE_BIN_DIR to their folder.",
            )
        paths[name] = str(Path(found).absolute())
    text = min((_version(name, paths[name]) for name in ("pg_dump", "pg_restore")), key=_major)
    return Tools(**paths, version=_major(text), text=text)


def require_new_enough(tools: Tools, session: Session) -> None:
    """Refuse a pg_dump that is older than the server that it is to read from.

    Raises:
        ToolFailed: It is.
    """
    major = session.version // 10000
    if tools.version < major:
        server = session.value("SELECT current_setting('server_version')")
        raise exceptions.ToolFailed(
            f"pg_dump {tools.text} ({tools.pg_dump}) is too old for the server, which is {server}.",
            f"Install client tools of PostgreSQL {major} or newer, or set PGCLONE_BIN_DIR to their folder.",
        )


@contextlib.contextmanager
def pg_dump(
    tools: Tools, conninfo: Conninfo, *, snapshot: str, excluded: Sequence[str], encoding: str, lock_timeout: str = ""
) -> Iterator[Child]:
    """Dump a database as a custom-format archive, uncompressed, with owners and privileges.

    Its standard output is the archive. A clean end of the block means that pg_dump has succeeded.

    Args:
        snapshot: An exported snapshot, so that the archive shows what its exporter saw.
        excluded: Patterns of tables whose rows are left out.
        encoding: Of the database, as PostgreSQL names it.

    Raises:
        ToolFailed: pg_dump failed or was killed.
    """
    argv = [tools.pg_dump, "--format=custom", "--compress=0", "--no-password", f"--snapshot={snapshot}"]
    # pg_dump takes patterns for text in the encoding of its session, and ignores those that match nothing.
    argv.append(f"--encoding={encoding}")
    argv += [_encoded(f"--exclude-table-data={pattern}", encoding) for pattern in excluded]
    argv += [f"--lock-wait-timeout={lock_timeout}"] if lock_timeout else []
    argv += [*_connection(conninfo)]
    with _start(argv, conninfo, stdout=subprocess.PIPE) as child:
        yield child
        succeed(child)
        for line in child.errors.splitlines():
            log.warning("pg_dump_warned", line=line)


@contextlib.contextmanager
def pg_restore(
    tools: Tools,
    conninfo: Conninfo,
    *,
    section: Section,
    archive: Path | None,
    entries: Path | None = None,
    owner: bool = False,
    acl: bool = False,
    jobs: int = 1,
) -> Iterator[Child]:
    """Restore one section of an archive, going on after errors. The caller waits for it and judges status and errors.

    Args:
        archive: A file; None for standard input, which the caller feeds and closes.
        entries: A list of the entries to restore, as `table_of_contents` gives them.
        jobs: How many connections work at once; more than one only from a file.
    """
    argv = [tools.pg_restore, "--format=custom", "--no-password", "--verbose", f"--section={section}"]
    argv += [f"--use-list={entries}"] if entries else []
    argv += [f"--jobs={jobs}"] if jobs > 1 else []
    argv += [flag for flag, wanted in (("--no-owner", not owner), ("--no-acl", not acl)) if wanted]
    argv += [*_connection(conninfo), *([str(archive)] if archive else [])]
    with _start(argv, conninfo, stdin=None if archive else subprocess.PIPE) as child:
        yield child


@contextlib.contextmanager
def copy_out(tools: Tools, conninfo: Conninfo, statements: Sequence[str], encoding: str) -> Iterator[Child]:
    """Run statements in psql, one of which is a COPY to STDOUT: the rows are its standard output.

    A clean end of the block means that psql has succeeded.

    Args:
        statements: In order, in one session.
        encoding: Of the session and of the rows, as PostgreSQL names it.

    Raises:
        ServerError: The server refused a statement. `sqlstate` is set.
        ToolFailed: psql failed in another way, or was killed.
    """
    with _start([*_psql(tools, conninfo, statements, encoding)], conninfo, stdout=subprocess.PIPE) as child:
        yield child
        succeed(child)


class Loader:
    """psql with an open COPY from STDIN, inside a transaction that nothing but `commit` commits."""

    def __init__(self, child: Child, verdict: BinaryIO) -> None:
        self.child = child
        self._verdict = verdict
        os.set_blocking(child.stdin.fileno(), False)
        self._waiting = select.poll()
        self._waiting.register(child.stdin, select.POLLOUT)
        self._waiting.register(child.stdout, select.POLLIN)

    def write(self, block: bytes) -> None:
        """Send rows.

        Raises:
            ServerError, ToolFailed: psql has ended meanwhile, or its COPY has: there was a line with a backslash and a dot alone.
        """
        rows, view = self.child.stdin.fileno(), memoryview(block)
        while view:
            try:
                view = view[os.write(rows, view) :]
            except BlockingIOError:
                if self.child.stdout.fileno() in dict(self._waiting.poll()):
                    counted = self._count()
                    raise exceptions.ToolFailed(f"The server took {counted} rows, and then no more.") from None
            except BrokenPipeError:
                raise self._failed() from None

    def commit(self, rows: int) -> None:
        """End the COPY, and commit if the server has taken exactly this many rows.

        Raises:
            ServerError, ToolFailed: psql failed, the server counted other rows, or the COMMIT failed.
        """
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        counted = self._count()
        if counted != rows:
            raise exceptions.ToolFailed(f"The server took {counted} rows of {rows} that were sent to it.")
        with contextlib.suppress(BrokenPipeError):
            self._verdict.write(b"COMMIT;\n\\echo committed\n")
            self._verdict.close()
        if self.child.stdout.read().strip() != b"committed" or self.child.wait() != 0:
            raise self._failed()

    def _count(self) -> int:
        counted = self.child.stdout.readline()
        if not counted:
            raise self._failed()
        return int(counted)

    def _failed(self) -> exceptions.PgcloneError:
        return _psql_failed(self.child, self.child.wait())


@contextlib.contextmanager
def copy_in(tools: Tools, conninfo: Conninfo, statements: Sequence[str], encoding: str) -> Iterator[Loader]:
    """Load rows by psql, whose last statement is a COPY from STDIN inside a transaction.

    psql takes the end of its input for the end of the rows, and would commit whatever it got. So rows and verdict come by
    different pipes: after the rows, psql reads COMMIT from the second one, or its end, which rolls back. Nothing in the
    rows can become a command, either.

    Raises:
        ServerError: The server refused a statement or a row. `sqlstate` is set.
        ToolFailed: psql failed in another way, or was killed.
    """
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as verdict:
        try:
            argv = [
                *_psql(tools, conninfo, statements, encoding),
                "--command=\\echo :ROW_COUNT",
                f"--file=/dev/fd/{reading}",
            ]
            starting = _start(argv, conninfo, stdin=subprocess.PIPE, stdout=subprocess.PIPE, inherit=[reading])
            with starting as child:
                os.close(reading)
                reading = -1
                yield Loader(child, verdict)
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()
                verdict.close()
        finally:
            if reading >= 0:
                os.close(reading)


def table_of_contents(tools: Tools, archive: Path) -> str | None:
    """The archive's table of contents (`pg_restore --list`); None when the file does not hold all of it.

    A custom-format archive that was written to a pipe has its table of contents at its head: each strict prefix of that
    head is an error, more than the head is harmless.
    """
    with _start([tools.pg_restore, "--list", str(archive)], stdout=subprocess.PIPE) as child:
        text = child.stdout.read()
        if child.wait() == 0:
            encoding = _encoding(_script(tools, archive, Path(os.devnull)))
            return text.decode(encoding, errors="replace")
        if "unsupported version" in child.errors:
            raise exceptions.ToolFailed(
                f"The dump was made by a newer pg_dump than pg_restore {tools.text} can read: {child.errors.strip()}",
                "Install client tools at least as new as the ones that made it, or set PGCLONE_BIN_DIR to their folder.",
            )
        return None


def statements(tools: Tools, archive: Path, entries: Path) -> str:
    """The SQL that pg_restore would send for some entries of an archive."""
    script = _script(tools, archive, entries)
    return script.decode(_encoding(script), errors="replace")


def _script(tools: Tools, archive: Path, entries: Path) -> bytes:
    argv = [tools.pg_restore, "--format=custom", "--file=-", f"--use-list={entries}", "--no-owner", "--no-acl"]
    with _start([*argv, str(archive)], stdout=subprocess.PIPE) as child:
        script = child.stdout.read()
        status = child.wait()
        if status != 0:
            raise failed(child, status)
        return script


def _encoding(script: bytes) -> str:
    """Python's name for the encoding of an archive, which is that of the dumped database."""
    match = re.search(rb"^SET client_encoding = '(\w+)';", script, re.MULTILINE)
    return _python_encoding(match[1].decode() if match else "UTF8")


def _python_encoding(name: str) -> str:
    """Python's name for an encoding of PostgreSQL's; UTF-8 for SQL_ASCII, which says nothing about its bytes."""
    name = {"KOI8R": "koi8_r", "KOI8U": "koi8_u"}.get(name, re.sub(r"^WIN", "cp", name))
    try:
        return codecs.lookup(name).name
    except LookupError:
        return "utf-8"


def _psql(tools: Tools, conninfo: Conninfo, statements: Sequence[str], encoding: str) -> Iterator[str]:
    yield from (tools.psql, "--no-psqlrc", "--quiet", "--no-password", f"--dbname={conninfo.dsn}")
    yield from ("--set=ON_ERROR_STOP=1", "--set=VERBOSITY=verbose")
    yield f"--command=SET client_encoding = '{encoding}'"
    yield from (_encoded(f"--command={statement}", encoding) for statement in statements)


def _encoded(argument: str, encoding: str) -> str:
    """An argument that the tool takes for text in the encoding of the database."""
    return os.fsdecode(argument.encode(_python_encoding(encoding)))


def succeed(child: Child) -> None:
    """Wait for a tool that must end with status 0.

    Raises:
        ServerError, ToolFailed: It does not.
    """
    status = child.wait()
    if status != 0:
        raise _psql_failed(child, status) if child.name == "psql" else failed(child, status)


def _psql_failed(child: Child, status: int) -> exceptions.PgcloneError:
    """What the server said, if psql failed because of that."""
    # The severity comes in the server's language.
    said = re.findall(r"^(?:psql:\S+ )?\w+:  ([0-9A-Z]{5}): (.*)", child.errors, re.MULTILINE)
    if not said:
        return failed(child, status)
    sqlstate, message = said[-1]  # what came before were warnings
    place = re.search(r"^CONTEXT:  (COPY [^:]*)", child.errors, re.MULTILINE)  # what follows is the row
    return exceptions.ServerError(f"{message}{f' ({place[1]})' if place else ''}", sqlstate=sqlstate)


def failed(child: Child, status: int) -> exceptions.ToolFailed:
    """The error for a tool that failed or was killed, with the first lines of what it said."""
    said = "\n".join(child.errors.strip().splitlines()[:12])
    how = (
        f"was killed by signal {-status} ({signal.strsignal(-status)})"
        if status < 0
        else f"failed with status {status}"
    )
    return exceptions.ToolFailed(f"{child.name} {how}{f': {said}' if said else '.'}")


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `Terminated`, so that every block cleans up, as Ctrl-C does already.

    Where they are handled by somebody else, or outside the main thread, nothing changes.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise exceptions.Terminated(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _start(
    argv: Sequence[str],
    conninfo: Conninfo | None = None,
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    inherit: Sequence[int] = (),
) -> Iterator[Child]:
    # PGOPTIONS is part of the conninfo string; another encoding than the database's would end up in the archive.
    environ = {key: value for key, value in os.environ.items() if key not in ("PGOPTIONS", "PGCLIENTENCODING")}
    process = subprocess.Popen(
        _until_parent_dies(argv),
        stdin=stdin or subprocess.DEVNULL,
        stdout=stdout or subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**environ, "LC_ALL": "C", **(conninfo.environ if conninfo else {})},
        start_new_session=True,  # Ctrl-C is for this process: it stops the child in its own time
        pass_fds=inherit,
    )
    for pipe in (process.stdin, process.stdout):
        _enlarge(pipe)
    child = Child(process, Path(argv[0]).name)
    try:
        yield child
        child.wait()
    finally:
        child.stop()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _enlarge(pipe: IO[bytes] | None) -> None:
    if pipe is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # the user's pipes have reached their limit
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _until_parent_dies(argv: Sequence[str]) -> list[str]:
    embedded = not Path(sys.executable or "").name.startswith("python")  # in uwsgi, for one
    if sys.platform != "linux" or embedded:
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _UNTIL_PARENT_DIES, str(os.getpid()), *argv]


def _connection(conninfo: Conninfo) -> Iterator[str]:
    yield f"--dbname={conninfo.dsn}"
    if conninfo.role:
        yield f"--role={conninfo.role}"


def _version(name: str, path: str) -> str:
    try:
        with _start([path, "--version"], stdout=subprocess.PIPE) as child:
            text = child.stdout.read().decode(errors="replace")
            status = child.wait()
    except OSError as error:
        raise exceptions.ToolFailed(
            f"{path} cannot be run: {error.strerror}.", "Reinstall PostgreSQL's client tools."
        ) from error
    match = re.search(r"\d+(\.\d+)?", text)
    if status != 0 or match is None:
        raise exceptions.ToolFailed(
            f"{path} is not {name}: it does not tell its version.", "Reinstall PostgreSQL's client tools."
        )
    return match[0]


def _major(version: str) -> int:
    return int(version.partition(".")[0])
