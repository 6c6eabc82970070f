"""Restores and copies that are killed, interrupted or failed, and dumps that are damaged: nothing is ever lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgclone.testing.postgres import Server
from tests.faults import Fault, Tally, alive, children, read_trace, spread, tally, wait_until  # noqa: F401
from tests.forks import Forks
from tests.project import Project
from tests.shop import ASIDE, COMMANDS, COPY, PLAIN, REVERSIBLE, Command, Shop, open_shop
from tests.tools import make_tools

STATUS = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130,)}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def shop(
    postgres: Server,
    tmp_path_factory: pytest.TempPathFactory,
    forks: Forks,
    tally: Tally,  # noqa: F811
) -> Iterator[Shop]:
    """One for all tests: whatever they do to it, it must not suffer."""
    with open_shop(postgres, tmp_path_factory.mktemp("shop"), forks, tally) as shop:
        yield shop


@pytest.fixture
def copied(shop: Shop) -> Shop:
    """With databases from before and after a restore, a backup, and one that was restored aside."""
    for command in (COPY, ASIDE, REVERSIBLE):
        shop.check_next_run(command)
    return shop


def kill(shop: Shop, command: Command, fault: Fault, *, lines: bool = False) -> None:
    before = shop.state()
    done = shop.run(*command.argv, faults=[fault], lines=lines)
    shop.tally.faults[f"{fault.blow} in restores and copies" if done.status else "faults that came too late"] += 1
    try:
        assert done.status in (0, *STATUS[fault.blow]), done.err
        shop.check(command, before, clean=fault.blow != "SIGKILL" and not lines)
        shop.check_next_run(command)
    except AssertionError as error:
        raise AssertionError(f"{fault}: {error}\n{done.err}") from None


def points(shop: Shop, command: Command, folder: Path, *, lines: bool = False) -> list[tuple[str, int]]:
    done = shop.run(*command.argv, trace=folder / "trace", lines=lines)
    assert done.status == 0, done.err
    shop.sell()
    return read_trace(folder / "trace")


@pytest.mark.parametrize(("name", "count"), [("plain", 6), ("reversible", 5), ("undo", 2), ("as", 2), ("copy", 3)])
def test_a_killed_command_loses_nothing(copied: Shop, tmp_path: Path, name: str, count: int) -> None:
    for point, occurrence in spread(points(copied, COMMANDS[name], tmp_path)[:-1], count):
        kill(copied, COMMANDS[name], Fault(point, "SIGKILL", occurrence))


@pytest.mark.parametrize("blow", ["SIGTERM", "SIGINT"])
def test_an_interrupted_restore_leaves_nothing(shop: Shop, tmp_path: Path, blow: str) -> None:
    for point, occurrence in spread(points(shop, PLAIN, tmp_path)[:-1], 3):
        kill(shop, PLAIN, Fault(point, blow, occurrence))


@pytest.mark.soak
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_anywhere_loses_nothing(copied: Shop, tmp_path: Path, name: str) -> None:
    for point, occurrence in points(copied, COMMANDS[name], tmp_path):
        kill(copied, COMMANDS[name], Fault(point, "SIGKILL", occurrence))


@pytest.mark.soak
@pytest.mark.parametrize("blow", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", ["plain", "reversible", "copy"])
def test_a_command_that_is_interrupted_anywhere_leaves_nothing(
    copied: Shop, tmp_path: Path, name: str, blow: str
) -> None:
    for point, occurrence in spread(points(copied, COMMANDS[name], tmp_path), 60):
        kill(copied, COMMANDS[name], Fault(point, blow, occurrence))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["plain", "reversible"])
def test_a_restore_that_is_interrupted_in_any_line_loses_nothing(copied: Shop, tmp_path: Path, name: str) -> None:
    for point, occurrence in spread(points(copied, COMMANDS[name], tmp_path, lines=True), 120):
        kill(copied, COMMANDS[name], Fault(point, "SIGINT", occurrence), lines=True)


def test_ctrl_c_twice_loses_nothing(shop: Shop) -> None:
    before = shop.state()
    looking = "before: SELECT datname::text, pg_get_userbyid(datdba)::text, shobj_description(oid, 'pg_database')"
    faults = [Fault("child: awaited", "SIGINT", 9), Fault(looking, "SIGINT", 2)]
    assert shop.run(*PLAIN.argv, faults=faults).status == 130
    shop.check(PLAIN, before)
    shop.check_next_run(PLAIN)
    shop.tally.faults["SIGINT twice in restores and copies"] += 1


def test_an_orphan_under_a_work_name_goes_and_one_that_is_used_stays(shop: Shop) -> None:
    server = shop.project.server
    with frozen(shop, PLAIN, MOMENTS["loading"]) as restore:
        used = shop.left_over()
        server.run("createdb", "pgclone_work_0123456789ab_012345")
        server.run("createdb", "-T", "warehouse", "annex")
        annex = Project(server, "annex", shop.project.dumps)
        assert shop.forks.run(annex, "pgclone", "copy", ":annex2").status == 0
        assert shop.left_over() == used
        assert restore.thaw().status == 0
    for name in ("annex", "annex2"):
        server.run("dropdb", name)


# Children


def test_pg_restore_ends_with_a_killed_restore(shop: Shop) -> None:
    before = shop.state()
    restore = shop.forks.start(
        shop.project, "pgclone", *PLAIN.argv, faults=[Fault("child: pg_restore started", "SIGSTOP", 4)]
    )
    restore.wait_until_frozen()
    started = children(restore.pid)
    assert started
    restore.send(signal.SIGKILL)
    restore.wait()
    wait_until(lambda: not alive(started), seconds=3)
    wait_until(lambda: sessions(shop, "shop__temp") == 0, seconds=3)
    shop.check(PLAIN, before)
    shop.check_next_run(PLAIN)
    shop.tally.faults["SIGKILL in restores and copies"] += 1


def sessions(shop: Shop, database: str) -> int:
    return int(shop.project.sql(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'", "postgres"))


@pytest.mark.parametrize(
    ("section", "after", "how"),
    [
        ("pre-data", 0, "by=9"),
        ("pre-data", None, "status=1"),
        ("data", 0, "status=1"),
        ("data", 300_000, "by=9"),
        ("data", 300_000, "status=1"),
        ("data", None, "by=9"),
        ("data", None, "status=3"),
        ("post-data", 0, "by=9"),
        ("post-data", None, "status=1"),
    ],
)
def test_a_pg_restore_that_dies_changes_nothing(
    shop: Shop, tmp_path: Path, section: str, after: int | None, how: str
) -> None:
    before = shop.state()
    action = f"die(after={after}, section={section!r}, {how})"
    tools = make_tools(tmp_path, shop.project.server.bin, pg_restore=action)
    refused(shop, before, "pg_restore", kind="killed children", PGCLONE_BIN_DIR=str(tools))


def refused(
    shop: Shop, before: Any, words: str, *argv: str, kind: str = "failures in restores", **options: Any
) -> None:
    """A restore fails, says why in words, and nothing has changed."""
    done = shop.run(*(argv or PLAIN.argv), **options)
    shop.tally.faults[kind] += 1
    assert done.status == 1, done.err
    assert words in done.err and "Traceback" not in done.err, done.err
    shop.check_unchanged(before)


# Damaged dumps


@pytest.fixture(params=["zstd", "none"])
def stored(shop: Shop, request: pytest.FixtureRequest) -> Path:
    """A dump by one codec or the other."""
    dump = shop.special("--codec", request.param)
    shop.sell()
    return dump


def manifest_of(dump: Path) -> Path:
    return dump.with_name(f"{dump.name}.json")


def key_of(shop: Shop, dump: Path) -> str:
    return dump.relative_to(shop.project.dumps).as_posix()


def damaged(shop: Shop, dump: Path, file: Path, data: bytes, kind: str) -> None:
    """With these bytes in one of its files, the dump is refused; with the right ones, it is not."""
    intact, before = file.read_bytes(), shop.state()
    file.write_bytes(data)
    try:
        refused(shop, before, "", "restore", key_of(shop, dump), kind=kind)
    except AssertionError:
        shop.tally.lost += 1
        raise
    finally:
        file.write_bytes(intact)


def truncate(shop: Shop, stored: Path, count: int) -> None:
    for file, times in ((stored, count), (manifest_of(stored), count // 3)):
        data = file.read_bytes()
        for end in sorted({0, 1, 4, len(data) - 1, *(len(data) * n // times for n in range(times))}):
            damaged(shop, stored, file, data[:end], "truncations")


def flip(shop: Shop, stored: Path, count: int) -> None:
    for file, times in ((stored, count), (manifest_of(stored), count // 3)):
        data = file.read_bytes()
        chosen = random.Random(count)
        for part in range(times):
            at = chosen.randrange(len(data) * part // times, len(data) * (part + 1) // times)
            flipped = data[:at] + bytes([data[at] ^ (1 << chosen.randrange(8))]) + data[at + 1 :]
            damaged(shop, stored, file, flipped, "bit flips")


def test_a_truncated_dump_is_refused(shop: Shop, stored: Path) -> None:
    truncate(shop, stored, 3)


def test_a_dump_with_a_flipped_bit_is_refused(shop: Shop, stored: Path) -> None:
    flip(shop, stored, 4)


@pytest.mark.soak
def test_a_dump_that_is_truncated_anywhere_is_refused(shop: Shop, stored: Path) -> None:
    truncate(shop, stored, 100)


@pytest.mark.soak
def test_a_dump_with_a_bit_flipped_anywhere_is_refused(shop: Shop, stored: Path) -> None:
    flip(shop, stored, 150)


def test_a_row_that_was_changed_without_harm_to_the_syntax_is_refused(shop: Shop) -> None:
    """pg_restore would take it."""
    dump = shop.special("--codec", "none")
    data = dump.read_bytes()
    assert b"Book 17\t" in data
    damaged(shop, dump, dump, data.replace(b"Book 17\t", b"Book 57\t", 1), "bit flips")


def test_what_is_not_what_was_dumped_is_refused(shop: Shop, stored: Path) -> None:
    data, other = stored.read_bytes(), shop.special()
    for wrong in (data + b"junk", data + data, b"", other.read_bytes()):
        damaged(shop, stored, stored, wrong, "damaged dumps")
    for wrong in (b"", b"{}", manifest_of(other).read_bytes()):
        damaged(shop, stored, manifest_of(stored), wrong, "damaged dumps")


def test_a_dump_that_has_lost_its_manifest_is_refused(shop: Shop, stored: Path) -> None:
    manifest_of(stored).unlink()
    refused(shop, shop.state(), "has no manifest", "restore", key_of(shop, stored), kind="damaged dumps")


def rewrite(manifest: Path, **changes: object) -> None:
    """Change a manifest as if it had been written so."""
    body = {**json.loads(manifest.read_bytes()), **changes}
    del body["self_sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({**body, "self_sha256": digest}))


@pytest.mark.parametrize("codecs", [["none such"], []])
def test_another_codec_than_the_manifest_says_is_refused(shop: Shop, codecs: list[str]) -> None:
    dump = shop.special()
    rewrite(manifest_of(dump), codecs=codecs)
    refused(shop, shop.state(), "", "restore", key_of(shop, dump), kind="damaged dumps")


def test_a_truncated_dump_of_django_pgclone_is_refused(shop: Shop) -> None:
    """It has no manifest, and is compressed inside the archive."""
    old = shop.project.dumps / "old/default/none/2020-01-31-10-20-30-123456.dump"
    old.parent.mkdir(parents=True)
    shop.project.server.run("pg_dump", "-Fc", "-d", "shop", "-f", str(old))
    content, data = shop.content("shop"), old.read_bytes()
    shop.sell()
    for end in (0, 4, 100, len(data) // 4, len(data) // 2, len(data) - 1):
        damaged(shop, old, old, data[:end], "truncations")
    assert shop.run("restore", "old").status == 0
    assert shop.content("shop") == content


# Hooks


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        (["objects"], "not today"),
        (["vetoes"], "not today"),
        (["leaves"], "SystemExit"),
        (["leaves_with_a_status"], "SystemExit"),
        (["kills_its_connection"], "kills_its_connection"),
        (["queries_another_database"], 'queried the database "other"'),
        (["goes_elsewhere"], 'on database "postgres"'),
        (["masks_in_a_thread", "goes_elsewhere"], 'on database "postgres"'),
        (["forgets_to_commit"], "transaction"),
        (["forgets_in_a_block"], "transaction"),
    ],
)
def test_a_hook_that_fails_changes_nothing(shop: Shop, plugins: list[str], words: str) -> None:
    default = {**shop.project.server.settings("shop"), **shop.project.database}
    databases = {"default": default, "other": {**default, "NAME": "postgres"}}
    names = [f"tests.bad_plugins:{name}" for name in plugins]
    refused(shop, shop.state(), words, kind="failing hooks", PGCLONE_PLUGINS=names, DATABASES=databases,
            PGCLONE_CONN_DB="template1")  # fmt: skip


@pytest.mark.parametrize("plugin", ["asks_in_threads", "older.asks_in_threads"])
def test_threads_of_a_hook_see_the_restored_database(shop: Shop, plugin: str) -> None:
    done = shop.run(*PLAIN.argv, PGCLONE_PLUGINS=[f"tests.bad_plugins:{plugin}"])
    assert done.status == 0, done.err


def test_threads_of_a_hook_change_the_restored_database_only(shop: Shop) -> None:
    shop.sell()
    done = shop.run(*REVERSIBLE.argv, PGCLONE_PLUGINS=["tests.bad_plugins:masks_in_a_thread"])
    assert done.status == 0, done.err
    names = {name: shop.project.sql("SELECT DISTINCT name FROM app_author", name) for name in ("shop", "shop__pre")}
    assert names["shop"] == "masked"
    assert names["shop__pre"].startswith("sale")


@pytest.mark.parametrize("plugin", ["fails_afterwards", "leaves_afterwards"])
def test_a_hook_that_fails_after_the_swap_leaves_it(shop: Shop, plugin: str) -> None:
    before = shop.state()
    done = shop.run(*PLAIN.argv, PGCLONE_PLUGINS=[f"tests.bad_plugins:{plugin}"])
    assert done.status == 0
    assert "too late" in done.err
    assert shop.state() == PLAIN.after(before, shop.dumped)


def test_a_hook_does_not_turn_a_failure_into_a_success(shop: Shop) -> None:
    plugins = ["tests.bad_plugins:vetoes", "tests.bad_plugins:leaves_afterwards"]
    refused(shop, shop.state(), "not today", kind="failing hooks", PGCLONE_PLUGINS=plugins)


# What others do to the server meanwhile


@contextlib.contextmanager
def frozen(shop: Shop, command: Command, fault: Fault) -> Iterator[Any]:
    restore = shop.forks.start(shop.project, "pgclone", *command.argv, faults=[fault])
    restore.wait_until_frozen()
    try:
        yield restore
    except BaseException:
        restore.send(signal.SIGKILL)
        restore.wait()
        raise


# pg_restore is started for its version and the list first
MOMENTS = {
    "loading": Fault("child: pg_restore started", "SIGSTOP", 4),
    "proving": Fault('before: ANALYZE ONLY "public"."app_review"', "SIGSTOP"),
    "hooking": Fault("event: command_finished", "SIGSTOP"),
    "swapping": Fault('before: ALTER DATABASE "shop" RENAME TO "shop__swap"', "SIGSTOP"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_server_that_crashes_meanwhile_loses_nothing(shop: Shop, moment: str) -> None:
    before = shop.state()
    with frozen(shop, PLAIN, MOMENTS[moment]) as restore:
        crash(shop)
        done = restore.thaw()
    shop.tally.faults["crashes of the server"] += 1
    assert done.status == 1
    assert "Traceback" not in done.err, done.err
    shop.check(PLAIN, before)
    shop.check_next_run(PLAIN)


def crash(shop: Shop) -> None:
    """Kill a backend: the server ends all sessions, and recovers from its log."""
    backend = subprocess.Popen(
        [str(shop.project.server.bin / "psql"), "-XAtq", "-d", "postgres"],
        env=shop.project.server.environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert backend.stdin and backend.stdout
    backend.stdin.write("SELECT pg_backend_pid();\n")
    backend.stdin.flush()
    os.kill(int(backend.stdout.readline()), signal.SIGKILL)
    backend.communicate()
    wait_until(shop._reachable)


@pytest.mark.parametrize("moment", ["loading", "proving", "hooking"])
def test_a_temporary_database_that_is_dropped_meanwhile_changes_nothing(shop: Shop, moment: str) -> None:
    before = shop.state()
    with frozen(shop, PLAIN, MOMENTS[moment]) as restore:
        (temporary,) = shop.left_over()
        shop.project.server.run("dropdb", "--force", temporary)
        done = restore.thaw()
    shop.tally.faults["temporary databases dropped"] += 1
    assert done.status == 1
    assert "Traceback" not in done.err, done.err
    shop.check_unchanged(before)


@pytest.mark.parametrize("moment", ["loading", "hooking"])
def test_a_restore_that_has_lost_its_lock_changes_nothing(shop: Shop, moment: str) -> None:
    before = shop.state()
    with frozen(shop, PLAIN, MOMENTS[moment]) as restore:
        end_lock_sessions(shop)
        done = restore.thaw()
    shop.tally.faults["locks lost"] += 1
    assert done.status == 1
    assert "The lock" in done.err and "Traceback" not in done.err, done.err
    shop.check_unchanged(before)


def test_a_restore_that_loses_its_lock_in_mid_swap_loses_nothing(shop: Shop) -> None:
    before = shop.state()
    with frozen(shop, PLAIN, MOMENTS["swapping"]) as restore:
        end_lock_sessions(shop)
        done = restore.thaw()
    shop.tally.faults["locks lost"] += 1
    assert "Traceback" not in done.err, done.err
    shop.check(PLAIN, before)
    shop.check_next_run(PLAIN)


def end_lock_sessions(shop: Shop) -> None:
    shop.project.sql(
        "SELECT pg_terminate_backend(pid) FROM (SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory') AS l",
        "postgres",
    )


def test_a_restore_that_has_lost_its_lock_spoils_no_other(shop: Shop) -> None:
    before = shop.state()
    begun = Fault("child: stopped", "SIGSTOP", 4)  # after the tables, before the rows
    with frozen(shop, PLAIN, begun) as first:
        end_lock_sessions(shop)
        with frozen(shop, PLAIN, begun) as second:
            lost = first.thaw()
            done = second.thaw()
    shop.tally.faults["locks lost"] += 1
    assert lost.status == 1
    assert done.status == 0, done.err
    assert shop.state() == PLAIN.after(before, shop.dumped)
    assert shop.left_over() == []


def test_a_database_that_somebody_makes_meanwhile_is_not_replaced(shop: Shop) -> None:
    shop.project.server.run("dropdb", "--if-exists", "yesterday")
    with frozen(shop, ASIDE, MOMENTS["hooking"]) as restore:
        shop.project.server.run("createdb", "-T", "warehouse", "yesterday")
        oid = shop.project.sql("SELECT oid FROM pg_database WHERE datname = 'yesterday'")
        done = restore.thaw()
    assert done.status == 1
    assert '"yesterday" is in the way' in done.err
    assert shop.project.sql("SELECT oid FROM pg_database WHERE datname = 'yesterday'") == oid
    assert shop.left_over() == []
    shop.project.server.run("dropdb", "yesterday")


# Errors of pg_restore


def test_an_error_that_is_not_harmless_is_named_and_refused_and_can_be_allowed(shop: Shop) -> None:
    project = shop.project
    project.sql("CREATE ROLE analyst")
    project.sql("CREATE POLICY mine ON app_book TO analyst")
    key = key_of(shop, shop.special())
    project.sql("DROP POLICY mine ON app_book")
    project.sql("DROP ROLE analyst")
    entry = "POLICY public app_book mine"
    refused(shop, shop.state(), entry, "restore", key, "--jobs", "1")
    refused(shop, shop.state(), entry, "restore", key, "--allow-error", "POLICY public app_book min")
    done = shop.run("restore", key, "--allow-error", entry)
    assert done.status == 0, done.err
    assert f"Ignored, as you allowed it: {entry} postgres" in done.err


def test_what_was_allowed_to_fail_is_not_missed(shop: Shop) -> None:
    project = shop.project
    project.sql(
        """CREATE FUNCTION picky(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
        $$ BEGIN IF current_database() <> 'shop' THEN RAISE 'elsewhere'; END IF; RETURN $1; END $$"""
    )
    project.sql("CREATE INDEX picky_index ON app_author (public.picky(name))")
    key = key_of(shop, shop.special())
    project.sql("DROP FUNCTION picky CASCADE")
    entry = "INDEX public picky_index"
    refused(shop, shop.state(), entry, "restore", key, "--jobs", "1")
    done = shop.run("restore", key, "--allow-error", entry)
    assert done.status == 0, done.err
    assert f"Ignored, as you allowed it: {entry} postgres" in done.err


def test_errors_of_data_are_never_allowed(shop: Shop) -> None:
    project = shop.project
    project.sql("ALTER TABLE app_author ADD CHECK (current_database() = 'shop')")
    key = key_of(shop, shop.special())
    project.sql("ALTER TABLE app_author DROP CONSTRAINT app_author_check")
    refused(shop, shop.state(), "TABLE DATA public app_author", "restore", key)
    refused(shop, shop.state(), "TABLE DATA public app_author", "restore", key, "--allow-error", "TABLE")
    words = ("--allow-error", "TABLE DATA public app_author")
    refused(shop, shop.state(), "errors of data are never allowed", "restore", key, *words)


def test_a_missing_extension_is_named_before_anything_is_made(shop: Shop) -> None:
    dump = shop.special()
    rewrite(manifest_of(dump), extensions={"plpgsql": "1.0", "no_such_extension": "1.0"})
    refused(shop, shop.state(), "no_such_extension", "restore", key_of(shop, dump))
    done = shop.run("restore", key_of(shop, dump), "--allow-error", "EXTENSION - no_such_extension")
    assert done.status == 0, done.err
