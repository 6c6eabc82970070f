"""Storage locations, parsed. Pure."""

from __future__ import annotations

from pgclone import exceptions
from pgclone.types import Location


def parse_location(url: str) -> Location:
    """Parse a storage location: a folder of the local file system, or `scheme://bucket/prefix`.

    Raises:
        ValueError: It is empty, or has a scheme and nothing behind it.
    """
    scheme, separator, rest = url.partition("://")
    if not url:
        raise exceptions.ValueError("The storage location is empty.", "Set PGCLONE_STORAGE_LOCATION, or leave it out.")
    if not separator:
        return Location(url, "", "", f"{url.rstrip('/')}/")
    if scheme == "file":
        if not rest:
            raise exceptions.ValueError(
                f'The storage location "{url}" names no folder.', "Write it as file:///folder/."
            )
        return Location(url, "file", "", f"{rest.rstrip('/')}/")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise exceptions.ValueError(
            f'The storage location "{url}" names no bucket.', f"Write it as {scheme}://bucket/prefix/."
        )
    prefix = prefix.strip("/")
    return Location(url, scheme.lower(), bucket, f"{prefix}/" if prefix else "")
