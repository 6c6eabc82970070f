"""Settings: what they change, and what `manage.py check` says of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import fake_gcs
import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials
from google.oauth2 import service_account

import pgclone_gcs
from pgclone import conf
from pgclone.api import PgcloneError
from pgclone.locations import parse_location
from pgclone.testing.proxy import Proxy
from pgclone.testing.storage import get, keys, put, serve
from pgclone_gcs.bucket import open_bucket
from pgclone_gcs.settings import Settings, read_settings, rows

README = Path(__file__).parents[1] / "README.md"


def _check(settings: Any, **given: Any) -> list[tuple[str, str]]:
    settings.PGCLONE_GCS = given
    return [(found.id, found.msg) for found in pgclone_gcs.check_settings(settings)]


# Checks


def test_nothing_is_wrong_with_nothing(settings: Any) -> None:
    assert pgclone_gcs.check_settings(settings) == []


def test_nothing_is_wrong_with_all_keys(settings: Any, key_file: str) -> None:
    given = {
        "credentials_file": Path(key_file),
        "impersonate": "other@project.iam.gserviceaccount.com",
        "project": "project",
        "user_project": "payer",
        "kms_key": "projects/p/locations/l/keyRings/r/cryptoKeys/k",
        "storage_class": "NEARLINE",
        "acl": "private",
        "endpoint": "https://storage.europe-west3.rep.googleapis.com",
        "chunk_size": 32,
        "concurrency": 4,
        "timeout": 30.5,
        "deadline": 0,
    }
    assert set(given) == {item.name for item in fields(Settings)}
    assert _check(settings, **given) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunksize": 8}, '"chunksize", which is no option'),
        ({"chunk_size": "8"}, 'PGCLONE_GCS["chunk_size"] must be int, and is str'),
        ({"chunk_size": 0}, "a number that is too small"),
        ({"concurrency": 0}, "a number that is too small"),
        ({"timeout": 0}, "a number that is too small"),
        ({"deadline": -1}, "a number that is too small"),
        ({"storage_class": "STANDARD_IA"}, '["storage_class"] is none of those that there are'),
        ({"acl": "publicRead"}, '["acl"] is none of those that there are'),
        ({"endpoint": "localhost:4443"}, '["endpoint"] is no URL'),
    ],
)
def test_what_is_wrong_is_said_and_refused(settings: Any, given: dict[str, Any], message: str) -> None:
    ((id, said),) = _check(settings, **given)
    assert id == "pgclone_gcs.E001"
    assert message in said
    with pytest.raises(PgcloneError):
        keys(serve(pgclone_gcs, "gs://bucket/"))


def test_a_file_of_credentials_that_is_not_there(settings: Any, tmp_path: Path) -> None:
    ((id, said),) = _check(settings, credentials_file=str(tmp_path / "key.json"))
    assert (id, str(tmp_path / "key.json") in said) == ("pgclone_gcs.E002", True)
    assert [id for id, _ in _check(settings, credentials_file=tmp_path)] == ["pgclone_gcs.E002"]


def test_the_core_takes_the_setting_for_no_mistake(settings: Any) -> None:
    settings.PGCLONE_GCS = {"chunk_size": 8}
    assert conf.check() == []


def test_the_readme_has_the_table_of_settings() -> None:
    documented = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", README.read_text(), re.MULTILINE)
    assert documented == [
        (name, f"`{type_}`".replace(" | None", ""), "none" if default is None else f"`{default!r}`", help)
        for name, type_, default, help in rows()
    ]


# Where requests go, and with what


def test_an_emulator_of_the_environment(
    settings: Any, server: fake_gcs.Server, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    settings.PGCLONE_GCS = {}
    storage = serve(pgclone_gcs, place)
    put(storage, "key", b"bytes")
    assert get(storage, "key") == b"bytes"


@pytest.mark.parametrize(
    ("endpoint", "emulator", "with_file", "wanted"),
    [
        (None, None, False, "default"),
        (None, None, True, service_account.Credentials),
        (None, "http://localhost:1", False, AnonymousCredentials),
        (None, "http://localhost:1", True, service_account.Credentials),
        ("http://localhost:1", None, False, AnonymousCredentials),
        ("http://localhost:1", None, True, service_account.Credentials),
        ("https://storage.europe-west3.rep.googleapis.com", None, False, "default"),
        ("https://storage.europe-west3.rep.googleapis.com", "http://localhost:1", True, service_account.Credentials),
    ],
)
def test_whose_credentials_are_sent(
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    key_file: str,
    endpoint: str | None,
    emulator: str | None,
    with_file: bool,
    wanted: Any,
) -> None:
    if emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    default = service_account.Credentials.from_service_account_file(key_file)
    monkeypatch.setattr(google.auth, "default", lambda **_: (default, "project"))
    settings.PGCLONE_GCS = {"endpoint": endpoint, "credentials_file": key_file if with_file else None}
    service = open_bucket(parse_location("gs://bucket/")).service
    if wanted == "default":
        assert service.credentials.service_account_email == default.service_account_email
        assert service.credentials is not default  # it has been given a scope
    else:
        assert type(service.credentials) is wanted
    assert (endpoint or emulator or "https://storage.googleapis.com") == service.client._connection.API_BASE_URL


def test_default_credentials_are_those_of_the_environment(
    connect: Any, between: Proxy, google: Any, key_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", key_file)
    bucket = open_bucket(connect(None).location)
    assert bucket.service.credentials.service_account_email == "dumper@project.iam.gserviceaccount.com"


def test_the_account_that_is_impersonated(connect: Any, key_file: str) -> None:
    bucket = open_bucket(connect(None, credentials_file=key_file, impersonate="other@example.org").location)
    assert bucket.service.credentials.service_account_email == "other@example.org"


def test_the_project_that_quota_counts_against(connect: Any, key_file: str) -> None:
    bucket = open_bucket(connect(None, credentials_file=key_file, project="counting").location)
    assert bucket.service.credentials.quota_project_id == "counting"


def test_the_project_that_pays_is_named_in_all_requests(connect: Any, between: Proxy) -> None:
    storage = connect(between.url, user_project="payer")
    put(storage, "key", b"bytes")
    get(storage, "key")
    keys(storage)
    storage.delete(location=storage.location, key="key")
    sent = [request.target for request in between.requests if "upload_id" not in request.target]
    assert len(sent) == 6
    assert all("userProject=payer" in target for target in sent)


def test_nothing_is_asked_that_needs_rights_on_the_bucket(connect: Any, between: Proxy) -> None:
    storage = connect(between.url)
    put(storage, "key", b"bytes")
    get(storage, "key")
    assert all("/b/pgclone/o" in request.target for request in between.requests)


def test_connections_are_kept(connect: Any, server: fake_gcs.Server) -> None:
    first = open_bucket(connect(server.url).location)
    assert open_bucket(connect(server.url).location).service is first.service
    assert open_bucket(connect(server.url, concurrency=3).location).service is not first.service


# Secrets and weight


def test_nothing_secret_is_shown(connect: Any, key_file: str) -> None:
    bucket = open_bucket(connect(None, credentials_file=key_file).location)
    assert "PRIVATE KEY" not in repr(bucket)
    assert "redentials object" not in repr(bucket)
    assert read_settings().credentials_file == key_file


def test_the_sdk_is_imported_when_a_bucket_is_used() -> None:
    code = (
        "import sys, pgclone_gcs; from pgclone.locations import parse_location as parse\n"
        "assert pgclone_gcs.list_keys(parse('s3://bucket/'), '') is None\n"
        "heavy = {'google.cloud.storage', 'google.auth', 'smart_open', 'requests'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
