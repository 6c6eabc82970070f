"""Dumps over SFTP, at sftp://user@host:port/folder/. The path of the folder is absolute; it is made if it is missing."""

import contextlib
import secrets
from datetime import datetime, timedelta, timezone

from pgclone.api import Entry, KeyNotFound, hookimpl
from pgclone_sftp import host


@hookimpl
def storage_open(location, key, mode):
    if location.scheme == "sftp":
        return reading(location, key) if mode == "rb" else writing(location, key)


@hookimpl
def list_keys(location, prefix):
    return listing(location, prefix) if location.scheme == "sftp" else None


@hookimpl
def delete_key(location, key):
    if location.scheme == "sftp":
        with host.connected(location) as (sftp, folder):
            return host.is_file(sftp, folder + key) and sftp.remove(folder + key) is None


@contextlib.contextmanager
def reading(location, key):
    with host.connected(location) as (sftp, folder):
        if not host.is_file(sftp, folder + key):
            raise KeyNotFound(f'There is no "{key}" in {location}.')
        with host.stream(location, folder + key, "rb") as file:
            yield file


@contextlib.contextmanager
def writing(location, key):
    with host.connected(location) as (sftp, folder):
        unfinished = f"{folder}{key}.{secrets.token_hex(8)}.pgclone-unfinished"
        host.make_folder_of(sftp, unfinished)
        try:
            with host.stream(location, unfinished, "wb") as file:
                yield file
            sftp.rename(unfinished, folder + key)  # fails if there is such a file: a commit never overwrites
        finally:
            with contextlib.suppress(Exception):
                sftp.remove(unfinished)


def listing(location, prefix):
    with host.connected(location) as (sftp, folder):
        for path, size, modified in host.files(sftp, folder + prefix):
            if not path.endswith(".pgclone-unfinished"):
                yield Entry(path.removeprefix(folder), size, modified)
            elif modified < datetime.now(timezone.utc) - timedelta(days=1):  # its writer was killed
                with contextlib.suppress(OSError):
                    sftp.remove(path)
