"""Who is measured, and how each is called: pgclone, its predecessor, and the tools that people use instead.

A contender prepares a `Job`: commands, and what they need. What it makes is gone when its block ends.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import populate
from store import S3, count_files
from tools import (
    DBBACKUP_SETTINGS,
    PASSWORD,
    PGCLONE_SETTINGS,
    USER,
    Project,
    Step,
    Unavailable,
    find_pgcopydb,
    install,
)

from pgclone.testing.postgres import Server

SOURCE, RESTORED, COPIED = "bench", "bench_restored", "bench_copied"
KEPT = "kept"


@dataclass(frozen=True)
class Job:
    """What is measured. `count` gives further numbers at its end; `makes` is the database that has to be complete."""

    steps: tuple[Step, ...]
    environ: Mapping[str, str]
    folder: Path
    count: Callable[[], Mapping[str, float]] = field(default=dict)
    makes: str | None = None
    store: tuple[int, ...] = ()
    """Processes of a store whose CPU time is somebody's as well."""


@dataclass(frozen=True)
class Contender:
    """`ours` is for the chart; a `guest` may be unable to take part: it is then left out, and the report says why."""

    name: str
    prepare: Callable[[], AbstractContextManager[Job]]
    ours: bool = False
    guest: bool = False


@dataclass(frozen=True)
class Bench:
    """The server with the database, a folder for everything that is made, and how to measure without noting it."""

    server: Server
    root: Path
    perform: Callable[[Job], object]

    def dump_contenders(self) -> list[Contender]:
        def directory(*flags: str) -> Callable[[], AbstractContextManager[Job]]:
            return lambda: self._dump_by_tools(lambda to: [_pg_dump("-Fd", "-j2", *flags, "-f", f"{to}/dump")])

        return [
            *self._ours("dump", lambda flags: self._dump_by(self.pgclone, "dump", *flags)),
            Contender("django-pgclone 3.8.0", lambda: self._dump_by(self.predecessor, "dump")),
            Contender("django-dbbackup 5", lambda: self._dump_by(self.dbbackup)),
            Contender("pg_dump -Fc -Z0 | zstd -3 -T0", lambda: self._dump_by_tools(self._dump_through_zstd)),
            Contender("pg_dump -Fd -j2", directory()),
            Contender("pg_dump -Fd -j2 -Z1", directory("-Z1")),
        ]

    def restore_contenders(self) -> list[Contender]:
        analyze = _vacuumdb(RESTORED)
        return [
            *self._ours("restore", lambda flags: self._restore_by(self.pgclone, flags)),
            Contender("django-pgclone 3.8.0", lambda: self._restore_by(self.predecessor)),
            Contender("django-dbbackup 5", self._restore_by_dbbackup),
            Contender("pg_restore -j2 (from -Fd)", self._restore_by_tools),
            Contender("pg_restore -j2 (from -Fd), vacuumdb -Z", lambda: self._restore_by_tools(analyze)),
            Contender("pg_restore -j2, vacuumdb -Z, swap", self._restore_by_hand),
        ]

    def copy_contenders(self) -> list[Contender]:
        def createdb(strategy: str, **options: str) -> Callable[[], AbstractContextManager[Job]]:
            return lambda: self._copy_by_createdb(strategy, options)

        ours = [Contender("pgclone copy", lambda: self._copy_by(self.pgclone), ours=True)]
        if self.pgclone.has_flag("copy", "--online"):
            ours.append(Contender("pgclone copy --online", lambda: self._copy_by(self.pgclone, "--online"), ours=True))
        ours.append(
            Contender(
                "pgclone copy --strategy file_copy",
                lambda: self._copy_by(self.pgclone, "--strategy", "file_copy"),
                ours=True,
            )
        )
        return [
            *ours,
            Contender("django-pgclone 3.8.0", lambda: self._copy_by(self.predecessor)),
            Contender("DSLR", self._copy_by_dslr),
            Contender("createdb -T, wal_log", createdb("wal_log")),
            Contender("createdb -T, file_copy", createdb("file_copy")),
            Contender("createdb -T, file_copy, clone", createdb("file_copy", file_copy_method="clone")),
            Contender("pg_dump -Fc -Z0 | pg_restore", self._copy_through_pipe),
            Contender("pgcopydb clone", self._copy_by_pgcopydb, guest=True),
        ]

    def s3_contenders(self, store: S3) -> list[Contender]:
        jobs = ("--jobs", "2")

        def ours(name: str, prepare: Callable[[tuple[str, ...]], AbstractContextManager[Job]]) -> Contender:
            command = name.partition(",")[0]
            flags = jobs if self.pgclone.has_flag(command, "--jobs") else ()
            return Contender(name, lambda: prepare(flags), ours=True)

        return [
            ours("dump, files", lambda flags: self._dump_by(self.pgclone, "dump", *flags)),
            ours("dump, S3 without latency", lambda flags: self._dump_to(store, 0, flags)),
            ours("dump, S3 at 30 ms", lambda flags: self._dump_to(store, 0.03, flags)),
            ours("restore, files", lambda flags: self._restore_by(self.pgclone, flags)),
            ours("restore, S3 without latency", lambda flags: self._restore_from(store, 0, flags)),
            ours("restore, S3 at 30 ms", lambda flags: self._restore_from(store, 0.03, flags)),
        ]

    def memory_contenders(self, store: S3) -> list[Contender]:
        flags = ("--jobs", "4") if self.pgclone.has_flag("dump", "--jobs") else ()
        return [
            Contender(
                f"{' '.join(('dump', *flags))}, files", lambda: self._dump_by(self.pgclone, "dump", *flags), ours=True
            ),
            Contender(f"{' '.join(('dump', *flags))}, S3", lambda: self._dump_to(store, 0, flags), ours=True),
        ]

    def ls_contenders(self, keys: int) -> list[Contender]:
        return [
            Contender("manage.py check", lambda: self._run_beside_keys(self.pgclone, keys, "check")),
            Contender("pgclone ls", lambda: self._run_beside_keys(self.pgclone, keys, "pgclone", "ls"), ours=True),
            Contender(
                "django-pgclone 3.8.0 ls", lambda: self._run_beside_keys(self.predecessor, keys, "pgclone", "ls")
            ),
        ]

    @cached_property
    def pgclone(self) -> Project:
        return Project(self.server, self.root, Path(sys.executable), "pgclone", PGCLONE_SETTINGS)

    @cached_property
    def predecessor(self) -> Project:
        """Imported under the same name as this project: in an environment of its own."""
        bin = install("django-pgclone", "django-pgclone==3.8.0", "psycopg2-binary")
        return Project(self.server, self.root, bin / "python", "pgclone", PGCLONE_SETTINGS)

    @cached_property
    def dbbackup(self) -> Project:
        bin = install("django-dbbackup", "django-dbbackup>=5,<6", "psycopg2-binary")
        return Project(self.server, self.root, bin / "python", "dbbackup", DBBACKUP_SETTINGS)

    @cached_property
    def shape(self) -> populate.Shape:
        return populate.describe(self.server, SOURCE)

    def databases(self) -> set[str]:
        return set(self.server.psql("SELECT datname FROM pg_database").splitlines())

    @contextmanager
    def new_databases_dropped(self) -> Iterator[None]:
        before = self.databases()
        try:
            yield
        finally:
            for name in self.databases() - before:
                self.server.psql(f'DROP DATABASE "{name}" WITH (FORCE)')

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            yield Path(folder)

    def forget(self) -> None:
        """Delete the dumps that were kept to restore from."""
        shutil.rmtree(self.root / "dumps", ignore_errors=True)

    # How pgclone is called.

    def _ours(self, command: str, prepare: Callable[[tuple[str, ...]], AbstractContextManager[Job]]) -> list[Contender]:
        if not self.pgclone.has_flag(command, "--jobs"):
            return [Contender("pgclone", lambda: prepare(()), ours=True)]

        def ours(jobs: str) -> Contender:
            return Contender(f"pgclone --jobs {jobs}", lambda: prepare(("--jobs", jobs)), ours=True)

        return [ours(jobs) for jobs in ("1", "2")]

    # Dumps.

    @contextmanager
    def _dump_by(self, project: Project, *arguments: str) -> Iterator[Job]:
        with self.work_folder() as folder:
            yield self._dump_into(folder, project, *arguments)

    def _dump_into(self, folder: Path, project: Project, *arguments: str) -> Job:
        command = ("dbbackup", "--noinput") if project.app == "dbbackup" else (project.app, *arguments)
        return Job(
            (project.step(*command),),
            project.environ(SOURCE, f"{folder}/"),
            self.root,
            count=lambda: count_files(folder),
        )

    @contextmanager
    def _dump_by_tools(self, make: Callable[[Path], list[Step]]) -> Iterator[Job]:
        with self.work_folder() as folder:
            yield Job(tuple(make(folder)), self.server.environ(), folder, count=lambda: count_files(folder))

    def _dump_through_zstd(self, folder: Path) -> list[Step]:
        if not shutil.which("zstd"):
            raise Unavailable("There is no zstd: install Debian's package of that name.")
        dump = _pg_dump("-Fc", "-Z0").pipeline
        return [Step((*dump, ("zstd", "-q", "-3", "-T0")), folder / "dump.zst")]

    @contextmanager
    def _dump_to(self, store: S3, latency: float, flags: tuple[str, ...], folder: str = "dump") -> Iterator[Job]:
        try:
            yield Job(
                (self.pgclone.step("pgclone", "dump", *flags),),
                self.pgclone.environ(SOURCE, store.locate(folder), **store.environ(latency)),
                self.root,
                count=lambda: store.count(folder),
                store=store.processes,
            )
        finally:
            if folder != KEPT:
                store.clear(folder)

    def _keep(self, name: str, make: Callable[[Path], Job]) -> Path:
        """A dump to restore from, which is made once."""
        folder = self.root / "dumps" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            self.perform(make(folder))
        return folder

    # Restores.

    @contextmanager
    def _restore_by(self, project: Project, flags: tuple[str, ...] = ()) -> Iterator[Job]:
        dump = self._keep_parts() if project is self.pgclone else self._keep_dump(project)
        with self._database_to_replace():
            environ = project.environ(RESTORED, f"{dump}/")
            yield Job((project.step("pgclone", "restore", "bench", *flags),), environ, self.root, makes=RESTORED)

    @contextmanager
    def _restore_from(self, store: S3, latency: float, flags: tuple[str, ...]) -> Iterator[Job]:
        if not store.count(KEPT)["MB"]:
            with self._dump_to(store, 0, self._part_flags(), KEPT) as dump:
                self.perform(dump)
        with self._database_to_replace():
            environ = self.pgclone.environ(RESTORED, store.locate(KEPT), **store.environ(latency))
            step = self.pgclone.step("pgclone", "restore", "bench", *flags)
            yield Job((step,), environ, self.root, makes=RESTORED, store=store.processes)

    @contextmanager
    def _restore_by_dbbackup(self) -> Iterator[Job]:
        dump = self._keep_dump(self.dbbackup)
        (file,) = (path for path in dump.iterdir() if path.suffix == ".bin")
        with self.new_databases_dropped():
            steps = (
                Step((("createdb", "-T", "template0", RESTORED),)),
                self.dbbackup.step("dbrestore", "--noinput", "--input-path", str(file)),
            )
            yield Job(steps, self.dbbackup.environ(RESTORED, f"{dump}/"), self.root, makes=RESTORED)

    @contextmanager
    def _restore_by_tools(self, *further: tuple[str, ...]) -> Iterator[Job]:
        dump = self._keep_directory()
        with self.new_databases_dropped():
            commands = (
                ("createdb", "-T", "template0", RESTORED),
                ("pg_restore", "-j2", "-d", RESTORED, str(dump / "dump")),
                *further,
            )
            yield Job(tuple(Step((argv,)) for argv in commands), self.server.environ(), self.root, makes=RESTORED)

    @contextmanager
    def _restore_by_hand(self) -> Iterator[Job]:
        """All that pgclone does: DROP DATABASE lets the server write to disk what was restored, and waits for that."""
        dump = self._keep_directory()
        new, old = f"{RESTORED}_new", f"{RESTORED}_old"
        with self._database_to_replace():
            swap = [f"ALTER DATABASE {RESTORED} RENAME TO {old}", f"ALTER DATABASE {new} RENAME TO {RESTORED}"]
            commands = (
                ("createdb", "-T", "template0", new),
                ("pg_restore", "-j2", "-d", new, str(dump / "dump")),
                _vacuumdb(new),
                ("psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", swap[0], "-c", swap[1]),
                ("dropdb", old),
            )
            yield Job(tuple(Step((argv,)) for argv in commands), self.server.environ(), self.root, makes=RESTORED)

    def _keep_parts(self) -> Path:
        return self._keep("pgclone", lambda folder: self._dump_into(folder, self.pgclone, "dump", *self._part_flags()))

    def _keep_dump(self, project: Project) -> Path:
        return self._keep(project.python.parts[-3], lambda folder: self._dump_into(folder, project, "dump"))

    def _keep_directory(self) -> Path:
        return self._keep(
            "directory",
            lambda folder: Job((_pg_dump("-Fd", "-j2", "-f", f"{folder}/dump"),), self.server.environ(), folder),
        )

    def _part_flags(self) -> tuple[str, ...]:
        return ("--jobs", "2") if self.pgclone.has_flag("dump", "--jobs") else ()

    @contextmanager
    def _database_to_replace(self) -> Iterator[None]:
        """What a restore swaps out: a database of the same size, whose removal is a part of the work."""
        with self.new_databases_dropped():
            self.server.psql(f"CREATE DATABASE {RESTORED} TEMPLATE {SOURCE} STRATEGY file_copy OWNER {USER}")
            yield

    # Copies.

    @contextmanager
    def _copy_by(self, project: Project, *flags: str) -> Iterator[Job]:
        with self.new_databases_dropped(), self.work_folder() as folder:
            step = project.step("pgclone", "copy", *flags, f":{COPIED}")
            yield Job((step,), project.environ(SOURCE, f"{folder}/"), self.root, makes=f"*{COPIED}")

    @contextmanager
    def _copy_by_dslr(self) -> Iterator[Job]:
        command = install("dslr", "dslr", "psycopg2-binary") / "dslr"
        server = self.server
        url = f"postgres://{USER}:{PASSWORD}@{server.host}:{server.port}/{SOURCE}"
        with self.new_databases_dropped():
            step = Step(((str(command), "--url", url, "snapshot", COPIED),))
            yield Job((step,), server.environ(), self.root, makes=f"*{COPIED}")

    @contextmanager
    def _copy_by_createdb(self, strategy: str, options: Mapping[str, str]) -> Iterator[Job]:
        environ = self.server.environ()
        environ["PGOPTIONS"] = " ".join(f"-c {name}={value}" for name, value in options.items())
        with self.new_databases_dropped():
            step = Step((("createdb", "-T", SOURCE, f"--strategy={strategy}", COPIED),))
            yield Job((step,), environ, self.root, makes=COPIED)

    @contextmanager
    def _copy_through_pipe(self) -> Iterator[Job]:
        dump = _pg_dump("-Fc", "-Z0").pipeline
        with self.new_databases_dropped():
            steps = (
                Step((("createdb", "-T", "template0", COPIED),)),
                Step((*dump, ("pg_restore", "-d", COPIED))),
            )
            yield Job(steps, self.server.environ(), self.root, makes=COPIED)

    @contextmanager
    def _copy_by_pgcopydb(self) -> Iterator[Job]:
        command = find_pgcopydb()
        server = self.server
        source, target = (
            f"postgres://{USER}:{PASSWORD}@{server.host}:{server.port}/{name}" for name in (SOURCE, COPIED)
        )
        with self.new_databases_dropped(), self.work_folder() as folder:
            clone = (str(command), "clone", "--source", source, "--target", target, "--dir", f"{folder}/work")
            steps = (
                Step((("createdb", "-T", "template0", COPIED),)),
                Step(((*clone, "--table-jobs", "2", "--index-jobs", "2"),)),
            )
            yield Job(steps, server.environ(), folder, makes=COPIED)

    # Lists.

    @contextmanager
    def _run_beside_keys(self, project: Project, keys: int, *command: str) -> Iterator[Job]:
        """With so many dumps in the storage, each beside what belongs to it."""
        folder = self.root / "keys"
        if not folder.exists():
            parent = folder / "bench" / "default" / "none"
            parent.mkdir(parents=True)
            for number in range(keys):
                hours, seconds = divmod(number, 3600)
                days, hours = divmod(hours, 24)
                key = parent / f"2026-01-{days + 1:02}-{hours:02}-{seconds // 60:02}-{seconds % 60:02}-000000.dump"
                for path in (key, key.with_name(f"{key.name}.json")):
                    path.write_bytes(b"{}")
                if self.pgclone.has_flag("dump", "--jobs"):
                    parts = key.with_name(f"{key.name}.parts")
                    parts.mkdir()
                    for part in range(3):
                        (parts / f"{part:05}").write_bytes(b"")
        yield Job((project.step(*command),), project.environ(SOURCE, f"{folder}/"), self.root)


def _pg_dump(*flags: str) -> Step:
    return Step((("pg_dump", *flags, "-d", SOURCE),))


def _vacuumdb(database: str) -> tuple[str, ...]:
    return ("vacuumdb", "--analyze-only", "-j2", "-q", "-d", database)
