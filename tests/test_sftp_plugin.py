"""The example of a storage plugin, examples/pgclone-sftp, on a real SSH server."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import paramiko
import pytest

from pgclone import archive, exceptions, streams
from pgclone.host import Storage
from pgclone.testing.storage import StorageConformance, get, keys, noise, put, serve
from tests.project import ROOT, Project
from tests.sftp import PASSWORD, USER, Server, run

sys.path.append(str(ROOT / "examples" / "pgclone-sftp" / "src"))
import pgclone_sftp
from pgclone_sftp import host

LOGIN = {"password": PASSWORD, "allow_agent": False, "look_for_keys": False}
BLOCK = noise(1 << 20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests that leave it as it is."""
    with run(tmp_path_factory.mktemp("sftp")) as server:
        yield server


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server for a test that does not."""
    with run(tmp_path / "sftp") as server:
        monkeypatch.setenv("HOME", str(server.home))
        yield server


@pytest.fixture(autouse=True)
def home(server: Server, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    """This process belongs to somebody who knows the server."""
    monkeypatch.setenv("HOME", str(server.home))
    settings.PGCLONE_SFTP = LOGIN


def at(url: str) -> Storage:
    return serve(pgclone_sftp, url)


def dump(storage: Storage, key: str = "prod/key", blocks: int = 1) -> None:
    """Write a key as the core does, whose words errors come in."""
    with streams.store(storage, key) as stored:
        for _ in range(blocks):
            stored.write(BLOCK)


class TestSftp(StorageConformance):
    plugin = pgclone_sftp

    @pytest.fixture
    def location(self, server: Server) -> str:
        return f"{server.url}/{secrets.token_hex(4)}/dumps/"


def test_loading_it_costs_little() -> None:
    script = "import sys, pgclone_sftp; print({*sys.modules} & {'paramiko', 'smart_open', 'cryptography'})"
    environ = {**os.environ, "PYTHONPATH": str(Path(pgclone_sftp.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


# Where and how dumps are stored


def test_a_key_is_a_path_below_the_folder_which_is_absolute(server: Server) -> None:
    folder = secrets.token_hex(4)
    put(at(f"{server.url}/{folder}/dumps"), "prod/default/key.dump", b"bytes")
    assert (server.root / folder / "dumps" / "prod" / "default" / "key.dump").read_bytes() == b"bytes"
    assert keys(at(f"{server.url}/{folder}")) == ["dumps/prod/default/key.dump"]


def test_the_root_of_a_server_is_a_location_too(own: Server) -> None:
    storage = at(own.url)
    put(storage, "key", b"bytes")
    assert (get(storage, "key"), keys(storage), own.files()) == (b"bytes", ["key"], ["key"])


def test_what_killed_writers_left_is_removed_after_a_day_and_nothing_else(server: Server) -> None:
    location = secrets.token_hex(4)
    storage = at(f"{server.url}/{location}")
    block = storage.open(location=storage.location, key="prod/key", mode="wb", size_hint=None)
    block.__enter__()
    (unfinished,) = (server.root / location / "prod").iterdir()
    foreign = unfinished.with_name("film.unfinished")
    foreign.write_bytes(b"")
    for path in (unfinished, foreign):
        os.utime(path, (time.time() - 23 * 3600,) * 2)
    assert keys(storage) == ["prod/film.unfinished"]
    assert unfinished.exists()
    for path in (unfinished, foreign):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    assert keys(storage) == ["prod/film.unfinished"]
    assert not unfinished.exists()
    with pytest.raises(OSError):
        block.__exit__(None, None, None)
    assert keys(storage) == ["prod/film.unfinished"]


# Logging in


@pytest.fixture
def afresh() -> None:
    """Nobody has logged in yet."""
    host.CLIENTS.clear()


@pytest.fixture
def known_hosts(afresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The known hosts of somebody who knows none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path / ".ssh" / "known_hosts"


@pytest.mark.usefixtures("afresh")
def test_a_key_instead_of_a_password(server: Server, settings: Any) -> None:
    settings.PGCLONE_SFTP = {"key_filename": str(server.key), "allow_agent": False, "look_for_keys": False}
    tried = server.logins
    storage = at(f"{server.url}/{secrets.token_hex(4)}")
    put(storage, "key", BLOCK)
    assert get(storage, "key") == BLOCK
    assert server.logins == tried


REMEDY = "Check the location, PGCLONE_SFTP, and that the host is in ~/.ssh/known_hosts."


def refuse(storage: Storage) -> str:
    """What is wrong with a location, the same whatever one wants from it."""
    found = []
    for call in (
        lambda: dump(storage),
        lambda: list(archive.list_entries(storage)),
        lambda: archive.delete(storage, "key"),
        lambda: storage.open(location=storage.location, key="key", mode="rb", size_hint=None).__enter__(),
    ):
        with pytest.raises(exceptions.StorageError) as caught:
            call()
        found.append(str(caught.value))
    assert len(set(found)) == 1
    assert PASSWORD not in found[0]
    return found[0]


@pytest.mark.usefixtures("afresh")
def test_a_wrong_password(server: Server, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings.PGCLONE_SFTP = {**LOGIN, "password": f"{PASSWORD}, not this one"}
    assert refuse(at(server.url)) == f"{server.url} cannot be reached: Authentication failed.\n{REMEDY}"
    assert PASSWORD not in caplog.text


def test_an_unknown_host_is_told_nothing(server: Server, known_hosts: Path) -> None:
    before = (server.logins, server.files())
    words = f"Server '[127.0.0.1]:{server.port}' not found in known_hosts"
    assert refuse(at(server.url)) == f"{server.url} cannot be reached: {words}\n{REMEDY}"
    assert (server.logins, server.files()) == before


def test_a_host_with_another_key_is_told_nothing(server: Server, known_hosts: Path) -> None:
    before = (server.logins, server.files())
    another = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    known_hosts.write_text(f"[127.0.0.1]:{server.port} {another}")
    assert "does not match" in refuse(at(server.url))
    assert (server.logins, server.files()) == before


def test_smart_open_checks_the_key_of_a_host_that_is_known(own: Server) -> None:
    """This is what lets it make a connection of its own, once paramiko's has found the host known."""
    storage = at(own.url)
    another = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    own.known_hosts.write_text(f"[127.0.0.1]:{own.port} {another}")
    with pytest.raises(paramiko.BadHostKeyException), host.stream(storage.location, "/key", "wb"):
        raise AssertionError("smart_open has trusted another host.")
    assert (own.logins, own.files()) == ("", [])


