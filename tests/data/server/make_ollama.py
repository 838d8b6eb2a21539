"""Write ollama.json: what an Ollama server sends, by its documentation. No Ollama was asked, the times are invented.

    python -m tests.data.server.make_ollama

After docs/api.md of ollama/ollama at commit 01e52d24bc00defcd9bcc6d995b11df0f08bc6f1 ("List Local Models", "Generate a
chat completion") and, for `thinking` and /api/version, what later servers answer. The form of the file is record.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENS, PROMPT_TOKENS = 8, 41
FIRST_MS, GAP_MS = 120.0, 40.0
PROMPT_NS, OUTPUT_NS = 90_000_000, 304_000_000
MODEL = {
    "name": "llama3.2:latest",
    "modified_at": "2024-10-01T10:12:13.123456789Z",
    "size": 2019393189,
    "digest": "a80c4f17acd55265feec403c7aef86be0c25983ab279d83f3bcd3abbcb5b8b72",
    "details": {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "3.2B",
        "quantization_level": "Q4_K_M",
    },
}


def _head(kind: str, rest: str) -> str:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nDate: Mon, 23 Nov 2026 00:00:00 GMT\r\n{rest}\r\n\r\n"


def _whole(path: str, found: Any) -> dict[str, Any]:
    body = json.dumps(found)
    text = _head("application/json; charset=utf-8", f"Content-Length: {len(body)}") + body
    return {"method": "GET", "path": path, "body": None, "abridged": False, "pieces": [[1.0, text]]}


def _chunk(line: dict[str, Any]) -> str:
    data = json.dumps({"model": MODEL["name"], "created_at": "2026-11-23T00:00:00.1Z", **line}) + "\n"
    return f"{len(data):x}\r\n{data}\r\n"


def _stream() -> dict[str, Any]:
    said = [{"role": "assistant", "content": "", "thinking": " so"}] + [
        {"role": "assistant", "content": f" word{i}"} for i in range(1, TOKENS)
    ]
    pieces = [[FIRST_MS + GAP_MS * i, _chunk({"message": m, "done": False})] for i, m in enumerate(said)]
    pieces[0][1] = _head("application/x-ndjson", "Transfer-Encoding: chunked") + pieces[0][1]
    final = {
        "message": {"role": "assistant", "content": ""},
        "done_reason": "length",
        "done": True,
        "total_duration": 405_000_000,
        "load_duration": 9_000_000,
        "prompt_eval_count": PROMPT_TOKENS,
        "prompt_eval_duration": PROMPT_NS,
        "eval_count": TOKENS,
        "eval_duration": OUTPUT_NS,
    }
    pieces.append([pieces[-1][0] + 1.0, _chunk(final) + "0\r\n\r\n"])
    return {"method": "POST", "path": "/api/chat", "body": {"stream": True}, "abridged": False, "pieces": pieces}


def main() -> None:
    found = {
        "server": "Ollama as documented; not recorded, the times are invented",
        "made_by": "python -m tests.data.server.make_ollama",
        "exchanges": [
            _whole("/api/tags", {"models": [MODEL]}),
            _whole("/api/version", {"version": "0.5.1"}),
            _stream(),
        ],
    }
    Path(__file__).with_name("ollama.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
