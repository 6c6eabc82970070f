"""What the SDK raises, in one sentence that names the object, with the remedy."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

import requests
import urllib3
from google.api_core.exceptions import GoogleAPICallError, GoogleAPIError, RetryError
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, InvalidOperation, TransportError
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

from pgclone.api import KeyNotFound, Location, PgcloneError, StorageError

_NETWORK = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_UNREACHED = (
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
    urllib3.exceptions.ProxyError,
)

FAILURES = (GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption, *_NETWORK)
"""What a request may raise."""

_TRANSIENT = (408, 429, 500, 502, 503, 504)
"""Answers after which a request is tried again (Cloud Storage, retry strategy)."""

_ROLES = {
    "storage.objects.create": "roles/storage.objectCreator",
    "storage.objects.get": "roles/storage.objectViewer",
    "storage.objects.list": "roles/storage.objectViewer",
    "serviceusage.services.use": "roles/serviceusage.serviceUsageConsumer",
    "iam.serviceAccounts.getAccessToken": "roles/iam.serviceAccountTokenCreator",
}
"""The least predefined role with a permission; for all others of objects it is this one:"""
_ROLE = "roles/storage.objectUser"

_PERMISSION = re.compile(r"\b(?:storage\.\w+s|serviceusage\.services|iam\.serviceAccounts)\.[a-z]\w+")

_SET = (
    'Set PGCLONE_GCS = {"credentials_file": "/path/to/key.json"}, or GOOGLE_APPLICATION_CREDENTIALS, or run '
    '"gcloud auth application-default login".'
)


def is_transient(error: Exception) -> bool:
    """Whether another try may help."""
    if isinstance(error, (GoogleAPICallError, InvalidResponse)):
        return _status(error) in _TRANSIENT
    if isinstance(error, GoogleAuthError):
        return error.retryable or (isinstance(error, TransportError) and not _is_tls(error))
    return isinstance(error, _NETWORK) and not isinstance(error, ValueError) and not _is_tls(error)


def is_about_the_bucket(error: Exception) -> bool:
    """Whether a "not found" means the bucket."""
    return "bucket does not exist" in _message(error)


def exists(location: Location, key: str) -> StorageError:
    """The error for a key that is taken."""
    return StorageError(f'"{key}" exists already in {location}.', "Dumps are never overwritten.")


@contextlib.contextmanager
def explained(location: Location, key: str = "", action: str = "") -> Iterator[None]:
    """Raise what the SDK raises in the block as errors of pgclone. `action` is the permission that the block needs."""
    try:
        yield
    except PgcloneError:
        raise
    except DataCorruption as error:
        raise StorageError(f'"{key}" arrived damaged in {location}, and was discarded.', "Try again.") from error
    except Exception as error:
        last = error.cause if isinstance(error, RetryError) and isinstance(error.cause, Exception) else error
        if isinstance(last, GoogleAuthError):
            raise _rejected(last, location) from None  # what it says and holds may be secret
        if isinstance(last, (GoogleAPICallError, InvalidResponse)):
            raise _answer(last, location, key, action) from error
        if isinstance(last, _NETWORK):
            raise _unreachable(last, location) from error
        if isinstance(last, (OSError, ValueError)):
            raise StorageError(
                f"{location} cannot be used: {_one_line(str(last))}.",
                "Look at PGCLONE_GCS and PGCLONE_STORAGE_LOCATION.",
            ) from error
        raise


def _answer(error: Exception, location: Location, key: str, action: str) -> PgcloneError:
    """The error for what the service answered."""
    status, message = _status(error), _message(error)
    where = f'"{key}" in {location}' if key else f"{location}"
    if status == 401:
        return StorageError(f"{location} cannot be used: the credentials are not accepted: {message}.", _SET)
    if "kms" in message.lower():
        return StorageError(
            f"The KMS key for {location} cannot be used: {message}.",
            "Grant roles/cloudkms.cryptoKeyEncrypterDecrypter on it to the service agent of Cloud Storage, or mend "
            'PGCLONE_GCS = {"kms_key": …}.',
        )
    if "requester pays" in message.lower():
        return StorageError(
            f"{location} cannot be used: {message}.", 'Set PGCLONE_GCS = {"user_project": …} to the project that pays.'
        )
    if "uniform bucket-level access" in message.lower():
        return StorageError(f"{location} cannot be used: {message}.", 'Remove "acl" from PGCLONE_GCS.')
    if status == 403:
        return _denied(message, location, key, action)
    if status in (404, 410) and _method(error) == "PUT":
        return StorageError(f"The upload of {where} is gone: {message}.", "Try again.")
    if status == 404 and (is_about_the_bucket(error) or not key or action == "storage.objects.create"):
        return StorageError(
            f'The bucket "{location.bucket}" does not exist.',
            "Create it, or mend PGCLONE_STORAGE_LOCATION (or --storage-location).",
        )
    if status == 404:
        return KeyNotFound(f'There is no "{key}" in {location}.')
    if status == 412:
        return exists(location, key)
    if status in _TRANSIENT:
        return StorageError(f"{location} answers {status}, also after several tries: {message}.", "Try again later.")
    return StorageError(f"{where} cannot be used: the answer is {status}: {message}.")


def _denied(message: str, location: Location, key: str, action: str) -> StorageError:
    """The error for what the credentials may not do, and the least role that would allow it."""
    named = _PERMISSION.search(message)
    permission = named[0] if named else action
    what = f' for "{key}"' if key else ""
    if not named and "access" not in message.lower() and "permission" not in message.lower():
        return StorageError(
            f"{location} refuses {action}{what}: {message}."
        )  # a retention policy, a bill that is not paid
    role = _ROLES.get(permission, _ROLE)
    on = f"gs://{location.bucket}" if permission.startswith("storage.") else "the project"
    return StorageError(
        f"The credentials for {location} do not allow {permission}{what}: {message}.",
        f"Grant {role} on {on}" + (f" ({_ROLE} has all that pgclone needs)." if role != _ROLE else "."),
    )


def _rejected(error: GoogleAuthError, location: Location) -> StorageError:
    """The error for credentials that are not there, or that no token is given for."""
    if isinstance(error, TransportError):
        return _unreachable(error, location)
    if isinstance(error, InvalidOperation):
        return StorageError(f"{location} cannot be used without credentials.", _SET)
    if isinstance(error, DefaultCredentialsError):
        text = _one_line(str(error.args[0] if error.args else ""))
        if text.startswith("Your default credentials were not found"):
            return StorageError(f"{location} cannot be used: there are no credentials.", _SET)
        return StorageError(f"{location} cannot be used: the credentials make no sense: {text}.", _SET)
    said = _description(error)
    remedy = "Log in again, or create a new key, if these are expired or revoked."
    if re.search(r"\biat\b|\bexp\b|reasonable timeframe|clock", said):
        remedy = "Set the clock of this machine (NTP)."
    elif "iam.serviceAccounts" in said or "iam.serviceaccounts" in said.lower():
        remedy = f"Grant {_ROLES['iam.serviceAccounts.getAccessToken']} on the account to those who impersonate it."
    return StorageError(f"{location} cannot be used: the credentials are not accepted: {said}.", remedy)


def _description(error: GoogleAuthError) -> str:
    """What the service that gives tokens said: its description alone, for the rest of the answer may hold a token."""
    answer: Any = error.args[-1] if error.args else ""
    with contextlib.suppress(TypeError, ValueError):
        answer = json.loads(answer)
    if isinstance(answer, Mapping):
        kind = answer.get("error")
        if isinstance(kind, Mapping):
            return _one_line(str(kind.get("message") or kind.get("status") or "no reason given"))
        return _one_line(f"{kind}: {answer.get('error_description') or 'no reason given'}")
    return _one_line(re.sub(r"[\w\-+=]{32,}", "…", str(answer))) or type(error).__name__


def _unreachable(error: Exception, location: Location) -> StorageError:
    """The error for requests that got no answer."""
    text = _one_line(_reason(error))
    if _is_tls(error):
        return StorageError(
            f"{location} cannot be used: TLS failed: {text}.",
            "Set REQUESTS_CA_BUNDLE to a file of certificates if a private authority signs the endpoint's.",
        )
    if any(isinstance(inner, _UNREACHED) for inner in _chain(error)):
        return StorageError(
            f"{location} cannot be reached: {text}.",
            'Look at the network, PGCLONE_GCS = {"endpoint": …} and STORAGE_EMULATOR_HOST.',
        )
    return StorageError(f"{location} broke off, also after several tries: {text}.", "Try again later.")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was made of, the innermost one last."""
    seen: list[BaseException] = []
    inner: Any = error
    while isinstance(inner, BaseException) and inner not in seen:
        seen.append(inner)
        yield inner
        reason = getattr(inner, "reason", None)
        wrapped = next((item for item in inner.args if isinstance(item, BaseException)), None)
        inner = reason if isinstance(reason, BaseException) else wrapped or inner.__cause__ or inner.__context__


def _is_tls(error: BaseException) -> bool:
    """Whether TLS failed for a reason that stays."""
    return any(
        isinstance(inner, ssl.SSLCertVerificationError)
        or (isinstance(inner, ssl.SSLError) and inner.reason == "WRONG_VERSION_NUMBER")
        for inner in _chain(error)
    )


def _reason(error: BaseException) -> str:
    """The innermost error's words; those around it show addresses, that of an upload among them, which is a secret."""
    *_, last = _chain(error)
    return getattr(last, "strerror", None) or re.sub(r"^.*?>?: (?=\w)", "", str(last)) or type(last).__name__


def _status(error: Exception) -> int:
    return int(error.response.status_code if isinstance(error, InvalidResponse) else getattr(error, "code", None) or 0)


def _method(error: Exception) -> str:
    request = getattr(getattr(error, "response", None), "request", None)
    return str(getattr(request, "method", ""))


def _message(error: Exception) -> str:
    """What the service said, without the address that it said it at."""
    response: Any = getattr(error, "response", None)
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        return _one_line(response.json()["error"]["message"])
    text = str(getattr(response, "text", "") or "")
    if not text or "<" in text:
        text = http.client.responses.get(_status(error), "no reason given")
    return _one_line(text)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(". ")