def test_a_host_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"sftp://{USER}@127.0.0.1:{port}/dumps"
    words = f"Unable to connect to port {port} on 127.0.0.1"
    assert refuse(at(url)) == f"{url} cannot be reached: {words}\n{REMEDY}"


def test_a_host_that_does_not_speak_ssh(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(4):
                with listener.accept()[0] as connection:
                    connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1000):
                        pass

        threading.Thread(target=answer, daemon=True).start()
        url = f"sftp://{USER}@127.0.0.1:{listener.getsockname()[1]}/dumps"
        assert refuse(at(url)) == f"{url} cannot be reached: Error reading SSH protocol banner\n{REMEDY}"
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("afresh")
def test_a_setting_that_paramiko_does_not_know(server: Server, settings: Any) -> None:
    settings.PGCLONE_SFTP = {"pasword": PASSWORD}
    assert "got an unexpected keyword argument 'pasword'" in refuse(at(server.url))


@pytest.mark.parametrize("url", ["sftp://127.0.0.1/dumps", f"sftp://{USER}:{PASSWORD}@127.0.0.1/dumps"])
def test_a_location_names_a_user_and_no_password(url: str) -> None:
    assert refuse(at(url)).splitlines() == [
        "The storage location on 127.0.0.1 has to name a user, and no password.",
        "Write it as sftp://user@host/folder/, and the password into PGCLONE_SFTP.",
    ]


# Writing and reading that goes wrong


def test_a_folder_that_may_not_be_written(server: Server) -> None:
    (server.root / "denied" / "prod").mkdir(parents=True)
    storage = at(f"{server.url}/denied")
    for key in ("prod/key", "made/key"):
        with pytest.raises(exceptions.StorageError) as caught:
            dump(storage, key)
        assert caught.value.cause == f'"{key}" in {server.url}/denied could not be written: Permission denied'
    assert keys(storage) == []


