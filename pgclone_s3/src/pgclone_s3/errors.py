"""What botocore raises, in one sentence that names the object, with the remedy."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from botocore import exceptions as boto

from pgclone.api import KeyNotFound, Location, PgcloneError, StorageError

_ACTIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AssumeRole": "sts:AssumeRole",
    "AssumeRoleWithWebIdentity": "sts:AssumeRoleWithWebIdentity",
}
"""The action of IAM that allows an operation (Amazon S3 user guide, required permissions)."""
_ON_THE_BUCKET = ("s3:ListBucket", "s3:ListBucketMultipartUploads")

_KEYS = "Look at PGCLONE_S3_CONFIG, the environment (AWS_ACCESS_KEY_ID …) or ~/.aws/credentials, whichever you use."


def code(error: Exception) -> str:
    """S3's code of an error; empty if it did not come from S3."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto.ClientError) else ""


@contextlib.contextmanager
def explained(location: Location, key: str = "") -> Iterator[None]:
    """Raise what botocore raises in the block as errors of pgclone."""
    try:
        yield
    except boto.ClientError as error:
        raise _answer(error, location, key) from error
    except boto.BotoCoreError as error:
        if "Invalid header value" in str(error):  # followed by the value: a token
            raise _unprintable(location) from None
        raise _failure(error, location) from error
    except (ConnectionError, TimeoutError) as error:
        raise StorageError(f"{location} broke off, also after several tries: {error}.", "Try again later.") from error
    except OSError as error:  # files of credentials and tokens
        named = f"{error.filename}: " if error.filename else ""
        raise StorageError(f"{location} cannot be used: {named}{error.strerror or error}.", _KEYS) from error
    except ValueError as error:  # botocore's, for endpoints that are no URL
        if isinstance(error, PgcloneError):
            raise
        raise StorageError(
            f"{location} cannot be used: {_masked(error)}.", "Look at PGCLONE_S3_ENDPOINT_URL and the AWS_* variables."
        ) from error


def exists(location: Location, key: str) -> StorageError:
    """The error for a key that is taken."""
    return StorageError(f'"{key}" exists already in {location}.', "Dumps are never overwritten.")


def require_etag(answer: Mapping[str, Any], location: Location) -> None:
    """Refuse an answer that no S3 has given, although its status says that all is well.

    Raises:
        StorageError: It has no ETag.
    """
    if not answer.get("ETag"):
        if "Body" in answer:
            answer["Body"].close()
        raise StorageError(
            f"{location} cannot be used: what answers there does not speak S3.",
            "Look at PGCLONE_S3_ENDPOINT_URL, and at proxies on the way.",
        )


