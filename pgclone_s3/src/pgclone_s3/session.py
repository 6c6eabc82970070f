"""Where credentials, region and endpoint come from: the settings, then botocore's own chain."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from botocore.config import Config
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    AssumeRoleWithWebIdentityCredentialFetcher,
    CredentialProvider,
    Credentials,
    DeferredRefreshableCredentials,
)
from botocore.exceptions import NoCredentialsError
from botocore.session import Session
from botocore.utils import FileWebIdentityTokenLoader

from pgclone_s3.settings import Settings

_ATTEMPTS = 7
"""Of a request that is throttled, answered with 5xx or cut off: with backoff and jitter, a minute at the most."""

_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
_WEB_IDENTITY = ("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_SESSION_NAME")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL")
_OF_THE_CLI = ("AWS_PAGER", "AWS_DEFAULT_OUTPUT", "AWS_CLI_AUTO_PROMPT", "AWS_CLI_FILE_ENCODING")
"""What `aws`, which django-pgclone ran, reads and a library has no use for."""


def known_variables() -> set[str]:
    """The AWS_* variables that `PGCLONE_S3_CONFIG` may hold."""
    return {*_variables(), "AWS_REGION", *_CREDENTIALS, *_WEB_IDENTITY, *_ENDPOINTS, *_OF_THE_CLI}


def create_client(settings: Settings, environment: Mapping[str, str]) -> Any:
    """A client for S3.

    Args:
        environment: AWS_* variables, which are taken as if they were set in the environment, and stay out of it.

    Raises:
        BotoCoreError: A profile does not exist, a value makes no sense.
    """
    session = _create_session(settings, environment)
    return session.create_client("s3", endpoint_url=_endpoint("S3", environment), config=_config(settings, session))


def _config(settings: Settings, session: Session) -> Config:
    own: dict[str, Any] = {}
    if session.get_config_variable("max_attempts") is None:
        # Other modes have a quota that all requests of a client share: streams would use up each other's tries.
        own["retries"] = {"mode": "legacy", "total_max_attempts": _ATTEMPTS}
    if settings.checksums:
        own["request_checksum_calculation"] = own["response_checksum_validation"] = settings.checksums
    return Config(
        connect_timeout=min(10, settings.timeout),
        read_timeout=settings.timeout,
        max_pool_connections=max(64, 4 * settings.concurrency),
        s3={"addressing_style": settings.addressing_style},
        user_agent_extra="pgclone",
        **own,
    )


def _create_session(settings: Settings, environment: Mapping[str, str]) -> Session:
    session = Session()
    for name, (variable, convert) in _variables().items():
        if name in environment:
            session.set_config_variable(variable, convert(environment[name]))
    if "AWS_REGION" in environment and "AWS_DEFAULT_REGION" not in environment:
        session.set_config_variable("region", environment["AWS_REGION"])
    for variable, value in (("profile", settings.profile), ("ca_bundle", settings.ca_bundle)):
        if value:
            session.set_config_variable(variable, value)
    providers = session.get_component("credential_provider").providers
    sts = functools.partial(session.create_client, endpoint_url=_endpoint("STS", environment))
    if "AWS_ACCESS_KEY_ID" in environment and not settings.profile:
        token = environment.get("AWS_SESSION_TOKEN") or environment.get("AWS_SECURITY_TOKEN")
        keys = environment["AWS_ACCESS_KEY_ID"], environment.get("AWS_SECRET_ACCESS_KEY", ""), token or None
        providers.insert(0, _Provider(lambda: Credentials(*keys)))
    elif "AWS_WEB_IDENTITY_TOKEN_FILE" in environment and not settings.profile:
        loader = FileWebIdentityTokenLoader(environment["AWS_WEB_IDENTITY_TOKEN_FILE"])
        role = environment.get("AWS_ROLE_ARN", "")
        arguments = {"RoleSessionName": environment.get("AWS_ROLE_SESSION_NAME", "pgclone")}
        providers.insert(
            0, _Provider.fetching(AssumeRoleWithWebIdentityCredentialFetcher(sts, loader, role, arguments))
        )
    if settings.role:
        source = session.get_component("credential_provider").load_credentials()
        if source is None:
            raise NoCredentialsError
        arguments = {"RoleSessionName": "pgclone"}
        if settings.external_id:
            arguments["ExternalId"] = settings.external_id
        providers.insert(0, _Provider.fetching(AssumeRoleCredentialFetcher(sts, source, settings.role, arguments)))
    return session


class _Provider(CredentialProvider):  # type: ignore[misc]
    """Credentials that the settings name, asked for before all others."""

    METHOD = CANONICAL_NAME = "pgclone"

    def __init__(self, load: Callable[[], Any]) -> None:
        super().__init__()
        self.load = load

    @classmethod
    def fetching(cls, fetcher: Any) -> _Provider:
        """Temporary ones, fetched when they are needed, and again before they expire."""
        return cls(lambda: DeferredRefreshableCredentials(fetcher.fetch_credentials, cls.METHOD))


def _endpoint(service: str, environment: Mapping[str, str]) -> str | None:
    return environment.get(f"AWS_ENDPOINT_URL_{service}") or environment.get("AWS_ENDPOINT_URL")


def _variables() -> dict[str, tuple[str, Callable[[str], Any]]]:
    """The variables of the environment that botocore's sessions know: their names there, and how they are read."""
    found: dict[str, tuple[str, Callable[[str], Any]]] = {}
    for variable, (_, names, _, convert) in BOTOCORE_DEFAUT_SESSION_VARIABLES.items():
        for name in [names] if isinstance(names, str) else names or []:
            found[name] = (variable, convert or os.fspath)
    return found
