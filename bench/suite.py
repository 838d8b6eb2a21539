"""The benchmark as a whole: which parts there are, in which order they run, and what one failing part means.

A part is a module with ``run(ctx) -> dict``, which measures its rows through `Context.row`. A row that raises is null
with the reason, and so is a part. Ctrl-C ends the run: the rows that are finished are in the report, and in the
journal, from which a later run can go on. See :mod:`.reporting.report` for the document that comes out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import edgellm_cupy as ec

from ..exit_codes import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PARTIAL, EXIT_UNSTABLE, EXIT_WRONG_RESULT
from ..formats.checkpoint import Checkpoint
from ..version import __version__
from . import journal
from .context import INTERRUPTED, Context, WrongResultError, describe, failure
from .machine import doctor
from .machine.nvml import current_nvml_device
from .machine.telemetry import Telemetry
from .metrics import Metric, inner, is_metric, measured, missing
from .parts import (
    cpu,
    hardware,
    kernel_stats,
    latency,
    power,
    reproducibility,
    scaling,
    table,
    tokens,
    transfer,
    utilisation,
)
from .reporting import report, stability


class Part(NamedTuple):
    """One concern of the benchmark.

    Attributes:
        module: has ``run(ctx) -> dict``, whose keys :mod:`.reporting.report` looks up.
        decodes: its figures rest on the decoder, so they are only taken from one that was found to be right.
        rows: what takes long in it are rows. After Ctrl-C it is run once more, to report those that are finished.
    """

    module: ModuleType
    decodes: bool = False
    rows: bool = True


PARTS = {
    "hardware": Part(hardware, rows=False),
    "reproducibility": Part(reproducibility),
    "latency": Part(latency),
    "transfer": Part(transfer),
    "tokens": Part(tokens, decodes=True),
    "scaling": Part(scaling, decodes=True),
    "power": Part(power, decodes=True),
    "utilisation": Part(utilisation, decodes=True),
    "cpu": Part(cpu, decodes=True),
    "kernels": Part(kernel_stats, decodes=True),
}
"""In the order in which they run: first what is cheap and says where we are, then the check of every kernel; last what
traces this process, so that no other part is timed by a process that was traced."""


class DecoderCheck(NamedTuple):
    """One comparison of the GPU's decoder with the reference.

    Attributes:
        activation: of both decoders.
        bound: largest relative distance of their logits, as norms over the vocabulary.
        depths: of random keys and values before the tokens and a prompt of :data:`PROMPT_TOKENS` behind them; 0: that
            prompt, and then the tokens.
    """

    activation: str
    bound: float
    depths: tuple[int, ...]


DECODER_CHECKS = (DecoderCheck("int8", 0.1, (0,)), DecoderCheck("float", 0.04, (0, 1024, scaling.DEPTHS[-1])))
"""The decoder that is timed, and for its attention at depth the same weights with float activations.

The reference rounds its intermediate results to float16 where the GPU stores them. What remains is float32 rounding,
which now and then tips an int8 activation over a tie, and that tips others after it: with the real SmolLM2-135M, a
change of 2e-7 in the embedding alone makes 0.03 behind a prompt. With random weights, changes of 2e-7 in every product
make 0.04, with an int8 cache in bfloat16 0.055. Mistakes that were tried make more: a rotary base of 1e5 in place of
1e4 0.2, the newest value lost 0.15 to 0.25, no rotation 0.5, no norm weights 0.8.

