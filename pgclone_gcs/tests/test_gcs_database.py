"""A database that goes to Cloud Storage and comes back, whatever breaks on the way."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import fake_gcs
import pytest

from pgclone.testing import proxy
from pgclone.testing.proxy import Answer, Corrupt, Proxy, ResetAnswer, ResetRequest, Stall
from tests.faults import wait_until
from tests.project import Done, Project

BOOKS = 60_000
"""An archive of 14 MB: chunks of 4 MiB, two ranges of 8."""

CHUNK = r"PUT .*upload_id="
READ = r"GET .*dump\?.*alt=media"
BUSY = Answer(503, b'{"error": {"code": 503, "message": "Backend Error"}}', {"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def durable() -> Iterator[fake_gcs.Server]:
    """A server whose objects outlive it."""
    with fake_gcs.start(durable=True) as server:
        yield server


@pytest.fixture
def across(durable: fake_gcs.Server) -> Iterator[Proxy]:
    """A proxy in front of it. All faults of a test must have been met at its end."""
    with proxy.start(fake_gcs.HOST, durable.port) as across:
        yield across
        assert across.pending == []


@pytest.fixture
def shop(project: Project, durable: fake_gcs.Server) -> Project:
    """The project, with its dumps in Cloud Storage, in small chunks."""
    project.fill(BOOKS)
    prefix = project.dumps.parent.name
    project.settings |= {
        "PGCLONE_STORAGE_LOCATION": f"gs://{durable.bucket}/{prefix}/",
        "PGCLONE_GCS": {"endpoint": durable.url, "chunk_size": 4, "timeout": 3, "deadline": 20},
        "PGCLONE_CODEC": "none",
        "PGCLONE_PRE_SWAP_HOOKS": [],
    }
    return project


def through(shop: Project, across: Proxy) -> dict[str, object]:
    """The setting that sends requests through the proxy."""
    return {"PGCLONE_GCS": {**shop.settings["PGCLONE_GCS"], "endpoint": across.url}}


def ended(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, out, err)


def test_a_database_is_dumped_listed_and_restored(shop: Project) -> None:
    before = shop.digest()
    key = shop.dump()
    assert shop.keys() == [key]
    shop.sql("DELETE FROM app_review")
    shop.restore("prod")
    assert shop.digest() == before


def test_parts_go_to_cloud_storage_and_come_back_through_faults(shop: Project, across: Proxy) -> None:
    shop.environ["PGCLONE_TEST_LARGE"] = "1000000"
    before = shop.digest()
    across.inject(BUSY, CHUNK)
    key = shop.dump("--jobs", "3", **through(shop, across))
    assert shop.keys() == [key]
    shop.sql("DELETE FROM app_review")
    for fault in (ResetAnswer(100_000), BUSY):
        across.inject(fault, r"GET .*parts%2F.*alt=media")
    shop.restore(key, "--jobs", "3", **through(shop, across))
    assert shop.digest() == before


def test_a_dump_and_a_restore_get_through_all_of_it(shop: Project, across: Proxy) -> None:
    before = shop.digest()
    across.inject(BUSY, CHUNK)
    across.inject(ResetRequest(0), CHUNK, skip=1)  # before any byte: this server would take those that came for stored
    key = shop.dump(**through(shop, across))
    shop.sql("DELETE FROM app_review")
    for fault in (ResetAnswer(1_000_000), BUSY, Stall(2_000_000)):
        across.inject(fault, READ)
    shop.restore(key, **through(shop, across))
    assert shop.digest() == before


def test_the_server_is_killed_and_restarted_during_a_dump(
    shop: Project, durable: fake_gcs.Server, across: Proxy
) -> None:
    """This server, other than the real one, forgets unfinished uploads: the dump fails, and the next one works."""
    across.inject(Stall(), CHUNK, skip=1)
    process = shop.start("pgclone", "dump", **through(shop, across))
    wait_until(lambda: across.pending == [])
    durable.kill()
    durable.restart()
    done = ended(process)
    assert done.status == 1
    assert "Traceback" not in done.err
    assert "The upload of" in done.err
    assert shop.keys() == []
    key = shop.dump()
    assert shop.keys() == [key]


def test_the_server_is_killed_and_restarted_during_a_restore(
    shop: Project, durable: fake_gcs.Server, across: Proxy
) -> None:
    before = shop.digest()
    key = shop.dump()
    shop.sql("DELETE FROM app_review")
    across.inject(Stall(1_000_000), READ, skip=1)
    process = shop.start("pgclone", "restore", key, **through(shop, across))
    wait_until(lambda: across.pending == [])
    durable.kill()
    durable.restart()
    done = ended(process)
    assert done.status == 0, done.err
    assert shop.digest() == before


def test_a_bit_that_flips_on_the_way_is_found(shop: Project, across: Proxy) -> None:
    key = shop.dump()
    before = shop.digest()
    across.inject(Corrupt(1_000_000), READ, skip=1)
    done = shop.pgclone("restore", key, **through(shop, across))
    assert (done.status, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert (shop.digest(), shop.databases()) == (before, ["shop"])


def test_an_interrupted_dump_leaves_nothing(shop: Project, across: Proxy) -> None:
    across.inject(Stall(), CHUNK, skip=1)
    process = shop.start("pgclone", "dump", **through(shop, across))
    wait_until(lambda: across.pending == [])
    process.send_signal(signal.SIGTERM)
    done = ended(process)
    assert done.status in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert "No dump was listed." in done.err
    assert "Traceback" not in done.err
    assert shop.keys() == []


def test_a_server_that_is_not_there(shop: Project) -> None:
    before = shop.digest()
    nowhere = {"PGCLONE_GCS": {"endpoint": "http://127.0.0.1:1", "timeout": 1, "deadline": 1}}
    for command in (["dump"], ["restore", "prod"]):
        done = shop.pgclone(*command, **nowhere)
        assert (done.status, done.out) == (1, "")
        assert "cannot be reached" in done.err
        assert "Traceback" not in done.err
    assert (shop.digest(), shop.databases()) == (before, ["shop"])
