"""How the service is reached: credentials, connections, and what an upload needs of them beyond the SDK."""

from __future__ import annotations

import functools
import io
import re
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import google.auth
import requests
from google.api_core.client_info import ClientInfo
from google.auth import impersonated_credentials
from google.auth.credentials import AnonymousCredentials, with_scopes_if_required
from google.auth.transport.requests import AuthorizedSession
from google.cloud.storage import Client
from requests.adapters import HTTPAdapter

from pgclone.api import StorageError, log
from pgclone_gcs.settings import Settings

_CANCEL_SECONDS = 5
_BLOCK = 256 * 1024
_RANGE = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<total>\d+|\*)")


@dataclass(frozen=True)
class Service:
    """Where requests go, and with what.

    Args:
        credentials: google-auth's.
        endpoint: The address, if it is not the usual one.
        payer: The project that pays, if it is not the bucket's.
        is_emulator: Whether it only looks like the service: it may not know all conditions that a request can have.
        connections: The pool that all sessions share.
    """

    credentials: Any = field(repr=False)
    endpoint: str | None
    payer: str | None
    is_emulator: bool
    connections: HTTPAdapter = field(repr=False)

    @functools.cached_property
    def client(self) -> Client:
        """The client that all streams share."""
        return self.client_of(self.prepare(AuthorizedSession(self.credentials)))

    def client_of(self, session: AuthorizedSession) -> Client:
        """A client whose requests a session carries."""
        options = {"api_endpoint": self.endpoint} if self.endpoint else None
        info = ClientInfo(user_agent="pgclone")
        client = Client(None, self.credentials, _http=session, client_info=info, client_options=options)
        client.bucket = functools.partial(client.bucket, user_project=self.payer)  # smart_open asks for buckets without
        client._bucket_metadata_cache = None  # fills itself for traces, with requests that need storage.buckets.get
        return client

    def prepare(self, session: AuthorizedSession) -> AuthorizedSession:
        """The same session, on the connections of all."""
        session.mount("https://", self.connections)
        session.mount("http://", self.connections)
        return session


def create_service(settings: Settings, emulator: str | None) -> Service:
    """The service, as the settings and the SDK's STORAGE_EMULATOR_HOST say.

    Raises:
        GoogleAuthError: There are no credentials.
    """
    endpoint = settings.endpoint or emulator
    is_emulator = (
        bool(endpoint) and not settings.credentials_file and not (settings.endpoint or "").startswith("https:")
    )
    size = max(64, 4 * settings.concurrency)
    return Service(
        _credentials(settings, is_emulator), endpoint, settings.user_project, is_emulator, HTTPAdapter(4, size)
    )


def _credentials(settings: Settings, is_emulator: bool) -> Any:
    if settings.credentials_file:
        with warnings.catch_warnings():  # of files that strangers hand in; this one is the project's own
            warnings.filterwarnings("ignore", "(?s)The load_credentials_from_file", DeprecationWarning)
            found, _ = google.auth.load_credentials_from_file(
                settings.credentials_file, scopes=Client.SCOPE, quota_project_id=settings.project
            )
    elif is_emulator:
        return AnonymousCredentials()
    else:
        found, _ = google.auth.default(scopes=Client.SCOPE, quota_project_id=settings.project)
    if settings.impersonate:
        return impersonated_credentials.Credentials(
            found, settings.impersonate, list(Client.SCOPE), quota_project_id=settings.project
        )
    return with_scopes_if_required(found, Client.SCOPE)


class UploadSession(AuthorizedSession):  # type: ignore[misc]
    """Carries one upload, of whose protocol the SDK's writer leaves out what an upload of hours needs.

    The writer takes for granted that the service has stored a chunk whole; it cancels an upload at an address where there
    is none; and it commits when it is closed, be it by the garbage collector. Here the rest of a chunk is sent, `delete`
    cancels what is under way, and nothing is committed before `may_commit` is set.
    """

    def __init__(self, credentials: Any, name: str) -> None:
        super().__init__(credentials)
        self._name = name
        self._address: str | None = None
        self.may_commit = False
        self.given_up = threading.Event()

    def request(self, method: Any, url: Any, data: Any = None, headers: Any = None, **options: Any) -> Any:
        """Send a request of the writer's.

        Raises:
            StorageError: It must not be sent.
        """
        if self.given_up.is_set():
            raise StorageError(f"The upload of {self._name} was given up.")
        if method == "PUT":
            return self._put(url, data, headers, options)
        answer = super().request(method, url, data=data, headers=headers, **options)
        self._address = answer.headers.get("location", self._address)
        return answer

    def delete(self, *_: Any, **__: Any) -> Any:
        """Cancel the upload. What goes wrong is logged: the service forgets an upload after a week."""
        try:
            if self._address:
                return super().request("DELETE", self._address, timeout=_CANCEL_SECONDS)
        except Exception as error:  # noqa: BLE001  whatever the upload is cancelled for is what matters
            log.warning("upload_left", object=self._name, error=type(error).__name__)
        return None

    def _put(self, url: str, data: Any, headers: Any, options: Any) -> Any:
        """Send a chunk, and what the service did not store of it once more."""
        part = _RANGE.fullmatch(headers["content-range"])
        if not self.may_commit and (part is None or part["total"] != "*"):
            raise StorageError(f"The upload of {self._name} was closed before it was complete.")
        if part is None:  # the end of an upload whose chunks are all stored
            return super().request("PUT", url, data=data, headers=headers, **options)
        first, last = int(part["first"]), int(part["last"])
        body = data if isinstance(data, _Body) else _Body(data, first, self.given_up)
        body.seek(first - body.first)
        answer = super().request("PUT", url, data=body, headers=headers, **options)
        if answer.status_code != 308:
            return answer
        stored = int(answer.headers.get("range", "bytes=0--1").partition("-")[2]) + 1
        if stored > last:
            return answer
        if stored <= first:
            raise requests.ConnectionError("The service has stored nothing of what was sent")
        rest = {**headers, "content-range": f"bytes {stored}-{last}/{part['total']}"}
        return self.request("PUT", url, data=body, headers=rest, **options)


class _Body(io.BytesIO):
    """A chunk, sent block by block: each one has the time that is allowed, and an upload that was given up ends at once."""

    def __init__(self, data: bytes, first: int, given_up: threading.Event) -> None:
        super().__init__(data)
        self.first, self._given_up = first, given_up

    def read(self, size: int | None = -1) -> bytes:
        if self._given_up.is_set():
            raise StorageError("The upload was given up.")
        return super().read(_BLOCK)
