"""The story of a visit to the doctor: what dumps and restores do with a storage location, tried on an object of its own."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pgclone import archive, exceptions, streams
from pgclone import host as hosts
from pgclone.conf import Options
from pgclone.events import log
from pgclone.host import Storage
from pgclone.locations import parse_location
from pgclone.process import signals_raise
from pgclone.streams import BLOCK, Digest
from pgclone.types import Entry


def doctor(options: Options) -> Iterator[str]:
    """Try what pgclone needs of a storage location, one step after the other, and yield lines that say what works.

    Raises:
        StorageError: A step failed. The lines have said which, and why.
    """
    # 1. Find who serves the location. A plugin that cannot be loaded is reported, and does not matter otherwise.
    host = hosts.build(options)
    for failure in host.failures:
        log.warning("plugin_failed", error=str(failure.as_error()))
    storage = host.storage(parse_location(options.storage_location))

    # 2. Take every step, but those that need one that failed.
    failed: list[str] = []
    with signals_raise(), _probe(storage) as probe:
        for step in STEPS:
            if missing := [name for name in step.needs if name in failed]:
                yield from _lines("skipped", step, f"cannot be tried without {missing[0]}")
                continue
            started = time.monotonic()
            try:
                finding = _take(step, probe)
            except exceptions.PgcloneError as error:
                failed.append(step.name)
                yield from _lines("failed", step, error.cause, *error.remedy.splitlines(), step.without)
            else:
                yield from _lines("ok", step, f"{finding} ({time.monotonic() - started:.2f} s)")

    # 3. Let the exit status say it, too.
    if failed:
        raise exceptions.StorageError(
            f"{storage.location} cannot do all that pgclone needs: {', '.join(failed)} failed.",
            "Mend what is said of it above, and see the doctor again.",
        )


_SEVERAL_PARTS = 20
"""MiB: more than storages that upload in parts keep back until they begin an upload."""


class Probe:
    """An object of random bytes that nobody takes for a dump. Each step says what it found, or raises `PgcloneError`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.key = f"pgclone-doctor-{secrets.token_hex(8)}"  # in no folder, which would stay
        self.written: Digest | None = None
        self.left: set[str] = set()
        """Keys that something may be stored under."""

    def write(self) -> str:
        self.written = self._store(self.key)
        return f'1 MiB as "{self.key}" in {self.storage.location}'

    def list(self) -> str:
        found = self._find(self.key)
        if self.written is None:
            return "works, but there is nothing to be found"
        if found is None:
            raise self._broken("was written, and is not listed.")
        if found.size not in (None, self.written.size):
            raise self._broken(f"has {self.written.size} bytes, and is listed with {found.size}.")
        return "what was written is listed"

    def read(self) -> str:
        if self._read() != self.written:
            raise self._broken("did not come back as it was written.")
        return "what was written came back"

    def overwrite(self) -> str:
        try:
            self._store(self.key)
        except exceptions.PgcloneError:
            if self._read() == self.written:
                return "a second write of the same key was refused"
            raise
        raise self._broken("was written twice, and the second time not refused.")

    def interrupt(self) -> str:
        key = f"{self.key}-interrupted"
        try:
            self._store(key, _SEVERAL_PARTS, interrupted=True)
        except _Interrupted as interrupted:
            if (error := interrupted.__cause__) is not None:
                words = getattr(error, "strerror", None) or error
                raise exceptions.StorageError(
                    f'"{key}" in {self.storage.location} could not be discarded: {words}'
                ) from error
        if self._find(key):
            raise exceptions.StorageError(
                f'"{key}" in {self.storage.location} is listed, although its write was interrupted.'
            )
        self.left.discard(key)
        return "an interrupted write left nothing"

    def delete(self) -> str:
        if not archive.delete(self.storage, self.key):
            raise self._broken("was not there to be deleted.")
        self.left.discard(self.key)
        return "what was written is gone"

    def _store(self, key: str, blocks: int = 1, *, interrupted: bool = False) -> Digest:
        self.left.add(key)
        with streams.store(self.storage, key, blocks * BLOCK) as stored:
            for _ in range(blocks):
                stored.write(secrets.token_bytes(BLOCK))
            if interrupted:
                raise _Interrupted("the doctor interrupted it")
        return stored.digest

    def _read(self) -> Digest:
        with streams.open_source(self.storage, self.key, lambda head: None) as source:
            return source.drain()

    def _find(self, key: str) -> Entry | None:
        return next((entry for entry in archive.list_entries(self.storage, key) if entry.key == key), None)

    def _broken(self, what: str) -> exceptions.StorageError:
        return exceptions.StorageError(f'"{self.key}" in {self.storage.location} {what}')


@dataclass(frozen=True)
class Step:
    """What is tried with the probe, the steps that must have worked for it, and what a user lacks without it."""

    name: str
    take: Callable[[Probe], str]
    without: str
    needs: tuple[str, ...] = ()


STEPS = (
    Step("write", Probe.write, "Without it, nothing can be dumped to this location."),
    Step("list", Probe.list, "Without it, nothing can be dumped to this location, or restored from it."),
    Step("read", Probe.read, "Without it, dumps can be made, but not restored from this location.", ("write",)),
    Step("overwrite", Probe.overwrite, "Without it, one dump may replace another.", ("write", "read")),
    Step("interrupt", Probe.interrupt, "Without it, broken dumps are listed like whole ones.", ("write", "list")),
    Step("delete", Probe.delete, "Without it, what dead runs leave stays, and what was written just now.", ("write",)),
)


class _Interrupted(BaseException):
    """What Ctrl-C looks like to a storage plugin: no `Exception`."""


@contextlib.contextmanager
def _probe(storage: Storage) -> Iterator[Probe]:
    """A probe for the block, of which nothing is left afterwards if the storage can delete."""
    probe = Probe(storage)
    try:
        yield probe
    finally:
        for key in probe.left:
            with contextlib.suppress(Exception):  # said in its step, or less important than what brought us here
                storage.delete(location=storage.location, key=key)


def _take(step: Step, probe: Probe) -> str:
    try:
        return step.take(probe)
    except exceptions.Terminated:
        raise
    except SystemExit as error:  # the caller would take status 0 for success
        raise exceptions.PluginError(f"A plugin tried to end the process: SystemExit({error}).") from error


def _lines(verdict: str, step: Step, *said: str) -> Iterator[str]:
    """What was said of a step, the first line behind its name and the others below."""
    for number, text in enumerate(said):
        head = f"{verdict:<7}  {step.name:<9}" if number == 0 else ""
        yield f"{head:<20}{text}"
