"""Dump keys: how they are made, recognised, selected and sorted."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgclone import exceptions, keys

MOMENTS = st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(timezone.utc))
SEGMENTS = st.text(alphabet="abzAZ019_-", min_size=1, max_size=8)
KEYS = st.builds(keys.make, instance=SEGMENTS, database=SEGMENTS, config=SEGMENTS, now=MOMENTS)
DAY = "2026-11-22-10-11-12-000345"


@given(st.text(), st.text(), st.text(), MOMENTS)
def test_whatever_things_are_called_a_key_names_them(instance: str, database: str, config: str, now: datetime) -> None:
    name = str(keys.make(instance=instance, database=database, config=config, now=now))
    assert re.fullmatch(r"([A-Za-z0-9_-]+/){3}\d{4}(-\d\d){5}-\d{6}\.dump", name)
    assert str(keys.parse(name)) == keys.check(name) == name


def test_a_key_tells_the_time_in_utc() -> None:
    east = timezone(timedelta(hours=9))
    key = keys.make(
        instance="web.1", database="default", config="none", now=datetime(2026, 1, 1, 3, 4, 5, 6, tzinfo=east)
    )
    assert str(key) == "web_1/default/none/2025-12-31-18-04-05-000006.dump"


@given(KEYS)
def test_a_key_that_is_taken_makes_way_for_one_of_a_microsecond_later(key: keys.Key) -> None:
    assert keys.newest_first([str(key), str(keys.later(key))])[0] == str(keys.later(key))


@pytest.mark.parametrize(
    "name",
    [
        "",
        f"default/none/{DAY}.dump",
        f"prod/default/none/more/{DAY}.dump",
        f"prod/default/none/{DAY}",
        f"prod/default/none/{DAY}.dump.json",
        f"prod/default/none/{DAY}.dump\n",
        f"prod/def ault/none/{DAY}.dump",
        f"prod//none/{DAY}.dump",
        f"../default/none/{DAY}.dump",
        "prod/default/none/2026-11-22.dump",
        "prod/default/none/.2026-11-22-10-11-12-000345.dump.abcd.partial",
    ],
)
def test_other_names_are_no_keys(name: str) -> None:
    assert keys.parse(name) is None


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        (f"a/b/c/{DAY}.dump.json", f"a/b/c/{DAY}.dump"),
        (f"a/b/c/{DAY}.dump.parts/00001", f"a/b/c/{DAY}.dump"),
        (f"a/b/c/{DAY}.dump", None),
        (f"a/b/c/{DAY}.dump.parts", None),
        ("notes.json", None),
    ],
)
def test_manifests_and_parts_belong_to_a_key(name: str, owner: str | None) -> None:
    assert keys.owner(name) == owner


KEY = f"prod/default/nightly/{DAY}.dump"


@pytest.mark.parametrize(
    ("prefix", "selects"),
    [
        ("", True),
        ("prod", True),
        ("prod/", True),
        ("pro", False),
        ("prod/default", True),
        ("prod/default/", True),
        ("prod/def", False),
        ("prod/default/nightly", True),
        ("prod/default/night", False),
        ("prod/default/nightly/", True),
        ("prod/default/nightly/2026", True),
        ("prod/default/nightly/2026-11-22-1", True),
        ("prod/default/nightly/2026-12", False),
        (KEY, True),
        ("default", False),
        ("production", False),
    ],
)
def test_a_prefix_selects_by_whole_segments_and_within_the_timestamp_by_any_beginning(
    prefix: str, selects: bool
) -> None:
    assert keys.matches(KEY, prefix) is selects


@given(KEYS, st.integers(0, 3))
def test_a_key_is_selected_by_each_beginning_of_its_segments(key: keys.Key, count: int) -> None:
    prefix = "/".join(str(key).split("/")[:count])
    assert keys.matches(str(key), prefix)
    assert keys.matches(str(key), f"{prefix}/" if prefix else "")


@given(st.lists(KEYS, unique=True))
def test_keys_are_sorted_by_time_whatever_they_are_called(unsorted: list[keys.Key]) -> None:
    newest_first = [keys.parse(name) for name in keys.newest_first(map(str, unsorted))]
    times = [key.timestamp for key in newest_first if key]
    assert times == sorted((key.timestamp for key in unsorted), reverse=True)


def test_microseconds_count_as_a_number_and_names_that_are_no_keys_come_last() -> None:
    names = ["notes.txt", "a/b/c/2026-01-01-00-00-00-9.dump", "a/b/c/2026-01-01-00-00-00-000010.dump"]
    assert keys.newest_first(names) == [names[2], names[1], names[0]]


@pytest.mark.parametrize(
    "text", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/..", "a\\b", "a\nb", "a\0b", "/", "a//"]
)
def test_a_key_never_leaves_the_storage_location(text: str) -> None:
    with pytest.raises(exceptions.ValueError, match="is not a dump key or prefix"):
        keys.check(text)


@pytest.mark.parametrize("text", ["", "prod", "prod/", "prod/default/none/2026-1", KEY, "ünï cödé/x..y/-"])
def test_everything_else_may_be_asked_for(text: str) -> None:
    assert keys.check(text) == text
