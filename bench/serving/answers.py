"""What OpenAI's and Ollama's streams say: events from their lines, and an answer from its events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ..metrics import Metric, measured, missing
from .exchange import beginning, complaint, json_object

_LLAMA_CLOCK = (("pp", "prompt"), ("tg", "predicted"))  # llama.cpp's names for what it times itself
_STRANGE = (AttributeError, KeyError, IndexError, TypeError)  # JSON of another shape than the API's


@dataclass
class Event:
    """What one line of a stream says.

    Attributes:
        at: when it arrived, by `perf_counter`.
        text: output, also thinking; empty in chunks that only tell a role, a reason or counts.
        thinks: some of it is thinking that the API sets apart.
        finish: why the output ended, or None.
        counts: prompt_tokens, completion_tokens, reasoning_tokens and cached_tokens, those that are told.
        durations: (tokens, ms) of ``"pp"`` and of ``"tg"`` on the server's own clock, those that are told.
        error: what went wrong in the middle of the stream.
        ends: nothing that matters comes after it.
    """

    at: float = 0.0
    text: str = ""
    thinks: bool = False
    finish: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    durations: dict[str, tuple[int, float]] = field(default_factory=dict)
    error: str | None = None
    ends: bool = False


@dataclass
class Answer:
    """One answered request; times by `perf_counter`.

    Attributes:
        connect_s: what opening the connection took, in seconds.
        begin, end: before the request was sent, and after the stream was read.
        arrivals: of each chunk with output.
        text: of all chunks.
        thinks: thinking came in any of them.
        finish, counts, durations: see :class:`Event`; the last ones that were told.
    """

    connect_s: float
    begin: float
    end: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    thinks: bool = False
    finish: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    durations: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        if event.text:
            self.arrivals.append(event.at)
            self.text += event.text
            self.thinks |= event.thinks
        self.finish = event.finish or self.finish
        self.counts |= event.counts
        self.durations |= event.durations

    @property
    def tokens(self) -> int | None:
        return self.counts.get("completion_tokens")

    @property
    def prompt_tokens(self) -> int | None:
        return self.counts.get("prompt_tokens")

    def line(self, origin: float) -> dict[str, Any]:
        """Everything but the counts of tokens; seconds since `origin`."""
        first, last = self.arrivals[0], self.arrivals[-1]
        return {
            "chunks": len(self.arrivals),
            "finish_reason": self.finish,
            "cached_tokens": told(self.counts.get("cached_tokens"), "the server does not tell"),
            "connect_ms": measured(1e3 * self.connect_s, "ms"),
            "first_token_ms": measured(1e3 * (first - self.begin), "ms"),
            "first_to_last_ms": measured(1e3 * (last - first), "ms"),
            "total_ms": measured(1e3 * (self.end - self.begin), "ms"),
            "server_ms": {name: {"tokens": n, "ms": measured(ms, "ms")} for name, (n, ms) in self.durations.items()},
            "arrivals_ns": [round(1e9 * (at - self.begin)) for at in self.arrivals],
            "begin_s": self.begin - origin,
            "end_s": self.end - origin,
        }


def openai_events(lines: Iterable[tuple[float, bytes]], content_type: str) -> Iterator[Event]:
    """Server-sent events; comments, names and empty lines say nothing."""
    strange = b""
    events = 0
    for at, line in lines:
        name, _, data = line.partition(b":")
        if name == b"data" and data.strip() == b"[DONE]":
            yield Event(at=at, ends=True)
            return
        if name in (b"data", b"error") and data.strip():  # `error:` is llama.cpp's
            events += 1
            found = json_object(data)
            if found is None:
                yield Event(error=f"no JSON came: {beginning(data)}")
            yield openai_event(found, at) if name == b"data" else Event(error=complaint(found))
        elif name not in (b"", b"event", b"id", b"retry"):
            strange += line
    if not events:
        yield Event(error=f"no server-sent event came but {content_type}: {beginning(strange)}")


def openai_event(found: Any, at: float = 0.0) -> Event:
    """What a chunk, or a whole answer, says."""
    try:
        return _openai_event(found, at)
    except _STRANGE:
        return Event(error=f"not what OpenAI's API says: {complaint(found)}")


def _openai_event(found: Any, at: float) -> Event:
    if found.get("error") or "choices" not in found:
        return Event(error=complaint(found))
    choice = (found["choices"] or [{}])[0]
    said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    thinking = _text(said.get("reasoning_content")) + _text(said.get("reasoning"))
    usage, timings = found.get("usage") or {}, found.get("timings") or {}
    counts = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "reasoning_tokens": (usage.get("completion_tokens_details") or {}).get("reasoning_tokens"),
        "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", timings.get("cache_n")),
    }
    clock = {key: (timings.get(f"{name}_n"), timings.get(f"{name}_ms")) for key, name in _LLAMA_CLOCK}
    return Event(
        at=at,
        text=thinking + _text(said.get("content")),
        thinks=bool(thinking),
        finish=_finish(choice.get("finish_reason")),
        counts={key: n for key, n in counts.items() if _is_count(n)},
        durations={key: (n, ms) for key, (n, ms) in clock.items() if _is_count(n) and n and _is_time(ms)},
    )


def ollama_events(lines: Iterable[tuple[float, bytes]], content_type: str) -> Iterator[Event]:
    """One JSON object a line; the last one is `done`, and counts."""
    for at, line in lines:
        if not line.strip():
            continue
        found = json_object(line)
        if isinstance(found, dict) and found.get("error"):
            yield Event(error=complaint(found))
            return
        try:
            yield _ollama_event(found, at)
        except _STRANGE:
            yield Event(error=f"no line of Ollama's came but {content_type}: {beginning(line)}")
            return


def _ollama_event(found: Any, at: float) -> Event:
    said = found.get("message") or {"content": found.get("response"), "thinking": found.get("thinking")}
    counts, durations = {}, {}
    for key, name, told_as in (("pp", "prompt_tokens", "prompt_eval"), ("tg", "completion_tokens", "eval")):
        n, ns = found.get(f"{told_as}_count"), found.get(f"{told_as}_duration")
        if _is_count(n):
            counts[name] = n
            if n and _is_time(ns):
                durations[key] = (n, ns / 1e6)
    thinking = _text(said.get("thinking"))
    return Event(
        at=at,
        text=thinking + _text(said.get("content")),
        thinks=bool(thinking),
        finish=_finish(found.get("done_reason", "not told")) if found["done"] else None,
        counts=counts,
        durations=durations,
        ends=bool(found["done"]),
    )


def _text(found: Any) -> str:
    return found if isinstance(found, str) else ""


def _finish(found: Any) -> str | None:
    return None if found is None else str(found)


def _is_count(found: Any) -> TypeGuard[int]:
    return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _is_time(found: Any) -> TypeGuard[float]:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and 0 < found < math.inf


def told(count: int | None, reason: str) -> Metric:
    """A count as a figure, null with `reason` where there is none."""
    return missing(reason) if count is None else measured(count)
