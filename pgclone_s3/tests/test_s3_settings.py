"""The settings: those of django-pgclone, and one dict for the rest. Each arrives where it is meant to."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError

import pgclone_s3
from pgclone.locations import parse_location
from pgclone.testing.storage import MiB, get, noise, put, serve
from pgclone_s3 import session
from pgclone_s3.bucket import open_bucket
from pgclone_s3.settings import Settings, rows

KEYS = {"AWS_ACCESS_KEY_ID": "AKIA1", "AWS_SECRET_ACCESS_KEY": "s3cr3t/+"}
README = Path(__file__).parent.parent / "README.md"


def client(environment: dict[str, str], **options: Any) -> Any:
    return session.create_client(Settings(**options), environment)


def credentials(environment: dict[str, str], **options: Any) -> tuple[str, str, str | None]:
    found = client(environment, **options)._get_credentials().get_frozen_credentials()
    return found.access_key, found.secret_key, found.token


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No AWS_* variables, and a home folder of its own."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    return tmp_path


# PGCLONE_S3_CONFIG


def test_keys_are_taken_as_django_pgclone_took_them() -> None:
    before = dict(os.environ)
    assert credentials(KEYS) == ("AKIA1", "s3cr3t/+", None)
    assert credentials({**KEYS, "AWS_SESSION_TOKEN": "token"}) == ("AKIA1", "s3cr3t/+", "token")
    assert dict(os.environ) == before


def test_region_endpoint_and_profile(empty_environment: Path) -> None:
    (empty_environment / ".aws" / "config").write_text("[profile staging]\nregion = eu-central-1\n")
    (empty_environment / ".aws" / "credentials").write_text(
        "[staging]\naws_access_key_id = OF-STAGING\naws_secret_access_key = x\n"
    )
    assert client({**KEYS, "AWS_DEFAULT_REGION": "eu-west-3"}).meta.region_name == "eu-west-3"
    assert client({**KEYS, "AWS_REGION": "eu-west-2"}).meta.region_name == "eu-west-2"
    assert client({"AWS_PROFILE": "staging"}).meta.region_name == "eu-central-1"
    assert credentials({"AWS_PROFILE": "staging"})[0] == "OF-STAGING"
    endpoint = {
        **KEYS,
        "AWS_DEFAULT_REGION": "x",
        "AWS_ENDPOINT_URL": "http://one",
        "AWS_ENDPOINT_URL_S3": "http://two",
    }
    assert client(endpoint).meta.endpoint_url == "http://two"


def test_other_files_of_credentials(empty_environment: Path) -> None:
    path = empty_environment / "elsewhere"
    path.write_text("[default]\naws_access_key_id = ELSEWHERE\naws_secret_access_key = x\n")
    assert credentials({"AWS_SHARED_CREDENTIALS_FILE": str(path)})[0] == "ELSEWHERE"


def test_every_variable_that_botocore_knows_is_taken() -> None:
    assert {"AWS_CA_BUNDLE", "AWS_MAX_ATTEMPTS", "AWS_USE_FIPS_ENDPOINT", "AWS_PROFILE"} <= session.known_variables()
    assert client({**KEYS, "AWS_MAX_ATTEMPTS": "3"}).meta.config.retries["total_max_attempts"] == 3
    assert client(KEYS).meta.config.retries["total_max_attempts"] == 7


def test_without_settings_it_is_botocores_own_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROM-OUTSIDE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert credentials({})[0] == "FROM-OUTSIDE"
    assert credentials(KEYS)[0] == "AKIA1"


def test_the_endpoint_of_django_pgclone(settings: Any) -> None:
    settings.PGCLONE_S3_CONFIG = KEYS
    settings.PGCLONE_S3_ENDPOINT_URL = "http://127.0.0.1:1"
    bucket = open_bucket(parse_location("s3://bucket/prefix"))
    assert bucket.client.meta.endpoint_url == "http://127.0.0.1:1"
    assert "s3cr3t" not in repr(bucket)


# PGCLONE_S3


def test_a_profile_wins_over_keys(empty_environment: Path) -> None:
    (empty_environment / ".aws" / "credentials").write_text(
        "[staging]\naws_access_key_id = OF-STAGING\naws_secret_access_key = x\n"
    )
    assert credentials(KEYS, profile="staging")[0] == "OF-STAGING"


def test_addresses_certificates_checksums_and_timeouts(tmp_path: Path) -> None:
    virtual = client(
        {**KEYS, "AWS_DEFAULT_REGION": "eu-west-3"}, addressing_style="path", timeout=7, checksums="when_required"
    )
    config = virtual.meta.config
    assert config.s3["addressing_style"] == "path"
    assert (config.read_timeout, config.connect_timeout) == (7, 7)
    assert config.request_checksum_calculation == config.response_checksum_validation == "when_required"
    assert client(KEYS).meta.config.connect_timeout == 10
    assert client(KEYS, ca_bundle="/ca.pem")._endpoint.http_session._verify == "/ca.pem"


def test_what_is_wrong_is_reported_by_check(settings: Any) -> None:
    settings.PGCLONE_S3 = {"storage_clas": "STANDARD_IA"}
    settings.PGCLONE_S3_CONFIG = {"AWS_ACCES_KEY_ID": "x", "AWS_PAGER": "", **KEYS}
    assert [(message.id, message.msg, message.hint) for message in pgclone_s3.check_settings(settings)] == [
        (
            "pgclone_s3.E001",
            'settings.PGCLONE_S3 has the key "storage_clas", which is no option.',
            'Did you mean "storage_class"?',
        ),
        (
            "pgclone_s3.W001",
            'PGCLONE_S3_CONFIG has "AWS_ACCES_KEY_ID", which is not read.',
            'Did you mean "AWS_ACCESS_KEY_ID"?',
        ),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"part_size": "16"}, 'settings.PGCLONE_S3["part_size"] must be int, and is str.'),
        ({"tags": {"a": 1}}, 'settings.PGCLONE_S3["tags"] must be'),
        ({"sse": "rot13"}, 'settings.PGCLONE_S3["sse"] is none of those that there are.'),
        ({"part_size": 4}, "settings.PGCLONE_S3 has a number that is too small."),
        ({"timeout": 0}, "settings.PGCLONE_S3 has a number that is too small."),
        (["profile"], "settings.PGCLONE_S3 must be a dict."),
    ],
)
def test_values_that_make_no_sense(options: Any, words: str, settings: Any) -> None:
    settings.PGCLONE_S3 = options
    (message,) = pgclone_s3.check_settings(settings)
    assert message.msg.startswith(words)


def test_a_config_that_is_no_dict(settings: Any) -> None:
    settings.PGCLONE_S3_CONFIG = "AWS_ACCESS_KEY_ID=x"
    (message,) = pgclone_s3.check_settings(settings)
    assert (message.id, message.msg) == (
        "pgclone_s3.E002",
        "settings.PGCLONE_S3_CONFIG must be a dict of AWS_* variables.",
    )


def test_settings_that_are_right_are_not_reported(settings: Any) -> None:
    settings.PGCLONE_S3_CONFIG = KEYS
    settings.PGCLONE_S3 = {"tags": {"team": "web"}, "part_size": 32, "timeout": 2.5, "ca_bundle": Path("/ca.pem")}
    assert pgclone_s3.check_settings(settings) == []


def test_botocore_is_imported_when_a_bucket_is_used() -> None:
    import subprocess

    script = "import pgclone_s3, sys; print([name for name in sys.modules if name.startswith(('boto', 'django.conf'))])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"


# What S3 itself gets to see (moto says what arrived)


@pytest.fixture
def moto(moto_url: str, settings: Any) -> Any:
    """A bucket on moto, which remembers encryption, classes, tags and owners of objects."""
    settings.PGCLONE_S3_CONFIG = {**KEYS, "AWS_DEFAULT_REGION": "us-east-1"}
    settings.PGCLONE_S3_ENDPOINT_URL = moto_url
    settings.PGCLONE_S3 = {}
    found = open_bucket(parse_location("s3://objects/prefix/")).client
    found.create_bucket(Bucket="objects")
    return found


@pytest.mark.parametrize("size", [5, 11 * MiB], ids=["small", "large"])
def test_objects_have_the_properties_that_were_set(size: int, moto: Any, settings: Any) -> None:
    settings.PGCLONE_S3 = {
        "sse": "aws:kms",
        "kms_key": "alias/dumps",
        "storage_class": "STANDARD_IA",
        "tags": {"team": "web + data", "kind": "dump"},
        "acl": "bucket-owner-full-control",
        "part_size": 5,
    }
    storage = serve(pgclone_s3, "s3://objects/prefix/")
    put(storage, f"key{size}", noise(size), 1)
    found = moto.head_object(Bucket="objects", Key=f"prefix/key{size}")
    assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", "alias/dumps")
    assert found["StorageClass"] == "STANDARD_IA"
    tags = moto.get_object_tagging(Bucket="objects", Key=f"prefix/key{size}")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "web + data", "kind": "dump"}
    assert get(storage, f"key{size}") == noise(size)


@pytest.mark.parametrize(("options", "sse"), [({"sse": "AES256"}, "AES256"), ({"kms_key": "k"}, "aws:kms")])
def test_a_key_alone_means_kms(options: dict[str, str], sse: str, moto: Any, settings: Any) -> None:
    settings.PGCLONE_S3 = options
    put(serve(pgclone_s3, "s3://objects/prefix/"), f"key-{sse}", b"")
    assert moto.head_object(Bucket="objects", Key=f"prefix/key-{sse}")["ServerSideEncryption"] == sse


def test_the_requester_pays_for_every_request(moto: Any, settings: Any) -> None:
    settings.PGCLONE_S3 = {"requester_pays": True, "part_size": 5}
    storage = serve(pgclone_s3, "s3://objects/payer/")
    bucket = open_bucket(storage.location)
    assert bucket.client is not moto  # a client of its own for other settings
    seen: dict[str, str | None] = {}
    bucket.client.meta.events.register(
        "before-send.s3",
        lambda request, event_name, **_: seen.update({event_name: request.headers.get("x-amz-request-payer")}),
    )
    put(storage, "key", noise(11 * MiB), 1)
    get(storage, "key")
    put(storage, "small", b"bytes")
    list(storage.list(location=storage.location, prefix=""))
    storage.delete(location=storage.location, key="key")
    assert {name.rpartition(".")[2] for name in seen} == {
        "ListMultipartUploads", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "GetObject", "PutObject",
        "ListObjectsV2", "DeleteObject",
    }  # fmt: skip
    assert {bytes(value or b"").decode() if isinstance(value, bytes) else value for value in seen.values()} == {
        "requester"
    }


def test_a_role_is_assumed(moto: Any, moto_url: str) -> None:
    sts = {**KEYS, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": moto_url}
    role = "arn:aws:iam::123456789012:role/dumps"
    access_key, _, token = credentials(sts, role=role, external_id="ours")
    assert access_key != "AKIA1"
    assert token
    assert client(sts, role=role).list_buckets()["Buckets"]


def test_a_web_identity_of_django_pgclone(moto_url: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a token of somebody else's")
    web = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/pod",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": moto_url,
    }
    access_key, _, token = credentials(web)
    assert access_key and token


def test_a_role_without_credentials_is_an_error(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BotoCoreError):
        credentials(
            {"AWS_ENDPOINT_URL": moto_url, "AWS_DEFAULT_REGION": "x"}, role="arn:aws:iam::123456789012:role/dumps"
        )


# The documentation


def test_the_readme_has_the_table_of_settings() -> None:
    documented = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", README.read_text(), re.MULTILINE)
    assert documented == [
        (name, f"`{type_}`".replace(" | None", ""), "none" if default is None else f"`{default!r}`", help)
        for name, type_, default, help in rows()
    ]
