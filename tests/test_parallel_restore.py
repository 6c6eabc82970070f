"""Restores of dumps with parts: the rows of large tables come in beside the archive, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pgclone import process
from pgclone.database import rows
from pgclone.exceptions import ServerError, ToolFailed
from pgclone.testing.postgres import Server
from tests.faults import Fault, Tally, alive, read_trace, spread, tally, wait_until  # noqa: F401
from tests.fixtures import World
from tests.forks import Forked, Forks
from tests.project import Done, open_project
from tests.shop import PLAIN, Shop, open_shop
from tests.tools import make_tools

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STATUS = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130,)}
PROMPTLY = 15
"""Seconds, on a machine that has much to do: what hangs here hangs for a minute."""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(large=65536) as forks:
        yield forks


@pytest.fixture(scope="module")
def shop(
    postgres: Server,
    tmp_path_factory: pytest.TempPathFactory,
    forks: Forks,
    tally: Tally,  # noqa: F811
) -> Iterator[Shop]:
    """One for all tests: whatever they do to it, it must not suffer. Books and reviews become parts.

    An unlogged table stays in the archive, which outgrows its head and the pipe to pg_restore.
    """
    long = "CREATE UNLOGGED TABLE long AS SELECT repeat(n::text, 20) FROM generate_series(1, 20000) AS n"
    with open_shop(postgres, tmp_path_factory.mktemp("shop"), forks, tally, also=long, PGCLONE_JOBS=2) as shop:
        yield shop


@dataclass(frozen=True)
class Dump:
    """A dump in its folder, and the parts of its manifest."""

    path: Path
    key: str
    codec: str
    content: str

    @property
    def manifest(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def parts(self) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = json.loads(self.manifest.read_bytes())["parts"]
        return parts

    def file(self, number: int = 1) -> Path:
        return self.path.with_name(f"{self.path.name}.parts") / f"{number:05d}"

    def rows(self, number: int = 1) -> bytes:
        data = self.file(number).read_bytes()
        return zstd.decompress(data) if self.codec == "zstd" else data

    def describe(self, number: int, **changes: object) -> None:
        """Change what the manifest says of a part, as if it had been written so."""
        body = json.loads(self.manifest.read_bytes())
        del body["self_sha256"]
        body["parts"][number - 1] |= changes
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        self.manifest.write_text(json.dumps({**body, "self_sha256": digest}))

    @contextlib.contextmanager
    def changed(self, data: bytes, number: int = 1, **manifest: object) -> Iterator[None]:
        """Other bytes in a part, and a manifest that takes them for the right ones: in what it says, `manifest` aside."""
        file, intact, described = self.file(number), self.file(number).read_bytes(), self.manifest.read_bytes()
        file.write_bytes(data)
        digest = {"stored_size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.describe(number, **digest, **manifest)
        try:
            yield
        finally:
            file.write_bytes(intact)
            self.manifest.write_bytes(described)


def special(shop: Shop, *flags: str, codec: str = "zstd") -> Dump:
    """A dump of its own, with parts."""
    path = shop.special("--codec", codec, *flags)
    dump = Dump(path, path.relative_to(shop.project.dumps).as_posix(), codec, shop.content("shop"))
    assert {part["table"] for part in dump.parts} == {"app_book", "app_review"}
    shop.sell()
    return dump


@pytest.fixture(scope="module")
def plain(shop: Shop) -> Dump:
    """A dump whose bytes are the rows."""
    return special(shop, codec="none")


@pytest.fixture(scope="module")
def compressed(shop: Shop) -> Dump:
    return special(shop)


def refused(shop: Shop, dump: Dump, *words: str, kind: str = "damaged parts", **options: Any) -> Done:
    """A restore fails, says why in words, and nothing has changed."""
    before = shop.state()
    done = shop.run("restore", dump.key, "--pre-swap-hook", **options)
    shop.tally.faults[kind] += 1
    assert done.status == 1, done.err
    assert [word for word in words if word not in done.err] == [] and "Traceback" not in done.err, done.err
    shop.check_unchanged(before)
    return done


# Parts that are damaged


def test_a_part_with_a_flipped_bit_is_refused(shop: Shop, compressed: Dump) -> None:
    data = compressed.file().read_bytes()
    for at in (0, len(data) // 3, len(data) - 1):
        with bytes_of(compressed.file(), data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
            refused(shop, compressed, "00001", "public.app_review")


@contextlib.contextmanager
def bytes_of(file: Path, data: bytes) -> Iterator[None]:
    intact = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(intact)


def test_a_part_that_ends_inside_its_codec_is_refused_though_the_manifest_knows_its_bytes(
    shop: Shop, compressed: Dump
) -> None:
    data = compressed.file().read_bytes()
    for end in (0, len(data) - 1):
        with compressed.changed(data[:end]):
            refused(shop, compressed, "00001", "public.app_review")


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda rows: rows[: len(rows) // 2], id="in mid-row"),
        pytest.param(lambda rows: rows[: rows.rindex(b"\n", 0, -1) + 1], id="after a row"),
        pytest.param(lambda rows: b"", id="before all rows"),
        pytest.param(lambda rows: rows + rows[rows.rindex(b"\n", 0, -1) + 1 :], id="too many rows"),
    ],
)
def test_rows_that_were_not_counted_in_the_dump_are_refused_whatever_the_digests_say(
    shop: Shop, plain: Dump, cut: Callable[[bytes], bytes]
) -> None:
    rows = cut(plain.rows())
    with plain.changed(rows, raw_size=len(rows)):
        refused(shop, plain, "Part 00001", "public.app_review", f"{rows.count(10)} rows")


def test_a_last_row_that_is_cut_is_refused_though_it_could_be_a_row(shop: Shop, compressed: Dump) -> None:
    """psql takes the rest for a row, and the line feeds are as many as the manifest says."""
    rows = compressed.rows()[:-2]
    assert rows[-1:].isdigit()
    with compressed.changed(zstd.compress(rows), raw_size=len(rows), rows=rows.count(10)):
        refused(shop, compressed, "public.app_review", f"took {rows.count(10) + 1} rows of {rows.count(10)}")


def test_other_rows_of_the_same_size_are_refused(shop: Shop, plain: Dump) -> None:
    """psql would take them."""
    data = plain.file().read_bytes()
    assert b"fine; " in data
    with bytes_of(plain.file(), data.replace(b"fine; ", b"good; ", 1)):
        refused(shop, plain, "Part 00001", "public.app_review", "SHA-256")


# Parts that are not the dump's


def test_a_part_that_is_gone_is_named_before_anything_is_made(shop: Shop, plain: Dump) -> None:
    aside = plain.file(2).rename(plain.path.with_name("aside"))
    try:
        done = refused(shop, plain, f'"{plain.key}.parts/00002" is gone', "public.app_book")
    finally:
        aside.rename(plain.file(2))
    assert "Restoring" not in done.err


def test_a_part_of_another_size_is_named_before_anything_is_made(shop: Shop, plain: Dump, compressed: Dump) -> None:
    """It was cut, or belongs to another dump, or to another table."""
    size = plain.file().stat().st_size
    for data in (b"", plain.file().read_bytes()[:-1], compressed.file().read_bytes(), plain.file(2).read_bytes()):
        with bytes_of(plain.file(), data):
            words = f'"{plain.key}.parts/00001"', f"has {len(data)} bytes where the manifest has {size}"
            assert "Restoring" not in refused(shop, plain, *words).err


def test_a_part_that_the_manifest_does_not_name_is_none_of_the_dumps(shop: Shop, plain: Dump) -> None:
    stray = plain.file(len(plain.parts) + 1)
    stray.write_bytes(b"999999\tstray\t5\t1\n")
    try:
        assert restored(shop, plain) == plain.content
    finally:
        stray.unlink()


def restored(shop: Shop, dump: Dump, *flags: str, **options: Any) -> str:
    """What a database holds that was restored from a dump."""
    done = shop.run("restore", dump.key, "--as", ":trial", "--pre-swap-hook", *flags, **options)
    assert done.status == 0, done.err
    content = shop.content("trial")
    shop.project.server.run("dropdb", "trial")
    return content


# Rows that would be commands


@pytest.mark.parametrize("rest", [1, 60_000], ids=["short", "longer than a pipe"])
def test_nothing_in_a_part_becomes_a_command(shop: Shop, plain: Dump, tmp_path: Path, rest: int) -> None:
    """psql takes a line with a backslash and a dot for the end of the rows, and would take commands after that."""
    trap = tmp_path / "trap"
    rows = plain.rows()
    commands = (
        f"\\.\n\\! touch {trap}\n\\copy (SELECT 1) TO '{trap}'\nCOMMIT;\nDROP TABLE public.app_review;\n".encode()
    )
    hostile = rows[: rows.index(b"\n") + 1] + commands + rows * (rest // 3000 or 1)
    with plain.changed(hostile, raw_size=len(hostile), rows=hostile.count(10)):
        begun = time.monotonic()
        refused(shop, plain, "public.app_review", "The server took 1 rows")
    assert not trap.exists()
    assert time.monotonic() - begun < PROMPTLY


# The commit of loaded rows


@pytest.fixture
def loading(world: World) -> Iterator[Callable[[], contextlib.AbstractContextManager[process.Loader]]]:
    """psql with an open COPY into a table of a database."""
    world.create("app", "one")
    tools = process.find_tools(str(world.server.bin))
    with world.connect("app") as session:
        statements = rows.copy_in(session, "public", "content", ["value"])
    yield lambda: process.copy_in(tools, world.alias("app").conninfo("app"), statements, "UTF8")


def contents(world: World) -> int:
    return int(world.value("SELECT count(*) FROM public.content", database="app"))


def test_rows_are_there_when_they_were_committed(world: World, loading: Any) -> None:
    with loading() as loader:
        loader.write(b"two\nthree\n")
        loader.commit(2)
        assert contents(world) == 3


def test_rows_whose_stream_ends_without_a_commit_are_not_there(world: World, loading: Any) -> None:
    """COPY itself would commit them."""
    with loading() as loader:
        loader.write(b"two\nthr")
        loader.child.stdin.close()
    assert contents(world) == 1


def test_rows_whose_stream_fails_are_not_there(world: World, loading: Any) -> None:
    with pytest.raises(ZeroDivisionError), loading() as loader:
        loader.write(b"two\nthree\n")
        raise ZeroDivisionError
    assert contents(world) == 1


@pytest.mark.parametrize("sent", [b"two\n", b"two\nthree\nfour\n", b"two\nthree\n\\.\n"])
def test_rows_that_the_server_counts_otherwise_are_not_there(world: World, loading: Any, sent: bytes) -> None:
    with pytest.raises(ToolFailed, match=r"The server took \d rows"), loading() as loader:
        loader.write(sent)
        loader.commit(2 + sent.count(b"."))
    assert contents(world) == 1


def test_rows_that_the_server_refuses_are_not_there(world: World, loading: Any) -> None:
    with pytest.raises(ServerError, match=r"invalid byte sequence .*line 2") as caught, loading() as loader:
        loader.write(b"two\n\xff\n")
        loader.commit(2)
    assert caught.value.sqlstate == "22021"
    assert contents(world) == 1


# Tools that fail

LOADS = "any(word.endswith(' FROM STDIN') for word in sys.argv)"
"""Whether a psql is told to load rows."""

LOADER = f"""
if not {LOADS}: exact()
process = subprocess.Popen([tool, *sys.argv[1:]], stdin=subprocess.PIPE, close_fds=False)
"""
"""The real psql, fed by a script; its verdict comes by the other pipe."""

HANGS = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("psql", "words"),
    [
        pytest.param(
            f"{LOADER}process.stdin.write(sys.stdin.buffer.read(9000)); process.stdin.flush()\n"
            "process.kill(); os.kill(os.getpid(), signal.SIGKILL)",
            "psql was killed by signal 9",
            id="is killed",
        ),
        pytest.param(
            "sys.exit('psql: no such library')", "psql failed with status 1: psql: no such library", id="does not start"
        ),
        pytest.param(
            f"{LOADER}process.communicate(b''.join(sys.stdin.buffer.readlines()[:-1]))",
            "The server took 3049 rows of 3050",
            id="loses a row",
        ),
        pytest.param(
            f"{LOADER}process.communicate(sys.stdin.buffer.read()); sys.exit(2)",
            "psql failed with status 2",
            id="fails after the commit",
        ),
        pytest.param("sys.exit(0)", "psql failed with status 0", id="does nothing"),
    ],
)
def test_a_psql_that_goes_wrong_fails_the_restore(
    shop: Shop, compressed: Dump, tmp_path: Path, psql: str, words: str
) -> None:
    tools = make_tools(tmp_path, shop.project.server.bin, psql=psql)
    refused(shop, compressed, "The rows of public.", words, kind="killed children", PGCLONE_BIN_DIR=str(tools))


def test_a_psql_that_cannot_be_run_fails_the_restore(shop: Shop, compressed: Dump, tmp_path: Path) -> None:
    """It was built for another machine."""
    tools = make_tools(tmp_path, shop.project.server.bin)
    (tools / "psql").write_bytes(b"\x7fELF")
    refused(shop, compressed, "psql", PGCLONE_BIN_DIR=str(tools))


def test_a_row_that_the_database_refuses_is_named_with_its_table(shop: Shop) -> None:
    sql = shop.project.sql
    sql("ALTER TABLE app_book ADD CONSTRAINT home CHECK (id < 17 OR current_database() = 'shop')")
    dump = special(shop)
    sql("ALTER TABLE app_book DROP CONSTRAINT home")
    done = refused(shop, dump, "The rows of public.app_book could not be loaded", 'check constraint "home"', "line 17")
    assert "Book 17" not in done.err  # whose rows they are is nobody's business


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (
            {"psql": "sys.exit('psql: gone')", "pg_restore": f"if '--section=data' in sys.argv: {HANGS}\nexact()"},
            "psql: gone",
        ),
        ({"psql": HANGS, "pg_restore": "die(after=90_000, by=9, section='data')"}, "pg_restore was killed by signal 9"),
        ({"psql": f"if any('app_book' in word for word in sys.argv): sys.exit('psql: gone')\n{HANGS}"}, "psql: gone"),
    ],
    ids=["a part, while the archive goes on", "the archive, while parts go on", "a part, while another goes on"],
)
def test_the_first_failure_is_the_one_that_is_told_and_ends_everything(
    shop: Shop, compressed: Dump, tmp_path: Path, broken: dict[str, str], words: str
) -> None:
    tools = make_tools(tmp_path, shop.project.server.bin, **broken)
    begun = time.monotonic()
    refused(shop, compressed, words, kind="killed children", PGCLONE_BIN_DIR=str(tools), PGCLONE_JOBS=3)
    assert time.monotonic() - begun < PROMPTLY
    assert running(str(tools)) == []


def running(words: str) -> list[str]:
    """The command lines of living processes with these words in them."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if words in line]


