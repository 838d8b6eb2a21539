"""Results of other engines as rows: llama-bench, and vLLM's `bench latency` and `bench serve`.

What a file is, is seen from what is in it:

    llama-bench     `-o json`, an array of objects, or `-o jsonl`, an object a line. Boundary `engine`: token ids in and
                    out, no tokeniser. Rates with their samples, by llama-bench's own names (``pp512``, ``tg128``,
                    ``pp512+tg128``, ``tg128 @ d4096``). Options by which tests of one file differ are part of the name.
    vLLM latency    `vllm bench latency --output-json`. Boundary `engine`. The file does not say how long prompts and
                    outputs were, nor how many there were: it can be compared with another such file only.
    vLLM serve      `vllm bench serve --save-result`, one object or, with `--append-result`, one a line. Boundary
                    `client`: network, queue and tokeniser are inside. ``tg128`` is the inverse of the time per output
                    token, 128 the mean length of the outputs. The samples are there with `--save-detailed`.

Keys that are not needed may be missing or unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import EdgeLLMError
from .rows import Row, distinct, tg_at_depth

EDGELLM, LLAMA_BENCH, VLLM_LATENCY, VLLM_SERVE = "edgellm", "llama-bench", "vLLM latency", "vLLM serve"


class ImportFileError(EdgeLLMError, ValueError):
    """A file of results cannot be read; the message names it, what was expected and what came."""


@dataclass(frozen=True)
class Imported:
    """What a file of another engine says.

    Attributes:
        kind: which engine wrote it, :data:`LLAMA_BENCH`, :data:`VLLM_LATENCY` or :data:`VLLM_SERVE`.
        rows: in the file's order.
        environment: what it says about itself and its machine, as text.
    """

    kind: str
    rows: list[Row]
    environment: dict[str, str] = field(default_factory=dict)


def read_json(path: Path) -> Any:
    """The JSON value of a file; of a file with one value a line, their list.

    Raises:
        ImportFileError: the file cannot be read or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ImportFileError(f"{path}: cannot be read: {e.strerror if isinstance(e, OSError) else e}") from e
    try:
        return json.loads(text)
    except ValueError as whole:
        try:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise ImportFileError(f"{path}: not JSON, nor JSON lines: {whole}") from whole
        return lines


def kind_of(value: Any) -> str | None:
    """Which program wrote this JSON value, :data:`EDGELLM` or one of the others; None if it is unknown."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        return None
    if "schema_version" in first:
        return EDGELLM
    if "model_filename" in first or {"n_prompt", "n_gen"} <= first.keys():
        return LLAMA_BENCH
    if {"avg_latency", "latencies"} & first.keys() and "completed" not in first:
        return VLLM_LATENCY
    if {"request_throughput", "output_throughput"} & first.keys():
        return VLLM_SERVE
    return None


def imported(value: Any, path: Path) -> Imported:
    """Read the JSON value of another engine's file.

    Raises:
        ImportFileError: it is of no engine that is known, or a key that is needed is missing or no number.
    """
    kind = kind_of(value)
    if kind not in _READERS:
        raise ImportFileError(
            f"{path}: not a result that this program reads: expected a report.json of edgellm, the JSON of "
            f"llama-bench, or that of vLLM's bench latency or bench serve; {_described(value)}"
        )
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, dict):
            raise ImportFileError(f"{path}: not a file of {kind}: expected objects, found {_described(entry)}")
    rows, environment = _READERS[kind]([_Entry(entry, path, kind) for entry in entries])
    return Imported(kind, distinct(rows), environment)


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"its keys are {', '.join(map(str, list(value)[:5])) or 'none'}"
    return "it is empty" if value == [] else f"it is a {type(value).__name__}"


class _Entry:
    """One object of a file; what is needed of it is asked for by name."""

    def __init__(self, values: dict[str, Any], path: Path, kind: str):
        self.values, self.path, self._kind = values, path, kind

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            found = f"is {value!r}" if key in self.values else "is missing"
            raise ImportFileError(f"{self.path}: not a whole result of {self._kind}: {key} {found}, expected a number")
        return float(value)

    def positive(self, key: str) -> float:
        value = self.number(key)
        if not value > 0:
            raise ImportFileError(f"{self.path}: {key} is {value:g}, expected a positive number")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers above zero; empty if there is none."""
        values = self.values.get(key) or ()
        ok = isinstance(values, Sequence) and all(isinstance(v, (int, float)) and v > 0 for v in values)
        return tuple(map(float, values)) if ok else ()

    def facts(self, names: Mapping[str, str]) -> dict[str, Any]:
        """`names`: key of ours -> key of the file; those that the file has."""
        return {ours: self.values[key] for ours, key in names.items() if self.values.get(key) is not None}


_Read = tuple[list[Row], dict[str, str]]


def _environment(entries: Sequence[_Entry], names: Mapping[str, str]) -> dict[str, str]:
    """`names`: key of ours -> key of the file. All values that occur, each once."""
    found = {}
    for ours, key in names.items():
        values = dict.fromkeys(str(entry.values[key]) for entry in entries if entry.values.get(key) not in (None, ""))
        if values:
            found[ours] = ", ".join(values)
    return found


# ---- llama-bench ----------------------------------------------------------------------------------------------------

_LLAMA_OPTIONS = ("model_filename", "type_k", "type_v", "n_batch", "n_ubatch", "n_threads",
                  "n_gpu_layers", "split_mode", "main_gpu", "no_kv_offload", "flash_attn", "use_mmap", "embeddings",
                  "tensor_split", "devices")  # fmt: skip
