"""What SFTP needs, whatever is stored: paramiko looks after files and folders, smart_open streams."""

import contextlib
import functools
import logging
import posixpath
import socket
import stat
import threading
from datetime import datetime, timezone
from urllib.parse import urlsplit

from django.conf import settings

from pgclone.api import StorageError

SECONDS = 60  # that a host may take for an answer
CLIENTS, LOCK = {}, threading.Lock()

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # it would print tracebacks


@contextlib.contextmanager
def connected(location):
    """paramiko's client of the host, and the path of the location there. The host has to be in ~/.ssh/known_hosts."""
    import paramiko

    try:
        with LOCK:
            client = CLIENTS.get(location.bucket)
            if client is None or not client.get_transport().is_active():
                client = CLIENTS[location.bucket] = log_in(*address(location))
        sftp = client.open_sftp()
    except (OSError, paramiko.SSHException, TypeError) as error:
        raise StorageError(
            f"{location} cannot be reached: {getattr(error, 'strerror', None) or error}",
            "Check the location, PGCLONE_SFTP, and that the host is in ~/.ssh/known_hosts.",
        ) from error
    with sftp:
        sftp.get_channel().settimeout(SECONDS)
        yield sftp, f"/{location.prefix}"


def log_in(host, user, _, port, login):
    """A connection to a host that is known. smart_open, which comes later, would trust others as well."""
    import paramiko

    client = paramiko.SSHClient()
    client.load_system_host_keys()
    try:
        client.connect(host, port, user, **login)
    except BaseException:
        client.close()
        raise
    return client


@contextlib.contextmanager
def stream(location, path, mode):
    """A file that smart_open reads or writes, on a channel of its own."""
    from smart_open import ssh

    with LOCK:  # smart_open keeps its connections without one
        file = ssh.open(path, mode, *address(location))
    with file.sftp, file:
        file.settimeout(SECONDS)
        file.write = functools.partial(write, file.write)
        yield file


def write(send, data):
    """Send data to a file. When its disk is full, most hosts say no more than Failure."""
    try:
        send(data)
    except OSError as error:
        if str(error) != "Failure":
            raise
        raise OSError("Failure (is the disk full?)") from None


def address(location):
    """Host, user, password, port and what else paramiko wants to know, as smart_open takes them."""
    url = urlsplit(location.url)
    if not url.username or url.password:
        raise StorageError(
            f"The storage location on {url.hostname} has to name a user, and no password.",
            "Write it as sftp://user@host/folder/, and the password into PGCLONE_SFTP.",
        )
    login = {"timeout": SECONDS, "channel_timeout": SECONDS, "transport_factory": transport}
    # With a password, be it empty, smart_open does not go by ~/.ssh/config, which could name another host.
    return url.hostname, url.username, "", url.port or 22, {**login, **getattr(settings, "PGCLONE_SFTP", {})}


def transport(sock, **options):
    """A connection that does not wait for packets to be full (1 MB/s instead of 100), and never looks idle."""
    import paramiko

    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made = paramiko.Transport(sock, **options)
    made.set_keepalive(SECONDS // 2)
    return made


def files(sftp, path):
    """The path, size and time of every file whose path begins with this one."""
    folder = posixpath.dirname(path)
    with contextlib.suppress(FileNotFoundError):
        for found in sftp.listdir_attr(folder):
            inner = posixpath.join(folder, found.filename)
            if inner.startswith(path) and stat.S_ISDIR(found.st_mode):
                yield from files(sftp, f"{inner}/")
            elif inner.startswith(path) and stat.S_ISREG(found.st_mode):
                yield inner, found.st_size, datetime.fromtimestamp(found.st_mtime, timezone.utc)


def is_file(sftp, path):
    return stat.S_ISREG(mode_of(sftp, path))


def make_folder_of(sftp, path):
    """Make the folder of a file, and those above it, unless they are there."""
    folder = posixpath.dirname(path)
    if not mode_of(sftp, folder):
        make_folder_of(sftp, folder)
        try:
            sftp.mkdir(folder)
        except OSError:
            if not mode_of(sftp, folder):  # nobody else was faster
                raise


def mode_of(sftp, path):
    """The mode of what is there, 0 if nothing is."""
    with contextlib.suppress(FileNotFoundError):
        return sftp.stat(path).st_mode
    return 0