def test_a_damaged_archive_ends_the_parts(shop: Shop, compressed: Dump, tmp_path: Path) -> None:
    tools = make_tools(tmp_path, shop.project.server.bin, psql=HANGS)
    data = compressed.path.read_bytes()
    begun = time.monotonic()
    with bytes_of(compressed.path, data[: len(data) - 9]):
        refused(shop, compressed, f'"{compressed.key}" is damaged', PGCLONE_BIN_DIR=str(tools))
    assert time.monotonic() - begun < PROMPTLY
    assert running(str(tools)) == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"psql": "sys.exit('psql: gone')"}, "psql: gone"),
        ({"pg_restore": "die(after=90_000, by=9, section='data')"}, "signal 9"),
    ],
    ids=["of a part", "of pg_restore"],
)
def test_a_failure_does_not_wait_for_the_end_of_the_archive(
    shop: Shop, plain: Dump, tmp_path: Path, broken: dict[str, str], words: str
) -> None:
    tools = make_tools(tmp_path, shop.project.server.bin, **broken)
    begun = time.monotonic()
    with trickling(plain.path):
        refused(shop, plain, words, kind="killed children", PGCLONE_BIN_DIR=str(tools))
    assert time.monotonic() - begun < PROMPTLY


@contextlib.contextmanager
def trickling(file: Path) -> Iterator[None]:
    """A storage that gives half of a file at once, and the rest, which never ends, bit by bit."""
    data, aside, over = file.read_bytes(), file.rename(file.with_name("aside")), threading.Event()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), file.open("wb", buffering=0) as pipe:
            pipe.write(data[: len(data) // 2])
            while not over.wait(0.02):
                pipe.write(data[-65536:])

    os.mkfifo(file)
    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        yield
    finally:
        over.set()
        with contextlib.suppress(OSError):  # where nobody has read, nobody writes
            os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))
        feeder.join()
        aside.rename(file)


