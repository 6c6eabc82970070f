"""The settings of the plugin: `PGCLONE_S3`, and those of django-pgclone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pgclone.api import PgcloneError
from pgclone.api import read_settings as read_dict


def _option(help: str, default: Any = None, *, hash: bool | None = None, **metadata: Any) -> Any:
    return field(default=default, hash=hash, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Settings:
    """`PGCLONE_S3`: its keys, their types and defaults."""

    sse: str | None = _option(
        "Encryption at rest, where the bucket's own default is not enough.",
        choices=("AES256", "aws:kms", "aws:kms:dsse"),
    )
    kms_key: str | None = _option("ID, alias or ARN of the KMS key (implies `sse` `aws:kms`).")
    storage_class: str | None = _option("For example `STANDARD_IA` or `GLACIER_IR`.")
    acl: str | None = _option("A canned ACL, for example `bucket-owner-full-control`.")
    tags: Mapping[str, str] | None = _option("Tags of the objects, for lifecycle rules and bills.", hash=False)
    requester_pays: bool = _option("Pay for requests to a bucket of somebody else.", False)
    addressing_style: str = _option(
        "Where the bucket stands in a URL: `virtual` in the host, `path` in the path.",
        "auto",
        choices=("auto", "virtual", "path"),
    )
    ca_bundle: str | None = _option("A file of certificates that sign the endpoint's.")
    profile: str | None = _option("A profile of `~/.aws/config`.")
    role: str | None = _option("ARN of a role to assume, with the credentials that are found otherwise.")
    external_id: str | None = _option("The external ID that the role wants.")
    checksums: str | None = _option(
        "`when_required` for services that do not know S3's newer checksums.",
        choices=("when_supported", "when_required"),
    )
    part_size: int = _option("MiB of a part, at least 5. Large dumps get larger ones, as 10,000 must do.", 8)
    concurrency: int = _option("How many parts of one stream travel at once; of ranges, twice as many.", 4)
    timeout: float = _option("Seconds without an answer after which a request is tried again.", 60)

    def __post_init__(self) -> None:
        if self.part_size < 5 or self.concurrency < 1 or self.timeout <= 0:
            raise PgcloneError(
                "settings.PGCLONE_S3 has a number that is too small.",
                "part_size is at least 5 (MiB), concurrency at least 1, timeout more than 0.",
            )


def read_settings() -> Settings:
    """`PGCLONE_S3`.

    Raises:
        ValueError: A key or a value in it is wrong.
    """
    return read_dict("PGCLONE_S3", Settings)


def read_environment() -> dict[str, str]:
    """`PGCLONE_S3_CONFIG`, AWS_* variables as django-pgclone took them, with `PGCLONE_S3_ENDPOINT_URL` among them.

    Raises:
        PgcloneError: It is no dict.
    """
    from django.conf import settings

    given = getattr(settings, "PGCLONE_S3_CONFIG", None) or {}
    if not isinstance(given, Mapping):
        raise PgcloneError(
            "settings.PGCLONE_S3_CONFIG must be a dict of AWS_* variables.",
            'For example {"AWS_ACCESS_KEY_ID": "…", "AWS_SECRET_ACCESS_KEY": "…"}.',
        )
    endpoint = getattr(settings, "PGCLONE_S3_ENDPOINT_URL", None)
    variables = {str(name): str(value).strip() for name, value in given.items() if value is not None}
    return {**variables, **({"AWS_ENDPOINT_URL_S3": str(endpoint)} if endpoint else {})}


def rows() -> Iterator[tuple[str, str, Any, str]]:
    """The table of `PGCLONE_S3`, for the documentation: name, type, default and meaning."""
    for item in fields(Settings):
        yield item.name, str(item.type), item.default, item.metadata["help"]
