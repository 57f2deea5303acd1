"""A port that something else has: it says nothing, or answers everything with the same words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HTTP = b"HTTP/1.1 400 Bad Request\r\n\r\n"


@contextmanager
def taken_port(answer: bytes = b"") -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        if answer:
            threading.Thread(target=_serve, args=[listener, answer], daemon=True).start()
        yield listener.getsockname()[1]


def _serve(listener: socket.socket, answer: bytes) -> None:
    while True:
        try:
            with listener.accept()[0] as client:
                client.recv(100)
                client.sendall(answer)
        except OSError:  # the test is over, or the client has left
            if listener.fileno() < 0:
                return
