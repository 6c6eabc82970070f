"""A proxy for HTTP/1.1 that breaks what passes through it: put it between a storage client and its server.

    with start("127.0.0.1", server.port) as between:
        client = connect(between.url)
        between.inject(LoseAnswer(), "POST .*uploadId=")
        ...  # the client's code, which has to survive that
        assert between.pending == []  # it was met

Apart from the faults, and from `latency` and `rate`, it changes nothing: heads and bodies pass byte by byte, the Host
header (which signatures cover) too, and a connection that one side closes or resets is closed or reset on the other.
Bodies are streamed. There is no TLS.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

BUFFER = 256 * 1024
"""Bytes that are read at once, and the longest head."""

_SLICE = 0.02
"""Seconds: with a rate, no piece takes longer than that, and one that is late by less does not slow the next down."""


class Fault:
    """What goes wrong with one request."""


@dataclass(frozen=True)
class ResetRequest(Fault):
    """Forward so many bytes of the request's body, then reset both connections."""

    after: int


@dataclass(frozen=True)
class ResetAnswer(Fault):
    """Forward the head of the answer and so many bytes of its body, then reset both connections."""

    after: int


@dataclass(frozen=True)
class LoseAnswer(Fault):
    """Let the server do everything and answer, then reset the client's connection: it cannot know what happened."""


@dataclass(frozen=True)
class Answer(Fault):
    """Read the whole request and answer it; the server never sees it."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stall(Fault):
    """Forward the request, the head of the answer and so many bytes of its body, then nothing more: the connection
    stays open until the client closes it or the proxy stops. With 0 the client gets no head either."""

    after: int = 0


@dataclass(frozen=True)
class Corrupt(Fault):
    """Flip one bit in this byte of the answer's body."""

    at: int


@dataclass(frozen=True)
class Delay(Fault):
    """Hold the answer back."""

    seconds: float


@dataclass(frozen=True)
class Request:
    """A request that came by. Its status is None as long as the client got no answer."""

    method: str
    target: str
    status: int | None


@contextlib.contextmanager
def start(host: str, port: int, *, latency: float = 0, rate: int | None = None) -> Iterator[Proxy]:
    """Start a proxy on a free port of 127.0.0.1; stop it at the end of the block, with all its connections.

    Args:
        host: The server to forward to, and its port. It need not run yet.
        latency: Seconds of a round trip: how much later every answer begins, an interim one (100 Continue) too.
        rate: Bytes a second that a connection carries in each direction.
    """
    proxy = Proxy(host, port, latency, rate)
    try:
        yield proxy
    finally:
        proxy.stop()


class Proxy:
    """A running proxy."""

    def __init__(self, host: str, port: int, latency: float, rate: int | None) -> None:
        self.server = (host, port)
        self.latency = latency
        self.rate = rate
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._injections: list[_Injection] = []
        self._exchanges: list[_Exchange] = []
        self._connections: set[_Connection] = set()
        self._stopped = False
        self._thread = threading.Thread(target=self._accept, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()

    @property
    def requests(self) -> list[Request]:
        """The requests seen so far, in the order in which they came."""
        with self._lock:
            return [Request(exchange.method, exchange.target, exchange.status) for exchange in self._exchanges]

    @property
    def pending(self) -> list[Fault]:
        """The faults that were not met yet, also because a body was too short for them."""
        with self._lock:
            return [injection.fault for injection in self._injections if injection.times or injection.under_way]

    def inject(self, fault: Fault, pattern: str = "", times: int = 1, skip: int = 0) -> None:
        """Let the next requests meet a fault.

        A request meets the first fault, in the order of injection, that wants it; later ones then do not count it.

        Args:
            fault: What goes wrong.
            pattern: A regular expression, searched in "METHOD target", with the target as it is on the wire.
            times: How many requests meet it.
            skip: How many matching requests are left alone before.
        """
        with self._lock:
            self._injections.append(_Injection(fault, re.compile(pattern), times, skip))

    def calm(self) -> None:
        """Forget the faults that were not met yet."""
        with self._lock:
            self._injections.clear()

    def stop(self) -> None:
        """Close all connections."""
        with self._lock:
            self._stopped = True
        _shut(self._listener, socket.SHUT_RDWR)  # wakes accept()
        self._thread.join()
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.stop()
        for connection in connections:
            connection.requests.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if self._stopped:
                    return
                raise
            connection = _Connection(self, client)
            with self._lock:
                if self._stopped:
                    client.close()
                    return
                self._connections.add(connection)
            connection.requests.start()

    def _meet(self, method: str, target: str) -> _Exchange:
        """Take note of a request, and of the fault that it meets."""
        exchange = _Exchange(method, target)
        with self._lock:
            self._exchanges.append(exchange)
            for injection in self._injections:
                if injection.times > 0 and injection.pattern.search(f"{method} {target}"):
                    if injection.skip == 0:
                        injection.times -= 1
                        injection.under_way += 1
                        exchange.injection = injection
                        break
                    injection.skip -= 1
        return exchange

    def _settle(self, exchange: _Exchange, *, met: bool) -> None:
        """The fault happens now, before anybody can see that, or it cannot happen: then another request has to meet it.

        Of a request's fault only the first word counts.
        """
        with self._lock:
            if exchange.injection is not None and not exchange.settled:
                exchange.settled = True
                exchange.injection.under_way -= 1
                exchange.injection.times += not met

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


@dataclass
class _Injection:
    fault: Fault
    pattern: re.Pattern[str]
    times: int
    skip: int
    under_way: int = 0


@dataclass(eq=False)
class _Exchange:
    """A request and its answer, on their way."""

    method: str
    target: str
    status: int | None = None
    injection: _Injection | None = None
    settled: bool = False
    expects: bool = False
    continued: bool = False
    body_began: bool = False
    sent: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)

    @property
    def fault(self) -> Fault | None:
        return None if self.injection is None else self.injection.fault


