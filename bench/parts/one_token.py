"""One decoded token, warm and at a depth: what profilers look at. As a program: what Nsight Compute is started on.

    python -m edgellm_cupy.bench.parts.one_token CONFIG OPTIONS

builds a random model of ONE layer of the configuration (the layers of a model are alike), warms it up, and decodes one
token between cudaProfilerStart and cudaProfilerStop. CONFIG is the JSON of a `ModelConfig`, OPTIONS a JSON object with
:data:`OPTIONS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import edgellm_cupy as ec

from ...formats.checkpoint import Checkpoint
from ..context import Context
from .utilisation import CONTEXT

OPTIONS = ("activation", "dtype", "head", "kv_dtype")
"""Fields of :class:`..context.Context` that change the decoder."""
CACHE_TOKENS = CONTEXT + 256
"""Positions of the cache. Attention is divided by the size of the cache too: whoever compares launch shapes takes this
one."""


def warm_steps(ctx: Context, tokens: int) -> Callable[[], None]:
    """A function that decodes `tokens` tokens around a context of :data:`.utilisation.CONTEXT`, to be called once.

    The same steps have run before: kernels are loaded, and every graph that they need is captured and uploaded. The
    device may still be busy with them. The cache, of :data:`CACHE_TOKENS`, lives as long as the function.
    """
    cache: Any = ctx.new_cache(CACHE_TOKENS)
    start = CONTEXT - tokens // 2

    def steps() -> None:
        token: Any = cache.token
        for _ in range(tokens):
            token = ctx.model.decode_one_token(token, cache)

    cache.fill_random(start)
    steps()
    cache.truncate(start)
    return steps


def described(ctx: Context) -> tuple[str, str]:
    """The CONFIG and OPTIONS of the decoder that `ctx` measures, for :func:`lookalike` in another process."""
    model = ctx.model
    chosen = (model.activation, model.dtype, model.head_dtype, ctx.kv_dtype)
    return json.dumps(ctx.config.to_dict()), json.dumps(dict(zip(OPTIONS, chosen, strict=True)))


def lookalike(config_text: str, options_text: str, layers: int | None = None) -> Context:
    """A run on the GPU with a decoder that launches the same kernels: random weights, each layer with the first one's.

    layers: their number; the configuration's when missing.

    Raises:
        CheckpointError: a configuration that makes no model.
        ValueError: an argument is not JSON, or an option is unknown.
    """
    config = ec.ModelConfig.from_dict(json.loads(config_text), "CONFIG")
    config = replace(config, num_layers=layers or config.num_layers)
    options = json.loads(options_text)
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"unknown option {unknown[0]!r}, expected {', '.join(OPTIONS)}")
    checkpoint = Checkpoint.random(config)
    alike = replace(checkpoint, layers=[checkpoint.layers[0]] * config.num_layers)
    return Context(alike, None, **options)


def main(arguments: Sequence[str]) -> None:
    """Run the program with its two arguments.

    Raises:
        EdgeLLMError: no usable GPU, or a configuration that makes no model.
        ValueError: an argument is not JSON, or an option is unknown.
    """
    config_text, options_text = arguments
    steps = warm_steps(lookalike(config_text, options_text, layers=1), 1)

    import cupy as cp

    cp.cuda.Device().synchronize()
    cp.cuda.runtime.profilerStart()
    steps()
    cp.cuda.Device().synchronize()
    cp.cuda.runtime.profilerStop()


if __name__ == "__main__":
    main(sys.argv[1:])
