"""The decoder on the GPU: prefill, one decoded token as one CUDA graph, and greedy generation.

Reads from top to bottom: the cache, the model, and `_forward`, one step of the whole network as a list of launches.
:mod:`edgellm_cupy.reference.decoder` is the same network in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import ACTIVATIONS, MODEL_DTYPES, check_cache_size, check_tokens
from ..errors import ArgumentTypeError, ArgumentValueError
from ..formats import load_checkpoint
from ..formats.checkpoint import Checkpoint
from ..formats.config import ModelConfig
from ..formats.rotary import rotary_table
from ..formats.ternary import TernaryWeight
from ..kernels import Graph, capture, load
from ..ops import enqueue
from ..runtime import require_gpu
from ..tuning import decoder as tuning
from ..tuning.device import current_facts

_PREFILL_TOKENS = 4096  # tokens that a prefill processes at a time


@dataclass(frozen=True)
class _Buffers:
    """Intermediate results of one step for `tokens` tokens; the graph of a cache owns one set, a prefill another.

    x: residual stream [tokens, hidden]; qkv, up: results of the fused products; attended [tokens, heads * head_dim];
    h [tokens, intermediate]; last, normed: the last position of each sequence, before and after the final norm.
    """

    x: Any
    qkv: Any
    partial: Any
    attended: Any
    up: Any
    h: Any
    last: Any
    normed: Any
    splits: int


class KVCache:
    """Keys and values of `batch` sequences of one common length on the device.

    Attributes:
        keys, values: [layer, batch, kv head, position, head_dim] of the model's dtype.
        token: int32 [batch], where a decode step reads its tokens and leaves the next ones.
        logits: float32 [batch, vocabulary] of the last step.
        max_len, batch: what it was made for.
    """

    def __init__(self, model: TernaryTransformer, max_len: int, batch: int):
        """For :meth:`TernaryTransformer.new_cache`."""
        cp, config, dtype = model._cp, model.config, MODEL_DTYPES[model.dtype]
        # The graph below runs with this model's weights, so the cache serves no other model, and keeps this one alive.
        self._model = model
        shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)
        self.keys, self.values = cp.zeros(shape, dtype), cp.zeros(shape, dtype)
        self.max_len, self.batch = max_len, batch
        self.token = cp.zeros(batch, cp.int32)
        self.logits = cp.zeros((batch, config.vocab_size), cp.float32)
        # The length lives twice: on the device, where the kernels of a graph read it, and here, for checks.
        self._device_length, self._length = cp.zeros(1, cp.int32), 0
        self._best = cp.zeros(batch, cp.uint64)
        self._turns = cp.asarray(
            rotary_table(config.head_dim, config.rope_theta, config.rope_scaling, max_len, config.max_context)
        )
        self._decode_buffers: _Buffers | None = None
        self._graph: Graph | None = None

    @property
    def length(self) -> int:
        """Positions filled so far."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that it can hold."""
        return int(self.keys.nbytes + self.values.nbytes)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; the next token goes there. One 4-byte fill on the current stream.

        Raises:
            ArgumentValueError: longer than the cache is now, or negative.
        """
        if not 0 <= length <= self._length:
            raise ArgumentValueError(f"length is {length}, expected 0 to the present {self._length}")
        self._device_length.fill(length)
        self._length = length

    def fill_random(self, length: int, seed: int = 0) -> None:
        """Pretend that `length` positions were processed: random keys and values, for measuring at a depth.

        Raises:
            ArgumentValueError: more than `max_len`, or negative.
        """
        import cupy as cp

        if not 0 <= length <= self.max_len:
            raise ArgumentValueError(f"length is {length}, but the cache holds max_len = {self.max_len}")
        rng = np.random.default_rng(seed)
        block = rng.standard_normal((*self.keys.shape[1:3], length, self.keys.shape[-1]), dtype=np.float32)
        self.keys[..., :length, :] = cp.asarray(block.astype(self.keys.dtype))
        self.values[..., :length, :] = cp.asarray(block[..., ::-1].astype(self.keys.dtype))
        self._device_length.fill(length)
        self._length = length


@dataclass(frozen=True)
class _Layer:
    """One layer's weights on the device; see formats.checkpoint.LayerWeights."""

    attn_norm: Any
    qkv: TernaryWeight
    out: TernaryWeight
    ffn_norm: Any
    up: TernaryWeight
    down: TernaryWeight


