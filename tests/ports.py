"""Ports for servers that are told theirs and start again at the same one."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

HOST = "127.0.0.1"


@contextlib.contextmanager
def reserved_port(beside: int = 0) -> Iterator[int]:
    """A port that is free, for the time of the block. With `beside`, the port so far from it is free as well.

    Servers bind their ports when they like, and not at all while they are down. A UDP socket says to other tests that a port
    is taken. Ports that the system hands out by itself are never among them: those begin at 32768.
    """
    while True:
        port = random.randrange(10240, 32768 - beside)
        with contextlib.ExitStack() as stack:
            try:
                for number in {port, port + beside}:
                    stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)).bind((HOST, number))
                    with socket.socket() as probe:
                        probe.bind((HOST, number))
            except OSError:
                continue
            yield port
            return
