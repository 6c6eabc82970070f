"""A database that goes to S3 and comes back, whatever breaks on the way."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import pytest

from pgclone.testing.proxy import Answer, Corrupt, LoseAnswer, Proxy, ResetAnswer, ResetRequest, Stall
from tests.faults import wait_until
from tests.project import Done, Project

BOOKS = 60_000
"""An archive of 14 MB: three parts of 5 MiB, two ranges of 8."""

PART, COMPLETE = r"PUT .*partNumber=", r"POST .*uploadId="
READ = r"GET .*\.dump$"
SLOW_DOWN = Answer(503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")


@pytest.fixture
def shop(project: Project, s3: Any) -> Project:
    """The project, with its dumps in S3, in parts of the least size."""
    project.fill(BOOKS)
    project.settings |= {
        **s3.configuration(part_size=5, timeout=2),
        "PGCLONE_CODEC": "none",
        "PGCLONE_PRE_SWAP_HOOKS": [],
    }
    return project


def through(between: Proxy) -> dict[str, str]:
    """The setting that sends requests through the proxy."""
    return {"PGCLONE_S3_ENDPOINT_URL": between.url}


def ended(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, out, err)


def test_a_database_is_dumped_listed_and_restored(shop: Project, s3: Any) -> None:
    before = shop.digest()
    key = shop.dump()
    assert shop.keys() == [key]
    assert sorted(s3.objects()) == [key, f"{key}.json"]
    assert s3.uploads() == []
    shop.sql("DELETE FROM app_review")
    shop.restore("prod")
    assert shop.digest() == before


def test_parts_go_to_s3_and_come_back_through_faults(shop: Project, s3: Any, between: Proxy) -> None:
    shop.environ["PGCLONE_TEST_LARGE"] = "1000000"
    before = shop.digest()
    for fault, request in (
        (ResetRequest(100_000), r"PUT .*\.parts/"),
        (SLOW_DOWN, r"PUT .*\.parts/"),
        (LoseAnswer(), r"PUT .*\.parts/00001$"),
    ):
        between.inject(fault, request)
    key = shop.dump("--jobs", "3", **through(between))
    parts = [name for name in s3.objects() if name.startswith(f"{key}.parts/")]
    assert len(parts) > 3 and shop.keys() == [key]
    shop.sql("DELETE FROM app_review")
    for fault in (ResetAnswer(100_000), SLOW_DOWN):
        between.inject(fault, r"GET .*\.parts/")
    shop.restore(key, "--jobs", "3", **through(between))
    assert (shop.digest(), s3.uploads()) == (before, [])


def test_a_dump_whose_part_cannot_be_written_leaves_none(shop: Project, s3: Any, between: Proxy) -> None:
    shop.environ["PGCLONE_TEST_LARGE"] = "1000000"
    between.inject(ResetRequest(0), r"PUT .*\.parts/00003", times=100)
    done = shop.pgclone("dump", "--jobs", "2", **through(between))
    assert (done.status, "Traceback" in done.err) == (1, False) and ".parts/00003" in done.err, done.err
    between.calm()
    assert (s3.objects(), s3.uploads()) == ({}, [])


def test_a_dump_and_a_restore_get_through_all_of_it(shop: Project, s3: Any, between: Proxy) -> None:
    between.latency = 0.02
    before = shop.digest()
    for fault, request in (
        (ResetRequest(1_000_000), PART),
        (SLOW_DOWN, PART),
        (Stall(), PART),
        (SLOW_DOWN, COMPLETE),
        (LoseAnswer(), COMPLETE),
        (LoseAnswer(), r"PUT .*\.json$"),
    ):
        between.inject(fault, request)
    key = shop.dump(**through(between))
    shop.sql("DELETE FROM app_review")
    for fault in (ResetAnswer(1_000_000), SLOW_DOWN, Stall(2_000_000)):
        between.inject(fault, READ)
    shop.restore(key, **through(between))
    assert shop.digest() == before
    assert s3.uploads() == []


def test_the_server_is_killed_and_restarted_during_a_dump(shop: Project, s3: Any, between: Proxy) -> None:
    between.inject(Stall(), PART, skip=1)
    process = shop.start("pgclone", "dump", **through(between))
    wait_until(lambda: between.pending == [])
    s3.server.kill()
    s3.server.restart()
    done = ended(process)
    assert done.status == 0, done.err
    shop.sql("DELETE FROM app_review")
    shop.restore("prod")
    assert shop.books() == BOOKS + 50
    assert s3.uploads() == []


def test_the_server_is_killed_and_restarted_during_a_restore(shop: Project, s3: Any, between: Proxy) -> None:
    before = shop.digest()
    key = shop.dump()
    shop.sql("DELETE FROM app_review")
    between.inject(Stall(1_000_000), READ, skip=1)
    process = shop.start("pgclone", "restore", key, **through(between))
    wait_until(lambda: between.pending == [])
    s3.server.kill()
    s3.server.restart()
    done = ended(process)
    assert done.status == 0, done.err
    assert shop.digest() == before


def test_a_server_that_stays_away_ends_a_restore_and_the_database_is_as_it_was(shop: Project, between: Proxy) -> None:
    key = shop.dump()
    shop.sql("DELETE FROM app_review")
    before = shop.digest()
    between.inject(ResetAnswer(0), READ, skip=1, times=100)
    done = shop.pgclone("restore", key, **through(between))
    assert (done.status, done.out) == (1, "")
    assert "broke off, also after several tries" in done.err
    assert "Traceback" not in done.err
    between.calm()
    assert (shop.digest(), shop.databases()) == (before, ["shop"])


def test_a_bit_that_flips_on_the_way_is_found(shop: Project, between: Proxy) -> None:
    key = shop.dump()
    before = shop.digest()
    between.inject(Corrupt(1_000_000), READ, skip=1)
    done = shop.pgclone("restore", key, **through(between))
    assert (done.status, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert (shop.digest(), shop.databases()) == (before, ["shop"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_dump_leaves_nothing(number: int, shop: Project, s3: Any, between: Proxy) -> None:
    between.inject(Stall(), PART, skip=1)
    process = shop.start("pgclone", "dump", PGCLONE_S3={"part_size": 5}, **through(between))
    wait_until(lambda: between.pending == [])
    assert len(s3.uploads()) == 1
    process.send_signal(number)
    done = ended(process)
    assert done.status in (128 + number, -number)
    assert "No dump was listed." in done.err
    assert "Traceback" not in done.err
    assert (s3.objects(), s3.uploads()) == ({}, [])


def test_a_killed_dump_is_never_listed_and_its_upload_is_removed_later(shop: Project, s3: Any, between: Proxy) -> None:
    between.inject(Stall(), PART, skip=1)
    process = shop.start("pgclone", "dump", PGCLONE_S3={"part_size": 5}, **through(between))
    wait_until(lambda: between.pending == [] and any(r.status == 200 and r.method == "PUT" for r in between.requests))
    process.kill()
    ended(process)
    assert (shop.keys(), len(s3.uploads())) == ([], 1)
    done = shop.pgclone("dump", PGCLONE_SWEEP_AFTER=0)
    assert done.status == 0, done.err
    assert "which a dead run had left" in done.err
    (key,) = shop.keys()
    assert (sorted(s3.objects()), s3.uploads()) == ([key, f"{key}.json"], [])


@pytest.mark.parametrize("command", [["dump"], ["ls"], ["restore", "prod"]])
def test_credentials_that_are_rejected(command: list[str], shop: Project, s3: Any) -> None:
    before = shop.digest()
    wrong = {**shop.settings["PGCLONE_S3_CONFIG"], "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    done = shop.pgclone(*command, PGCLONE_S3_CONFIG=wrong)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"{s3.location} cannot be used: the secret access key is wrong.\n")
    assert "Traceback" not in done.err
    assert "not-the-secret" not in done.err
    assert (shop.digest(), shop.databases()) == (before, ["shop"])


def test_credentials_that_may_not_list_are_told_what_a_dump_needs(shop: Project, s3: Any) -> None:
    writer = s3.configuration(s3.server.writer)["PGCLONE_S3_CONFIG"]
    done = shop.pgclone("dump", PGCLONE_S3_CONFIG=writer)
    assert done.status == 1
    assert '"Action": "s3:ListBucket"' in done.err


def test_the_doctor_says_what_credentials_may_do(shop: Project, s3: Any) -> None:
    healthy = shop.pgclone("doctor")
    assert (healthy.status, healthy.err) == (0, "")
    verdicts = [line.split()[:2] for line in healthy.lines]
    assert verdicts == [["ok", step] for step in ("write", "list", "read", "overwrite", "interrupt", "delete")]

    reader = shop.pgclone("doctor", PGCLONE_S3_CONFIG=s3.configuration(s3.server.reader)["PGCLONE_S3_CONFIG"])
    assert reader.status == 1
    assert [line.split()[:2] for line in reader.lines if line[0] != " "] == [
        ["failed", "write"], ["ok", "list"], ["skipped", "read"], ["skipped", "overwrite"], ["skipped", "interrupt"],
        ["skipped", "delete"],
    ]  # fmt: skip
    assert '"Action": "s3:PutObject"' in reader.out
    assert (s3.objects(), s3.uploads()) == ({}, [])


def test_no_secret_is_shown_at_any_verbosity(shop: Project, s3: Any) -> None:
    done = shop.pgclone("dump", "-v3")
    assert done.status == 0
    assert s3.server.secret_key not in done.err + done.out
