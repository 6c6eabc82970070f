"""Restores: the primary database is replaced by a proven one, or stays as it was."""

from __future__ import annotations

from tests.project import Project


def test_a_restore_brings_the_dumped_rows_back(project: Project) -> None:
    before = project.digest()
    key = project.dump()
    project.sql("DELETE FROM app_review")
    project.fill(3)
    project.restore(key)
    assert project.digest() == before
    assert project.databases() == ["shop"]


def test_a_dump_with_parts_brings_the_rows_back(project: Project) -> None:
    project.environ["PGCLONE_TEST_LARGE"] = "8192"
    project.fill(3000)
    before = project.digest()
    key = project.dump("--jobs", "2")
    assert [name for name in project.stored() if ".parts/" in name]
    project.sql("DELETE FROM app_review")
    project.restore(key, "--jobs", "3")
    assert project.digest() == before
    assert project.databases() == ["shop"]


def test_a_prefix_restores_the_newest_dump(project: Project) -> None:
    project.dump()
    project.fill(1)
    newest = project.dump()
    project.sql("DELETE FROM app_review")
    done = project.restore("prod/default")
    assert newest in done.err
    assert project.books() == 51


def test_a_reversible_restore_can_be_undone_and_redone(project: Project) -> None:
    key = project.dump()
    project.fill(7)
    project.restore(key, "--reversible")
    assert (project.books(), project.books("shop__pre"), project.books("shop__post")) == (50, 57, 50)
    project.restore(":pre")
    assert project.books() == 57
    project.sql("DELETE FROM app_review")
    project.restore(":post")
    assert project.books() == 50
    assert project.databases() == ["shop", "shop__post", "shop__pre"]


def test_a_restore_that_is_not_reversible_removes_both_copies(project: Project) -> None:
    key = project.dump()
    project.restore(key, "--reversible")
    project.restore(key)
    assert project.databases() == ["shop"]


def test_a_missing_primary_database_is_created(project: Project) -> None:
    key = project.dump()
    project.server.run("dropdb", "shop")
    project.restore(key)
    assert project.books() == 50


def test_a_restore_under_another_name_swaps_nothing(project: Project) -> None:
    key = project.dump()
    project.fill(5)
    project.restore(key, "--as", ":yesterday")
    assert (project.books(), project.books("yesterday")) == (55, 50)
    assert project.databases() == ["shop", "yesterday"]


def test_what_django_pgclone_left_behind_is_kept_and_can_be_restored(project: Project) -> None:
    project.server.run("createdb", "-T", "shop", "shop__pre")
    key = project.dump()
    project.fill(3)
    refused = project.pgclone("restore", key, "--reversible")
    assert refused.status == 1 and 'DROP DATABASE "shop__pre"' in refused.err
    plain = project.restore(key)
    assert "shop__pre" in plain.err
    project.fill(4)
    project.restore(":pre")
    assert project.databases() == ["shop", "shop__pre"]
    assert project.books() == 50


def test_a_reversible_copy_of_another_role_is_named_before_anything_is_done(project: Project) -> None:
    key = project.dump()
    project.restore(key, "--reversible")
    project.sql("CREATE ROLE plain CREATEDB LOGIN PASSWORD 'plain'; ALTER DATABASE shop OWNER TO plain")
    try:
        project.database |= {"USER": "plain", "PASSWORD": "plain"}
        done = project.pgclone("restore", key, "--reversible")
        assert done.status == 1
        assert done.err.startswith('Database "shop__pre" is in the way: it belongs to the role "postgres".')
    finally:
        project.sql("ALTER DATABASE shop OWNER TO postgres; DROP ROLE plain")
