"""`pgclone.testing.proxy`: what it breaks, and that it changes nothing else."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pgclone.testing import proxy
from pgclone.testing.proxy import (
    Answer,
    Corrupt,
    Delay,
    LoseAnswer,
    Proxy,
    Request,
    ResetAnswer,
    ResetRequest,
    Stall,
)

MiB = 1024 * 1024
BODY = random.Random(0).randbytes(300_000)


class Server(ThreadingHTTPServer):
    """Keeps what is PUT, and says what it saw."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.port: int = self.server_address[1]
        self.objects: dict[str, bytes] = {"/body": BODY}
        self.received: dict[str, int] = {}
        self.hosts: list[str] = []
        self.connections: list[socket.socket] = []
        self.errors: list[type[BaseException]] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        kind = sys.exc_info()[0]
        assert kind is not None
        self.errors.append(kind)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        return "Tue, 24 Nov 2026 12:00:00 GMT"  # two answers are the same bytes

    def end_headers(self) -> None:
        self.server.hosts.append(self.headers["Host"])
        super().end_headers()

    def handle_expect_100(self) -> bool:
        if self.path == "/forbidden":
            self.answer(403)
            return False
        return super().handle_expect_100()

    def body(self) -> bytes:
        """The request's body. How much of it came is known at all times, the whole is kept unless it is large."""
        self.server.received[self.path] = 0
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            found = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                found += self.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return found
        return self.read(int(self.headers.get("Content-Length", "0")))

    def read(self, size: int) -> bytes:
        found = []
        while size:
            block = self.rfile.read1(min(size, MiB))
            if not block:
                raise EOFError
            size -= len(block)
            self.server.received[self.path] += len(block)
            if not self.path.startswith("/sink"):
                found.append(block)
        return b"".join(found)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for begin in range(0, len(BODY), 70_000):
                block = BODY[begin : begin + 70_000]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
            self.wfile.write(b"0\r\nX-Trailer: yes\r\n\r\n")
        elif self.path == "/to-the-end":
            self.close_connection = True
            self.send_response(200)
            self.end_headers()
            self.wfile.write(BODY)
        elif self.path == "/short":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:1000])
        elif self.path == "/reset":
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
        elif self.path == "/not-modified":
            self.send_response(304)
            self.send_header("ETag", '"tag"')
            self.end_headers()
        elif self.path in self.server.objects:
            self.answer(200, self.server.objects[self.path], ETag='"tag"')
        else:
            self.answer(404, b"missing")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.objects[self.path] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        self.answer(200, self.body())

    def do_DELETE(self) -> None:
        self.answer(204 if self.server.objects.pop(self.path, None) is not None else 404)


