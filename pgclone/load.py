"""Loads an archive, and the rows beside it, into an empty database, and proves that it is all there.

The stream is read once. Its head, a few kilobytes, goes to a temporary file, since it is needed before the data
(tables), and after it (indexes, constraints): pg_restore does the three sections of an archive one by one.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgclone import exceptions, parts, process, toc, verdict
from pgclone.archive import ForeignKey, Manifest
from pgclone.crew import Crew, crew
from pgclone.database import catalogue
from pgclone.database.connection import Conninfo, Server, Session
from pgclone.events import log
from pgclone.parts import Progress, Reader, Rows
from pgclone.process import Child, Tools
from pgclone.streams import BLOCK, Digest
from pgclone.toc import Contents

_FOREIGN_KEY_VIOLATION = "23503"
_NOT_VALID_ON_PARTITIONED = 180000
_UNKNOWN = "SQL_ASCII"


@dataclass(frozen=True)
class Loading:
    """How an archive is to be loaded: what the options say of it."""

    owner: bool = False
    acl: bool = False
    allow_errors: tuple[str, ...] = ()
    allow_missing_fk: bool = False
    jobs: int = 1


@contextlib.contextmanager
def open_archive(tools: Tools, read: Callable[[int], bytes]) -> Iterator[Contents]:
    """Read the head of a dump, keep it in a temporary file for the time of the block.

    Raises:
        CorruptDump: The stream is no complete archive.
        ToolFailed: pg_restore is too old for it.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pgclone-"))
            contents = toc.read_contents(tools, read, Path(folder))
        except OSError as error:
            raise exceptions.RuntimeError(
                f"The head of the dump could not be kept in {tempfile.gettempdir()}: {error.strerror}.",
                "Make room there, or set TMPDIR to another folder.",
            ) from error
        yield contents


def load_rows(
    tools: Tools,
    server: Server,
    database: str,
    contents: Contents,
    archive: Reader,
    rows: Sequence[Rows],
    encoding: str,
    loading: Loading,
    progress: Progress = lambda count: None,
) -> None:
    """Load the tables of an archive, and all rows, into an empty database.

    The rows of the archive and those beside it come side by side, on as many connections as there are jobs. Nothing but the
    head of the archive is kept anywhere.

    Args:
        archive: What follows its head.
        rows: Those beside the archive.
        encoding: Theirs, as PostgreSQL names it.
        progress: Called with numbers of bytes that were read.

    Raises:
        ToolFailed: pg_restore or psql failed, or had errors that are neither harmless nor allowed.
        CorruptDump: A stream is damaged, or not what was dumped.
    """
    if twice := toc.tables_with_rows(contents, {one.oid for one in rows}):
        raise exceptions.CorruptDump(f"The dump has the rows of {', '.join(twice)} twice.", "Restore another dump.")
    conninfo = _conninfo(server, database)
    pg_restore = _pg_restore(tools, conninfo, loading)
    with pg_restore(section="pre-data", archive=contents.head) as child:
        verdict.judge(child, contents.names, loading.allow_errors)
    if encoding == _UNKNOWN:  # the server looks at no byte then, in a database of any encoding
        with server.connect(database) as session:
            encoding = catalogue.shape(session).encoding
    tasks = [functools.partial(parts.load, tools, conninfo, encoding, one, progress) for one in rows]
    with crew(tasks, loading.jobs - 1) as workers:
        with (
            pg_restore(section="data", archive=None) as child,
            workers.ending(child.terminate),
            workers.ending(archive.end),
        ):
            complete = _feed(child, contents, archive, progress, workers)
            workers.check()
            if not complete:  # a pg_restore that has died does not wait for the rest
                verdict.judge(child, contents.names)
            archive.prove(0)
            verdict.judge(child, contents.names)
        workers.hire()
        workers.wait(lambda: progress(0))


def build_indexes(
    tools: Tools,
    server: Server,
    database: str,
    contents: Contents,
    foreign_keys: Sequence[ForeignKey],
    loading: Loading,
) -> None:
    """Build the indexes and constraints of an archive, and what else follows the rows, on as many connections as there are
    jobs.

    Args:
        foreign_keys: Those that point to rows which were left out of the dump. They come back NOT VALID when rows are
            missing.

    Raises:
        ToolFailed: pg_restore failed, or had errors that are neither harmless nor allowed.
    """
    pg_restore = _pg_restore(tools, _conninfo(server, database), loading)
    entries = toc.without(contents, foreign_keys)
    jobs = _jobs_for_indexes(tools, server, loading)
    with pg_restore(section="post-data", archive=contents.head, entries=entries, jobs=jobs) as child:
        verdict.judge(child, contents.names, loading.allow_errors, jobs=jobs)
    with server.connect(database) as session:
        added = [
            foreign_key
            for foreign_key in foreign_keys
            if _add_foreign_key(tools, session, contents, foreign_key, loading.allow_missing_fk)
        ]
    if comments := toc.only_comments(contents, added):
        with pg_restore(section="post-data", archive=contents.head, entries=comments) as child:
            verdict.judge(child, contents.names, loading.allow_errors)


def prove(manifest: Manifest | None, key: str, digest: Digest, raw_size: int) -> None:
    """Compare what came out of the storage with what the manifest says went in.

    Raises:
        CorruptDump: They differ.
    """
    if manifest is None:
        log.warning("dump_without_manifest", key=key)
        return
    if digest != manifest.digest or raw_size != manifest.raw_size:
        raise exceptions.CorruptDump(
            f'The dump "{key}" is not what was dumped: {digest.size} bytes with SHA-256 {digest.sha256[:16]}…, '
            f"where the manifest has {manifest.stored_size} bytes with {manifest.sha256[:16]}….",
            "Nothing was swapped in. Restore another dump.",
        )