class TernaryTransformer:
    """A Llama-class decoder with ternary projections, resident on the current device.

    Build one with :meth:`random` or :meth:`from_pretrained`.

    Args (of the constructor):
        checkpoint: host weights; they are copied to the device once.
        activation: ``"int8"`` (BitNet b1.58) or ``"float"``.
        dtype: of the residual stream, the KV cache and all intermediate results: ``"float16"``, ``"bfloat16"`` or
            ``"float32"``. The head is int8 rows times float32 activations in all cases.

    Raises:
        ArgumentTypeError: no Checkpoint.
        ArgumentValueError: an unknown option, or a configuration that the kernels cannot serve.
        GpuUnavailableError: no usable GPU.
    """

    def __init__(self, checkpoint: Checkpoint, activation: str = "int8", dtype: str = "float16"):
        if not isinstance(checkpoint, Checkpoint):
            raise ArgumentTypeError(
                f"checkpoint: expected a Checkpoint, got {type(checkpoint).__name__} (from_pretrained takes a path)"
            )
        if activation not in ACTIVATIONS:
            raise ArgumentValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if dtype not in MODEL_DTYPES:
            raise ArgumentValueError(f"dtype is {dtype!r}, expected one of {', '.join(MODEL_DTYPES)}")
        if reason := tuning.unsupported(checkpoint.config):
            raise ArgumentValueError(reason)
        cp = self._cp = require_gpu()
        self._device = cp.cuda.runtime.getDevice()
        self.config, self.activation, self.dtype = checkpoint.config, activation, dtype
        self._facts = current_facts()
        self._layers = [
            _Layer(
                cp.asarray(w.attn_norm),
                w.qkv.to_device(),
                w.out.to_device(),
                cp.asarray(w.ffn_norm),
                w.up.to_device(),
                w.down.to_device(),
            )
            for w in checkpoint.layers
        ]
        self._final_norm = cp.asarray(checkpoint.final_norm)
        # Rows of whole 16-byte chunks, which is what lm_head.cu reads.
        embedding = checkpoint.embedding.astype("int8")
        values = embedding.values
        padding = -values.shape[1] % 16
        self._head_values = cp.asarray(np.pad(values, ((0, 0), (0, padding))) if padding else values)
        self._head_scale = cp.asarray(embedding.scale)

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0, **options: Any) -> TernaryTransformer:
        """A model with seeded random ternary weights; `options` go to the constructor."""
        return cls(Checkpoint.random(config, seed), **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> TernaryTransformer:
        """A model from a checkpoint file; see :func:`edgellm_cupy.formats.load_checkpoint` for what it reads."""
        return cls(load_checkpoint(path), **options)

    def new_cache(self, max_len: int, batch: int = 1) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens.

        Raises:
            ArgumentTypeError, ArgumentValueError: either is no integer, or below 1; the model is on another device.
        """
        check_cache_size(max_len, batch)
        self._check_device()
        return KVCache(self, max_len, batch)

    # ---- using it ---------------------------------------------------------------------------------------------------

    def prefill(self, token_ids: Any, cache: KVCache) -> Any:
        """Append a prompt to the cache.

        Args:
            token_ids: integers [N] or [B, N] in host memory (a list or a NumPy array), B the cache's batch.

        Returns:
            float32 CuPy array [V] or [B, V]: the logits of the last position. They are `cache.logits`, which the next
            step overwrites. `cache.token` holds their greedy tokens.

        Raises:
            ArgumentTypeError, ArgumentValueError: dtype, shape, a token outside the vocabulary, no room left in the
                cache, or a cache of another model.
        """
        cp, ids = self._cp, np.asarray(token_ids)
        rows = np.atleast_2d(ids)
        self._check_cache(cache)
        check_tokens(rows, cache.batch, cache._length, cache.max_len, self.config.vocab_size)
        # In pieces, which bounds the memory of the intermediate results; the head is only computed for the last one.
        piece = max(1, _PREFILL_TOKENS // cache.batch)
        for start in range(0, rows.shape[1], piece):
            part = rows[:, start : start + piece]
            buffers = self._new_buffers(cache, part.size)
            last = start + piece >= rows.shape[1]
            self._forward(cp.asarray(part.astype(np.int32).ravel()), cache, buffers, head=last)
            cache._length += part.shape[1]
        return cache.logits[0] if ids.ndim == 1 else cache.logits

    def decode_one_token(self, token: Any, cache: KVCache) -> Any:
        """Append one token a sequence and choose the next ones greedily: one graph launch, no synchronisation.

        Args:
            token: int32 CuPy array [B]; best the array that the last call returned, which costs no copy. Its values
                are not checked, because they stay on the device. An int or a NumPy array is uploaded.

        Returns:
            int32 CuPy array [B], the next tokens. It is `cache.token`: the next call overwrites it.

        Raises:
            ArgumentTypeError, ArgumentValueError: dtype, shape, no room left in the cache, or a cache of another model.
                Nothing has changed then.
        """
        cp = self._cp
        self._check_cache(cache)
        if cache._length >= cache.max_len:
            raise ArgumentValueError(f"the cache is full: max_len = {cache.max_len}")
        if token is not cache.token:
            if isinstance(token, cp.ndarray):
                if token.dtype != cp.int32:
                    raise ArgumentTypeError(f"token.dtype is {token.dtype}, expected int32")
                if token.size != cache.batch:
                    raise ArgumentValueError(f"token.shape is {token.shape}, expected [{cache.batch}]")
            else:
                rows = np.asarray(token).reshape(-1, 1)
                check_tokens(rows, cache.batch, cache._length, cache.max_len, self.config.vocab_size)
                token = cp.asarray(rows.astype(np.int32))
            cache.token[...] = token.reshape(-1)
        if cache._graph is None:
            buffers = cache._decode_buffers = self._new_buffers(cache, cache.batch)
            cache._graph = capture(lambda: self._forward(cache.token, cache, buffers, head=True))
        cache._graph.launch()
        cache._length += 1
        return cache.token

    def generate(self, token_ids: Any, max_new_tokens: int = 128) -> Iterator[int]:
        """Greedy continuation of one prompt, token by token. token_ids: integers [N] in host memory.

        Reading a token out is the only synchronisation; the next step is on its way by then.

        Raises:
            ArgumentTypeError, ArgumentValueError: at once, not when the first token is asked for.
        """
        ids = np.asarray(token_ids)
        check_tokens(np.atleast_2d(ids), 1, 0, ids.size, self.config.vocab_size)
        return self._generate(ids, max_new_tokens) if max_new_tokens > 0 else iter(())

    def _generate(self, ids: np.ndarray, max_new_tokens: int) -> Iterator[int]:
        cache = self.new_cache(ids.size + max_new_tokens)
        self.prefill(ids, cache)
        for remaining in reversed(range(max_new_tokens)):
            token = int(cache.token[0])
            if remaining:
                self.decode_one_token(cache.token, cache)
            yield token

    def _check_device(self) -> None:
        current = self._cp.cuda.runtime.getDevice()
        if current != self._device:
            raise ArgumentValueError(f"the model is on device {self._device}, but the current device is {current}")

    def _check_cache(self, cache: KVCache) -> None:
        self._check_device()
        if cache._model is not self:
            raise ArgumentValueError("cache belongs to another model, expected one of this model's new_cache()")

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _forward(self, ids: Any, cache: KVCache, b: _Buffers, head: bool) -> None:
        """Enqueue one step: ids int32 [batch * N] in, the cache N longer, and with `head` logits and tokens out."""
        c, dtype = self.config, self.dtype
        tokens = b.x.shape[0]
        n = tokens // cache.batch
        load(tuning.EMBED)(
            (tokens, 1, 1),
            (tuning.THREADS, 1, 1),
            (
                ids,
                self._head_values,
                self._head_values.shape[1],
                self._head_scale,
                b.x,
                enqueue.DTYPE_TAGS[b.x.dtype],
                c.hidden_size,
            ),
        )
        for i, layer in enumerate(self._layers):
            self._product(b.x, layer.attn_norm, layer.qkv, None, b.qkv)
            self._attention(cache, i, n, b)
            self._product(b.attended, None, layer.out, b.x, b.x)
            self._product(b.x, layer.ffn_norm, layer.up, None, b.up)
            load(tuning.silu_spec(c, dtype))(
                (-(-c.intermediate_size // tuning.THREADS), tokens, 1),
                (tuning.THREADS, 1, 1),
                (b.up, b.h, c.intermediate_size),
            )
            self._product(b.h, None, layer.down, b.x, b.x)

        if head:
            self._head(cache, n, b)
        load(tuning.NEXT_TOKEN)(
            (1, 1, 1),
            (32, 1, 1),
            (cache._best, cache.token, cache._device_length, cache.batch if head else 0, n),
        )

    def _head(self, cache: KVCache, n: int, b: _Buffers) -> None:
        """Final norm, logits and their largest, for the last of each sequence's n tokens."""
        c = self.config
        if n > 1:
            b.last[...] = b.x.reshape(cache.batch, n, -1)[:, -1]
        last = b.last if n > 1 else b.x
        enqueue.rmsnorm(self._cp, last, self._final_norm, c.rms_eps, b.normed)
        load(tuning.LM_HEAD)(
            tuning.head_grid(c, cache.batch, self._facts),
            (tuning.THREADS, 1, 1),
            (b.normed, self._head_values, self._head_scale, cache.logits, c.vocab_size, c.hidden_size),
            (-(-c.hidden_size // 16) | 1) * 64,
        )
        load(tuning.ARGMAX)(
            (-(-c.vocab_size // (4 * tuning.THREADS)), cache.batch, 1),
            (tuning.THREADS, 1, 1),
            (cache.logits, cache._best, c.vocab_size),
        )

    def _product(self, x: Any, gamma: Any, weight: TernaryWeight, residual: Any, out: Any) -> None:
        enqueue.product(self._cp, x, gamma, weight, self.config.rms_eps, self.activation, residual, "adaptive", out)

    def _attention(self, cache: KVCache, layer: int, n: int, b: _Buffers) -> None:
        """Rotary embedding, append to the cache, attention over the cache: b.qkv -> b.attended."""
        c, tokens = self.config, b.x.shape[0]
        keys, values = cache.keys[layer], cache.values[layer]
        load(tuning.rope_spec(self.dtype))(
            (tokens, 1, 1),
            (tuning.THREADS, 1, 1),
            (
                b.qkv,
                keys,
                values,
                cache._turns,
                cache._device_length,
                n,
                c.num_heads,
                c.num_kv_heads,
                c.head_dim,
                cache.max_len,
            ),
        )
        load(tuning.attention_spec(c, self.dtype))(
            (b.splits, c.num_kv_heads, tokens),
            (tuning.ATTENTION_THREADS, 1, 1),
            (
                b.qkv,
                b.qkv.shape[1],
                keys,
                values,
                cache._device_length,
                n,
                c.num_kv_heads,
                cache.max_len,
                c.head_dim**-0.5,
                b.partial,
            ),
        )
        load(tuning.combine_spec(c, self.dtype))(
            (c.num_heads, tokens, 1),
            (c.head_dim, 1, 1),
            (b.partial, cache._device_length, n, b.splits, b.attended),
        )

    def _new_buffers(self, cache: KVCache, tokens: int) -> _Buffers:
        cp, c = self._cp, self.config
        dtype = MODEL_DTYPES[self.dtype]
        shapes = {name: shape[0] for name, shape in c.products().items()}
        splits = tuning.attention_splits(c, tokens, cache.max_len, self._facts)
        return _Buffers(
            x=cp.empty((tokens, c.hidden_size), dtype),
            qkv=cp.empty((tokens, shapes["qkv"]), dtype),
            partial=cp.empty((tokens, c.num_heads, splits, c.head_dim + 2), cp.float32),
            attended=cp.empty((tokens, c.q_rows), dtype),
            up=cp.empty((tokens, shapes["gate_up" if c.gated else "up"]), dtype),
            h=cp.empty((tokens, c.intermediate_size), dtype),
            last=cp.empty((cache.batch, c.hidden_size), dtype),
            normed=cp.empty((cache.batch, c.hidden_size), cp.float32),
            splits=splits,
        )
