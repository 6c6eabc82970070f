"""Hooks run on the database they are for, and on no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project import Project

RECORD = """
import os, threading
from pgclone import hookimpl
from django.db import connection, connections

def note(*words):
    with open(os.environ["NOTES"], "a") as notes:
        print(*words, file=notes)
"""


@pytest.fixture
def hooked(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a module of hooks of its own, which notes what it sees."""
    project.environ |= {"PYTHONPATH": str(tmp_path), "NOTES": str(tmp_path / "notes")}
    project.settings["PGCLONE_PLUGINS"] = ["project_hooks"]
    return project


def write_hooks(project: Project, code: str) -> None:
    Path(project.environ["PYTHONPATH"], "project_hooks.py").write_text(RECORD + code)


def notes(project: Project) -> list[str]:
    return Path(project.environ["NOTES"]).read_text().splitlines()


def test_the_orm_and_the_target_see_the_temporary_database(hooked: Project) -> None:
    write_hooks(
        hooked,
        """
from django.db import connection

@hookimpl
def pre_dump(run, source):
    with source.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        note(run.command, source.name, *cursor.fetchone())

@hookimpl
def pre_swap(run, target):
    from tests.app.models import Book
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        note(run.command, run.database, target.name, *cursor.fetchone())
    Book.objects.filter(title="Book 1").update(title="Masked")
""",
    )
    hooked.dump()
    hooked.restore("prod")
    assert notes(hooked) == ["dump shop shop", "restore shop shop__temp shop__temp"]
    assert hooked.sql("SELECT count(*) FROM app_book WHERE title = 'Masked'") == "1"


def test_a_hook_that_raises_vetoes_the_restore(hooked: Project) -> None:
    write_hooks(
        hooked,
        """
@hookimpl
def pre_swap(run, target):
    from tests.app.models import Book
    Book.objects.all().delete()
    raise RuntimeError("not today")
""",
    )
    key = hooked.dump()
    done = hooked.pgclone("restore", key)
    assert done.status == 1 and "not today" in done.err and '"project_hooks"' in done.err
    assert "Traceback" not in done.err
    assert (hooked.books(), hooked.databases()) == (50, ["shop"])


def test_a_hook_that_exits_does_not_pass_for_a_restore(hooked: Project) -> None:
    write_hooks(hooked, "@hookimpl\ndef pre_swap(run, target): raise SystemExit(0)\n")
    done = hooked.pgclone("restore", hooked.dump())
    assert done.status == 1 and "SystemExit" in done.err


def test_threads_of_a_hook_are_routed_too(hooked: Project) -> None:
    write_hooks(
        hooked,
        """
@hookimpl
def pre_swap(run, target):
    def look():
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_database()")
            note(*cursor.fetchone())
        connection.close()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
""",
    )
    hooked.dump()
    hooked.restore("prod")
    assert notes(hooked) == ["shop__temp"]


OTHER = """
@hookimpl
def pre_swap(run, target):
    with connections["other"].cursor() as cursor:
        cursor.execute("SELECT 1")
"""


def test_queries_on_other_connections_fail(hooked: Project) -> None:
    write_hooks(hooked, OTHER)
    databases = {alias: hooked.server.settings(name) for alias, name in (("default", "shop"), ("other", "postgres"))}
    hooked.settings |= {"DATABASES": databases, "PGCLONE_CONN_DB": "template1"}
    done = hooked.pgclone("restore", hooked.dump())
    assert done.status == 1
    assert 'A hook queried the database "other", which it may not' in done.err
    assert hooked.books() == 50


def test_management_commands_are_routed_to_another_alias(hooked: Project) -> None:
    """`migrate` migrates the alias that is restored, not `default`."""
    databases = {alias: hooked.server.settings(name) for alias, name in (("default", "nobody"), ("second", "shop"))}
    hooked.settings |= {"DATABASES": databases}
    write_hooks(hooked, "@hookimpl\ndef pre_swap(run, target): note(connections['default'].settings_dict['NAME'])\n")
    key = hooked.dump("-d", "second")
    hooked.sql("DELETE FROM django_migrations WHERE app = 'app'; DROP TABLE app_review, app_book, app_author")
    done = hooked.restore(key, "-d", "second")
    assert key.startswith("prod/second/")
    assert 'Ran "manage.py migrate"' in done.err
    assert (notes(hooked), hooked.books()) == (["shop__temp"], 50)


def test_settings_of_the_database_hold_during_hooks(hooked: Project) -> None:
    """A project whose tables live in another schema finds them in the temporary database too."""
    hooked.sql(
        """CREATE SCHEMA tables; ALTER DATABASE shop SET search_path = tables, public;
        ALTER ROLE postgres IN DATABASE shop SET work_mem = '7MB'"""
    )
    write_hooks(
        hooked,
        """
@hookimpl
def pre_swap(run, target):
    with target.cursor() as cursor:
        cursor.execute("SELECT current_setting('search_path') || ' ' || current_setting('work_mem')")
        note(*cursor.fetchone())
""",
    )
    hooked.dump()
    hooked.restore("prod")
    assert notes(hooked) == ["tables, public 7MB"]
    assert hooked.sql("SHOW search_path") == "tables, public"


def test_persistent_connections_and_pools_do_not_reach_the_primary(hooked: Project) -> None:
    """A pool of psycopg 3 belongs to the alias: a routed connection taken from it would be on the primary."""
    hooked.database |= {"OPTIONS": {"pool": {"min_size": 2}}, "CONN_MAX_AGE": 0}
    code = """
from django.apps import AppConfig

@hookimpl
def pre_dump(run, source):
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        note(*cursor.fetchone())

@hookimpl
def pre_swap(run, target):
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        note(*cursor.fetchone())

@hookimpl
def post_swap(run):
    from tests.app.models import Book
    note(Book.objects.count())
"""
    write_hooks(hooked, code)
    hooked.dump()
    hooked.fill(5)
    hooked.restore("prod")
    assert notes(hooked) == ["shop", "shop__temp", "50"]


def test_a_pre_dump_hook_may_change_what_is_dumped_or_veto(hooked: Project) -> None:
    write_hooks(
        hooked,
        """
@hookimpl
def pre_dump(run, source):
    from tests.app.models import Author
    if Author.objects.filter(name="secret").exists():
        raise RuntimeError("not anonymized")
    Author.objects.create(name="secret")
""",
    )
    key = hooked.dump()
    hooked.restore(key)
    assert hooked.sql("SELECT count(*) FROM app_author") == "2"
    refused = hooked.pgclone("dump")
    assert refused.status == 1 and "not anonymized" in refused.err
    assert hooked.keys() == [key]
