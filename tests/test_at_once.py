"""Commands at once, on one database and on two; and commands that freeze in the middle."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from pgclone.testing.postgres import Server
from tests.faults import Fault, Tally, tally, wait_until  # noqa: F401
from tests.forks import Forked, Forks
from tests.project import Project, open_project
from tests.shop import COPY, PLAIN, REVERSIBLE, Command, Shop, open_shop

LOADING = Fault("child: pg_restore started", "SIGSTOP", 4)
HOOKING = Fault("event: command_finished", "SIGSTOP")
SWAPPING = Fault('before: ALTER DATABASE "shop" RENAME TO "shop__swap"', "SIGSTOP")
SWAPPED = Fault('before: ALTER DATABASE "pgclone_work_…" RENAME TO "shop"', "SIGSTOP")
DUMPING = Fault("child: pg_dump started", "SIGSTOP", 2)


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


def begin(shop: Shop, command: Command, *flags: str, faults: tuple[Fault, ...] = ()) -> Forked:
    return shop.forks.start(shop.project, "pgclone", *command.argv, *flags, faults=faults)


def frozen(shop: Shop, command: Command, fault: Fault) -> Forked:
    command_ = begin(shop, command, faults=(fault,))
    command_.wait_until_frozen()
    return command_


@pytest.mark.parametrize("second", [PLAIN, REVERSIBLE, COPY], ids=["restore", "reversible restore", "copy"])
def test_the_second_command_waits_for_a_restore_and_says_so(shop: Shop, second: Command) -> None:
    before = shop.state()
    restore = frozen(shop, PLAIN, LOADING)
    waiting = begin(shop, second)
    wait_until(lambda: 'Waiting for another run on database "shop" to end: pgclone' in waiting.err)
    for done in (restore.thaw(), waiting.wait()):
        assert done.status == 0, done.err
    assert shop.state() == second.after(PLAIN.after(before, shop.dumped), shop.dumped)
    assert shop.left_over() == []
    shop.sell()


@pytest.mark.parametrize("second", [PLAIN, COPY], ids=["restore", "copy"])
def test_the_second_command_fails_at_once_if_it_may_not_wait(shop: Shop, second: Command) -> None:
    before = shop.state()
    restore = frozen(shop, PLAIN, LOADING)
    done = shop.run(*second.argv, "--no-wait")
    assert done.status == 1
    assert 'Another run is at work on database "shop": pgclone with pid' in done.err
    assert restore.thaw().status == 0
    assert shop.state() == PLAIN.after(before, shop.dumped)
    shop.sell()


def test_three_restores_at_once_all_succeed(shop: Shop) -> None:
    before = shop.state()
    restores = [begin(shop, PLAIN) for _ in range(3)]
    for restore in restores:
        assert (done := restore.wait()).status == 0, done.err
    assert shop.state() == PLAIN.after(before, shop.dumped)
    assert shop.left_over() == []
    shop.sell()


def test_restores_of_two_databases_do_not_wait_for_each_other(shop: Shop) -> None:
    server = shop.project.server
    with open_project(server, shop.project.dumps, name="kiosk", books=5) as kiosk:
        key = kiosk.dump(PGCLONE_INSTANCE="kiosk")
        kiosk.sql("DELETE FROM app_review")
        before = shop.state()
        restore = frozen(shop, PLAIN, LOADING)
        done = shop.forks.run(kiosk, "pgclone", "restore", key)
        assert done.status == 0, done.err
        assert "Waiting" not in done.err
        assert int(kiosk.sql("SELECT count(*) FROM app_review")) == 5
        assert restore.thaw().status == 0
        assert {**shop.state(), "kiosk": ""} == {**PLAIN.after(before, shop.dumped), "kiosk": ""}
    shop.sell()


def test_a_dump_during_a_restore_holds_the_old_rows(shop: Shop) -> None:
    before = shop.state()
    restore = frozen(shop, PLAIN, HOOKING)
    assert shop.run("dump", "--instance", "nightly").status == 0
    assert restore.thaw().status == 0
    assert shop.run("restore", "nightly").status == 0
    assert shop.content("shop") == before["shop"]
    shop.sell()


def test_a_restore_during_a_dump_ends_the_dump_and_nothing_is_listed(shop: Shop) -> None:
    """The dump's session would otherwise keep the old database alive."""
    before, listed = shop.state(), shop.run("ls").lines
    dump = shop.forks.start(shop.project, "pgclone", "dump", faults=[DUMPING])
    dump.wait_until_frozen()
    assert shop.run(*PLAIN.argv).status == 0
    done = dump.thaw()
    assert done.status in (0, 1) and "Traceback" not in done.err
    new = [key for key in shop.run("ls").lines if key not in listed]
    assert len(new) == (done.status == 0)
    for key in new:
        assert shop.run("restore", key, "--as", ":trial").status == 0
        assert shop.content("trial") == before["shop"]
        shop.project.server.run("dropdb", "trial")
    assert shop.state() == PLAIN.after(before, shop.dumped)
    shop.sell()


def test_two_dumps_at_once_get_keys_of_their_own(shop: Shop) -> None:
    listed = len(shop.run("ls").lines)
    dumps = [shop.forks.start(shop.project, "pgclone", "dump", "--instance", "twins") for _ in range(3)]
    for dump in dumps:
        assert (done := dump.wait()).status == 0, done.err
    assert len(shop.run("ls").lines) == listed + 3


def test_a_restore_that_freezes_holds_nobody_up_and_goes_on(shop: Shop) -> None:
    before = shop.state()
    restore = frozen(shop, PLAIN, LOADING)
    assert answers(shop.project)
    assert restore.thaw().status == 0
    assert shop.state() == PLAIN.after(before, shop.dumped)
    shop.sell()


@pytest.mark.parametrize("moment", [SWAPPING, SWAPPED], ids=["before the rename", "after the rename"])
def test_a_restore_that_freezes_in_mid_swap_lets_clients_go_and_tries_again(shop: Shop, moment: Fault) -> None:
    before = shop.state()
    restore = frozen(shop, PLAIN, moment)
    wait_until(lambda: answers(shop.project), seconds=5)
    assert shop.state() == before
    done = restore.thaw()
    assert done.status == 0, done.err
    assert shop.state() == PLAIN.after(before, shop.dumped)
    assert shop.left_over() == []
    shop.tally.faults["SIGSTOP in restores"] += 1
    shop.sell()


def answers(project: Project) -> bool:
    """Whether a client gets in, and an answer."""
    try:
        return project.server.run("psql", "-XAtqc", "SELECT 1", "-d", project.name, timeout=2) == "1\n"
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
