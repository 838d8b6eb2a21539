"""A server on a local socket that answers as a test tells it to, and what such answers are made of."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Pieces = list[tuple[float, bytes]]
"""Of an answer: the seconds to wait before each piece, and its bytes."""


class Request:
    """What a client sent."""

    def __init__(self, head: bytes, body: bytes):
        line, *fields = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = line.split(" ")
        self.headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        self.body = json.loads(body) if body else None


class FakeServer:
    """A server on a local socket: `answer` gives the pieces for each request, on a connection of its own.

    Attributes:
        requests: all of them, in order.
        sent: of each POST with a stream, when its pieces went out (`perf_counter`).
    """

    def __init__(self, answer: Callable[[Request], Pieces], reset: bool = False, certificate: Path | None = None):
        self._answer, self._reset = answer, reset
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
        if self._tls:
            self._tls.load_cert_chain(certificate)
        self.requests: list[Request] = []
        self.sent: list[list[float]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # the client may hang up
            stack.enter_context(connection)
            if self._tls:
                connection = stack.enter_context(self._tls.wrap_socket(connection, server_side=True))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := connection.recv(65536)):
                    return
                data += more
                if data[0] == 0x16:  # of TLS; web servers answer so
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    return
            head, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            while len(body) < int(length[1] if length else 0):
                body += connection.recv(65536)
            request = Request(head, body)
            self.requests.append(request)
            stamps: list[float] = []
            if request.body and request.body["stream"]:
                self.sent.append(stamps)
            for delay, piece in self._answer(request):
                time.sleep(delay)
                stamps.append(time.perf_counter())
                connection.sendall(piece)
            if self._reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def head(kind: str, status: str = "200 OK", *more: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *more, "", ""]).encode()


def whole(found: Any, status: str = "200 OK") -> Pieces:
    return [(0, head("application/json", status) + json.dumps(found).encode())]


def sse(found: Any) -> bytes:
    return f"data: {json.dumps(found)}\n\n".encode()


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    return sse({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


def usage(tokens: int, prompt: int = 40, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens, **more}


DONE = b"data: [DONE]\n\n"
ROLE = sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})


def stream(*pieces: bytes, gap: float = 0.0) -> Pieces:
    return [(0, head("text/event-stream; charset=utf-8")), *((gap, piece) for piece in pieces)]


def openai(answer: Callable[[Request], Pieces]) -> Callable[[Request], Pieces]:
    """`answer` to prompts, and a list of one model."""

    def with_models(request: Request) -> Pieces:
        if request.method == "POST":
            return answer(request)
        if request.path == "/v1/models":
            return whole({"data": [{"id": "tiny"}, {"id": "other"}]})
        return whole({"detail": "Not Found"}, "404 Not Found")

    return with_models


def words(n: int) -> list[bytes]:
    return [chunk(f" word{i}") for i in range(n)]


def plain(n: int = 8, finish: str = "length") -> bytes:
    """A stream of `n` tokens, one a chunk, as vLLM and llama.cpp send it."""
    return b"".join([ROLE, *words(n), chunk(finish=finish), sse({"choices": [], "usage": usage(n)}), DONE])
