"""Servers for the tests, and the plugin as the core sees it.

fake-gcs-server is the real thing for what it knows; `strict_gcs` is for what it leaves out of uploads; `Google` gives tokens.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fake_gcs
import pytest
import strict_gcs
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

import pgclone_gcs
from pgclone.host import Storage
from pgclone.testing import proxy
from pgclone.testing.storage import serve
from pgclone.transfer import shared_budget

_numbers = itertools.count()

Connect = Callable[..., Storage]


def pytest_configure(config: pytest.Config) -> None:
    # The SDK says so on versions of Python that near their end.
    config.addinivalue_line("filterwarnings", "ignore:(?s).*Python version:FutureWarning:google")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own: no credentials, no emulator, no metadata server."""
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")


@pytest.fixture(autouse=True)
def _no_memory_is_lost() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5  # ranges on their way hand theirs back when they arrive
    while shared_budget().used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shared_budget().used == 0


@pytest.fixture(scope="session")
def server() -> Iterator[fake_gcs.Server]:
    with fake_gcs.start() as server:
        yield server


@pytest.fixture
def between(server: fake_gcs.Server) -> Iterator[proxy.Proxy]:
    """A proxy in front of fake-gcs-server, for what goes wrong on the way."""
    with proxy.start(fake_gcs.HOST, server.port) as between:
        yield between


@pytest.fixture
def service() -> Iterator[strict_gcs.Service]:
    with strict_gcs.start() as service:
        yield service


@pytest.fixture
def before(service: strict_gcs.Service) -> Iterator[proxy.Proxy]:
    """A proxy in front of the strict service."""
    with proxy.start("127.0.0.1", service.port) as before:
        yield before


@pytest.fixture
def place(server: fake_gcs.Server) -> str:
    """A location that is empty."""
    return f"gs://{server.bucket}/{next(_numbers)}/"


@pytest.fixture
def connect(settings: Any, place: str) -> Connect:
    """`connect(url, **more)`: the plugin at an address, in chunks of 1 MiB."""

    def connect(url: str | None, where: str = place, **more: Any) -> Storage:
        small = {"chunk_size": 1, "timeout": 5, "deadline": 10}
        settings.PGCLONE_GCS = {**small, "endpoint": url, **more}
        return serve(pgclone_gcs, where)

    return connect


class Google:
    """Who gives tokens to service accounts.

    Attributes:
        status: Of its answers.
        answer: What they hold.
        asked: The paths of the requests so far.
        give: Status and answer for a path.
    """

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.answer: Any = {"access_token": "secret-token", "expires_in": 3600, "token_type": "Bearer"}
        self.asked: list[str] = []
        self.give: Callable[[str], tuple[int, Any]] = lambda path: (self.status, self.answer)


@pytest.fixture
def google() -> Iterator[Google]:
    google = Google()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            google.asked.append(self.path)
            status, answer = google.give(self.path)
            self.send_response_only(status)
            self.end_headers()
            self.wfile.write(answer.encode() if isinstance(answer, str) else json.dumps(answer).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        google.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        yield google
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def key_file(google: Google, private_key: rsa.RSAPrivateKey, tmp_path: Path) -> str:
    """The key of a service account, whose tokens `google` gives."""
    pem = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key = {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "1",
        "private_key": pem.decode(),
        "client_email": "dumper@project.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": f"{google.url}/token",
    }
    path = tmp_path / "key.json"
    path.write_text(json.dumps(key))
    return str(path)