# Ends that come from outside

FAULTS = {
    "SIGKILL": "child: psql started",
    "SIGTERM": "stream: Source.drain",
    "SIGINT": 'while: ANALYZE ONLY "public"."app_book"',
}
"""What workers do when the blow comes."""


@pytest.mark.parametrize("blow", FAULTS)
def test_a_restore_that_is_ended_while_workers_are_at_work_loses_nothing(shop: Shop, blow: str) -> None:
    end(shop, Fault(FAULTS[blow], blow))


@pytest.mark.soak
@pytest.mark.parametrize("blow", STATUS)
def test_a_parallel_restore_that_is_ended_anywhere_loses_nothing(shop: Shop, tmp_path: Path, blow: str) -> None:
    assert shop.run(*PLAIN.argv, trace=tmp_path / "trace").status == 0
    for point, occurrence in spread(read_trace(tmp_path / "trace"), 80):
        end(shop, Fault(point, blow, occurrence), late=True)


def end(shop: Shop, fault: Fault, *, late: bool = False) -> None:
    """Late: the restore may have ended before, since threads pass their points in any order."""
    before = shop.state()
    done = shop.run(*PLAIN.argv, faults=[fault])
    shop.tally.faults[f"{fault.blow} in parallel restores" if done.status else "faults that came too late"] += 1
    try:
        assert done.status in (*STATUS[fault.blow], *([0] if late else [])), done.err
        shop.check(PLAIN, before, clean=fault.blow != "SIGKILL")
        shop.check_next_run(PLAIN)
    except AssertionError as error:
        raise AssertionError(f"{fault}: {error}\n{done.err}") from None