@pytest.mark.parametrize(
    ("folder", "words"), [("full", "No space left on device"), ("failure", "Failure (is the disk full?)")]
)
def test_a_disk_that_is_full(server: Server, folder: str, words: str) -> None:
    storage = at(f"{server.url}/{folder}")
    with pytest.raises(exceptions.StorageError) as caught:
        dump(storage)
    assert caught.value.cause == f'"prod/key" in {server.url}/{folder} could not be written: {words}'
    assert not [name for name in server.files() if name.startswith(folder)]


def test_a_server_that_is_gone_in_the_middle_of_a_write(own: Server) -> None:
    storage = at(f"{own.url}/dumps")
    with pytest.raises(exceptions.StorageError, match=r'^"prod/key" in sftp://\S+/dumps could not be written: '):
        with streams.store(storage, "prod/key") as stored:
            stored.write(BLOCK)
            own.kill()
            stored.write(BLOCK)
    (unfinished,) = own.files()

    own.start()
    assert keys(storage) == []
    dump(storage, blocks=2)
    assert get(storage, "prod/key") == BLOCK * 2
    assert own.files() == ["dumps/prod/key", unfinished]


def test_a_server_that_is_gone_before_the_commit(own: Server) -> None:
    storage = at(f"{own.url}/dumps")
    with pytest.raises(exceptions.StorageError, match=r'"prod/key" in .* could not be written: '):
        with streams.store(storage, "prod/key") as stored:
            stored.write(BLOCK)
            own.kill()
    own.start()
    assert keys(storage) == []


def test_a_server_that_is_gone_in_the_middle_of_a_read(own: Server) -> None:
    storage = at(f"{own.url}/dumps")
    dump(storage, blocks=4)
    with pytest.raises(exceptions.StorageError, match=r'"prod/key" in .* could not be read: '):
        with streams.open_source(storage, "prod/key", lambda head: None) as source:
            source.read(1000)
            own.kill()
            source.drain()
    own.start()
    assert get(storage, "prod/key") == BLOCK * 4


def test_a_server_that_is_frozen_is_not_waited_for_forever(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SECONDS", 1)
    storage = at(f"{own.url}/dumps")
    with pytest.raises(exceptions.StorageError, match="could not be written: TimeoutError"):
        with streams.store(storage, "prod/key") as stored:
            stored.write(BLOCK)
            own.freeze()
            stored.write(BLOCK)


# A project


def test_a_project_dumps_restores_and_sees_the_doctor(project: Project, own: Server) -> None:
    project.environ |= {"HOME": str(own.home), "PYTHONPATH": str(Path(pgclone_sftp.__file__).parent.parent)}
    project.settings = {
        "PGCLONE_STORAGE_LOCATION": f"{own.url}/var/backups/",
        "PGCLONE_PLUGINS": ["pgclone_sftp"],
        "PGCLONE_SFTP": LOGIN,
    }
    before = project.digest()
    assert project.pgclone("dump").status == 0
    (key,) = project.call("ls").lines
    assert own.files() == [f"var/backups/{key}", f"var/backups/{key}.json"]
    project.sql("DELETE FROM app_review")
    project.restore(key)
    assert project.digest() == before

    doctor = project.call("doctor")
    assert (doctor.status, doctor.err) == (0, "")
    assert [line.split()[0] for line in doctor.lines] == ["ok"] * 6


def test_a_command_that_cannot_log_in_says_so_and_keeps_the_password_to_itself(server: Server) -> None:
    settings = {
        "PGCLONE_STORAGE_LOCATION": server.url,
        "PGCLONE_PLUGINS": ["pgclone_sftp"],
        "PGCLONE_SFTP": {**LOGIN, "password": f"{PASSWORD}, not this one"},
    }
    done = subprocess.run(
        [sys.executable, "-m", "django", "pgclone", "ls", "-v", "2"],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(pgclone_sftp.__file__).parent.parent),
            "PGCLONE_TEST_SETTINGS": json.dumps(settings),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-2:] == [f"{server.url} cannot be reached: Authentication failed.", REMEDY]
    assert PASSWORD not in done.stderr and "Traceback" not in done.stderr
