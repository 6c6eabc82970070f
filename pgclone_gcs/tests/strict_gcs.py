"""What fake-gcs-server leaves out of resumable uploads, as Cloud Storage documents it.

Conditions count, when an upload begins and when it is committed; bytes that are stored already are skipped when they are sent
again; of a chunk, less may be stored than was sent; a commit that is asked for again is answered again; a wrong checksum is
refused; a cancelled upload is gone.

    with start() as service:
        ...  # a client that writes to service.url
        assert service.objects["name"].data == b"bytes"
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclass
class Object:
    """A committed object: its bytes, and its resource without what the server fills in."""

    data: bytes
    resource: dict[str, Any]
    generation: int


@dataclass
class Upload:
    """An upload that has begun. `parameters` and `resource` are what it was begun with."""

    parameters: dict[str, str]
    resource: dict[str, Any]
    data: bytearray = field(default_factory=bytearray)
    committed: Object | None = None


class Service:
    """What is stored. Attributes may be changed while it runs.

    Attributes:
        objects: By name.
        uploads: By ID; cancelled ones are gone.
        stores: How many bytes of the next chunks are stored, one number for each; all of them when there is none left.
        requests: Method and target of all requests.
    """

    def __init__(self) -> None:
        self.url = ""
        self.port = 0
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, Upload] = {}
        self.stores: list[int] = []
        self.requests: list[str] = []
        self.generations = itertools.count(1)


@contextlib.contextmanager
def start() -> Iterator[Service]:
    """Start a service on a free port; stop it at the end of the block."""
    service = Service()
    handler = type("Handler", (_Handler,), {"service": service})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        service.port = server.server_port
        service.url = f"http://127.0.0.1:{service.port}"
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    service: Service

    def do_POST(self) -> None:
        resource = json.loads(self._body())
        parameters = self._parameters()
        if not self._may_write(resource["name"], parameters):
            return
        id = f"upload-{len(self.service.uploads) + 1}"
        self.service.uploads[id] = Upload(parameters, resource)
        self._answer(200, headers={"Location": f"http://{self.headers['Host']}/upload/session?upload_id={id}"})

    def do_PUT(self) -> None:
        body = self._body()
        upload = self.service.uploads.get(self._parameters()["upload_id"])
        if upload is None:
            return self._refuse(499, "The upload was cancelled.")
        if upload.committed is not None:
            return self._answer(200, self._resource(upload.committed))
        match = _RANGE.fullmatch(self.headers["Content-Range"])
        assert match is not None
        if match[1] is not None:
            first = int(match[1])
            if first > len(upload.data):
                return self._refuse(400, f"{len(upload.data)} bytes are stored, and {first} are skipped.")
            new = body[len(upload.data) - first :]
            upload.data += new[: self.service.stores.pop(0)] if self.service.stores else new
        if match[3] != str(len(upload.data)):
            stored = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}
            return self._answer(308, headers=stored)
        return self._commit(upload)

    def _commit(self, upload: Upload) -> None:
        name = upload.resource["name"]
        wanted = self.headers.get("x-goog-hash")
        if wanted not in (None, f"crc32c={_crc32c(upload.data)}"):
            return self._refuse(400, f"Provided {wanted} doesn't match calculated {_crc32c(upload.data)}.")
        if not self._may_write(name, upload.parameters):
            return None
        upload.committed = Object(bytes(upload.data), upload.resource, next(self.service.generations))
        self.service.objects[name] = upload.committed
        return self._answer(200, self._resource(upload.committed))

    def do_GET(self) -> None:
        found = self.service.objects.get(self._name())
        if found is None:
            return self._refuse(404, f"No such object: bucket/{self._name()}")
        return self._answer(200, self._resource(found))

    def do_DELETE(self) -> None:
        if "upload_id" in self._parameters():
            self.service.uploads.pop(self._parameters()["upload_id"], None)
            return self._answer(499)
        if self.service.objects.pop(self._name(), None) is None:
            return self._refuse(404, f"No such object: bucket/{self._name()}")
        return self._answer(204)

    def _may_write(self, name: str, parameters: dict[str, str]) -> bool:
        found = self.service.objects.get(name)
        if parameters.get("ifGenerationMatch", "") not in ("", str(found.generation if found else 0)):
            self._refuse(412, "At least one of the pre-conditions you specified did not hold.")
            return False
        return True

    def _name(self) -> str:
        return unquote(urlsplit(self.path).path.rpartition("/")[2])

    def _parameters(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _resource(self, found: Object) -> dict[str, Any]:
        filled = {"size": str(len(found.data)), "generation": str(found.generation), "crc32c": _crc32c(found.data)}
        return {**found.resource, **filled}

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"code": status, "message": message}})

    def _answer(self, status: int, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body or {}).encode() if status != 204 else b""
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        if parsed:
            self.service.requests.append(f"{self.command} {self.path}")
        return parsed


def _crc32c(data: bytes | bytearray) -> str:
    return base64.b64encode(google_crc32c.Checksum(bytes(data)).digest()).decode()
