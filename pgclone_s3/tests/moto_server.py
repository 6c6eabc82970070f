"""Moto's S3 server for tests, in a process of its own, gone at the end.

    with start() as server:
        boto3.client("s3", endpoint_url=server.url, ...).create_bucket(Bucket="bucket")

It starts faster than SeaweedFS, knows headers which that does not (such as those of SSE-KMS), and by default lets
everybody do everything. It does not check the checksums that it is sent, and says of every unfinished upload that it
was begun in 2010. It needs `moto[s3]`, `flask` and `flask-cors`, not the rest of `moto[server]`.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.ports import HOST, reserved_port

START = 60.0
"""Seconds in which the server must answer. It takes less than half of one when the machine is idle."""


@dataclass(frozen=True)
class Server:
    """A running server, without any bucket."""

    url: str
    port: int


@contextlib.contextmanager
def start(*, unsigned: int | None = None) -> Iterator[Server]:
    """Start a server; stop it at the end of the block.

    Args:
        unsigned: How many requests it takes before it checks access keys, signatures and policies. With 0 it knows
            nobody, so that every access key is an unknown one. None: it never checks.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgclone-moto-")))
        port = stack.enter_context(reserved_port())
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_"))}
        environment.pop("INITIAL_NO_AUTH_ACTION_COUNT", None)
        if unsigned is not None:
            environment["INITIAL_NO_AUTH_ACTION_COUNT"] = str(unsigned)
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder, env=environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            _wait_until_ready(port, process, log)
            yield Server(url=f"http://{HOST}:{port}", port=port)
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers. What is asked is no action that it counts."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=10)) as connection:
            with contextlib.suppress(OSError):
                connection.request("GET", "/moto-api/data.json")
                if connection.getresponse().status == 200:
                    return
        time.sleep(0.02)
    raise RuntimeError(f"The server of moto did not start:\n{log.read_text(errors='replace')}")
