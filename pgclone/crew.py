"""Threads that work off a list of tasks beside the main thread. The first failure ends everything."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

_LOOK_SECONDS = 0.25
_GRACE_SECONDS = 30


Task = Callable[["Crew"], None]
"""Is given its crew, to ask whether it goes on and to say how it can be ended."""


class Stopped(Exception):
    """Ends a task of a crew that was told to stop. What stopped it is raised elsewhere."""


class Crew:
    """Workers and the tasks that are left, in order. Made by `crew`."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = deque(tasks)
        self._workers: list[threading.Thread] = []
        self._changed = threading.Condition(threading.RLock())
        self._working = 0
        self._stopped = False
        self._enders: list[Callable[[], None]] = []
        self.failure: BaseException | None = None

    def hire(self, count: int = 1) -> None:
        """Let this many more threads work."""
        for _ in range(min(count, len(self._tasks))):
            self._start(self._next)

    def begin(self, task: Task) -> None:
        """Let one more thread do this task alone, at once."""
        alone = iter([task])
        self._start(lambda: next(alone, None))

    def check(self) -> None:
        """For tasks, before each step that takes time or cannot be taken back.

        Raises:
            Stopped: The crew was told to stop.
        """
        if self._stopped:
            raise Stopped

    @contextlib.contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """When the crew is told to stop during the block, `end` is called, so that nobody waits for the block's work."""
        with self._changed:
            self._enders.append(end)
            stopped = self._stopped
        if stopped:
            end()
        try:
            yield
        finally:
            with self._changed:
                self._enders.remove(end)

    def wait(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until all tasks are done, and look up now and then.

        Raises:
            BaseException: What the first failing task raised.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended, _LOOK_SECONDS)
                ended = self._ended
            if self.failure is not None:
                raise self.failure
            look()
            if ended:
                return

    def stop(self) -> None:
        """Begin no more tasks, end those under way, and wait for that a little."""
        self._stop()
        with self._changed:
            ended = self._changed.wait_for(lambda: not self._working, _GRACE_SECONDS)
        for worker in self._workers if ended else ():
            worker.join()

    @property
    def _ended(self) -> bool:
        return self.failure is not None or not self._working

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._tasks.clear()
            for end in self._enders:
                end()

    def _start(self, tasks: Callable[[], Task | None]) -> None:
        worker = threading.Thread(
            target=self._work, args=[tasks], name=f"pgclone-{len(self._workers) + 1}", daemon=True
        )
        with self._changed:
            self._working += 1
        try:
            worker.start()
        except BaseException:  # the system has no more threads, or a signal came
            if worker.ident is None:
                self._leave()
            raise
        finally:
            if worker.ident is not None:
                self._workers.append(worker)

    def _work(self, tasks: Callable[[], Task | None]) -> None:
        try:
            while (task := tasks()) is not None:
                task(self)
        except BaseException as error:  # noqa: BLE001  for the thread that waits
            with self._changed:
                if not self._stopped:
                    self.failure = error
                    self._stop()
        finally:
            self._leave()

    def _next(self) -> Task | None:
        with self._changed:
            return self._tasks.popleft() if self._tasks else None

    def _leave(self) -> None:
        with self._changed:
            self._working -= 1
            self._changed.notify_all()


@contextlib.contextmanager
def crew(tasks: Iterable[Task], count: int) -> Iterator[Crew]:
    """Work off tasks in `count` threads, beside the block. Whatever ends the block first ends the tasks, too.

    The block waits for them itself (`Crew.wait`).

    Raises:
        BaseException: What failed first, a task or the block.
    """
    workers = Crew(tasks)
    try:
        workers.hire(count)
        yield workers
    except Exception as error:
        workers.stop()
        if workers.failure is None or workers.failure is error:
            raise
        raise workers.failure from None
    except BaseException:
        workers.stop()
        raise
