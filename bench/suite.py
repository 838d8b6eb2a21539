"""The benchmark as a whole: which parts there are, in which order they run, and what one failing part means.

A part is a module with ``run(ctx) -> dict``. One that raises loses its own figures and nobody else's: they become null
with the reason. Ctrl-C ends the run and keeps what is finished. See :mod:`.report` for the document that comes out.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import edgellm_cupy as ec

from ..version import __version__
from . import (
    cpu,
    hardware,
    kernel_stats,
    latency,
    power,
    report,
    reproducibility,
    scaling,
    tokens,
    transfer,
    utilisation,
)
from .context import Context, WrongResultError
from .metrics import Metric, measured, missing

EXIT_DONE, EXIT_WRONG_RESULT, EXIT_PARTIAL, EXIT_INTERRUPTED = 0, 4, 6, 130


class Part(NamedTuple):
    """One concern of the benchmark.

    Attributes:
        module: has ``run(ctx) -> dict``, whose keys :mod:`.report` looks up.
        share: of a whole run's time, roughly, for the progress bar; a number without unit.
        decodes: its figures rest on the decoder, so they are only taken from one that is right.
    """

    module: ModuleType
    share: int
    decodes: bool = False


PARTS = {
    "hardware": Part(hardware, 1),
    "reproducibility": Part(reproducibility, 2),
    "latency": Part(latency, 20),
    "transfer": Part(transfer, 3),
    "tokens": Part(tokens, 25, decodes=True),
    "scaling": Part(scaling, 10, decodes=True),
    "power": Part(power, 15, decodes=True),
    "kernels": Part(kernel_stats, 3, decodes=True),
    "utilisation": Part(utilisation, 5, decodes=True),
    "cpu": Part(cpu, 3, decodes=True),
}
"""In the order in which they run: first what is cheap and says where we are, then the check of every kernel."""

LOGITS_BOUND = 0.15
"""Largest relative distance of the GPU's logits from the reference's, as norms over the vocabulary.

Intermediate results in float16 move some int8 activations to the neighbouring step. In NumPy that alone makes 0.06 for
30 random layers and 0.03 for 9. Mistakes that were tried there make more: a rotary base of 1e5 in place of 1e4 0.2, the
newest value lost 0.3, no rotation 0.5, no norm weights 0.8. Finer ones are for the check of each product.
"""


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
    result: report.Report = {
        "schema_version": report.SCHEMA_VERSION,
        "workload": _workload(ctx),
        "backend": ctx.backend,
        "no_gpu": ctx.no_gpu,
        "quick": ctx.quick,
        "command": command,
        "model": {
            "config": ctx.config.to_dict(),
            "weights": ctx.checkpoint.source,
            "body_bytes": ctx.checkpoint.body_bytes,
            "head_bytes": ctx.checkpoint.head_bytes,
        },
        "decoder_check": missing("no part that decodes was run"),
        "parts": {},
        "seconds": {},
        "errors": {},
        "failures": ctx.failures,
        "interrupted": False,
    }
    try:
        if any(PARTS[name].decodes for name in names):
            result["decoder_check"] = _attempt(ctx, "decoder_check", check_decoder, result["errors"])
        for name in names:
            begin(name)
            if PARTS[name].decodes and ctx.failures:
                result["errors"][name] = {"reason": "not measured, because a result was wrong"}
                continue
            start = time.perf_counter()
            figures = _attempt(ctx, name, PARTS[name].module.run, result["errors"])
            result["seconds"][name] = round(time.perf_counter() - start, 3)
            if name not in result["errors"]:
                result["parts"][name] = figures
    except KeyboardInterrupt:
        result["interrupted"] = True
    result["summary"] = report.summary(result)
    return result


def _attempt(
    ctx: Context, name: str, measure: Callable[[Context], dict[str, Any]], errors: dict[str, Any]
) -> dict[str, Any]:
    """What `measure` returns; if it raises, the reason as a null figure, and in `errors` under `name`."""
    try:
        figures = measure(ctx)
        # A figure that JSON cannot hold (NaN, an array) is its part's bug and must not cost the whole report.
        json.dumps(figures, allow_nan=False)
    except Exception as e:  # whatever a part raises: the other parts' figures are worth keeping
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
        if isinstance(e, WrongResultError):
            ctx.failures.append(str(e))
        errors[name] = {"reason": reason, "traceback": traceback.format_exc()}
        return missing(reason)
    return figures


def check_decoder(ctx: Context) -> Metric:
    """Compare the GPU's decoder with the reference: a prompt, then a few tokens that the reference chose.

    Raises:
        WrongResultError: the logits of a step lie further away than :data:`LOGITS_BOUND`, or are not finite.
    """
    if ctx.no_gpu:
        return missing("the NumPy backend is the reference")
    ctx.progress("checking the decoder against the reference")
    prompt_tokens, steps = 16, 4
    model, reference = ctx.model, ec.reference.TernaryTransformer(ctx.checkpoint, ctx.model.activation)
    cache, expected = model.new_cache(prompt_tokens + steps), reference.new_cache(prompt_tokens + steps)
    ids = np.random.default_rng(0).integers(0, ctx.config.vocab_size, prompt_tokens)
    errors: list[float] = []
    for step in range(steps + 1):
        if step == 0:
            model.prefill(ids, cache)
            reference.prefill(ids, expected)
        else:
            token = reference.sample(expected.logits)
            model.decode_one_token(token, cache)
            reference.decode_one_token(token, expected)
        logits = cache.logits.get()
        errors.append(float(np.linalg.norm(logits - expected.logits) / np.linalg.norm(expected.logits)))
        if not errors[-1] <= LOGITS_BOUND:
            raise WrongResultError(f"decoder: logits of step {step} differ by {errors[-1]:.3g}, allowed {LOGITS_BOUND}")
    return measured(max(errors), n=len(errors), bound=LOGITS_BOUND, of="norm of the difference / norm of the logits")


def exit_code(result: report.Report) -> int:
    """0 done, 4 a result was wrong, 6 a part failed, 130 interrupted."""
    if result["interrupted"]:
        return EXIT_INTERRUPTED
    if result["failures"]:
        return EXIT_WRONG_RESULT
    return EXIT_PARTIAL if result["errors"] else EXIT_DONE


def _workload(ctx: Context) -> dict[str, Metric]:
    """What was run, under the keys of the summary."""
    return {
        "timestamp": measured(datetime.now(timezone.utc).isoformat(timespec="seconds"), standard="ISO 8601"),
        "benchmark_version": measured(__version__),
        "model_name": measured(ctx.config.name),
        "batch_size": measured(1),
        "num_layers": measured(ctx.config.num_layers),
        "hidden_size": measured(ctx.config.hidden_size),
        "quantization": measured("ternary 2-bit weights, int8 activations, int8 embedding and head"),
        "sampling_method": measured("greedy"),
        "temperature": measured(0.0, meaning="greedy: the largest logit"),
        "kv_cache_enabled": measured(True),
    }
