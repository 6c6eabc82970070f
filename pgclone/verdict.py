"""Decides whether pg_restore has done its work: which of its errors are known to be harmless, and which were allowed.

An error is known by its archive entry and the command that failed, never by the server's words, which come in any
language. Whatever cannot be told apart counts as a failure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pgclone import exceptions
from pgclone.events import log
from pgclone.process import Child, failed

_DATA = ("TABLE DATA", "BLOB", "SEQUENCE SET", "MATERIALIZED VIEW DATA")

# (entry, command), both from their beginning
_HARMLESS = tuple(
    (re.compile(entry), re.compile(command))
    for entry, command in (
        (r"INITIALIZING$", r"SET transaction_timeout = 0;$"),  # a client from 17 on, a server before 17
        (r"SCHEMA - public ", r"CREATE SCHEMA public;$"),
        (r"SCHEMA - public ", r"ALTER SCHEMA public OWNER TO "),
        (r"COMMENT - SCHEMA public ", r"COMMENT ON SCHEMA public IS "),
        (r"COMMENT - EXTENSION ", r"COMMENT ON EXTENSION "),  # an extension that the template had already
    )
)


@dataclass
class Failure:
    """One error of pg_restore: the archive entry (or phase) it belongs to, what was said, and the failed command."""

    entry: str
    message: str
    command: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.entry.strip()}: {self.message}"


def judge(child: Child, entries: Mapping[int, str], allowed: Sequence[str] = (), *, jobs: int = 1) -> None:
    """Wait for pg_restore and accept what it did, or not.

    Args:
        entries: The archive's entries by their IDs, as `pg_restore --list` names them. Its errors leave the schema out.
        allowed: Those of them that may fail.
        jobs: With more than one, nothing may fail: the processes of pg_restore write their errors across each other.

    Raises:
        ToolFailed: It was killed, it gave up, or at least one error is neither harmless nor allowed.
    """
    status = child.wait()
    failures = list(_parse(child.errors, entries))
    ignored = re.search(r"^pg_restore: warning: errors ignored on restore: (\d+)$", child.errors, re.MULTILINE)
    if status == 0 and not failures:
        return
    if jobs > 1 and failures:
        raise _refused(failures, " (With --jobs 1, each error has its entry.)")
    if status != 1 or ignored is None or int(ignored[1]) != len(failures):
        raise failed(child, status)
    serious = []
    for failure in failures:
        if _is_harmless(failure):
            log.info("restore_error_harmless", entry=failure.entry.strip(), error=failure.message)
        elif _is_allowed(failure, allowed):
            log.warning("restore_error_allowed", entry=failure.entry.strip(), error=failure.message)
        else:
            serious.append(failure)
    if serious:
        raise _refused(serious)


def check_allowed(allowed: Sequence[str]) -> None:
    """Refuse to allow errors of data.

    Raises:
        ValueError: An entry is data.
    """
    for entry in allowed:
        if entry.upper().startswith(_DATA):
            raise exceptions.ValueError(f'--allow-error "{entry}": errors of data are never allowed.', "Leave it out.")


def _refused(serious: Sequence[Failure], hint: str = "") -> exceptions.ToolFailed:
    named = "\n".join(f"  {failure}" for failure in serious[:12])
    more = f"\n  and {len(serious) - 12} more" if len(serious) > 12 else ""
    return exceptions.ToolFailed(
        f"pg_restore could not restore everything:\n{named}{more}",
        f"Nothing was swapped in. Where the database does well without them, name these entries with --allow-error.{hint}",
    )


def _parse(errors: str, entries: Mapping[int, str]) -> Iterator[Failure]:
    entry = ""
    current: Failure | None = None
    for line in errors.split("\n"):  # not splitlines, which breaks at more than line feeds
        if line.startswith("pg_restore: "):
            if current is not None:
                yield current
                current = None
            words = line.removeprefix("pg_restore: ")
            if match := re.fullmatch(r"while (INITIALIZING|FINALIZING|PROCESSING TOC):", words):
                entry = match[1]
            elif match := re.fullmatch(r"from TOC entry (\d+); \d+ \d+ (.*)", words):
                entry = entries.get(int(match[1]), match[2]) + " "
            elif words.startswith("error: "):
                current = Failure(entry, words.removeprefix("error: "))
        elif current is not None:
            if line.startswith("Command was: "):
                current.command.append(line.removeprefix("Command was: "))
            elif current.command and line:
                current.command.append(line)
    if current is not None:
        yield current


def _is_harmless(failure: Failure) -> bool:
    command = "\n".join(failure.command)
    return any(entry.match(failure.entry) and known.match(command) for entry, known in _HARMLESS)


def _is_allowed(failure: Failure, allowed: Sequence[str]) -> bool:
    if failure.entry.startswith(_DATA) or "COPY failed" in failure.message:
        return False
    return any(failure.entry.startswith(f"{' '.join(entry.split())} ") for entry in allowed)
