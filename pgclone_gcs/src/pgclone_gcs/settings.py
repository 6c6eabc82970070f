"""The settings of the plugin: `PGCLONE_GCS`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from pgclone.api import PgcloneError
from pgclone.api import read_settings as read_dict


def _option(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Settings:
    """`PGCLONE_GCS`: its keys, their types and defaults."""

    credentials_file: str | None = _option(
        "A key of a service account, or a configuration of workload identity (default: application default credentials)."
    )
    impersonate: str | None = _option("E-mail address of a service account to act as, with the credentials found.")
    project: str | None = _option("The project whose quota requests count against, for credentials of users.")
    user_project: str | None = _option(
        "The project that pays for requests to a bucket of somebody else (requester pays)."
    )
    kms_key: str | None = _option("`projects/…/cryptoKeys/…`, where the bucket's own default is not enough.")
    storage_class: str | None = _option(
        "Where the bucket's own default is not wanted.", choices=("STANDARD", "NEARLINE", "COLDLINE", "ARCHIVE")
    )
    acl: str | None = _option(
        "A predefined ACL, for buckets without uniform access.",
        choices=("bucketOwnerFullControl", "bucketOwnerRead", "private", "projectPrivate"),
    )
    endpoint: str | None = _option(
        "Another address of the service. With `http://` it is an emulator, which gets no credentials but those of a file."
    )
    chunk_size: int = _option("MiB that an upload sends at a time.", 16)
    concurrency: int = _option("How many ranges of one stream are read at once.", 8)
    timeout: float = _option("Seconds without an answer after which a request is tried again.", 60)
    deadline: float = _option("Seconds after which a request that keeps failing is given up.", 120)

    def __post_init__(self) -> None:
        if self.chunk_size < 1 or self.concurrency < 1 or self.timeout <= 0 or self.deadline < 0:
            raise PgcloneError(
                "settings.PGCLONE_GCS has a number that is too small.",
                "chunk_size (MiB) and concurrency are at least 1, timeout more than 0, deadline at least 0.",
            )
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise PgcloneError(
                'settings.PGCLONE_GCS["endpoint"] is no URL.',
                'For example "https://storage.europe-west3.rep.googleapis.com".',
            )


def read_settings() -> Settings:
    """`PGCLONE_GCS`.

    Raises:
        ValueError: A key or a value in it is wrong.
    """
    return read_dict("PGCLONE_GCS", Settings)


def rows() -> Iterator[tuple[str, str, Any, str]]:
    """The table of `PGCLONE_GCS`, for the documentation: name, type, default and meaning."""
    for item in fields(Settings):
        yield item.name, str(item.type), item.default, item.metadata["help"]
