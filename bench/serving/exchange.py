"""One HTTP request to a server of language models: a connection of its own, lines with the time at which they arrived.

Standard library only: :mod:`http.client` hands every piece of a stream on as it comes. Proxies of the environment are
not used, redirections are not followed: both would be part of what is measured.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...errors import ArgumentValueError, EdgeLLMError

APIS = ("openai", "ollama")
ENDPOINTS = {
    ("openai", "chat"): "/v1/chat/completions",
    ("openai", "completion"): "/v1/completions",
    ("ollama", "chat"): "/api/chat",
    ("ollama", "completion"): "/api/generate",
}

_QUESTION_S = 10.0
_LONGEST_S = 1e6  # poll() counts milliseconds in 32 bits
_READ_BYTES = 1 << 16


class ServerError(EdgeLLMError):
    """A server cannot be reached, refuses, or answers what its API does not say; the message names the URL."""


class RefusedError(ServerError):
    """Status 400 or 422: the server does not like something in the request."""


@dataclass(frozen=True)
class Server:
    """Where to ask.

    Attributes:
        url: http or https, with or without the /v1 or /api at its end.
        api: ``"openai"`` or ``"ollama"``.
        model: its name on the server; None: the first that the server lists.
        api_key: sent as a bearer token, written nowhere.
        timeout_s: seconds that one request may take as a whole, at most a million.
        endpoint: ``"chat"``, or ``"completion"`` for a prompt without a chat template.

    Raises:
        ArgumentValueError: a URL or a value that cannot be used.
    """

    url: str
    api: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 300.0
    endpoint: str = "chat"

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise ArgumentValueError(f"api is {self.api!r}, expected one of {', '.join(APIS)}")
        if (self.api, self.endpoint) not in ENDPOINTS:
            raise ArgumentValueError(f"endpoint is {self.endpoint!r}, expected chat or completion")
        if not 0 < self.timeout_s <= _LONGEST_S:
            raise ArgumentValueError(
                f"timeout_s is {self.timeout_s}, expected more than 0 and at most {_LONGEST_S:.0f} seconds"
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ArgumentValueError("api_key holds characters that no HTTP header may hold")
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as e:
            raise ArgumentValueError(f"url: {e}") from e
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ArgumentValueError(
                "url holds a user, a password or a query, which would be in the report; use api_key"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not self.url.isprintable():
            raise ArgumentValueError(f"url is {self.url!r}, expected such as http://127.0.0.1:8080")

    @property
    def base(self) -> str:
        """The path before that of the API: mostly empty."""
        return re.sub(r"/(v1|api)$", "", urlsplit(self.url).path.rstrip("/"))

    @property
    def question_s(self) -> float:
        """Longest wait for an answer about the server itself."""
        return min(self.timeout_s, _QUESTION_S)

    def hide(self, text: str) -> str:
        """`text` on one line, without the key: servers may repeat it in what they say."""
        text = " ".join(text.split())
        return text.replace(self.api_key, "***") if self.api_key else text


class Exchange:
    """One request over a connection of its own, which is open when it begins.

    Attributes:
        connect_s: what opening it took, in seconds.

    Raises:
        ServerError: whatever goes wrong between `with` and its end.
    """

    def __init__(self, server: Server, limit_s: float):
        parts = urlsplit(server.url)
        connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._server, self._limit_s = server, limit_s
        self._where = server.url
        self._connection = connection(parts.hostname or "", parts.port, timeout=limit_s)
        self._connection.response_class = self._response  # type: ignore[assignment]
        self._deadline = 0.0
        self.connect_s = 0.0

    def __enter__(self) -> Exchange:
        start = time.perf_counter()
        self._deadline = start + self._limit_s
        try:
            self._connection.connect()
        except OSError as e:
            self._connection.close()
            raise self._failure(e) from e
        self.connect_s = time.perf_counter() - start
        self._socket = self._connection.sock  # http.client forgets it when the server will close
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._connection.close()
        if isinstance(error, (OSError, http.client.HTTPException)):
            raise self._failure(error) from error

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """Send a request, and wait for the head of its response."""
        path = self._server.base + path
        self._where = f"{method} {self._connection.host}:{self._connection.port}{path}"
        headers = {"Accept": "text/event-stream, application/x-ndjson, application/json", "Connection": "close"}
        if self._server.api_key:
            headers["Authorization"] = f"Bearer {self._server.api_key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        self._hurry()
        self._connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
        return self._connection.getresponse()

    def lines(self, response: http.client.HTTPResponse) -> Iterator[tuple[float, bytes]]:
        """Lines of the body without their ends, each with the time at which its last byte arrived."""
        rest = b""
        while data := self._read(response):
            at = time.perf_counter()
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield at, line.rstrip(b"\r")
        if rest:
            yield time.perf_counter(), rest

    def body(self, response: http.client.HTTPResponse) -> bytes:
        return b"".join(iter(lambda: self._read(response), b""))

    def error(self, what: str) -> ServerError:
        return ServerError(self._server.hide(f"{self._where}: {what}"))

    def refusal(self, response: http.client.HTTPResponse) -> ServerError:
        """The error for a response that is not 200, with what its body says."""
        body = self.body(response)
        found = json_object(body)
        said = beginning(body) if found is None else complaint(found)
        if location := response.getheader("Location"):
            said = f"it has moved to {location}"
        kind = RefusedError if response.status in (400, 422) else ServerError
        return kind(self._server.hide(f"{self._where}: status {response.status} {response.reason}: {said}"))

    def _response(self, connected: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
        """A response that never waits beyond the limit: also not for a head that comes a byte at a time."""
        response = http.client.HTTPResponse(connected, *args, **options)
        response.fp = io.BufferedReader(_Hurried(response.fp.detach(), self._hurry))
        return response

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        return response.read1(_READ_BYTES)

    def _hurry(self) -> None:
        """Wait no longer than until the limit of the whole request."""
        left = self._deadline - time.perf_counter()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _failure(self, e: BaseException) -> ServerError:
        if isinstance(e, TimeoutError):
            return self.error(f"not finished after {self._limit_s:g} s")
        if isinstance(e, ConnectionRefusedError):
            return self.error("connection refused: no server listens there")
        if isinstance(e, ssl.SSLCertVerificationError):
            return self.error(
                f"its certificate is not trusted: {e.verify_message}; SSL_CERT_FILE may name another root"
            )
        if isinstance(e, ssl.SSLError):
            return self.error(f"no TLS: {e.reason or e}; is it http instead of https?")
        if isinstance(e, (ConnectionError, http.client.IncompleteRead)):
            return self.error("the server closed the connection in the middle")
        if isinstance(e, http.client.HTTPException):
            return self.error(f"no HTTP: {type(e).__name__} {e}")
        return self.error(f"{type(e).__name__}: {e.strerror if isinstance(e, OSError) and e.strerror else e}")


class _Hurried(io.RawIOBase):
    """Reads from `raw`, after calling `hurry` each time."""

    def __init__(self, raw: io.RawIOBase, hurry: Callable[[], None]):
        self._raw, self._hurry = raw, hurry

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._hurry()
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def json_answer(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that a request without a stream gives.

    Raises:
        ServerError: it gives none.
    """
    with Exchange(server, server.timeout_s if body else server.question_s) as exchange:
        response = exchange.send(method, path, body)
        if response.status != 200:
            raise exchange.refusal(response)
        data = exchange.body(response)
        found = json_object(data)
        if found is None:
            what = response.getheader("Content-Type") or "nothing"
            raise exchange.error(f"no JSON came but {what}: {beginning(data)}")
        return found


def json_object(data: bytes) -> Any:
    """The JSON in `data`, or None."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def complaint(found: Any) -> str:
    """What an error's body says, whichever way a server words it."""
    if isinstance(found, dict):
        error = next((found[key] for key in ("error", "detail", "message") if found.get(key)), found)
        if isinstance(error, dict):
            error = error.get("message") or error
        return error if isinstance(error, str) else json.dumps(error)[:200]
    return "no JSON came" if found is None else json.dumps(found)[:200]


def beginning(data: bytes) -> str:
    return repr(data[:80].decode("utf-8", "replace")) if data.strip() else "nothing"
