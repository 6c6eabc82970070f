"""Measures one stream to and from object storage beside the clouds' own tools, in turn, in one run.

    python benchmarks/object_storage.py --mebibytes 512 --rounds 3

S3 on a private SeaweedFS: this project, `aws s3 cp` (in a virtual environment of its own) and plain smart_open. GCS on a private
fake-gcs-server: this project and google-cloud-storage. Each is a process that reads random bytes from a pipe, or writes to
one; a proxy between it and the server adds latency and a limit for each connection. Prints MiB/s of the whole
process, start included, and the peak of its resident memory: medians.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pgclone.testing import proxy

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "pgclone_s3" / "tests"), str(ROOT / "pgclone_gcs" / "tests")]

MiB = 1024 * 1024
NETWORKS = {
    "no latency": None,
    "30 ms": {"latency": 0.03},
    "30 ms, 80 MB/s a connection": {"latency": 0.03, "rate": 80_000_000},
}


@dataclass(frozen=True)
class Measured:
    speed: float
    resident: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--service", choices=("s3", "gcs"), action="append")
    parser.add_argument("--network", choices=tuple(NETWORKS), action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pgclone-bench-", dir=memory()) as folder:
        data = Path(folder) / "data"
        with data.open("wb") as file:
            for _ in range(options.mebibytes):
                file.write(secrets.token_bytes(MiB))
        for service in options.service or ("s3", "gcs"):
            with SERVICES[service]() as (port, clients, delete):
                for network in options.network or NETWORKS:
                    with connect(port, NETWORKS[network]) as url:
                        compare(f"{service}, {network}", clients(url), data, options.rounds, delete)


@contextmanager
def connect(port: int, network: Mapping[str, float] | None) -> Iterator[str]:
    """The URL of the server, or of a proxy before it."""
    if network is None:
        yield f"http://127.0.0.1:{port}"
        return
    with proxy.start("127.0.0.1", port, **network) as between:
        yield between.url


def memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Client:
    """How a tool writes its standard input to a key, and a key to its standard output."""

    write: tuple[str, ...]
    read: tuple[str, ...]
    environ: Mapping[str, str]


@contextmanager
def s3() -> Iterator[tuple[int, Callable[[str], dict[str, Client]], Callable[[str], object]]]:
    import seaweed

    aws = install_awscli(ROOT / ".bench" / "aws")
    with seaweed.start() as server:

        def clients(url: str) -> dict[str, Client]:
            environ = {
                "AWS_ACCESS_KEY_ID": server.access_key,
                "AWS_SECRET_ACCESS_KEY": server.secret_key,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": url,
            }
            key = f"s3://{server.bucket}/{{}}"
            copy = (str(aws), "s3", "cp")
            return {
                "pgclone": this("s3", key, environ),
                "aws s3 cp": Client((*copy, "-", key), (*copy, key, "-"), environ),
                "smart_open": this("smart_open", key, environ),
            }

        yield server.port, clients, lambda key: server.client().delete_object(Bucket=server.bucket, Key=key)


@contextmanager
def gcs() -> Iterator[tuple[int, Callable[[str], dict[str, Client]], Callable[[str], object]]]:
    import fake_gcs

    with fake_gcs.start() as server:

        def clients(url: str) -> dict[str, Client]:
            environ, key = {"STORAGE_EMULATOR_HOST": url}, f"gs://{server.bucket}/{{}}"
            return {"pgclone": this("gcs", key, environ), "google-cloud-storage": this("google", key, environ)}

        yield server.port, clients, lambda key: server.client().bucket(server.bucket).blob(key).delete()


SERVICES = {"s3": s3, "gcs": gcs}


def this(name: str, key: str, environ: Mapping[str, str]) -> Client:
    """A client that is one of the functions below, in a process of its own."""
    run = (sys.executable, str(Path(__file__).with_name("storage_clients.py")), name)
    return Client((*run, "write", key), (*run, "read", key), environ)


def install_awscli(folder: Path) -> Path:
    """In an environment of its own: it wants one version of botocore, and no other."""
    if not (folder / "bin" / "aws").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", "awscli"], check=True)
    return folder / "bin" / "aws"


def compare(
    title: str, clients: Mapping[str, Client], data: Path, rounds: int, delete: Callable[[str], object]
) -> None:
    found: dict[tuple[str, str], list[Measured]] = {}
    for number in range(rounds + 1):
        for name in random.sample([*clients], len(clients)):  # nobody always comes after the same one
            client = clients[name]
            key = f"bench/{secrets.token_hex(4)}"
            for direction, argv in (("write", client.write), ("read", client.read)):
                measured = run([word.format(key) for word in argv], client.environ, data, direction)
                if number:  # the first round warms the server up
                    found.setdefault((name, direction), []).append(measured)
            delete(key)
    print(f"\n{title}\n{'':22}{'write MiB/s':>12}{'RSS MiB':>9}{'read MiB/s':>12}{'RSS MiB':>9}")
    for name in clients:
        row = [
            statistics.median(getattr(measured, what) for measured in found[name, direction])
            for direction in ("write", "read")
            for what in ("speed", "resident")
        ]
        print(f"{name:22}{row[0]:12.0f}{row[1]:9.0f}{row[2]:12.0f}{row[3]:9.0f}", flush=True)


def run(argv: list[str], environ: Mapping[str, str], data: Path, direction: str) -> Measured:
    """Run a client to its end, with `cat` on the other side of a pipe."""
    begin = time.perf_counter()
    with ExitStack() as stack:
        pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        if direction == "write":
            feeder = stack.enter_context(subprocess.Popen(["cat", data], stdout=subprocess.PIPE))
            pipe = {"stdin": feeder.stdout, "stdout": subprocess.DEVNULL}
        process = subprocess.Popen(argv, env={**os.environ, **environ}, **pipe)
        if direction == "read":
            stack.enter_context(subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL))
        else:
            feeder.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(argv)} failed with status {process.returncode}")
    return Measured(data.stat().st_size / MiB / (time.perf_counter() - begin), usage.ru_maxrss / 1024)


if __name__ == "__main__":
    main()
