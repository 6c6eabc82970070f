"""The table of contents of a pg_dump archive: found at the head of a stream, listed, filtered, compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pgclone import exceptions, process
from pgclone.archive import ForeignKey
from pgclone.process import Tools

MAGIC = b"PGDMP"
"""How every custom-format archive begins."""

_FIRST_BYTES = 256 * 1024
_MOST_BYTES = 1024**3
_ENTRY = re.compile(r"(?P<id>\d+); (?P<table>\d+) (?P<oid>\d+) (?P<text>.+)")
_PROVEN = (
    "TABLE",
    "FOREIGN TABLE",
    "VIEW",
    "MATERIALIZED VIEW",
    "SEQUENCE",
    "INDEX",
    "CONSTRAINT",
    "FK CONSTRAINT",
    "CHECK CONSTRAINT",
    "TRIGGER",
)


@dataclass(frozen=True)
class Contents:
    """The head of an archive in a file, and what it lists.

    Args:
        head: A file with the archive's first bytes: the whole table of contents, at least.
        listing: What `pg_restore --list` prints.
    """

    head: Path
    listing: str

    def entries(self) -> Iterator[re.Match[str]]:
        # Not splitlines: names may hold what Python, but not pg_restore, takes for a line break.
        return (match for line in self.listing.split("\n") if (match := _ENTRY.fullmatch(line)))

    @property
    def names(self) -> dict[int, str]:
        """The entries by their IDs: kind, schema, name and owner."""
        return {int(entry["id"]): entry["text"] for entry in self.entries()}

    @property
    def compressed(self) -> bool:
        """Whether pg_dump compressed the rows, which protects them by checksums."""
        return re.search(r"^;\s+Compression: (none|0)$", self.listing, re.MULTILINE) is None

    @property
    def pg_dump(self) -> str:
        """The version of the pg_dump that made the archive."""
        match = re.search(r"^;\s+Dumped by pg_dump version: (\S+)", self.listing, re.MULTILINE)
        return match[1] if match else ""


def read_contents(tools: Tools, read: Callable[[int], bytes], folder: Path) -> Contents:
    """Read as much of a dump as holds its table of contents, into a file in `folder`.

    Raises:
        CorruptDump: It is no archive of pg_dump, or ends within its table of contents.
    """
    head = folder / "head.dump"
    wanted = _FIRST_BYTES
    with head.open("wb") as file:
        while file.tell() < _MOST_BYTES:
            ended = False
            while file.tell() < wanted and not ended:
                block = read(min(wanted - file.tell(), _FIRST_BYTES))
                if file.tell() == 0 and not block.startswith(MAGIC[: len(block)]):
                    raise exceptions.CorruptDump("This is no custom-format archive of pg_dump.", "Check the key.")
                file.write(block)
                ended = not block
            file.flush()
            if (listing := process.table_of_contents(tools, head)) is not None:
                return Contents(head, listing)
            if ended:
                break
            wanted *= 2
    raise exceptions.CorruptDump(
        "The dump ends within its table of contents, or has none that pg_restore understands.",
        "Nothing was swapped in. Restore another dump.",
    )


def without(contents: Contents, foreign_keys: Collection[ForeignKey]) -> Path:
    """A list of entries for pg_restore that leaves out some foreign keys, and the comments on them."""
    oids = {foreign.oid for foreign in foreign_keys}
    return _write(
        contents,
        "without-foreign-keys",
        lambda entry: not _is_foreign_key(entry, oids) and not _is_comment(entry, foreign_keys),
    )


def only(contents: Contents, foreign_key: ForeignKey) -> Path | None:
    """A list of entries with one foreign key alone; None if the archive has none of that OID."""
    if not any(_is_foreign_key(entry, {foreign_key.oid}) for entry in contents.entries()):
        return None
    return _write(contents, f"foreign-key-{foreign_key.oid}", lambda entry: _is_foreign_key(entry, {foreign_key.oid}))


def only_comments(contents: Contents, foreign_keys: Collection[ForeignKey]) -> Path | None:
    """A list of entries with the comments on some foreign keys alone; None if the archive has none."""
    if not any(_is_comment(entry, foreign_keys) for entry in contents.entries()):
        return None
    return _write(contents, "comments", lambda entry: _is_comment(entry, foreign_keys))


def tables_with_rows(contents: Contents, oids: Collection[int]) -> list[str]:
    """Those of some tables, by their OIDs in the dumped database, whose rows an archive has."""
    return [
        entry["text"].removeprefix("TABLE DATA ")
        for entry in contents.entries()
        if entry["text"].startswith("TABLE DATA ") and int(entry["oid"]) in oids
    ]


def missing_objects(contents: Contents, present: Collection[tuple[str, str]]) -> list[str]:
    """What the table of contents lists and a database does not have.

    An entry ends with its owner, and names may hold spaces, so that an entry is there if any of its beginnings is.
    """
    missing = []
    for entry in contents.entries():
        kind = next((kind for kind in _PROVEN if entry["text"].startswith(kind + " ")), None)
        if kind is None or entry["text"].startswith(
            ("TABLE DATA ", "TABLE ATTACH ", "SEQUENCE SET ", "SEQUENCE OWNED BY ")
        ):
            continue
        if entry["text"].startswith(("INDEX ATTACH ", "MATERIALIZED VIEW DATA ", "VIEW DATA ")):
            continue
        if not any((kind, beginning) in present for beginning in _beginnings(entry["text"][len(kind) + 1 :])):
            missing.append(entry["text"])
    return missing


def _beginnings(text: str) -> Iterable[str]:
    yield text
    while " " in text:
        text = text.rpartition(" ")[0]
        yield text


def _is_foreign_key(entry: re.Match[str], oids: Collection[int]) -> bool:
    return entry["text"].startswith("FK CONSTRAINT ") and int(entry["oid"]) in oids


def _is_comment(entry: re.Match[str], foreign_keys: Collection[ForeignKey]) -> bool:
    """Comments have no OID of their own: `COMMENT public CONSTRAINT a_fkey ON book owner`, quoted where SQL needs it."""
    text = entry["text"].replace('"', "") + " "
    wanted = [f" CONSTRAINT {foreign.name} ON {foreign.table} ".replace('"', "") for foreign in foreign_keys]
    return text.startswith("COMMENT ") and any(re.sub(r"[\r\n]", " ", words) in text for words in wanted)


def _write(contents: Contents, name: str, wanted: Callable[[re.Match[str]], bool]) -> Path:
    path = contents.head.with_name(f"{name}.list")
    path.write_text("".join(f"{entry[0]}\n" for entry in contents.entries() if wanted(entry)))
    return path
