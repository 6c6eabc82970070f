"""Names of the databases that this tool makes, and the comment that marks them as its own. Pure.

PostgreSQL cuts names off at 63 bytes without a word, so a derived name that would be longer is shortened and gets a
hash of the whole name: two databases never share one.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import asdict, dataclass
from typing import Literal, get_args

MAX_BYTES = 63
"""NAMEDATALEN - 1 (PostgreSQL docs, 4.1.1)."""

Derived = Literal["temp", "swap", "pre", "post"]
DERIVED: tuple[Derived, ...] = get_args(Derived)
"""The kinds of databases whose names are derived from the primary's."""

Kind = Literal[Derived, "copy"]

_MARK = "pgclone "
_WORK = re.compile(r"pgclone_work_(?P<run>[0-9a-f]{12})_[0-9a-f]{6}")


@dataclass(frozen=True)
class Marker:
    """What the comment on a database of ours says.

    Args:
        kind: `temp` and `swap` belong to one run and are dropped with it; `pre`, `post` and `copy` are kept.
        source: The database that it was made for.
        run: The run that made it (`new_run`).
    """

    kind: Kind
    source: str
    run: str

    def __str__(self) -> str:
        return _MARK + json.dumps(asdict(self), ensure_ascii=False)


def parse_marker(comment: str | None) -> Marker | None:
    """The marker in a database's comment; None if the comment is none of ours."""
    if not comment or not comment.startswith(_MARK):
        return None
    try:
        fields = json.loads(comment[len(_MARK) :])
        return Marker(fields["kind"], fields["source"], fields["run"])
    except (json.JSONDecodeError, LookupError, TypeError):
        return None


def derive(database: str, kind: Derived) -> str:
    """The name of a database that belongs to `database`: `app__temp`."""
    suffix = f"__{kind}"
    if len((database + suffix).encode()) <= MAX_BYTES:
        return database + suffix
    digest = "_" + hashlib.sha256(database.encode()).hexdigest()[:10]
    room = MAX_BYTES - len(digest + suffix)
    return database.encode()[:room].decode(errors="ignore") + digest + suffix


def new_run() -> str:
    """A random name for one run, part of every name it makes up."""
    return secrets.token_hex(6)


def work_name(run: str) -> str:
    """A name that no client knows, for a database on its way to or from its real name."""
    return f"pgclone_work_{run}_{secrets.token_hex(3)}"


def run_of_work_name(database: str) -> str | None:
    """The run that made up a work name; None if `database` is not such a name."""
    match = _WORK.fullmatch(database)
    return match["run"] if match else None
