"""A real SSH server that speaks SFTP, in a process of its own: `python -m tests.sftp FOLDER PORT` serves a folder as `/`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.project import ROOT

USER, PASSWORD = "backup", "not-to-be-shown"


@dataclass
class Server:
    """The server, the folder it serves, and the home of somebody who knows its key and may log in with one of their own."""

    root: Path
    home: Path
    port: int = 0
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"sftp://{USER}@127.0.0.1:{self.port}"

    @property
    def key(self) -> Path:
        """The private key to log in with."""
        return self.home / ".ssh" / "key"

    @property
    def known_hosts(self) -> Path:
        return self.home / ".ssh" / "known_hosts"

    @property
    def logins(self) -> str:
        """The passwords that were tried."""
        path = self.home / "logins"
        return path.read_text() if path.exists() else ""

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def start(self) -> None:
        """Start it, again at its port but with another key if it has run before."""
        self.known_hosts.parent.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sftp", str(self.root), str(self.port)],
            cwd=ROOT,
            env={**os.environ, "HOME": str(self.home)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        port, key = self.process.stdout.readline().split(" ", 1)
        self.port = int(port)
        self.known_hosts.write_text(f"[127.0.0.1]:{port} {key}")

    def kill(self) -> None:
        assert self.process and self.process.stdout
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def freeze(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGSTOP)


@contextlib.contextmanager
def run(folder: Path) -> Iterator[Server]:
    """A server for the time of the block, with everything of it in a folder."""
    server = Server(folder / "root", folder / "home")
    for path in (server.root, server.home):
        path.mkdir(parents=True)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def serve(root: Path, port: int) -> None:
    """Serve a folder until the process is killed. Prints the port and the public key of the host.

    Nobody may write in its folder `denied`, and the disk is full in `full`, as OpenSSH puts it in `failure`.
    """
    import asyncssh

    home, host_key, login = Path.home(), *(asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    login.write_private_key(home / ".ssh" / "key")
    login.write_public_key(home / ".ssh" / "key.pub")

    class Host(asyncssh.SSHServer):
        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            with (home / "logins").open("a") as logins:
                logins.write(f"{password}\n")
            return (username, password) == (USER, PASSWORD)

    class Folder(asyncssh.SFTPServer):
        def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
            if path.startswith(b"/denied/") and pflags & asyncssh.FXF_WRITE:
                raise PermissionError(13, "Permission denied")
            return super().open(path, pflags, attrs)

        def mkdir(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
            if path.startswith(b"/denied/"):
                raise PermissionError(13, "Permission denied")
            super().mkdir(path, attrs)

        def write(self, file_obj: object, offset: int, data: bytes) -> int:
            name = getattr(file_obj, "name", b"")
            if offset > 100_000 and b"/full/" in name:
                raise OSError(28, "No space left on device")
            if offset > 100_000 and b"/failure/" in name:
                raise asyncssh.SFTPFailure("Failure")
            return int(super().write(file_obj, offset, data))  # type: ignore[arg-type]

    async def main() -> None:
        listener = await asyncssh.listen(
            "127.0.0.1",
            port,
            server_factory=Host,
            server_host_keys=[host_key],
            authorized_client_keys=str(home / ".ssh" / "key.pub"),
            sftp_factory=lambda channel: Folder(channel, chroot=os.fsencode(root)),
        )
        sys.stdout.write(f"{listener.get_port()} {host_key.export_public_key().decode()}")
        sys.stdout.flush()
        await asyncio.Event().wait()

    asyncio.run(main())


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
