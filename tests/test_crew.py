"""Threads that work off tasks beside the main thread: all are done, or the first failure ends everything."""

from __future__ import annotations

import threading
import time

import pytest

from pgclone import crew as crews
from pgclone.crew import Crew, Stopped, Task, crew

SOON = 5
"""Seconds after which a test fails instead of waiting for ever."""


class Failure(Exception):
    """What a test lets go wrong."""


def fail(_: Crew) -> None:
    raise Failure("first")


def noting(done: list[int], number: int) -> Task:
    return lambda _: done.append(number)


def endless(begun: threading.Event) -> Task:
    """A task that ends only when its crew ends it, and fails because of that."""

    def work(workers: Crew) -> None:
        ended = threading.Event()
        with workers.ending(ended.set):
            begun.set()
            assert ended.wait(SOON)
        raise Failure("ended")

    return work


def at_work() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pgclone-")]


def after(event: threading.Event, task: Task) -> Task:
    def work(workers: Crew) -> None:
        assert event.wait(SOON)
        task(workers)

    return work


def test_all_tasks_are_done() -> None:
    done: list[int] = []
    with crew([noting(done, number) for number in range(100)], 4) as workers:
        workers.wait()
        assert sorted(done) == [*range(100)]


def test_one_worker_does_them_in_order() -> None:
    done: list[int] = []
    with crew([noting(done, number) for number in range(10)], 1) as workers:
        workers.wait()
    assert done == [*range(10)]


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_are_done_at_once_as_there_are_workers(count: int) -> None:
    together = threading.Barrier(count, timeout=SOON)
    working: list[None] = []
    most = 0

    def work(_: Crew) -> None:
        nonlocal most
        working.append(None)
        together.wait()  # passes when `count` work at once
        most = max(most, len(working))
        together.wait()
        working.pop()

    with crew([work] * 3 * count, count) as workers:
        workers.wait()
    assert most == count


def test_a_worker_that_is_hired_later_helps() -> None:
    met = threading.Barrier(2, timeout=SOON)
    with crew([lambda _: met.wait()] * 2, 1) as workers:  # type: ignore[list-item]
        workers.hire()
        workers.wait()


def test_tasks_may_wait_for_their_first_worker() -> None:
    done: list[int] = []
    with crew([noting(done, 1)], 0) as workers:
        assert done == []
        workers.hire()
        workers.wait()
    assert done == [1]


def test_nobody_is_hired_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    with crew([], 4) as workers:
        workers.hire()
        workers.wait()


def test_a_failure_is_raised_where_somebody_waits() -> None:
    with pytest.raises(Failure, match="first"):
        with crew([fail], 1) as workers:
            workers.wait()


def test_a_failure_ends_what_the_other_workers_do() -> None:
    begun = threading.Event()
    with pytest.raises(Failure, match="first"):
        with crew([endless(begun), after(begun, fail)], 2) as workers:
            workers.wait()


def test_after_a_failure_no_task_begins() -> None:
    """Not even by a worker whose task ended well."""
    begun, ended, done = threading.Event(), threading.Event(), []

    def work(workers: Crew) -> None:
        with workers.ending(ended.set):
            begun.set()
            assert ended.wait(SOON)
        done.append(1)

    with pytest.raises(Failure):
        with crew([work, after(begun, fail), noting(done, 2)], 2) as workers:
            workers.wait()
    assert done == [1]


def test_a_failure_ends_the_work_of_the_block_and_is_what_counts() -> None:
    """pg_dump is ended when a worker fails; that it then fails is no news."""
    begun, ended = threading.Event(), threading.Event()
    with pytest.raises(Failure, match="first") as raised:
        with crew([after(begun, fail)], 1) as workers:
            with workers.ending(ended.set):
                begun.set()
                assert ended.wait(SOON)
                raise Failure("because it was ended")
    assert raised.value.__suppress_context__


def test_what_fails_the_block_ends_the_tasks_and_is_what_counts() -> None:
    begun = threading.Event()
    with pytest.raises(Failure, match="the block"):
        with crew([endless(begun)], 1):
            assert begun.wait(SOON)
            raise Failure("the block")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_of_the_block_ends_the_tasks_and_is_what_counts(interruption: type[BaseException]) -> None:
    begun = threading.Event()
    with pytest.raises(interruption):
        with crew([endless(begun)], 1) as workers:
            assert begun.wait(SOON)
            raise interruption
    assert workers.failure is None
    assert at_work() == []


def test_a_task_that_leaves_the_process_has_failed() -> None:
    def leave(_: Crew) -> None:
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        with crew([leave], 1) as workers:
            workers.wait()


def test_a_task_can_ask_whether_it_goes_on() -> None:
    begun, outcome = threading.Event(), []

    def work(workers: Crew) -> None:
        workers.check()
        begun.set()
        with pytest.raises(Stopped):
            for _ in range(SOON * 1000):
                workers.check()
                time.sleep(0.001)
        outcome.append("stopped")

    with pytest.raises(Failure):
        with crew([work, after(begun, fail)], 2) as workers:
            workers.wait()
    assert outcome == ["stopped"]


def test_what_begins_after_the_end_is_ended_at_once() -> None:
    workers = Crew([])
    workers.stop()
    ended: list[bool] = []
    with workers.ending(lambda: ended.append(True)):
        assert ended == [True]


def test_what_is_over_is_not_ended_any_more() -> None:
    workers = Crew([])
    ended: list[bool] = []
    with workers.ending(lambda: ended.append(True)):
        pass
    workers.stop()
    assert ended == []


def test_who_waits_looks_up_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "_LOOK_SECONDS", 0.001)
    seen = threading.Event()
    looks: list[None] = []

    def look() -> None:
        looks.append(None)
        if len(looks) == 3:
            seen.set()

    with crew([after(seen, lambda _: None)], 1) as workers:
        workers.wait(look)
    assert len(looks) > 3


def test_what_goes_wrong_there_ends_the_tasks() -> None:
    def look() -> None:
        raise Failure("looked")

    begun = threading.Event()
    with pytest.raises(Failure, match="looked"):
        with crew([endless(begun)], 1) as workers:
            assert begun.wait(SOON)
            workers.wait(look)
    assert at_work() == []


def test_a_thread_that_cannot_be_started_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, start = threading.Event(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "pgclone-2":
            assert begun.wait(SOON)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        with crew([endless(begun), endless(begun)], 2):
            pytest.fail("the block must not begin")
    assert at_work() == []


def test_a_task_that_does_not_end_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "_GRACE_SECONDS", 0.01)
    hangs, begun = threading.Event(), threading.Event()

    def hang(_: Crew) -> None:
        begun.set()
        hangs.wait(SOON)

    with pytest.raises(Failure):
        with crew([hang], 1) as workers:
            assert begun.wait(SOON)
            raise Failure
    (hanging,) = at_work()
    hangs.set()
    hanging.join()
    assert workers.failure is None


def test_the_workers_do_not_keep_the_process_alive() -> None:
    begun = threading.Event()
    with pytest.raises(Failure):
        with crew([endless(begun)], 1):
            assert [worker.daemon for worker in at_work()] == [True]
            raise Failure


def test_a_failure_counts_more_than_a_failure_of_the_block_that_comes_later() -> None:
    with pytest.raises(Failure, match="first"):
        with crew([fail], 1) as workers:
            with pytest.raises(Failure):
                workers.wait()
            raise Failure("second")