def prove_objects(
    server: Server, database: str, contents: Contents, loading: Loading, absent: Sequence[ForeignKey]
) -> None:
    """Compare what the archive lists with what the database has.

    Raises:
        CorruptDump: Something that the archive lists is not there.
    """
    with server.connect(database) as session:
        missing = toc.missing_objects(contents, catalogue.objects(session))
        excused = [*loading.allow_errors, *(f"FK CONSTRAINT {_spaced(foreign)}" for foreign in absent)]
        missing = [
            entry
            for entry in missing
            if not any(f"{entry} ".startswith(f"{' '.join(words.split())} ") for words in excused)
        ]
        if missing:
            raise exceptions.CorruptDump(
                f"{len(missing)} objects that the dump lists are not in the restored database: {'; '.join(missing[:8])}.",
                "Nothing was swapped in.",
            )


def absent_foreign_keys(server: Server, database: str, foreign_keys: Sequence[ForeignKey]) -> list[ForeignKey]:
    """Those that could not be kept, not even NOT VALID."""
    if not foreign_keys:
        return []
    with server.connect(database) as session:
        present = catalogue.objects(session)
    return [foreign for foreign in foreign_keys if ("FK CONSTRAINT", _spaced(foreign)) not in present]


def analyze(server: Server, database: str, jobs: int) -> None:
    """Bring the statistics of a database up to date, on as many connections as there are jobs."""
    with server.connect(database) as session:
        tables = deque(catalogue.analyzable(session))

    def work(workers: Crew) -> None:
        with server.connect(database) as session, workers.ending(session.cancel):
            while tables:
                workers.check()
                with contextlib.suppress(IndexError):  # another worker was faster
                    catalogue.analyze(session, *tables.popleft())

    with crew([work] * jobs, jobs) as workers:
        workers.wait()


def _feed(child: Child, contents: Contents, archive: Reader, progress: Progress, workers: Crew) -> bool:
    """Feed pg_restore the archive, and return whether it took all of it. One that has read enough closes the pipe: its exit
    status tells whether it is content."""
    with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
        with contents.head.open("rb") as head:
            while block := head.read(BLOCK):
                pipe.write(block)
        while block := archive.read(BLOCK):
            workers.check()
            pipe.write(block)
            progress(len(block))
        return True
    return False


def _pg_restore(
    tools: Tools, conninfo: Conninfo, loading: Loading
) -> Callable[..., contextlib.AbstractContextManager[Child]]:
    return functools.partial(process.pg_restore, tools, conninfo, owner=loading.owner, acl=loading.acl)


def _jobs_for_indexes(tools: Tools, server: Server, loading: Loading) -> int:
    """With several connections, pg_restore mixes up the errors of its processes: then none can be told to be harmless.

    From 17 on it sends servers before 17 a setting that they do not know.
    """
    with server.connect() as session:
        unknown_setting = tools.version >= 17 and session.version < 170000
    if loading.jobs > 1 and (unknown_setting or loading.allow_errors):
        log.info(
            "indexes_one_by_one", why="--allow-error" if loading.allow_errors else f"pg_restore {tools.text} is newer"
        )
        return 1
    return loading.jobs


def _add_foreign_key(
    tools: Tools, session: Session, contents: Contents, foreign: ForeignKey, allow_missing: bool
) -> bool:
    """Add one foreign key whose rows may be missing: valid if they are not, NOT VALID if they are. False: left out."""
    entries = toc.only(contents, foreign)
    if entries is None:
        return False  # its table was dropped between the reading of the catalogue and pg_dump's
    statement = _alter_table(process.statements(tools, contents.head, entries))
    try:
        session.execute(statement)
        return True
    except exceptions.ServerError as error:
        if error.sqlstate != _FOREIGN_KEY_VIOLATION:
            raise
    if not foreign.partitioned or session.version >= _NOT_VALID_ON_PARTITIONED:
        session.execute(f"{statement} NOT VALID")
        log.warning("foreign_key_not_valid", foreign_key=str(foreign))
        return True
    if allow_missing:
        log.warning("foreign_key_missing", foreign_key=str(foreign))
        return False
    raise exceptions.NotPossible(
        f"The foreign key {foreign} cannot be restored: this server has no NOT VALID for partitioned tables.",
        "Restore with --allow-missing-fk to do without it, or into PostgreSQL 18.",
    )


def _alter_table(script: str) -> str:
    """The one statement of a script of pg_restore, without its semicolon."""
    begin, end = script.index("\nALTER TABLE"), script.rindex("\n--\n-- PostgreSQL database dump complete")
    return script[begin:end].strip().removesuffix(";")


def _conninfo(server: Server, database: str) -> Conninfo:
    """pg_restore's sessions end soon after pg_restore does."""
    with server.connect(database) as session:
        interval = "-c client_connection_check_interval=100ms" if session.version >= 140000 else ""
    # A role may have it off, and the rows of arrays would not be what they were.
    return server.conninfo(database, options=f"{interval} -c array_nulls=on".strip())


def _spaced(foreign: ForeignKey) -> str:
    """As a table of contents writes it, which has no line breaks."""
    return re.sub(r"[\r\n]", " ", f"{foreign.schema} {foreign.table} {foreign.name}")
