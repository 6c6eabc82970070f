"""Rows may be left out of a dump; foreign keys to them come back NOT VALID, and are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pgclone.testing.postgres import Server
from tests.project import Project, open_project

VALIDITY = """SELECT conname || ' ' || convalidated FROM pg_constraint
              WHERE contype = 'f' AND conrelid = '{}'::regclass ORDER BY conname"""


def validity(project: Project, table: str) -> list[str]:
    return project.sql(VALIDITY.format(table)).splitlines()


def test_rows_of_excluded_models_are_left_out(project: Project) -> None:
    project.restore(project.dump("-e", "app.Review", "auth.Group"))
    assert (project.books(), project.sql("SELECT count(*) FROM app_review")) == (50, "0")


def test_a_foreign_key_to_missing_rows_comes_back_not_valid_and_is_named(project: Project) -> None:
    dumped = project.pgclone("dump", "-e", "app.Author")
    assert "app_book_author_id" in dumped.err
    done = project.restore("prod", "--pre-swap-hook")
    (constraint,) = validity(project, "app_book")
    assert constraint.startswith("app_book_author_id") and constraint.endswith("false")
    assert "app_book_author_id" in done.err and "NOT VALID" in done.err
    assert project.books() == 50


def test_a_foreign_key_without_missing_rows_comes_back_valid(project: Project) -> None:
    project.sql("DELETE FROM app_review")
    project.restore(project.dump("-e", "app.Book"))
    (constraint,) = validity(project, "app_review")
    assert constraint.endswith("true")


def test_deferred_keys_odd_names_and_comments_survive(project: Project) -> None:
    project.sql(
        """CREATE SCHEMA "Odd.schema";
        CREATE TABLE "Odd.schema"."a ""b%s" (id int PRIMARY KEY);
        CREATE TABLE "Odd.schema".child (parent int, CONSTRAINT "to; 'parent'" FOREIGN KEY (parent)
            REFERENCES "Odd.schema"."a ""b%s" ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED);
        COMMENT ON CONSTRAINT "to; 'parent'" ON "Odd.schema".child IS 'why; not';
        INSERT INTO "Odd.schema"."a ""b%s" VALUES (1); INSERT INTO "Odd.schema".child VALUES (1)"""
    )
    project.restore(project.dump("--exclude-table", '"Odd.schema"."a ""b%s"'))
    assert project.sql(
        """SELECT convalidated, condeferred, confdeltype FROM pg_constraint WHERE conname = 'to; ''parent'''"""
    ).split("|") == ["f", "t", "c"]


def test_a_pattern_that_matches_no_table_is_refused(project: Project) -> None:
    done = project.pgclone("dump", "--exclude-table", "app_custmer*")
    assert (done.status, project.keys()) == (1, [])
    assert done.err.startswith("No table matches 'app_custmer*'.")


PARTITIONED = """
    CREATE TABLE tenant (id int PRIMARY KEY);
    CREATE TABLE visit (tenant int REFERENCES tenant, day date) PARTITION BY RANGE (day);
    CREATE TABLE visit_2026 PARTITION OF visit FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
    INSERT INTO tenant VALUES (1); INSERT INTO visit VALUES (1, '2026-05-05')"""


def test_a_partitioned_table_keeps_its_key_not_valid(project: Project) -> None:
    project.sql(PARTITIONED)
    project.restore(project.dump("--exclude-table", "tenant"))
    assert validity(project, "visit") == ["visit_tenant_fkey false"]


def test_rows_of_a_partitioned_table_are_left_out_with_its_partitions(project: Project) -> None:
    project.sql(PARTITIONED)
    project.restore(project.dump("--exclude-table", "visit"))
    assert project.sql("SELECT count(*) FROM visit") == "0"


def test_a_key_to_a_partition_whose_rows_are_left_out_is_not_valid(project: Project) -> None:
    project.sql(
        """CREATE TABLE part (id int PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (10);
        CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM (10) TO (20);
        CREATE TABLE child (part int REFERENCES part); INSERT INTO part VALUES (1), (11); INSERT INTO child VALUES (1), (11)"""
    )
    project.restore(project.dump("--exclude-table", "part_1"))
    assert [line for line in validity(project, "child") if line.startswith("child_part_fkey ")] == [
        "child_part_fkey false"
    ]
    assert project.sql("SELECT string_agg(id::text, ',') FROM part") == "11"


@pytest.fixture
def old_project(servers: Callable[[int], Server], tmp_path: Path) -> object:
    with open_project(servers(17), tmp_path) as project:
        yield project


def test_where_the_server_knows_no_not_valid_the_key_is_named_and_may_be_left_out(old_project: Project) -> None:
    project = old_project
    project.sql(PARTITIONED)
    key = project.dump("--exclude-table", "tenant")
    refused = project.pgclone("restore", key)
    assert refused.status == 1 and "visit_tenant_fkey on public.visit" in refused.err
    assert "--allow-missing-fk" in refused.err and "Traceback" not in refused.err
    assert project.sql("SELECT count(*) FROM tenant") == "1"  # the primary database is as it was
    allowed = project.restore(key, "--allow-missing-fk")
    assert "visit_tenant_fkey" in allowed.err
    assert validity(project, "visit") == []
