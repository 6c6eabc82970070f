"""Errors: one sentence that names the object, and a remedy."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gcs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import iam

from pgclone.api import PgcloneError, StorageError
from pgclone.host import Storage
from pgclone.testing.proxy import Answer, LoseAnswer, Proxy, ResetRequest
from pgclone.testing.storage import MiB, get, keys, put

SENT = "^(?!GET .*new)"
"""Not what an emulator is asked before a commit."""

WHO = "dumper@project.iam.gserviceaccount.com"


def _said(status: int, message: str, **more: Any) -> Answer:
    """An answer as Cloud Storage gives it."""
    error = {"code": status, "message": message, **more}
    return Answer(status, json.dumps({"error": error}).encode(), {"Content-Type": "application/json"})


def _fails(call: Any, *arguments: Any) -> StorageError:
    with pytest.raises(StorageError) as caught:
        call(*arguments)
    assert "\n" not in caught.value.cause
    assert "Traceback" not in str(caught.value)
    return caught.value


def _list(storage: Storage) -> Any:
    return keys(storage)


def _read(storage: Storage) -> Any:
    return get(storage, "key")


def _write(storage: Storage) -> Any:
    return put(storage, "new", b"bytes")


def _delete(storage: Storage) -> Any:
    return storage.delete(location=storage.location, key="key")


@pytest.fixture
def storage(connect: Any, between: Proxy) -> Storage:
    storage: Storage = connect(between.url)
    put(storage, "key", b"bytes")
    return storage


# What the service answers


@pytest.mark.parametrize("call", [_list, _write])
def test_a_bucket_that_does_not_exist(connect: Any, server: fake_gcs.Server, call: Any) -> None:
    error = _fails(call, connect(server.url, "gs://there-is-none/dumps/"))
    assert error.cause == 'The bucket "there-is-none" does not exist.'
    assert "PGCLONE_STORAGE_LOCATION" in error.remedy


@pytest.mark.parametrize("call", [_list, _read, _write, _delete])
def test_a_bucket_that_does_not_exist_as_the_service_says_it(storage: Storage, between: Proxy, call: Any) -> None:
    between.inject(_said(404, "The specified bucket does not exist."), SENT)
    assert _fails(call, storage).cause == 'The bucket "pgclone" does not exist.'


@pytest.mark.parametrize(
    ("call", "permission", "role"),
    [
        (_list, "storage.objects.list", "roles/storage.objectViewer"),
        (_read, "storage.objects.get", "roles/storage.objectViewer"),
        (_write, "storage.objects.create", "roles/storage.objectCreator"),
        (_delete, "storage.objects.delete", "roles/storage.objectUser"),
    ],
)
def test_a_permission_that_is_missing(storage: Storage, between: Proxy, call: Any, permission: str, role: str) -> None:
    denied = f"{WHO} does not have {permission} access to the Google Cloud Storage object."
    for message in (denied, "Access denied."):
        between.inject(_said(403, message), SENT)
        error = _fails(call, storage)
        assert f"do not allow {permission}" in error.cause
        assert message.rstrip(".") in error.cause
        assert error.remedy.startswith(f"Grant {role} on gs://pgclone")


@pytest.mark.parametrize(
    ("status", "message", "cause", "remedy"),
    [
        (401, "Invalid Credentials", "the credentials are not accepted", "credentials_file"),
        (
            403,
            "Permission denied on Cloud KMS key. Please ensure that your Cloud Storage service account has been authorized "
            "to use this key.",
            "The KMS key for",
            "roles/cloudkms.cryptoKeyEncrypterDecrypter",
        ),
        (400, "Bucket is a requester pays bucket but no user project provided.", "requester pays", "user_project"),
        (
            403,
            f"{WHO} does not have serviceusage.services.use access to the Google Cloud project.",
            "do not allow serviceusage.services.use",
            "roles/serviceusage.serviceUsageConsumer on the project",
        ),
        (
            400,
            "Cannot insert legacy ACL for an object when uniform bucket-level access is enabled.",
            "uniform bucket-level access",
            'Remove "acl"',
        ),
        (403, "Object 'x' is subject to bucket's retention policy.", "retention policy", ""),
        (418, "I'm a teapot.", "the answer is 418: I'm a teapot.", ""),
    ],
)
def test_what_the_service_refuses(
    connect: Any, between: Proxy, key_file: str, status: int, message: str, cause: str, remedy: str
) -> None:
    storage = connect(between.url, credentials_file=key_file)
    between.inject(_said(status, message), "POST .*uploadType", times=3)
    error = _fails(_write, storage)
    assert cause in error.cause
    assert message.rstrip(".") in error.cause
    assert remedy in error.remedy


def test_pages_of_html_are_not_shown(connect: Any, between: Proxy) -> None:
    between.inject(
        Answer(502, b"<!DOCTYPE html><html lang=en><title>Error 502 (Server Error)!!1</title>"), times=10_000
    )
    assert (
        "answers 502, also after several tries: Bad Gateway." in _fails(_list, connect(between.url, deadline=0.3)).cause
    )


def test_an_upload_that_is_gone(storage: Storage, between: Proxy) -> None:
    between.inject(Answer(410, b"Gone"), "PUT ")
    error = _fails(_write, storage)
    assert error.cause.startswith('The upload of "new" in gs://pgclone/')
    assert error.remedy == "Try again."


def test_a_name_that_is_no_bucket(connect: Any, server: fake_gcs.Server) -> None:
    assert "must start and end with a number or letter" in _fails(_list, connect(server.url, "gs://-bucket/")).cause


# The network


def test_an_endpoint_that_cannot_be_reached(connect: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    error = _fails(_list, connect(f"http://127.0.0.1:{port}", deadline=0.3))
    assert "cannot be reached: Connection refused." in error.cause
    assert "STORAGE_EMULATOR_HOST" in error.remedy


def test_a_name_that_is_not_resolved(connect: Any) -> None:
    error = _fails(_list, connect("http://storage.invalid", deadline=0))
    assert "cannot be reached" in error.cause


def test_a_certificate_that_nobody_knows(connect: Any, key_file: str, tls: int) -> None:
    begun = time.monotonic()
    error = _fails(_list, connect(f"https://127.0.0.1:{tls}", credentials_file=key_file, deadline=20))
    assert "TLS failed" in error.cause
    assert "REQUESTS_CA_BUNDLE" in error.remedy
    assert time.monotonic() - begun < 3  # it is not tried again


# Credentials


def test_no_credentials(connect: Any) -> None:
    error = _fails(_list, connect(None))
    assert error.cause.endswith("cannot be used: there are no credentials.")
    assert "gcloud auth application-default login" in error.remedy


def test_no_credentials_where_some_are_wanted(storage: Storage, between: Proxy) -> None:
    between.inject(_said(401, "Anonymous caller does not have storage.objects.list access."))
    assert _fails(_list, storage).cause.endswith("cannot be used without credentials.")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "was not found"),
        ("{", "is not a valid json file"),
        ('{"type": "nonsense"}', "does not have a valid type"),
        ('{"type": "service_account"}', "Failed to load service account credentials"),
    ],
)
def test_a_file_that_holds_no_credentials(connect: Any, tmp_path: Path, content: str | None, cause: str) -> None:
    path = tmp_path / "key.json"
    if content is not None:
        path.write_text(content)
    error = _fails(_list, connect(None, credentials_file=path))
    assert cause in error.cause
    assert str(path) in error.cause


@pytest.mark.parametrize(
    ("description", "remedy"),
    [
        (
            "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your iat and "
            "exp values in the JWT claim.",
            "Set the clock of this machine (NTP).",
        ),
        ("Invalid JWT Signature.", "create a new key"),
        ("Token has been expired or revoked.", "Log in again"),
    ],
)
def test_credentials_that_are_rejected(
    connect: Any, server: fake_gcs.Server, google: Any, key_file: str, description: str, remedy: str
) -> None:
    google.status = 400
    google.answer = {"error": "invalid_grant", "error_description": description, "id_token": "secret-token"}
    error = _fails(_list, connect(server.url, credentials_file=key_file))
    assert f"the credentials are not accepted: invalid_grant: {description.rstrip('.')}" in error.cause
    assert remedy in error.remedy


@pytest.mark.parametrize("call", [_list, _write])
@pytest.mark.parametrize(
    "answer",
    [
        {
            "error": "invalid_grant",
            "access_token": "secret-token-0123456789-0123456789",
            "refresh_token": "secret-token",
        },
        {"access_token_": "secret-token-0123456789-0123456789"},
        "access_token=secret-token-0123456789-0123456789",
    ],
)
def test_no_token_is_shown(
    connect: Any, server: fake_gcs.Server, google: Any, key_file: str, answer: Any, call: Any
) -> None:
    google.status, google.answer = 403, answer
    error: BaseException | None = _fails(call, connect(server.url, credentials_file=key_file))
    assert "secret-token" not in str(error)
    assert error is not None
    assert error.__cause__ is None
    assert error.__suppress_context__  # no traceback shows it either


def test_an_account_that_may_not_be_impersonated(
    connect: Any, server: fake_gcs.Server, google: Any, key_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iam, "_IAM_ENDPOINT", f"{google.url}/iam/{{}}")
    storage = connect(server.url, credentials_file=key_file, impersonate="other@project.iam.gserviceaccount.com")
    denied = "Permission 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist)."
    give = google.give

    def refuse(path: str) -> Any:
        return (403, {"error": {"code": 403, "message": denied}}) if "/iam/" in path else give(path)

    google.give = refuse
    error = _fails(_list, storage)
    assert google.asked == ["/token", "/iam/other@project.iam.gserviceaccount.com"]
    assert denied.rstrip(".") in error.cause
    assert "roles/iam.serviceAccountTokenCreator" in error.remedy


def test_who_gives_tokens_cannot_be_reached(connect: Any, server: fake_gcs.Server, key_file: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    key = json.loads(Path(key_file).read_text())
    Path(key_file).write_text(json.dumps({**key, "token_uri": f"http://127.0.0.1:{port}/token"}))
    error = _fails(_list, connect(server.url, credentials_file=key_file, deadline=0))
    assert "cannot be reached: Connection refused." in error.cause


# Secrets


@pytest.mark.parametrize("fault", [LoseAnswer(), ResetRequest(0), Answer(503), Answer(400)])
def test_the_address_of_an_upload_is_not_shown(connect: Any, between: Proxy, fault: Any) -> None:
    between.inject(fault, "PUT ", times=10_000)
    with pytest.raises(PgcloneError) as caught:
        put(connect(between.url, deadline=0.3), "new", bytes(2 * MiB))
    assert "upload_id" not in str(caught.value)


@pytest.fixture
def tls(tmp_path: Path, private_key: rsa.RSAPrivateKey) -> Iterator[int]:
    """The port of a server whose certificate nobody knows."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, private_key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(private_key, hashes.SHA256())
    )
    key = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "tls.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                with contextlib.suppress(OSError), context.wrap_socket(client, server_side=True) as connection:
                    connection.recv(1)
                client.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join()
