"""Record what a live server sends to `edgellm bench server`: a proxy between both keeps each piece with its time.

    /opt/lcpp/v/bin/python -m llama_cpp.server --model SmolLM2-135M-Instruct.Q4_1.gguf --port 18080 \
        --n_ctx 512 --n_threads 2 --model_alias smollm2-135m-instruct-q4_1
    python -m tests.data.server.record http://127.0.0.1:18080 llama_cpp_python.json "llama-cpp-python 0.3.36, CPU"

The file: `server` (what answered), `made_by`, and `exchanges` in order, each {method, path, body, abridged, pieces}.
`pieces`: [ms since the request was passed on, bytes as Latin-1 text] as they came off the socket, head included.
`abridged`: the answer was too long to keep; of its JSON only the short values of the first level are left.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgellm_cupy.bench.serving import server

PLAN = server.Plan(requests=3, warm_up=1, max_tokens=16, prompt_tokens=32)
_LONGEST = 8000  # bytes of an answer that is kept whole


def main(url: str, name: str, what: str) -> None:
    """Run :data:`PLAN` against `url` through the proxy and write the exchanges to the file `name` beside this one."""
    exchanges: list[dict[str, Any]] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener, url, exchanges), daemon=True).start()
        here = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.run(server.Client(server.Server(here, "openai"), PLAN, print), print)
    made_by = f"python -m tests.data.server.record {url} {name} {what!r}"
    text = json.dumps({"server": what, "made_by": made_by, "exchanges": exchanges}, indent=1) + "\n"
    text = re.sub(r'\[\n\s+([\d.]+),\n\s+(".*")\n\s+\]', r"[\1, \2]", text)  # a piece on one line
    Path(__file__).with_name(name).write_text(text)


def _serve(listener: socket.socket, url: str, exchanges: list[dict[str, Any]]) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            request = _request(connection)
            if request:  # a client may only have looked whether someone listens
                exchanges.append(_pass_on(request, connection, url))


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65536)):
            return b""
        data += more
    length = re.search(rb"(?i)content-length: (\d+)", data)
    end = data.index(b"\r\n\r\n") + 4 + (int(length[1]) if length else 0)
    while len(data) < end:
        data += connection.recv(65536)
    return data


def _pass_on(request: bytes, connection: socket.socket, url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    head, _, body = request.partition(b"\r\n\r\n")
    method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
    pieces: list[tuple[float, bytes]] = []
    with socket.create_connection((parts.hostname, parts.port)) as upstream:
        start = time.perf_counter()
        upstream.sendall(request)
        while data := upstream.recv(65536):
            pieces.append((round(1e3 * (time.perf_counter() - start), 3), data))
            connection.sendall(data)
    whole = b"".join(data for _, data in pieces)
    abridged = len(whole) > _LONGEST and b"text/event-stream" not in whole.split(b"\r\n\r\n")[0]
    if abridged:
        pieces = [(pieces[0][0], _abridge(whole))]
    return {
        "method": method,
        "path": path,
        "body": json.loads(body) if body else None,
        "abridged": abridged,
        "pieces": [[ms, data.decode("latin-1")] for ms, data in pieces],
    }


def _abridge(whole: bytes) -> bytes:
    head, _, body = whole.partition(b"\r\n\r\n")
    short = {key: value for key, value in json.loads(body).items() if len(json.dumps(value)) < 200}
    kept = json.dumps(short).encode()
    return re.sub(rb"(?i)(content-length: )\d+", rb"\g<1>%d" % len(kept), head) + b"\r\n\r\n" + kept


if __name__ == "__main__":
    main(*sys.argv[1:])