_LLAMA_ENVIRONMENT = {"commit": "build_commit", "build": "build_number", "gpu": "gpu_info", "cpu": "cpu_info",
                      "backend": "backends", "model": "model_type"}  # fmt: skip


def _llama_bench(entries: Sequence[_Entry]) -> _Read:
    return [_llama_row(entry, entries) for entry in entries], _environment(entries, _LLAMA_ENVIRONMENT)


def _llama_row(entry: _Entry, entries: Sequence[_Entry]) -> Row:
    prompt, generated = int(entry.number("n_prompt")), int(entry.number("n_gen"))
    depth = int(entry.values.get("n_depth") or 0)
    if not prompt and not generated:
        raise ImportFileError(f"{entry.path}: a test of llama-bench has n_prompt and n_gen 0, expected one above 0")
    at = f" @ d{depth}" if depth else ""
    if prompt:
        name = match = f"pp{prompt}" + (f"+tg{generated}" if generated else "") + at
    else:
        name, match = tg_at_depth(generated, depth)
    differing = [
        f"{key}={entry.values[key]}"
        for key in _LLAMA_OPTIONS
        if key in entry.values and len({str(other.values.get(key)) for other in entries}) > 1
    ]
    options = f" [{', '.join(differing)}]" if differing else ""
    samples = entry.numbers("samples_ts")
    facts = entry.facts({"model": "model_type", "weight_bytes": "model_size"})
    size, parameters = entry.values.get("model_size"), entry.values.get("model_n_params")
    if size and parameters:
        facts["weight_bits"] = round(8 * size / parameters, 2)
    facts |= {"kv_type": _kv_type(entry), "batch": 1, "sampling": "none: random tokens are fed"}
    return Row(
        group="depth" if depth else "tokens",
        name=name + options,
        match=match + options,
        boundary="engine",
        metric="rate",
        unit="tok/s",
        value=float(np.median(samples)) if samples else entry.positive("avg_ts"),
        samples=samples,
        facts={key: value for key, value in facts.items() if value is not None},
    )


def _kv_type(entry: _Entry) -> str | None:
    """`type_k`, or both types where they differ; in the names that reports of ours have."""
    names = {"f16": "float16", "f32": "float32", "bf16": "bfloat16"}
    kinds = [names.get(kind, kind) for key in ("type_k", "type_v") if (kind := entry.values.get(key))]
    return " and ".join(dict.fromkeys(kinds)) or None


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def _vllm_latency(entries: Sequence[_Entry]) -> _Read:
    name, facts = "vLLM latency of a batch", {"lengths": "not in the file", "sampling": "temperature 1"}
    rows = []
    for entry in entries:
        average, samples = entry.positive("avg_latency"), entry.numbers("latencies")
        value = float(np.median(samples)) if samples else average
        rows.append(Row("tokens", name, "engine", "time", "s", value, name, samples=samples, facts=facts))
    return rows, {}


_SERVE_ENVIRONMENT = {"timestamp": "date", "model": "model_id", "engine": "backend", "request_rate": "request_rate"}


def _vllm_serve(entries: Sequence[_Entry]) -> _Read:
    rows = []
    for entry in entries:
        completed = entry.number("completed")
        if completed < 1:
            raise ImportFileError(f"{entry.path}: vLLM serve completed 0 requests: there is nothing to compare")
        facts = entry.facts({"model": "model_id", "concurrency": "max_concurrency", "request_rate": "request_rate",
                             "failed": "failed", "tokenizer": "tokenizer_id"})  # fmt: skip
        facts["prompt_tokens"] = round(entry.number("total_input_tokens") / completed)
        tokens = round(entry.number("total_output_tokens") / completed)
        load = _load(entry, entries)

        def add(
            name: str, value: float, unit: str, match: str, samples: tuple[float, ...] = (), load: str = load,
            facts: dict[str, Any] = facts,
        ) -> None:  # fmt: skip
            metric = "rate" if unit == "tok/s" else "time"
            rows.append(
                Row("server", name + load, "client", metric, unit, value, match + load, samples=samples, pace="host",
                    facts=facts)
            )  # fmt: skip

        firsts = tuple(1e3 * s for s in entry.numbers("ttfts"))
        add("ttft", entry.positive("median_ttft_ms"), "ms", "client ttft", firsts)
        add(f"tg{tokens}", 1e3 / entry.positive("median_tpot_ms"), "tok/s", f"tg{tokens}")
        gaps = entry.values.get("itls") or ()
        flat = tuple(1e3 * gap for request in gaps if isinstance(request, list) for gap in request if gap > 0)
        if "median_itl_ms" in entry.values:
            add("inter-token latency", entry.positive("median_itl_ms"), "ms", "client inter-token latency", flat)
        add("output throughput", entry.positive("output_throughput"), "tok/s", "client output throughput")
    return rows, _environment(entries, _SERVE_ENVIRONMENT)


def _load(entry: _Entry, entries: Sequence[_Entry]) -> str:
    """By what the runs of one file differ."""
    keys = ("request_rate", "max_concurrency", "num_prompts")
    differing = [f"{k}={entry.values.get(k)}" for k in keys if len({str(e.values.get(k)) for e in entries}) > 1]
    return f" [{', '.join(differing)}]" if differing else ""


_READERS = {LLAMA_BENCH: _llama_bench, VLLM_LATENCY: _vllm_latency, VLLM_SERVE: _vllm_serve}
