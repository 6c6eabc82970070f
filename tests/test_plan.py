"""Plans of parallel dumps: which tables become parts, in which pieces, in which order. No server is asked."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgclone import plan
from pgclone.plan import CHUNK, LARGE, MOST_TABLES, SMALL_CHUNK, Candidate, Chunk, MiB, Plan, Relation

GiB = 1024 * MiB
BLOCK = 8192


def table(name: str, size: int, blocks: int | None = None) -> Candidate:
    """One without TOAST, if its blocks are not given."""
    return Candidate(0, "public", name, ("id",), size, size // BLOCK if blocks is None else blocks)


def make(sizes: dict[str, int], jobs: int, *, others: int = 0, chunks: bool = True) -> Plan:
    """A plan for tables, of which all could be parts, and for other ones."""
    tables = [dataclasses.replace(table(name, size), oid=oid) for oid, (name, size) in enumerate(sizes.items(), 1)]
    return plan.make(tables, sum(sizes.values()) + others, jobs, chunks=chunks)


def names(plan: Plan) -> list[str]:
    return [table.name for table in plan.tables]


def test_one_job_makes_an_archive_of_everything() -> None:
    assert make({"events": 100 * GiB}, jobs=1) == Plan(jobs=1, kept=100 * GiB)


def test_a_small_database_is_an_archive_alone() -> None:
    assert make({"events": LARGE - 1, "users": LARGE - 1}, jobs=8).chunks == ()


def test_a_large_table_among_small_ones_becomes_parts() -> None:
    made = make({"events": LARGE, "users": LARGE - 1}, jobs=2)
    assert names(made) == ["events"]
    assert made.kept == LARGE - 1


def test_the_largest_tables_leave_the_archive_until_it_is_half_of_a_fair_share() -> None:
    sizes = {"a": 600 * MiB, "c": 100 * MiB, "b": 200 * MiB, "d": 60 * MiB, "e": 40 * MiB}
    assert names(make(sizes, jobs=2)) == ["a", "b"]  # of 1000 MB, 200 stay: 250 may
    assert names(make(sizes, jobs=4)) == ["a", "b", "c"]  # 100 stay: 125 may


def test_what_cannot_be_a_part_counts_as_work_for_the_archive() -> None:
    sizes = {"a": 400 * MiB, "b": 100 * MiB}
    assert names(make(sizes, jobs=2)) == ["a"]
    assert names(make(sizes, jobs=2, others=GiB)) == ["a", "b"]


def test_the_largest_chunks_come_first() -> None:
    chunks = make({"b": 300 * MiB, "a": 1000 * MiB, "c": 1100 * MiB}, jobs=2, others=4 * GiB).chunks
    assert [chunk.table.name for chunk in chunks] == ["a", "c", "c", "b"]


def test_a_table_that_would_hold_everything_up_is_cut_into_pieces_of_half_a_share() -> None:
    assert len(make({"events": 800 * MiB}, jobs=2).chunks) == 4
    assert len(make({"events": 800 * MiB}, jobs=4).chunks) == 8


def test_many_jobs_do_not_make_crumbs() -> None:
    chunks = make({"events": 800 * MiB}, jobs=64).chunks
    assert [chunk.bytes for chunk in chunks] == [800 * MiB // 13] * 13
    assert max(chunk.bytes for chunk in chunks) <= SMALL_CHUNK


def test_a_table_that_is_not_larger_than_a_piece_stays_whole() -> None:
    first, *others = make({"events": 100 * MiB, "users": SMALL_CHUNK}, jobs=4).chunks
    assert first == Chunk(first.table, SMALL_CHUNK) and first.table.name == "users"
    assert [chunk.table.name for chunk in others] == ["events", "events"]


def test_no_chunk_is_larger_than_a_gibibyte() -> None:
    chunks = make({"events": 10 * GiB + 1}, jobs=2).chunks
    assert len(chunks) == 11
    assert max(chunk.bytes for chunk in chunks) <= CHUNK == GiB


def test_the_first_chunk_has_no_lower_bound_and_the_last_one_no_upper_bound() -> None:
    chunks = sorted(make({"events": 400 * MiB}, jobs=2).chunks, key=lambda chunk: chunk.first or 0)
    assert [(chunk.first, chunk.end) for chunk in chunks] == [
        (None, 12800),
        (12800, 25600),
        (25600, 38400),
        (38400, None),
    ]


def test_a_server_that_would_scan_the_whole_table_for_each_chunk_gets_none() -> None:
    made = make({"events": 10 * GiB, "users": 2 * GiB}, jobs=4, chunks=False)
    assert made.chunks == tuple(Chunk(table, table.bytes) for table in made.tables)
    assert names(made) == ["events", "users"]


def test_rows_in_one_block_cannot_be_cut_however_large_they_are() -> None:
    """Nearly all of such a table is in its TOAST table."""
    scroll = table("scroll", 10 * GiB, blocks=1)
    assert plan.make([scroll], 10 * GiB, 2).chunks == (Chunk(scroll, 10 * GiB),)


def test_a_table_that_was_never_analyzed_may_seem_to_have_no_block() -> None:
    events = table("events", 10 * GiB, blocks=0)
    assert plan.make([events], 10 * GiB, 2).chunks == (Chunk(events, 10 * GiB),)


def test_pg_dump_is_not_told_to_leave_out_any_number_of_tables() -> None:
    sizes = {f"t{number}": 20 * MiB + number for number in range(MOST_TABLES + 500)}
    made = make(sizes, jobs=8)
    assert set(names(made)) == {f"t{number}" for number in range(500, MOST_TABLES + 500)}


def test_an_empty_database_has_a_plan() -> None:
    assert plan.make([], 0, 4) == Plan(jobs=4)


@given(
    st.lists(st.tuples(st.integers(0, 5 * 2**40), st.integers(0, 2**32)), max_size=30),
    st.integers(0, 2**40),
    st.integers(1, 64),
    st.booleans(),
)
def test_every_row_is_read_exactly_once(sizes: list[tuple[int, int]], others: int, jobs: int, chunks: bool) -> None:
    tables = [
        dataclasses.replace(table(f"t{oid}", size // 64, blocks % 5000), oid=oid)
        for oid, (size, blocks) in enumerate(sizes)
    ]
    total = sum(table.bytes for table in tables) + others
    made = plan.make(tables, total, jobs, chunks=chunks)
    assert made.kept == total - sum(table.bytes for table in made.tables)
    assert sum(chunk.bytes for chunk in made.chunks) <= total - made.kept
    for cut in made.tables:
        pieces = sorted((c for c in made.chunks if c.table == cut), key=lambda chunk: chunk.first or 0)
        edges = [chunk.first or 0 for chunk in pieces[1:]]
        assert pieces[0].first is None and pieces[-1].end is None
        assert [chunk.end for chunk in pieces[:-1]] == edges
        assert edges == sorted(set(edges)) and 0 not in edges  # no chunk is empty
        assert all(chunk.bytes <= CHUNK or len(pieces) == max(1, cut.blocks) for chunk in pieces if chunks)


def test_the_description_names_every_part_and_its_blocks() -> None:
    made = make({"events": 200 * MiB, "users": 30 * MiB}, jobs=2, others=100 * MiB)
    assert [*made.describe()] == [
        "2 jobs, 4 parts",
        "       104.9 MB  archive: all tables that are not named below, and everything else",
        "        69.9 MB  part 00001: public.events, blocks 0 to 8532",
        "        69.9 MB  part 00002: public.events, blocks 8533 to 17065",
        "        69.9 MB  part 00003: public.events, blocks 17066 to the last",
        "        31.5 MB  part 00004: public.users",
    ]


def test_the_description_knows_the_singular() -> None:
    assert next(make({"events": 40 * MiB}, jobs=2).describe()) == "2 jobs, 1 part"
    assert next(make({"events": 40 * MiB}, jobs=1).describe()) == "1 job, 0 parts"


@pytest.mark.parametrize(
    ("schema", "name", "pattern"),
    [("public", "book", '"public"."book"'), ('Odd "s"', "a.b*", '"Odd ""s"""."a.b*"')],
)
def test_a_pattern_matches_one_table_alone(schema: str, name: str, pattern: str) -> None:
    assert Relation(1, schema, name).pattern == pattern