@contextlib.contextmanager
def serve(port: int = 0) -> Iterator[Server]:
    with Server(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            for connection in server.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def between(server: Server) -> Iterator[Proxy]:
    with proxy.start("127.0.0.1", server.port) as between:
        yield between


class Client(http.client.HTTPConnection):
    """One connection to a port; `call` gives the status and the body."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port, timeout=10)

    def call(self, method: str, target: str, body: Any = None, **options: Any) -> tuple[int, bytes]:
        self.request(method, target, body, **options)
        answer = self.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def client(between: Proxy) -> Iterator[Client]:
    with contextlib.closing(Client(between.port)) as client:
        yield client


@contextlib.contextmanager
def raw_client(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        yield connection


def receive(connection: socket.socket, size: int = 1 << 30, until: bytes = b"") -> bytes:
    """What comes until the connection ends, or that much, or until something was said."""
    found = b""
    while len(found) < size and not (until and found.endswith(until)):
        block = connection.recv(min(size - len(found), MiB))
        if not block:
            break
        found += block
    return found


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def same(found: bytes, wanted: bytes) -> bool:
    return found == wanted  # pytest takes long to say how long ones differ


# What it leaves alone

REQUESTS = {
    "get": b"GET /body HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "get missing": b"GET /none HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "get chunked": b"GET /chunked HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "get to the end": b"GET /to-the-end HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "get too little": b"GET /short HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "not modified": b"GET /not-modified HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "head": b"HEAD /body HTTP/1.1\r\nhOST:   a.example\r\n\r\n",
    "put": b"PUT /a%20b?x=y&uploadId=%C3%BC HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\n12345",
    "post": b"POST /echo HTTP/1.1\r\nHost: a.example\r\nContent-Length: 300000\r\n\r\n" + BODY,
    "post chunked": b"POST /echo HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;name=value\r\n12345\r\n493E0\r\n" + BODY + b"\r\n0\r\nX-Trailer: yes\r\n\r\n",
    "delete": b"DELETE /none HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "http 1.0": b"GET /body HTTP/1.0\r\nHost: a.example\r\n\r\n",
}
LAST = b"GET /none HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_bytes_pass_unchanged(server: Server, between: Proxy, request_: bytes) -> None:
    answers = []
    for port in (server.port, between.port):
        with raw_client(port) as connection:
            connection.sendall(request_ + LAST)  # the second one shows that the first one's end was found
            answers.append(receive(connection))
    assert answers[0].startswith(b"HTTP/1.1 ")
    assert same(answers[0], answers[1])
    assert set(server.hosts) == {"a.example"}


def test_a_connection_carries_many_requests(server: Server, between: Proxy, client: Client) -> None:
    assert client.call("PUT", "/key", BODY) == (200, b"")
    assert client.call("GET", "/key") == (200, BODY)
    assert client.call("HEAD", "/key") == (200, b"")
    assert client.call("POST", "/echo", iter([BODY[:1000], BODY[1000:]])) == (200, BODY)  # chunked
    assert client.call("DELETE", "/key") == (204, b"")
    assert client.call("GET", "/key") == (404, b"missing")
    assert client.call("GET", "/chunked") == (200, BODY)
    assert len(server.connections) == 1
    assert between.requests == [
        Request("PUT", "/key", 200),
        Request("GET", "/key", 200),
        Request("HEAD", "/key", 200),
        Request("POST", "/echo", 200),
        Request("DELETE", "/key", 204),
        Request("GET", "/key", 404),
        Request("GET", "/chunked", 200),
    ]


def test_connections_at_once(server: Server, between: Proxy) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(between.port))) for _ in range(20)]
        for number, client in enumerate(clients):
            client.request("POST", "/echo", b"%d" % number)
        assert [client.getresponse().read() for client in clients] == [b"%d" % number for number in range(20)]


def test_a_body_that_was_announced_waits_for_100_continue(between: Proxy) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    with raw_client(between.port) as connection:
        for _ in range(2):
            connection.sendall(head)
            assert receive(connection, until=b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(b"12345")
            assert receive(connection, until=b"12345").startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_that_was_announced_and_refused_is_not_waited_for(between: Proxy) -> None:
    with raw_client(between.port) as connection:
        connection.sendall(b"PUT /forbidden HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert receive(connection).startswith(b"HTTP/1.1 403 Forbidden\r\n")  # and the connection ends


def test_large_bodies_are_not_kept(server: Server, client: Client) -> None:
    block = bytes(MiB)
    server.objects["/large"] = bytes(48 * MiB)
    tracemalloc.start()
    try:
        assert client.call("PUT", "/sink", (block for _ in range(48))) == (200, b"")
        client.request("GET", "/large")
        answer = client.getresponse()
        size = sum(len(found) for found in iter(lambda: answer.read(MiB), b""))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert server.received["/sink"] == size == 48 * MiB
    assert peak < 8 * MiB


def test_an_idle_connection_ends_when_the_server_closes_it(server: Server, client: Client) -> None:
    assert client.call("GET", "/none")[0] == 404
    server.connections[0].shutdown(socket.SHUT_RDWR)
    assert client.sock.recv(1) == b""


def test_a_connection_that_the_server_resets_is_reset(between: Proxy, client: Client) -> None:
    with pytest.raises(ConnectionResetError) as caught:
        client.call("GET", "/reset")
    assert not isinstance(caught.value, http.client.RemoteDisconnected)  # that one is an orderly end
    assert between.requests == [Request("GET", "/reset", None)]


def test_the_server_sees_a_client_that_leaves(server: Server, between: Proxy) -> None:
    with raw_client(between.port) as connection:
        connection.sendall(b"PUT /left HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1234")
        wait_for(lambda: server.received.get("/left") == 4)
    wait_for(lambda: server.errors == [EOFError])


def test_the_server_sees_a_client_that_resets(server: Server, between: Proxy) -> None:
    with raw_client(between.port) as connection:
        connection.sendall(b"PUT /reset HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1234")
        wait_for(lambda: server.received.get("/reset") == 4)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: server.errors == [ConnectionResetError])


def test_what_is_not_http_is_reset(between: Proxy) -> None:
    with raw_client(between.port) as connection:
        connection.sendall(b"hello\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert between.requests == []


# Faults


@pytest.mark.parametrize("after", [0, 1, 100_000, 299_999])
def test_reset_request(server: Server, between: Proxy, client: Client, after: int) -> None:
    between.inject(ResetRequest(after), "PUT ")
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        client.call("PUT", "/key", BODY)
    wait_for(lambda: server.errors == [ConnectionResetError])
    assert server.received["/key"] == after
    assert "/key" not in server.objects
    assert between.pending == []
    assert between.requests == [Request("PUT", "/key", None)]
    assert client.call("PUT", "/key", BODY) == (200, b"")  # the client connects again


def test_reset_request_after_100_continue(server: Server, between: Proxy) -> None:
    between.inject(ResetRequest(3))
    with raw_client(between.port) as connection:
        connection.sendall(b"PUT /key HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert receive(connection, until=b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"12345")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    wait_for(lambda: server.errors == [ConnectionResetError])
    assert server.received["/key"] == 3


@pytest.mark.parametrize("after", [0, 1, 200_000, 300_000])
@pytest.mark.parametrize("target", ["/body", "/chunked"])
def test_reset_answer(between: Proxy, client: Client, target: str, after: int) -> None:
    between.inject(ResetAnswer(after), "GET ")
    client.request("GET", target)
    answer = client.getresponse()
    assert answer.status == 200
    assert same(answer.read(after) if after else b"", BODY[:after])
    with pytest.raises(ConnectionResetError):
        client.sock.recv(1) if answer.isclosed() else answer.read(1)
    assert between.pending == []
    assert between.requests == [Request("GET", target, 200)]


def test_reset_answer_without_a_body(between: Proxy, client: Client) -> None:
    between.inject(ResetAnswer(0), "PUT ")
    assert client.call("PUT", "/key", b"bytes") == (200, b"")
    with pytest.raises(ConnectionResetError):
        client.sock.recv(1)


@pytest.mark.parametrize("target", ["/body", "/chunked", "/echo"])
def test_lose_answer(server: Server, between: Proxy, client: Client, target: str) -> None:
    between.inject(LoseAnswer(), "POST |GET ")
    with pytest.raises(ConnectionResetError) as caught:
        client.call("POST" if target == "/echo" else "GET", target, BODY if target == "/echo" else None)
    assert not isinstance(caught.value, http.client.RemoteDisconnected)
    if target == "/echo":
        assert server.received["/echo"] == len(BODY)
    assert server.errors == []  # it has answered in full
    assert between.requests[0].status is None
    assert client.call("GET", "/none") == (404, b"missing")


def test_lose_answer_of_a_write(server: Server, between: Proxy, client: Client) -> None:
    between.inject(LoseAnswer(), "PUT .*uploadId=")
    with pytest.raises(ConnectionResetError):
        client.call("PUT", "/key?uploadId=1", b"bytes")
    assert server.objects["/key?uploadId=1"] == b"bytes"


def test_answer(server: Server, between: Proxy, client: Client) -> None:
    between.inject(Answer(503, b"<Error/>", {"Retry-After": "1", "Content-Type": "application/xml"}), times=4)
    client.request("PUT", "/key", BODY)
    answer = client.getresponse()
    assert (answer.status, answer.reason, answer.read()) == (503, "Service Unavailable", b"<Error/>")
    assert dict(answer.getheaders()) == {
        "Retry-After": "1",
        "Content-Type": "application/xml",
        "Content-Length": "8",
    }
    connection = client.sock
    assert client.call("POST", "/echo", iter([b"chunked"])) == (503, b"<Error/>")
    assert client.call("HEAD", "/body") == (503, b"")
    assert client.call("GET", "/body") == (503, b"<Error/>")
    assert server.connections == []
    assert client.call("GET", "/none") == (404, b"missing")
    assert client.sock is connection
    assert [request.status for request in between.requests] == [503, 503, 503, 503, 404]


def test_answer_without_a_body(between: Proxy, client: Client) -> None:
    between.inject(Answer(204), "DELETE ")
    between.inject(Answer(429), "GET ")
    assert client.call("DELETE", "/body") == (204, b"")
    assert client.call("GET", "/body") == (429, b"")
    assert client.call("GET", "/body") == (200, BODY)


def test_answer_to_a_body_that_was_announced(between: Proxy) -> None:
    between.inject(Answer(503))
    with raw_client(between.port) as connection:
        connection.sendall(b"PUT /key HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert receive(connection, until=b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"12345" + LAST)
        assert receive(connection, until=b"\r\n\r\n").startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert receive(connection).endswith(b"missing")


def test_answer_closes_a_connection_that_should_close(between: Proxy) -> None:
    between.inject(Answer(503), times=2)
    for request in (LAST, b"GET /body HTTP/1.0\r\n\r\n"):
        with raw_client(between.port) as connection:
            connection.sendall(request)
            assert receive(connection).startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("after", [0, 1, 200_000])
def test_stall(server: Server, between: Proxy, client: Client, after: int) -> None:
    between.inject(Stall(after), "GET ")
    client.request("GET", "/body")
    if after:
        answer = client.getresponse()
        assert same(answer.read(after), BODY[:after])
    client.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.sock.recv(1)
    wait_for(lambda: between.pending == [])
    assert between.requests == [Request("GET", "/body", 200 if after else None)]
    client.close()
    assert client.call("GET", "/none") == (404, b"missing")


def test_stall_of_an_answer_without_a_body(server: Server, between: Proxy, client: Client) -> None:
    between.inject(Stall(), "PUT ")
    client.request("PUT", "/key", b"bytes")
    wait_for(lambda: server.objects.get("/key") == b"bytes")
    client.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.sock.recv(1)


@pytest.mark.parametrize("target", ["/body", "/chunked"])
@pytest.mark.parametrize("at", [0, 123_456, 299_999])
def test_corrupt(between: Proxy, client: Client, target: str, at: int) -> None:
    between.inject(Corrupt(at))
    status, body = client.call("GET", target)
    assert status == 200
    assert same(body[:at], BODY[:at])
    assert (body[at] ^ BODY[at]).bit_count() == 1
    assert same(body[at + 1 :], BODY[at + 1 :])
    assert client.call("GET", target) == (200, BODY)


def test_delay(between: Proxy, client: Client) -> None:
    between.inject(Delay(0.15))
    begin = time.monotonic()
    assert client.call("GET", "/body") == (200, BODY)
    assert time.monotonic() - begin >= 0.15


def test_faults_meet_requests_by_pattern_and_number(between: Proxy, client: Client) -> None:
    between.inject(Answer(500), r"PUT /key\?part=\d", times=2, skip=1)
    between.inject(Answer(501), "GET ")
    between.inject(Answer(502), "^PUT")

    def put(target: str) -> int:
        return client.call("PUT", target, b"")[0]

    assert put("/other") == 502
    assert [put("/key?part=1") for _ in range(4)] == [200, 500, 500, 200]
    assert between.pending == [Answer(501)]
    assert client.call("GET", "/body")[0] == 501
    assert between.pending == []


def test_calm(between: Proxy, client: Client) -> None:
    between.inject(LoseAnswer(), times=3)
    assert between.pending == [LoseAnswer()]
    between.calm()
    assert between.pending == []
    assert client.call("GET", "/body") == (200, BODY)


@pytest.mark.parametrize("fault", [ResetRequest(6), ResetAnswer(6), Stall(5), Stall(6), Corrupt(5)], ids=repr)
def test_a_fault_stays_pending_when_the_body_was_too_short(between: Proxy, client: Client, fault: proxy.Fault) -> None:
    between.inject(fault)
    assert client.call("POST", "/echo", b"12345") == (200, b"12345")
    assert between.pending == [fault]


# Latency and rate


def test_latency_delays_every_answer_once(server: Server) -> None:
    with (
        proxy.start("127.0.0.1", server.port, latency=0.05) as between,
        contextlib.closing(Client(between.port)) as client,
    ):
        begin = time.monotonic()
        for _ in range(3):
            assert client.call("GET", "/body") == (200, BODY)
        assert time.monotonic() - begin >= 0.15


def test_latency_delays_connections_at_the_same_time(server: Server) -> None:
    with proxy.start("127.0.0.1", server.port, latency=0.2) as between, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(between.port))) for _ in range(8)]
        begin = time.monotonic()
        for client in clients:
            client.request("GET", "/none")
        assert [client.getresponse().status for client in clients] == [404] * 8
        assert 0.2 <= time.monotonic() - begin < 1.5


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_rate_limits_each_direction(server: Server, method: str) -> None:
    with proxy.start("127.0.0.1", server.port, rate=2_000_000) as between:
        with contextlib.closing(Client(between.port)) as client:
            begin = time.monotonic()
            assert client.call(method, "/body", BODY if method == "PUT" else None)[0] == 200
            assert time.monotonic() - begin >= 0.12


# Servers that come and go


def test_a_server_that_is_down_resets_clients_until_it_is_back() -> None:
    with serve() as server:
        port = server.port
    with proxy.start("127.0.0.1", port) as between, contextlib.closing(Client(between.port)) as client:
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                client.call("GET", "/body")
        between.inject(Answer(503))
        assert client.call("GET", "/body") == (503, b"")
        for _ in range(2):
            client.close()
            with serve(port):
                assert client.call("GET", "/body") == (200, BODY)
        assert [request.status for request in between.requests] == [None, None, 503, 200, 200]


@pytest.mark.parametrize("fault", [Stall(), Stall(5), Delay(60)], ids=repr)
def test_the_proxy_stops_at_once(server: Server, fault: proxy.Fault) -> None:
    with contextlib.ExitStack() as stack:
        with proxy.start("127.0.0.1", server.port) as between:
            idle, waiting = (stack.enter_context(contextlib.closing(Client(between.port))) for _ in range(2))
            idle.call("GET", "/none")
            between.inject(fault)
            waiting.request("GET", "/body")
            wait_for(lambda: not between.pending)
            begin = time.monotonic()
        assert time.monotonic() - begin < 10
        for client in (idle, waiting):
            with contextlib.suppress(ConnectionResetError):
                receive(client.sock)  # ends
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", between.port))
    assert [thread for thread in threading.enumerate() if thread.name.startswith("proxy")] == []