class _Over(Exception):
    """Nothing more is to pass: close both connections, and reset these of them."""

    def __init__(self, *resets: socket.socket) -> None:
        self.resets = resets


class _Broken(Exception):
    """A connection failed, or what came from it is not HTTP."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection


class _Connection:
    """A client's connection and its counterpart to the server.

    `requests` reads from the client, connects to the server, and closes both in the end; `answers` reads from the
    server and ends before that. There is one request at a time: the next one waits until this one has its answer.
    """

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.proxy = proxy
        self.client = client
        self.server: socket.socket | None = None
        self.exchange: _Exchange | None = None
        self.resets: set[socket.socket] = set()
        self.gone = threading.Event()  # the client, or the proxy: there is nobody to wait for
        self.answers_ended = False
        self.requests = threading.Thread(target=self._run_requests, name="proxy-requests", daemon=True)
        self.answers = threading.Thread(target=self._run_answers, name="proxy-answers", daemon=True)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.from_server: _Source
        self.to_server: _Sink
        self.from_client = _Source(client, proxy.rate)
        self.to_client = _Sink(client, proxy.rate)

    def stop(self) -> None:
        self.gone.set()
        _shut(self.client, socket.SHUT_RDWR)
        _shut(self.server, socket.SHUT_RDWR)

    # From the client to the server

    def _run_requests(self) -> None:
        try:
            while raw := self.from_client.until(b"\r\n\r\n"):
                if self.exchange is not None:
                    self.exchange.answered.wait()
                if self.answers_ended:
                    break
                self._forward_request(raw)
            self._end_requests()
        except _Over as over:
            self.resets.update(over.resets)
        except _Broken as broken:
            if broken.connection is self.server:
                self.answers.join(1)  # it may have answered before it closed
            self._reset_both()
        finally:
            self._close()

    def _forward_request(self, raw: bytes) -> None:
        head = _Head(raw)
        found = _REQUEST.match(raw)
        if not found:
            raise _Broken(self.client)
        exchange = self.proxy._meet(found[1].decode("latin-1"), found[2].decode("latin-1"))
        exchange.expects = "100-continue" in head["expect"]
        body = _body(self.from_client, head)
        if isinstance(exchange.fault, Answer):
            try:
                self._answer(exchange, exchange.fault, body)
            finally:
                self.proxy._settle(exchange, met=False)
            if found[3] == b"0" or "close" in head["connection"]:
                raise _Over
            return
        self.exchange = exchange
        server, to_server = self._connect()
        limit = exchange.fault.after if isinstance(exchange.fault, ResetRequest) else None
        passed = 0
        to_server.send(raw)
        if limit == 0:
            self.proxy._settle(exchange, met=True)
            raise _Over(self.client, server)
        for piece, content in body:
            exchange.body_began = True
            if content and limit is not None and passed + len(piece) >= limit:
                self.proxy._settle(exchange, met=True)
                to_server.send(piece[: limit - passed])
                raise _Over(self.client, server)
            passed += len(piece) if content else 0
            to_server.send(piece)
        if limit is not None:
            self.proxy._settle(exchange, met=False)
        exchange.sent.set()

    def _answer(self, exchange: _Exchange, answer: Answer, body: Iterator[tuple[memoryview, bool]]) -> None:
        if exchange.expects:
            self.to_client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        for _ in body:
            pass
        bodiless = _bodiless(exchange.method, answer.status)
        headers = dict(answer.headers)
        if not bodiless or exchange.method == "HEAD":
            headers["Content-Length"] = str(len(answer.body))
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.gone.wait(self.proxy.latency)
        exchange.status = answer.status
        self.proxy._settle(exchange, met=True)
        self.to_client.send("\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if bodiless else answer.body))

    def _connect(self) -> tuple[socket.socket, _Sink]:
        if self.server is None:
            try:
                self.server = socket.create_connection(self.proxy.server)
                # Where nobody listens, the system may give the new socket that very port, connected to itself.
                if self.server.getsockname() == self.server.getpeername():
                    raise ConnectionRefusedError
                self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                raise _Over(self.client) from None
            if self.gone.is_set():
                raise _Over
            self.from_server = _Source(self.server, self.proxy.rate)
            self.to_server = _Sink(self.server, self.proxy.rate)
            self.answers.start()
        return self.server, self.to_server

    def _end_requests(self) -> None:
        """The client sends no more. It may still want its answer."""
        self.gone.set()
        if self.exchange is not None and not self.exchange.answered.is_set():
            _shut(self.server, socket.SHUT_WR)
            self.answers.join()

    def _close(self) -> None:
        self.gone.set()
        if self.exchange is not None:
            self.exchange.sent.set()
        if self.answers.ident is not None:
            # SHUT_RD wakes who reads, and the other side does not see it: a reset has to come without an end before.
            for how in (socket.SHUT_RD, socket.SHUT_RDWR):
                _shut(self.client, how)
                _shut(self.server, how)
                self.answers.join(1)
                if not self.answers.is_alive():
                    break
        if self.exchange is not None:
            self.proxy._settle(self.exchange, met=False)
        for connection in (self.client, self.server):
            if connection is not None:
                if connection in self.resets:
                    _drain(connection)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
        self.proxy._forget(self)

    def _reset_both(self) -> None:
        self.resets.update(connection for connection in (self.client, self.server) if connection is not None)

    # From the server to the client

    def _run_answers(self) -> None:
        try:
            while raw := self.from_server.until(b"\r\n\r\n"):
                self._forward_answer(raw)
        except _Over as over:
            self.resets.update(over.resets)
        except _Broken:
            self._reset_both()
        finally:
            self.answers_ended = True
            if self.exchange is not None:
                self.exchange.answered.set()
            _shut(self.client, socket.SHUT_RD)  # wakes `requests`
            if not (self.resets and self.gone.wait(1)):
                _shut(self.server, socket.SHUT_RDWR)  # wakes it while it sends

    def _forward_answer(self, raw: bytes) -> None:
        found, exchange, server = _ANSWER.match(raw), self.exchange, self.server
        if not found or server is None:
            raise _Broken(self.client)
        status = int(found[1])
        self.gone.wait(self.proxy.latency)
        if exchange is None or exchange.answered.is_set():  # such as 408, before the server closes
            self.to_client.send(raw)
            raise _Over
        if 100 <= status < 200:
            exchange.continued = True
            self.to_client.send(raw)
            return
        pieces = (
            iter(()) if _bodiless(exchange.method, status) else _body(self.from_server, _Head(raw), to_the_end=True)
        )
        fault = exchange.fault
        if isinstance(fault, LoseAnswer):
            for _ in pieces:
                pass
            exchange.sent.wait()
            self.proxy._settle(exchange, met=True)
            raise _Over(self.client)
        if isinstance(fault, Delay):
            self.proxy._settle(exchange, met=True)
            self.gone.wait(fault.seconds)
        if fault == Stall(0):
            self._cut(exchange)
        exchange.status = status
        self.to_client.send(raw)
        self._forward_answer_body(exchange, pieces)
        exchange.answered.set()
        if exchange.expects and not (exchange.continued or exchange.body_began or exchange.sent.is_set()):
            raise _Over  # The client need not send the body now, so nobody knows what its next bytes are.

    def _forward_answer_body(self, exchange: _Exchange, pieces: Iterator[tuple[memoryview, bool]]) -> None:
        fault = exchange.fault
        limit = fault.after if isinstance(fault, (ResetAnswer, Stall)) else None
        corrupt = fault.at if isinstance(fault, Corrupt) else None
        passed = 0
        for piece, content in pieces:
            if limit is not None and (passed == limit or (content and passed + len(piece) > limit)):
                self.to_client.send(piece[: limit - passed])
                self._cut(exchange)
            if content:
                if corrupt is not None and passed <= corrupt < passed + len(piece):
                    self.proxy._settle(exchange, met=True)
                    piece[corrupt - passed] ^= 1
                passed += len(piece)
            self.to_client.send(piece)
        if isinstance(fault, ResetAnswer) and passed == limit:
            self._cut(exchange)
        if limit is not None or corrupt is not None:
            self.proxy._settle(exchange, met=False)

    def _cut(self, exchange: _Exchange) -> NoReturn:
        """Send no more of an answer: reset, or wait until nobody waits."""
        self.proxy._settle(exchange, met=True)
        if isinstance(exchange.fault, Stall):
            self.gone.wait()
            raise _Over
        raise _Over(*(connection for connection in (self.client, self.server) if connection is not None))


_REQUEST = re.compile(rb"(\S+) (\S+) HTTP/1\.([01])\r\n")
_ANSWER = re.compile(rb"HTTP/1\.[01] (\d{3})")
_NUMBER = re.compile(rb"[0-9]+")
_CHUNK = re.compile(rb"[0-9a-fA-F]+")


class _Head:
    """The headers that frame a message. A missing one is empty."""

    def __init__(self, raw: bytes) -> None:
        self.headers: dict[str, str] = {}
        for line in raw.decode("latin-1").split("\r\n")[1:-2]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip().lower()

    def __getitem__(self, name: str) -> str:
        return self.headers.get(name, "")


class _Source:
    """What comes from a connection: heads and lines from a buffer, bodies as views of it."""

    def __init__(self, connection: socket.socket, rate: int | None) -> None:
        self.connection = connection
        self.size = BUFFER if rate is None else min(BUFFER, max(1, int(rate * _SLICE)))
        self.buffer = bytearray(BUFFER)
        self.view = memoryview(self.buffer)
        self.begin = self.end = 0

    def until(self, mark: bytes) -> bytes:
        """The bytes up to a mark and with it; none if the connection ended before the first one."""
        found = self.buffer.find(mark, self.begin, self.end)
        if found < 0:
            rest = self.end - self.begin
            self.view[:rest] = self.view[self.begin : self.end]
            self.begin, self.end = 0, rest
            while found < 0:
                if self.end == BUFFER:
                    raise _Broken(self.connection)
                count = self._receive(self.view[self.end :])
                if not count:
                    if self.end:
                        raise _Over
                    return b""
                found = self.buffer.find(mark, max(0, self.end - len(mark) + 1), self.end + count)
                self.end += count
        begin, self.begin = self.begin, found + len(mark)
        return bytes(self.view[begin : self.begin])

    def some(self, most: int) -> memoryview:
        """At least one and at most so many bytes; none if the connection ended."""
        if self.begin == self.end:
            self.begin, self.end = 0, self._receive(self.view[: self.size])
        begin = self.begin
        self.begin = min(self.end, begin + min(most, self.size))
        return self.view[begin : self.begin]

    def _receive(self, view: memoryview) -> int:
        try:
            return self.connection.recv_into(view)
        except OSError as error:
            raise _Broken(self.connection) from error


class _Sink:
    """What goes to a connection, at its rate."""

    def __init__(self, connection: socket.socket, rate: int | None) -> None:
        self.connection = connection
        self.rate = rate
        self.free = 0.0

    def send(self, data: bytes | memoryview) -> None:
        if self.rate is not None:
            now = time.monotonic()
            begin = now if now - self.free > _SLICE else self.free
            self.free = begin + len(data) / self.rate
            time.sleep(max(0.0, self.free - now))
        try:
            self.connection.sendall(data)
        except OSError as error:
            raise _Broken(self.connection) from error


def _body(source: _Source, head: _Head, *, to_the_end: bool = False) -> Iterator[tuple[memoryview, bool]]:
    """The pieces of a body as they come, and whether they are content, or what frames chunks of it.

    Args:
        to_the_end: Without a length, the body goes on until the connection ends; otherwise there is none.
    """
    if "chunked" in head["transfer-encoding"]:
        size = 1
        while size:
            line = source.until(b"\n")
            if not line:
                raise _Over
            found = _CHUNK.match(line)
            if not found:
                raise _Broken(source.connection)
            size = int(found[0], 16)
            yield memoryview(line), False
            if size:
                for piece in _content(source, size):
                    yield piece, True
                yield memoryview(source.until(b"\n")), False
        while True:  # trailers
            line = source.until(b"\n")
            yield memoryview(line), False
            if not line.strip():
                return
    elif head["content-length"] or not to_the_end:
        found = _NUMBER.match((head["content-length"] or "0").encode())
        if not found:
            raise _Broken(source.connection)
        for piece in _content(source, int(found[0])):
            yield piece, True
    else:
        while piece := source.some(BUFFER):
            yield piece, True


def _content(source: _Source, size: int) -> Iterator[memoryview]:
    while size:
        piece = source.some(size)
        if not piece:
            raise _Over
        size -= len(piece)
        yield piece


def _bodiless(method: str, status: int) -> bool:
    return method == "HEAD" or status in (204, 304)


def _shut(connection: socket.socket | None, how: int) -> None:
    """Shut a connection down, unless it is already gone."""
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(how)


def _drain(connection: socket.socket) -> None:
    """Wait until the other side has what was sent: a reset throws away what is still on its way."""
    deadline = time.monotonic() + 1
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            (waiting,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
            if waiting == 0:
                return
            time.sleep(0.001)