def _answer(error: boto.ClientError, location: Location, key: str) -> PgcloneError:
    """The error for what a service answered."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    said, operation = code(error) or str(status), error.operation_name
    message = str(error.response["Error"].get("Message") or http.client.responses.get(status, said)).rstrip(".")
    bucket = location.bucket
    if operation == "GetObject" and said in ("NoSuchKey", "404"):
        return KeyNotFound(f'There is no "{key}" in {location}.')
    if operation == "GetObject" and said in ("PreconditionFailed", "412"):
        return StorageError(f'"{key}" in {location} was written anew while it was read.', "Try again.")
    if said in ("PreconditionFailed", "412"):
        return exists(location, key)
    if said in ("ConditionalRequestConflict", "409"):
        return StorageError(f'"{key}" in {location} is being written by another process.', "Try again.")
    if said == "NoSuchBucket":
        return StorageError(
            f'The bucket "{bucket}" does not exist.',
            "Create it, or mend PGCLONE_STORAGE_LOCATION (or --storage-location).",
        )
    if said in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"):
        region = error.response["Error"].get("Region") or error.response.get("ResponseMetadata", {}).get(
            "HTTPHeaders", {}
        ).get("x-amz-bucket-region")
        return StorageError(
            f'The bucket "{bucket}" is in another region{f", {region}" if region else ""}: {message}.',
            f'Set PGCLONE_S3_CONFIG = {{"AWS_DEFAULT_REGION": "{region or "…"}"}}, or AWS_DEFAULT_REGION.',
        )
    if said == "InvalidAccessKeyId":
        return StorageError(f"{location} cannot be used: the access key ID is unknown to the service.", _KEYS)
    if said == "SignatureDoesNotMatch":
        return StorageError(f"{location} cannot be used: the secret access key is wrong.", _KEYS)
    if said in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"):
        return StorageError(f"{location} cannot be used: the credentials have expired.", "Log in again, or renew them.")
    if said in ("InvalidToken", "InvalidClientTokenId", "UnrecognizedClientException"):
        return StorageError(f"{location} cannot be used: the credentials are not valid: {message}.", _KEYS)
    if said == "RequestTimeTooSkewed":
        return StorageError(
            f"{location} cannot be used: the clock of this machine is wrong: {message}.", "Set the clock (NTP)."
        )
    if said in ("AccessDenied", "Forbidden", "AllAccessDisabled", "AccessDeniedException") or status == 403:
        return _denied(operation, location, key, message)
    if said.startswith("KMS."):
        return StorageError(f"The KMS key for {location} cannot be used: {message}.", "Look at the key and its policy.")
    if status >= 500 or said in ("SlowDown", "Throttling", "RequestTimeout"):
        return StorageError(f"{location} answers {said}, also after several tries: {message}.", "Try again later.")
    where = f'"{key}" in {location}' if key else f"{location}"
    return StorageError(f"{where} cannot be used: {operation} was answered with {said}: {message}.")


def _denied(operation: str, location: Location, key: str, message: str) -> StorageError:
    """The error for an action that the credentials may not do, and the least policy that would allow it."""
    named = re.search(r"\b(?:s3|kms|sts):\w+", message)
    action = named[0] if named else _ACTIONS.get(operation, f"s3:{operation}")
    if action.startswith("s3:"):
        below = "" if action in _ON_THE_BUCKET else f"/{location.prefix}*"
        resource = f"arn:aws:s3:::{location.bucket}{below}"
    else:
        resource = "the KMS key" if action.startswith("kms:") else "the role"
    statement = json.dumps({"Effect": "Allow", "Action": action, "Resource": resource})
    what = f' for "{key}"' if key else ""
    return StorageError(
        f"The credentials for {location} do not allow {action}{what}: {message}.", f"Allow it: {statement}"
    )


def _failure(error: boto.BotoCoreError, location: Location) -> StorageError:
    """The error for what went wrong before there was an answer."""
    text = _masked(error)
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        lack = (
            "there are no credentials"
            if isinstance(error, boto.NoCredentialsError)
            else "the credentials are incomplete"
        )
        return StorageError(
            f"{location} cannot be used: {lack}.",
            'Set PGCLONE_S3_CONFIG = {"AWS_ACCESS_KEY_ID": …, "AWS_SECRET_ACCESS_KEY": …}, PGCLONE_S3 = {"profile": …}, '
            "or whatever boto3 takes them from.",
        )
    if isinstance(error, boto.ParamValidationError) and "bucket name" in text:
        return StorageError(
            f'"{location.bucket}" is no name of a bucket.',
            "Mend PGCLONE_STORAGE_LOCATION (or --storage-location). Write an access point by its alias.",
        )
    if isinstance(error, boto.ProfileNotFound):
        return StorageError(f"{location} cannot be used: {text}.", "Look at PGCLONE_S3 and ~/.aws/config.")
    if isinstance(error, (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError)):
        return StorageError(f"{location} cannot be used: credentials could not be fetched: {text}.", "Log in again.")
    if isinstance(error, boto.SSLError):
        return StorageError(
            f"{location} cannot be used: TLS failed: {text}.",
            'Set PGCLONE_S3 = {"ca_bundle": "/path/to/ca.pem"} if a private authority signs the endpoint.',
        )
    if isinstance(error, (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)):
        return StorageError(
            f"{location} cannot be reached: {text}.", "Look at PGCLONE_S3_ENDPOINT_URL, the region and the network."
        )
    if isinstance(error, boto.HTTPClientError):
        return StorageError(f"{location} broke off, also after several tries: {text}.", "Try again later.")
    if isinstance(error, boto.NoRegionError):
        return StorageError(f"{location} cannot be used: {text}.", "Set AWS_DEFAULT_REGION.")
    return StorageError(f"{location} cannot be used: {text}.")


def _unprintable(location: Location) -> StorageError:
    return StorageError(f"{location} cannot be used: a key or a token has a character that no header can hold.", _KEYS)


def _masked(error: Exception) -> str:
    """The words of an error, in one line, without what a URL may say of users and passwords."""
    return re.sub(r"//[^/\s\"@]*@", "//…@", " ".join(str(error).split())).rstrip(".")