Random keys and values at depth amplify that too far to tell a lost split of the attention (0.24). With float
activations a right decoder makes 0.006 with random weights. With the real ones 0.025 was seen on an H200 at 16k, of
which 0.019 came from a random cache that only the GPU had rounded. A lost split makes 0.044 or more at either depth.
bfloat16 has eight times coarser steps to tip over: 0.026, where float16 makes 0.004.
"""

_WIDER = {"bfloat16": 2.0}  # times the bound of float activations; a lost split in bfloat16 may go unseen

PROMPT_TOKENS = 20
_CHECKED_TOKENS = 3  # decoded at each depth
_REFERENCE_CACHE_BYTES = 1 << 30  # of host memory: a larger model is checked at less depth
_REFERENCE_WEIGHTS = 300_000_000  # of a larger model the first layers are checked: NumPy needs seconds a token for all


def _nothing(name: str) -> None:
    """A part begins, and nobody watches."""


def run(
    ctx: Context, names: Iterable[str] = tuple(PARTS), command: str = "", begin: Callable[[str], None] = _nothing
) -> report.Report:
    """Run the parts `names` of :data:`PARTS` and return the report.

    Args:
        ctx: the workload and the backend.
        names: what to run, in this order.
        command: the command line, for the report.
        begin: called with the name of each part as it begins.
    """
    names = list(names)
    ctx.whole = set(names) == set(PARTS)
    result: report.Report = {
        "schema_version": report.SCHEMA_VERSION,
        "workload": _workload(ctx),
        "backend": ctx.backend,
        "no_gpu": ctx.no_gpu,
        "quick": ctx.quick,
        "seed": ctx.seed,
        "command": command,
        "environment": reproducibility.environment(ctx),
        "model": {
            "config": ctx.config.to_dict(),
            "weights": ctx.checkpoint.source,
            "body_bytes": ctx.checkpoint.body_bytes,
            "head_bytes": None,
            "decoder": None,
        },
        "decoder_check": missing("no part that decodes was run"),
        "parts": {},
        "seconds": {},
        "errors": {},
        "failures": ctx.failures,
        "interrupted": False,
        "doctor": missing(INTERRUPTED),
    }
    try:
        result["doctor"] = inner(_attempt(ctx, "doctor", _examined, result["errors"]), "found")
        with _telemetry(ctx) as ctx.telemetry:
            _run_parts(ctx, names, result, begin)
    except KeyboardInterrupt:
        ctx.interrupted = True
    result["interrupted"] = ctx.interrupted
    result["errors"] |= ctx.errors
    result["errors"] |= {f"telemetry/{probe}": failure(e) for probe, e in ctx.telemetry.broken.items()}
    result["resumed_rows"] = len(ctx.journal.taken)
    result["telemetry"] = ctx.telemetry.figures()
    result["stability"] = stability.findings(result)
    result["summary"] = report.summary(result)
    return result


def _examined(ctx: Context) -> dict[str, Any]:
    """What could disturb the run."""
    folder = ctx.journal.path.parent if ctx.journal.path else Path()
    return {"found": doctor.summary(doctor.examine(ctx.no_gpu, folder=folder))}


def _telemetry(ctx: Context) -> Telemetry:
    """What will watch the run."""
    if ctx.no_gpu:
        return ctx.telemetry
    try:
        return Telemetry(current_nvml_device())
    except Exception as e:  # whatever it is, the run can be measured without
        ctx.errors["telemetry"] = failure(e)
        return Telemetry(None, describe(e))


def _run_parts(ctx: Context, names: list[str], result: report.Report, begin: Callable[[str], None]) -> None:
    """Check the decoder where a part needs it, and run the parts; what comes out goes into `result`."""
    if not ctx.interrupted and any(PARTS[name].decodes for name in names):
        built = _attempt(ctx, "decoder_check", _build_and_check, result["errors"])
        result["decoder_check"] = built.get("check", built)
        if "decoder" in built:
            result["model"] |= {"head_bytes": ctx.model.head_bytes, "decoder": built["decoder"]}
            result["workload"]["quantization"] = measured(_quantization(**built["decoder"]))
    for name in names:
        if ctx.interrupted:
            return
        begin(name)
        if PARTS[name].decodes and (reason := _doubt(ctx, result)):
            result["errors"][name] = {"reason": f"not measured: {reason}"}
            continue
        taken, start = sum(ctx.journal.taken.values()), time.perf_counter()
        measure = table.run if name == "latency" and ctx.tokens else PARTS[name].module.run
        with ctx.telemetry.part(name):
            figures = _attempt(ctx, name, measure, result["errors"], PARTS[name].rows)
        earlier = sum(ctx.journal.taken.values()) - taken  # what its rows took in the process that measured them
        result["seconds"][name] = round(earlier + time.perf_counter() - start, 3)
        if not is_metric(figures):
            result["parts"][name] = figures


def identity(ctx: Context, names: Iterable[str], weights: Path | None = None) -> dict[str, Any]:
    """What must be the same for rows of two processes to belong to one run.

    weights: file or folder of the checkpoint; None when it is random.
    """
    where = reproducibility.environment(ctx)
    return {
        "code": reproducibility.code_hash(),
        "versions": reproducibility.versions(),
        **{key: where[key]["value"] for key in _SAME},
        "tuned": {key: where["tuned"].get(key) for key in ("value", "sha256")},
        "variables": reproducibility.changing_variables(),
        "gpu_uuid": None if ctx.no_gpu else current_nvml_device().read("UUID")["value"],
        "backend": ctx.backend,
        "parts": list(names),
        "model": ctx.config.to_dict(),
        "weights": ctx.checkpoint.source,
        "checkpoint": _files(weights),
        "decoder": {**ctx.options, "kv_dtype": ctx.kv_dtype},
        "tokens": list(ctx.tokens),
        "quick": ctx.quick,
        "seed": ctx.seed,
    }


_SAME = ("git_commit", "gpu_model", "driver_version", "cuda_version", "cpu_model")
_WEIGHTS = (".safetensors", ".gguf", ".pt")


def _files(weights: Path | None) -> dict[str, str]:
    """Name -> size and time of each file of a checkpoint: they tell a changed one, and cost no reading of gigabytes."""
    if weights is None:
        return {}
    shards = weights.parent if weights.name.endswith(".index.json") else weights
    files = [path for path in shards.iterdir() if path.suffix in _WEIGHTS] if shards.is_dir() else [weights]
    return {path.name: f"{(stat := path.stat()).st_size} bytes at {_when(stat.st_mtime)}" for path in sorted(files)}


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()


def seed_of(folder: Path) -> int:
    """The seed of the run in `folder`, for the process that resumes it; 0 where none was recorded.

    Raises:
        JournalError: its rows.jsonl cannot be read.
    """
    header, _ = journal.read(folder / journal.FILE)
    found = header["identity"].get("seed") if isinstance(header["identity"], dict) else None
    return found if isinstance(found, int) else 0


def _doubt(ctx: Context, result: report.Report) -> str | None:
    """Why a speed of the decoder would mean nothing, or None."""
    if ctx.failures:
        return "a result was wrong"
    return "the check of the decoder failed" if "decoder_check" in result["errors"] else None


def _attempt(
    ctx: Context, name: str, measure: Callable[[Context], dict[str, Any]], errors: dict[str, Any], rows: bool = False
) -> dict[str, Any]:
    """What `measure` returns; if it raises, the reason as a null figure, and in `errors` under `name`.

    rows: it is made of rows, so that after Ctrl-C it takes no time to ask it once more for what is finished.
    """
    try:
        try:
            figures = measure(ctx)
        except KeyboardInterrupt:
            ctx.interrupted = True
            if not rows:
                return missing(INTERRUPTED)
            figures = measure(ctx)
        # A figure that JSON cannot hold (NaN, an array) is its part's bug and must not cost the whole report.
        json.dumps(figures, allow_nan=False)
    except Exception as e:  # whatever a part raises: the other parts' figures are worth keeping
        if isinstance(e, WrongResultError):
            ctx.failures.append(str(e))
        errors[name] = failure(e)
        return missing(describe(e))
    return figures


def _build_and_check(ctx: Context) -> dict[str, Any]:
    """`decoder`, what the timed one computes in and is stored as, and its `check`."""
    check = check_decoder(ctx)
    decoder = {
        "activation": ctx.model.activation,
        "dtype": ctx.model.dtype,
        "head": ctx.model.head_dtype,
        "kv_cache": ctx.new_cache(1).dtype,
    }
    return {"check": check, "decoder": decoder}


def _quantization(activation: str, dtype: str, head: str, kv_cache: str) -> str:
    activations = f"{dtype} activations" if activation == "float" else f"{activation} activations in {dtype} layers"
    return f"ternary 2-bit weights, {activations}, {head} embedding and head, {kv_cache} keys and values"


def check_decoder(ctx: Context) -> Metric:
    """Compare the GPU's decoder with the reference in :data:`DECODER_CHECKS`, in a cache as :mod:`.parts.scaling` uses.

    Of a model that is too large for the reference, the first layers are compared, and the whole is only looked at.

    Raises:
        WrongResultError: logits that lie too far away or are not finite, or a token that is not their largest.
    """
    if ctx.no_gpu:
        return missing("the NumPy backend is the reference")
    checkpoint = _first_layers(ctx.checkpoint)
    whole = checkpoint is ctx.checkpoint
    checks = [check for check in DECODER_CHECKS if check.activation in (ctx.activation, "float")]
    bounds = {check.activation: _bound(check, ctx.model.dtype) for check in checks}
    errors = {check.activation: _logit_errors(ctx, check, checkpoint) for check in checks}
    if not whole:
        _look_at_the_whole(ctx)
    timed = errors.pop(ctx.activation)
    layers = {} if whole else {"layers": f"the first {len(checkpoint.layers)} of {ctx.config.num_layers}"}
    return measured(
        max(timed),
        n=len(timed),
        bound=bounds[ctx.activation],
        of="norm of the difference / norm of the logits",
        **layers,
        **{
            f"{activation}_activations_at_depth": f"{max(found):.3g}, bound {bounds[activation]}"
            for activation, found in errors.items()
        },
    )


def _bound(check: DecoderCheck, dtype: str) -> float:
    return check.bound * (_WIDER.get(dtype, 1.0) if check.activation == "float" else 1.0)


def _first_layers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or of a large one a model of its first layers, which are read once and kept."""
    config = checkpoint.config
    count = max(2, _REFERENCE_WEIGHTS // sum(m * k for m, k in config.products().values()))
    if config.num_layers <= count:
        return checkpoint
    embedding = checkpoint.embedding
    head = embedding if config.tied_head else checkpoint.head
    return replace(
        checkpoint,
        config=replace(config, num_layers=count),
        layers=checkpoint.layers[:count],
        read_embedding=lambda: embedding,
        read_head=lambda: head,
    )


def _look_at_the_whole(ctx: Context) -> None:
    """A prompt and a token of the timed decoder, without a reference."""
    ctx.progress("looking at the logits of the whole model")
    cache = ctx.new_cache(scaling.cache_length(ctx))
    ctx.model.prefill(_check_ids(ctx)[:PROMPT_TOKENS], cache)
    _logits_of(cache, "whole decoder, prompt")
    ctx.model.decode_one_token(_check_ids(ctx)[PROMPT_TOKENS], cache)
    _logits_of(cache, "whole decoder, token")


def _check_ids(ctx: Context) -> np.ndarray:
    return np.random.default_rng(tokens.PROMPT_SEED).integers(0, ctx.config.vocab_size, PROMPT_TOKENS + _CHECKED_TOKENS)


def _logits_of(cache: Any, where: str) -> np.ndarray:
    """The logits of the last step, once they are known to be finite and the chosen token to be their largest."""
    logits, token = np.asarray(cache.logits.get()), int(cache.token.get()[0])
    if not np.isfinite(logits).all():
        raise WrongResultError(f"{where}: {int((~np.isfinite(logits)).sum())} logits are not finite")
    if token != int(logits.argmax()):
        raise WrongResultError(f"{where}: the next token is {token}, the largest logit {int(logits.argmax())}")
    return logits


def _logit_errors(ctx: Context, check: DecoderCheck, checkpoint: Checkpoint) -> list[float]:
    """The relative distance after each step: prompts, and tokens that both decoders are told to take."""
    same = checkpoint is ctx.checkpoint and ctx.model.activation == check.activation
    options = ctx.options | {"activation": check.activation}
    model = ctx.model if same else type(ctx.model)(checkpoint, **options)
    bound = _bound(check, model.dtype)
    reference = ec.reference.TernaryTransformer(checkpoint, **options | {"dtype": model.dtype})
    position_bytes = reference.new_cache(1).nbytes
    deepest = min(max(check.depths), _REFERENCE_CACHE_BYTES // position_bytes)
    cache = model.new_cache(scaling.cache_length(ctx), dtype=ctx.kv_dtype)
    expected = reference.new_cache(deepest + PROMPT_TOKENS + _CHECKED_TOKENS, dtype=ctx.kv_dtype)
    ids = _check_ids(ctx)
    errors: list[float] = []

    def compare(step: str) -> None:
        where = f"decoder, {check.activation} activations, {step}"
        logits = _logits_of(cache, where)
        errors.append(float(np.linalg.norm(logits - expected.logits) / np.linalg.norm(expected.logits)))
        if not errors[-1] <= bound:
            raise WrongResultError(f"{where}: logits differ by {errors[-1]:.3g}, allowed {bound}")

    for depth in sorted({min(depth, deepest) for depth in check.depths}):
        ctx.progress(f"checking the decoder against the reference: {check.activation} activations, context {depth}")
        for decoder, target in ((model, cache), (reference, expected)):
            if depth:
                target.fill_random(depth)
            else:
                decoder.prefill(ids[:PROMPT_TOKENS], target)
        if not depth:
            compare(f"prompt of {PROMPT_TOKENS}")
        for token in ids[PROMPT_TOKENS:]:
            position = expected.length
            model.decode_one_token(token, cache)
            reference.decode_one_token(token, expected)
            compare(f"token at position {position}")
        if depth:
            position = expected.length
            model.prefill(ids[:PROMPT_TOKENS], cache)
            reference.prefill(ids[:PROMPT_TOKENS], expected)
            compare(f"prompt of {PROMPT_TOKENS} at position {position}")
    return errors


def exit_code(result: report.Report, strict: bool = False) -> int:
    """0 done, 4 a result was wrong, 5 it was unstable (only if `strict`), 6 a part or a row failed, 130 interrupted."""
    if result["interrupted"]:
        return EXIT_INTERRUPTED
    if result["failures"]:
        return EXIT_WRONG_RESULT
    if result["errors"]:
        return EXIT_PARTIAL
    return EXIT_UNSTABLE if strict and result["stability"] else EXIT_DONE


def _workload(ctx: Context) -> dict[str, Metric]:
    """What was run, under the keys of the summary."""
    when = {
        "timestamp": measured(datetime.now(timezone.utc).isoformat(timespec="seconds"), standard="ISO 8601"),
        "benchmark_version": measured(__version__),
    }
    what = {
        "model_name": measured(ctx.config.name),
        "batch_size": measured(1),
        "num_layers": measured(ctx.config.num_layers),
        "hidden_size": measured(ctx.config.hidden_size),
        "quantization": missing("no decoder was built"),
        "sampling_method": measured("greedy"),
        "temperature": measured(0.0, meaning="greedy: the largest logit"),
        "kv_cache_enabled": measured(True),
    }
    return when | (dict.fromkeys(what, missing("a table of shapes was measured, no model")) if ctx.tokens else what)
