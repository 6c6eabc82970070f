"""What goes wrong with S3 is said in one sentence, with the remedy, and without secrets."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pgclone_s3
from pgclone.exceptions import PgcloneError, StorageError
from pgclone.locations import parse_location
from pgclone.testing.proxy import Answer, Proxy
from pgclone.testing.storage import MiB, keys, noise, put, reader, serve
from pgclone_s3.errors import explained


def error_of(storage: Any, do: str = "list") -> str:
    with pytest.raises(PgcloneError) as caught:
        if do == "list":
            keys(storage)
        elif do == "write":
            put(storage, "prod/key", b"bytes")
        elif do == "write large":
            put(storage, "prod/key", noise(6 * MiB), 1)
        elif do == "delete":
            storage.delete(location=storage.location, key="prod/key")
        else:
            with reader(storage, "prod/key"):
                pass
    return str(caught.value)


def answer(status: int, code: str, message: str = "The words of the service.", **fields: str) -> Answer:
    more = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return Answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>".encode())


def statement(error: str) -> Any:
    """The policy in a remedy."""
    return json.loads(error[error.index("{") : error.rindex("}") + 1])


# The server's own words


@pytest.mark.parametrize("do", ["list", "write", "write large", "read"])
def test_a_bucket_that_does_not_exist(do: str, s3: Any) -> None:
    s3.use(part_size=5)
    error = error_of(serve(pgclone_s3, f"s3://nowhere/{s3.prefix}"), do)
    assert error == (
        'The bucket "nowhere" does not exist.\nCreate it, or mend PGCLONE_STORAGE_LOCATION (or --storage-location).'
    )


@pytest.mark.parametrize("do", ["list", "write", "write large", "read"])
def test_an_access_key_that_the_service_does_not_know(do: str, s3: Any) -> None:
    s3.use(part_size=5)
    storage = s3.use(type(s3.server.reader)("AKIANOBODY", "a secret"), part_size=5)
    error = error_of(storage, do)
    assert error.startswith(
        f"{s3.location} cannot be used: the access key ID is unknown to the service.\nLook at PGCLONE_S3"
    )
    assert "a secret" not in error


@pytest.mark.parametrize("do", ["list", "write", "write large", "read"])
def test_a_secret_that_is_wrong(do: str, s3: Any) -> None:
    storage = s3.use(type(s3.server.reader)(s3.server.access_key, "wr0ng secret"), part_size=5)
    error = error_of(storage, do)
    assert error.startswith(f"{s3.location} cannot be used: the secret access key is wrong.")
    assert "wr0ng" not in error
    assert s3.server.secret_key not in error


@pytest.mark.parametrize(
    ("do", "who", "action", "below"),
    [
        ("write", "reader", "s3:PutObject", True),
        ("write large", "reader", "s3:PutObject", True),
        ("read", "writer", "s3:GetObject", True),
        ("list", "writer", "s3:ListBucket", False),
    ],
)
def test_a_denied_action_is_named_with_the_least_policy_that_allows_it(
    do: str, who: str, action: str, below: bool, s3: Any
) -> None:
    s3.put("prod/key", b"bytes")
    error = error_of(s3.use(getattr(s3.server, who), part_size=5), do)
    assert error.startswith(f"The credentials for {s3.location} do not allow {action}")
    resource = f"arn:aws:s3:::{s3.server.bucket}" + (f"/{s3.prefix}*" if below else "")
    assert statement(error) == {"Effect": "Allow", "Action": action, "Resource": resource}


def test_a_denied_deletion(s3: Any) -> None:
    s3.put("prod/key", b"bytes")
    error = error_of(s3.use(s3.server.reader), "delete")
    assert statement(error)["Action"] == "s3:DeleteObject"


# Words that this server does not have

SAID = {
    "expired": (answer(400, "ExpiredToken"), "the credentials have expired.\nLog in again, or renew them."),
    "clock": (
        answer(403, "RequestTimeTooSkewed"),
        "the clock of this machine is wrong: The words of the service.\nSet the clock",
    ),
    "token": (answer(400, "InvalidToken"), "the credentials are not valid: The words of the service."),
    "KMS": (answer(400, "KMS.DisabledException"), "The KMS key for s3://"),
    "KMS denied": (
        answer(403, "AccessDenied", "not authorized to perform: kms:GenerateDataKey on this resource"),
        'do not allow kms:GenerateDataKey for "prod/key"',
    ),
    "region": (
        answer(400, "IllegalLocationConstraintException", Region="eu-west-3"),
        'is in another region, eu-west-3: The words of the service.\nSet PGCLONE_S3_CONFIG = {"AWS_DEFAULT_REGION": "eu-west-3"}',
    ),
    "storage class": (
        answer(400, "InvalidStorageClass"),
        "PutObject was answered with InvalidStorageClass: The words of the service.",
    ),
}


@pytest.mark.parametrize("said", SAID)
def test_what_a_service_says_is_explained(said: str, s3: Any, between: Proxy) -> None:
    fault, words = SAID[said]
    between.inject(fault, "PUT", times=3)
    assert words in error_of(s3.use(url=between.url), "write")
    between.calm()


# Before there is an answer


def test_an_endpoint_where_nobody_listens(s3: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    s3.settings.PGCLONE_S3_CONFIG = {}
    storage = s3.use(url=url)
    s3.settings.PGCLONE_S3_CONFIG["AWS_MAX_ATTEMPTS"] = "1"
    error = error_of(storage)
    assert error.startswith(f"{s3.location} cannot be reached: ")
    assert url in error
    assert "Look at PGCLONE_S3_ENDPOINT_URL" in error


def test_an_endpoint_that_is_no_url(s3: Any) -> None:
    error = error_of(s3.use(url="nonsense"))
    assert error.startswith(
        f"{s3.location} cannot be used: Invalid endpoint: nonsense.\nLook at PGCLONE_S3_ENDPOINT_URL"
    )


@pytest.fixture
def untrusted(tmp_path: Path) -> Iterator[str]:
    """An endpoint whose certificate nobody has signed but itself."""
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                try:
                    context.wrap_socket(client, server_side=True).close()
                except OSError:  # what this is for
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def make_certificate(folder: Path) -> Path:
    from datetime import datetime, timedelta, timezone
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "nobody")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


@pytest.mark.usefixtures("impatient")
def test_a_certificate_that_nobody_trusts(s3: Any, untrusted: str) -> None:
    error = error_of(s3.use(url=untrusted))
    assert error.startswith(f"{s3.location} cannot be used: TLS failed: ")
    assert "certificate verify failed" in error
    assert 'Set PGCLONE_S3 = {"ca_bundle": "/path/to/ca.pem"}' in error


def test_a_page_of_a_proxy_that_cannot_reach_the_service(s3: Any, between: Proxy, impatient: None) -> None:
    between.inject(Answer(502, b"<html><h1>Bad Gateway</h1></html>", {"Content-Type": "text/html"}), "GET", times=7)
    error = error_of(s3.use(url=between.url))
    assert error == f"{s3.location} answers 502, also after several tries: Bad Gateway.\nTry again later."


def test_a_bucket_whose_name_is_none(s3: Any) -> None:
    s3.use()
    error = error_of(serve(pgclone_s3, "s3://no bucket!/dumps/"))
    assert error == (
        '"no bucket!" is no name of a bucket.\n'
        "Mend PGCLONE_STORAGE_LOCATION (or --storage-location). Write an access point by its alias."
    )


@pytest.mark.parametrize(("do", "method"), [("read", "GET"), ("write", "PUT"), ("write large", "POST .*uploadId=")])
def test_what_answers_but_does_not_speak_s3(do: str, method: str, s3: Any, between: Proxy) -> None:
    between.inject(Answer(200, b"<a/>" if do == "write large" else b""), method)
    error = error_of(s3.use(url=between.url, part_size=5), do)
    assert error == (
        f"{s3.location} cannot be used: what answers there does not speak S3.\n"
        "Look at PGCLONE_S3_ENDPOINT_URL, and at proxies on the way."
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html><h1>Denied</h1></html>", "ListObjectsV2 was answered with 407: Proxy Authentication Required."),
        (b"<Error><Message>Weird thing</Message></Error>", "ListObjectsV2 was answered with 407: Weird thing."),
        (b"", "ListObjectsV2 was answered with 407: Proxy Authentication Required."),
    ],
    ids=["page", "no code", "empty"],
)
def test_answers_without_a_code(body: bytes, words: str, s3: Any, between: Proxy) -> None:
    between.inject(Answer(407, body), "GET")
    assert words in error_of(s3.use(url=between.url))


def test_the_action_that_the_service_names_is_the_one_to_allow(s3: Any, between: Proxy) -> None:
    words = "User: x is not authorized to perform: s3:PutObjectTagging on resource: y"
    between.inject(answer(403, "AccessDenied", words), "PUT")
    error = error_of(s3.use(url=between.url, tags={"a": "b"}), "write")
    assert "do not allow s3:PutObjectTagging" in error
    assert statement(error)["Action"] == "s3:PutObjectTagging"


def test_a_token_that_no_header_can_hold_is_not_shown(s3: Any) -> None:
    storage = s3.use()
    s3.settings.PGCLONE_S3_CONFIG["AWS_SESSION_TOKEN"] = "sesame\nopen"
    error = error_of(storage)
    assert error.startswith(f"{s3.location} cannot be used: a key or a token has a character that no header can hold.")
    assert "sesame" not in error


def test_a_password_in_the_endpoint_is_not_shown(s3: Any) -> None:
    storage = s3.use(url="http://user:hunter2@127.0.0.1:1")
    s3.settings.PGCLONE_S3_CONFIG["AWS_MAX_ATTEMPTS"] = "1"
    error = error_of(storage)
    assert "cannot be reached" in error
    assert "hunter2" not in error


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token", "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x"},
            "cannot be used: /nowhere/token: No such file or directory.",
        ),
        ({"AWS_MAX_ATTEMPTS": "abc"}, "Look at PGCLONE_S3_ENDPOINT_URL and the AWS_* variables."),
    ],
    ids=["token file", "number"],
)
def test_variables_that_make_no_sense(variables: dict[str, str], words: str, s3: Any) -> None:
    storage = s3.use()
    s3.settings.PGCLONE_S3_CONFIG = {"AWS_DEFAULT_REGION": "us-east-1", **variables}
    assert words in error_of(storage)


def test_no_credentials_at_all(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    storage = s3.use()
    s3.settings.PGCLONE_S3_CONFIG = {"AWS_DEFAULT_REGION": "us-east-1"}
    error = error_of(storage)
    assert error.startswith(f"{s3.location} cannot be used: there are no credentials.\nSet PGCLONE_S3_CONFIG = ")


def test_a_profile_that_does_not_exist(s3: Any) -> None:
    error = error_of(s3.use(profile="nobody"))
    assert error.startswith(f"{s3.location} cannot be used: The config profile (nobody) could not be found.")


def test_settings_that_are_wrong(s3: Any) -> None:
    assert error_of(s3.use(part_sice=5)) == (
        'settings.PGCLONE_S3 has the key "part_sice", which is no option.\nDid you mean "part_size"?'
    )


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), TimeoutError("timed out")])
def test_a_network_that_fails_is_no_matter_of_credentials(error: OSError) -> None:
    location = parse_location("s3://bucket/dumps")
    with pytest.raises(StorageError) as caught, explained(location):
        raise error
    assert str(caught.value) == f"s3://bucket/dumps broke off, also after several tries: {error}.\nTry again later."