@contextlib.contextmanager
def frozen(shop: Shop, fault: Fault) -> Iterator[Forked]:
    restore = shop.forks.start(shop.project, "pgclone", *PLAIN.argv, faults=[fault])
    restore.wait_until_frozen()
    try:
        yield restore
    except BaseException:
        restore.send(signal.SIGKILL)
        restore.wait()
        raise


LOADING = Fault("child: psql started", "SIGSTOP")


def test_psql_ends_with_a_killed_restore(shop: Shop) -> None:
    before = shop.state()
    with frozen(shop, LOADING) as restore:
        started = children(restore.pid)
        assert started
        wait_until(lambda: sessions(shop) > 0)
        restore.send(signal.SIGKILL)
        restore.wait()
    wait_until(lambda: not alive(started), seconds=3)
    wait_until(lambda: sessions(shop) == 0, seconds=3)
    shop.tally.faults["SIGKILL in parallel restores"] += 1
    shop.check(PLAIN, before)
    shop.check_next_run(PLAIN)


def children(pid: int) -> list[int]:
    """The processes that the threads of a process have started."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def sessions(shop: Shop) -> int:
    of_work = "FROM pg_stat_activity WHERE datname LIKE 'pgclone_work_%'"
    return int(shop.project.sql(f"SELECT count(*) {of_work}", "postgres"))


def test_a_server_that_crashes_while_parts_are_loaded_loses_nothing(shop: Shop) -> None:
    before = shop.state()
    with frozen(shop, LOADING) as restore:
        crash(shop)
        done = restore.thaw()
    shop.tally.faults["crashes of the server"] += 1
    assert done.status == 1
    assert "Traceback" not in done.err, done.err
    shop.check(PLAIN, before)
    shop.check_next_run(PLAIN)


def crash(shop: Shop) -> None:
    """Kill a backend: the server ends all sessions, and recovers from its log."""
    wait_until(lambda: sessions(shop) > 0)
    pids = "SELECT min(pid) FROM pg_stat_activity WHERE datname LIKE 'pgclone_work_%'"
    os.kill(int(shop.project.sql(pids, "postgres")), signal.SIGKILL)
    wait_until(lambda: answers(shop))


def answers(shop: Shop) -> bool:
    try:
        return sessions(shop) == 0
    except subprocess.CalledProcessError:
        return False


# Any dump, with any number of jobs


def test_a_dump_with_parts_restores_with_any_number_of_jobs(shop: Shop, plain: Dump, compressed: Dump) -> None:
    assert restored(shop, plain, "--jobs", "4") == plain.content
    assert restored(shop, compressed, "--jobs", "1") == compressed.content


@pytest.mark.parametrize("manifest", [True, False], ids=["of one job", "of django-pgclone"])
def test_a_dump_without_parts_restores_with_several_jobs(shop: Shop, manifest: bool) -> None:
    path = shop.special("--jobs", "1")
    dump = Dump(path, path.relative_to(shop.project.dumps).as_posix(), "zstd", shop.content("shop"))
    assert dump.parts == []
    if not manifest:
        shop.project.server.run("pg_dump", "-Fc", "-d", "shop", "-f", str(path))
        dump.manifest.unlink()
    assert restored(shop, dump, "--jobs", "4") == dump.content


# After the rows


def test_an_error_in_indexes_and_constraints_is_named_and_can_be_allowed(shop: Shop) -> None:
    sql = shop.project.sql
    sql("SET session_replication_role = replica; INSERT INTO app_review (book_id, text, stars) VALUES (-1, 'lost', 1)")
    dump = special(shop)
    sql("DELETE FROM app_review WHERE book_id = -1")
    name = sql("SELECT conname FROM pg_constraint WHERE contype = 'f' AND conrelid = 'app_review'::regclass")
    entry = f"FK CONSTRAINT public app_review {name}"
    refused(shop, dump, "app_review", f'violates foreign key constraint "{name}"', kind="failures in restores")
    done = shop.run("restore", dump.key, "--as", ":trial", "--allow-error", entry)
    assert done.status == 0, done.err
    assert f"Ignored, as you allowed it: {entry}" in done.err
    assert "Indexes and constraints are built one at a time: --allow-error" in done.err
    shop.project.server.run("dropdb", "trial")


def test_a_failing_analyze_is_told_and_ends_the_others(shop: Shop) -> None:
    """The one fails as soon as the other has begun, which would go on for a minute."""
    sql = shop.project.sql
    sql(
        """CREATE FUNCTION moody(kind text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
            IF current_query() LIKE 'ANALYZE%' AND current_database() <> 'shop' THEN
                PERFORM pg_sleep(60) WHERE kind = 'sleeps';
                WHILE NOT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE 'ANALYZE%"sleepy"' AND state = 'active')
                LOOP PERFORM pg_sleep(0.01), pg_stat_clear_snapshot(); END LOOP;
                RAISE 'not in the mood';
            END IF; RETURN kind; END $$"""
    )
    sql("CREATE TABLE sleepy AS SELECT 'sleeps' AS kind; CREATE INDEX ON sleepy (moody(kind))")
    sql("CREATE TABLE grumpy AS SELECT 'fails' AS kind; CREATE INDEX ON grumpy (moody(kind))")
    dump = special(shop)
    sql("DROP TABLE sleepy, grumpy; DROP FUNCTION moody")
    begun = time.monotonic()
    refused(shop, dump, "not in the mood", kind="failures in restores")
    assert time.monotonic() - begun < PROMPTLY


JOBS = 3

TOGETHER = f"""
CREATE FUNCTION together(id int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
DECLARE
    verb text := split_part(current_query(), ' ', 1); others int; everyone int;
BEGIN
    IF id > 1 OR current_database() = 'fair' THEN RETURN id; END IF;
    FOR round IN 1..500 LOOP
        PERFORM pg_sleep(0.02), pg_stat_clear_snapshot();
        SELECT count(*) FILTER (WHERE datname = current_database() AND state = 'active' AND query LIKE verb || '%stall_%'),
            count(*) FILTER (WHERE application_name IN ('pgclone', 'pg_restore', 'psql'))
            INTO others, everyone FROM pg_stat_activity;
        IF others = {JOBS} THEN
            PERFORM pg_sleep(0.5);  -- until the others have seen it, too
            IF everyone > {JOBS} + 2 THEN RAISE '% sessions at %', everyone, verb; END IF;
            RETURN id;
        END IF;
    END LOOP;
    RAISE '% of % sessions at %', others, {JOBS}, verb;
END $$;
CREATE TABLE stall_1 (id int CHECK (public.together(id) > 0));
CREATE TABLE stall_2 (id int CHECK (public.together(id) > 0));
CREATE UNLOGGED TABLE stall_3 (id int CHECK (public.together(id) > 0)); -- of the archive
"""


def test_rows_indexes_and_statistics_take_as_many_sessions_as_there_are_jobs_and_two_at_most_besides(
    postgres: Server, forks: Forks, tmp_path: Path
) -> None:
    """Each of three tables waits for the other two, whenever one is loaded, indexed or analyzed."""
    with open_project(postgres, tmp_path, name="fair", books=0) as fair:
        fair.sql(TOGETHER)
        for table in ("stall_1", "stall_2", "stall_3"):
            fair.sql(f"INSERT INTO {table} SELECT generate_series(1, 3000); CREATE INDEX ON {table} (together(id))")
        done = forks.run(fair, "pgclone", "dump", "--jobs", str(JOBS))
        assert done.status == 0 and f"{fair.stored()[0]}.parts/00002" in fair.stored(), done.err
        done = forks.run(fair, "pgclone", "restore", "prod", "--as", ":trial", "--jobs", str(JOBS))
        assert done.status == 0, done.err
