"""The decoder on the GPU: prefill, one decoded token as one CUDA graph, and generation.

Reads from top to bottom: the cache, the model, and `_forward`, one step of the whole network as a list of launches.
:mod:`edgellm_cupy.reference.decoder` is the same network in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import (
    ACTIVATIONS,
    MODEL_DTYPES,
    as_sequences,
    check_cache_size,
    check_generation,
    check_option,
    check_sampling,
    check_tokens,
    is_one_sequence,
)
from ..errors import ArgumentTypeError, ArgumentValueError
from ..formats import load_checkpoint
from ..formats.checkpoint import ROW_DTYPES, Checkpoint, LayerWeights, Rows
from ..formats.config import SQUARED_UNIT, ModelConfig
from ..formats.rotary import rotary_table
from ..formats.ternary import TernaryWeight
from ..kernels import Graph, capture, load
from ..kernels.spec import Launch
from ..ops import enqueue
from ..runtime import require_gpu
from ..sampling import Sampling
from ..tuning import attention
from ..tuning import decoder as tuning
from ..tuning.device import current_facts

_PREFILL_TOKENS = 4096  # tokens that a prefill processes at a time


@dataclass(frozen=True)
class _Buffers:
    """Intermediate results of one step for `tokens` tokens; the graph of a cache owns one set, a prefill another.

    x: residual stream [tokens, hidden]; qkv: result of the fused product; attended [tokens, heads * head_dim];
    h [tokens, intermediate]; partial, stats: shares of attention.cu over `splits` blocks, None where none is used;
    cluster: blocks of a cluster that merge a decode step's shares instead; 0: none do.
    """

    x: Any
    qkv: Any
    attended: Any
    h: Any
    partial: Any
    stats: Any
    splits: int
    cluster: int = 0


class KVCache:
    """Keys and values of `batch` sequences, of which each has a length of its own, on the device.

    Attributes:
        keys, values: [layer, batch, kv head, position, pitch], pitch = head_dim up to whole 16 bytes, zero beyond it.
        key_scales, value_scales: float32 [layer, batch, kv head, position] where `dtype` is int8, else None.
        dtype: of keys and values, by name.
        token: int32 [batch], where a decode step reads its tokens and leaves the next ones.
        logits: float32 [batch, vocabulary] of the last step.
        max_len, batch: what it was made for.
    """

    def __init__(self, model: TernaryTransformer, max_len: int, batch: int, dtype: str, sampling: Sampling):
        """For :meth:`TernaryTransformer.new_cache`."""
        cp, config = model._cp, model.config
        # The graphs below run with this model's weights, so the cache serves no other model, and keeps this one alive.
        self._model, self._cp = model, cp
        pitch = attention.cached_dim(config.head_dim, dtype)
        shape = (config.num_layers, batch, config.num_kv_heads, max_len)
        element = ROW_DTYPES[dtype]
        self.keys, self.values = cp.zeros((*shape, pitch), element), cp.zeros((*shape, pitch), element)
        self.key_scales = cp.zeros(shape, cp.float32) if dtype == "int8" else None
        self.value_scales = cp.zeros(shape, cp.float32) if dtype == "int8" else None
        self.dtype, self.max_len, self.batch = dtype, max_len, batch
        self.token = cp.zeros(batch, cp.int32)
        self.logits = cp.zeros((batch, config.vocab_size), cp.float32)
        # The lengths live twice: on the device, where the kernels of a graph read them, and here, for checks.
        self._device_lengths, self._lengths = cp.zeros(batch, cp.int32), [0] * batch
        self._best = cp.zeros(batch, cp.uint64)
        self._turns = cp.asarray(
            rotary_table(config.head_dim, config.rope_theta, config.rope_scaling, max_len, config.max_context)
        )
        # What sampling reads is on the device too, so that it may change between two launches of a graph.
        self._seen = cp.zeros((batch, config.vocab_size), cp.uint8)  # 1: in the context
        self._numbers, self._integers = cp.zeros(4, cp.float32), cp.zeros(3, cp.uint32)
        self._graphs: dict[tuple[bool, int], Graph] = {}  # by greedy or not, and size of attention's clusters
        self._decode_buffers: _Buffers | None = None
        self.sampling = sampling

    @property
    def length(self) -> int:
        """Positions filled so far, of the longest sequence."""
        return max(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions filled so far, of each sequence."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that it can hold, with their scales."""
        arrays = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(int(a.nbytes) for a in arrays if a is not None)

    @property
    def sampling(self) -> Sampling:
        """How the next tokens are chosen from here on; may be set at any time."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        check_sampling(sampling)
        cp, s = self._cp, sampling
        self._sampling = s
        numbers = np.array([s.temperature, s.top_p, s.min_p, s.repetition_penalty], np.float32)
        integers = np.array([min(s.top_k, self._model.config.vocab_size), s.seed % 2**32, s.seed >> 32], np.uint32)
        self._numbers[...], self._integers[...] = cp.asarray(numbers), cp.asarray(integers)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on, of every sequence that is longer; the next token goes there.

        With 0 the repetition penalty forgets too; after another length it still knows the tokens that were cut off.

        Raises:
            ArgumentValueError: longer than the longest sequence is now, or negative.
        """
        if not 0 <= length <= self.length:
            raise ArgumentValueError(f"length is {length}, expected 0 to the present {self.length}")
        self._set_lengths([min(length, old) for old in self._lengths])
        if length == 0:
            self._seen.fill(0)

    def fill_random(self, length: int, seed: int = 0) -> None:
        """Pretend that `length` positions were processed: random keys and values, for measuring at a depth.

        Raises:
            ArgumentValueError: more than `max_len`, or negative.
        """
        cp = self._cp
        if not 0 <= length <= self.max_len:
            raise ArgumentValueError(f"length is {length}, but the cache holds max_len = {self.max_len}")
        head_dim = self._model.config.head_dim
        rng = np.random.default_rng(seed)
        block = rng.standard_normal((*self.keys.shape[1:3], length, head_dim), dtype=np.float32)
        block = block.astype(MODEL_DTYPES[self._model.dtype]).astype(np.float32)
        for target, scales, rows in (
            (self.keys, self.key_scales, block),
            (self.values, self.value_scales, block[..., ::-1]),
        ):
            if scales is not None:
                step = np.abs(rows).max(axis=-1) / np.float32(127)
                rows = np.rint(rows / np.where(step == 0, np.float32(1), step)[..., None])
                scales[..., :length] = cp.asarray(step)
            target[..., :length, :head_dim] = cp.asarray(rows.astype(ROW_DTYPES[self.dtype]))
        self._set_lengths([length] * self.batch)

    def _set_lengths(self, lengths: list[int]) -> None:
        if len(set(lengths)) == 1:
            self._device_lengths.fill(lengths[0])
        else:
            self._device_lengths[...] = self._cp.asarray(np.array(lengths, np.int32))
        self._lengths = lengths


@dataclass(frozen=True)
class _Layer:
    """One layer's weights on the device; see formats.checkpoint.LayerWeights. `up` has gate and up in turns."""

    attn_norm: Any
    qkv: TernaryWeight
    attn_sub_norm: Any
    out: TernaryWeight
    ffn_norm: Any
    up: TernaryWeight
    ffn_sub_norm: Any
    down: TernaryWeight


@dataclass(frozen=True)
class _DeviceRows:
    """Embedding or head on the device: values [V, pitch], whole 16-byte pieces a row; scale float32 [V] or None."""

    values: Any
    scale: Any
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes + (0 if self.scale is None else self.scale.nbytes))


class TernaryTransformer:
    """A decoder of the Llama or BitNet b1.58 architecture with ternary projections, resident on the current device.

    Build one with :meth:`random` or :meth:`from_pretrained`.

    Args (of the constructor):
        checkpoint: host weights; they are copied to the device once, a layer at a time.
        activation: ``"int8"`` (BitNet b1.58) or ``"float"``.
        dtype: of the residual stream and all intermediate results: ``"float16"``, ``"bfloat16"`` or ``"float32"``;
            ``"auto"``: float16.
        head: what embedding and head are stored as: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"int8"`` (a scale
            a row; an element is off by up to absmax(row) / 254); ``"auto"``: as they are in the checkpoint. They are
            multiplied with float32 activations in all cases.

    Raises:
        ArgumentTypeError: no Checkpoint.
        ArgumentValueError: an unknown option, or a configuration that the kernels cannot serve.
        CheckpointError: a layer of the file is damaged.
        GpuUnavailableError: no usable GPU.
    """

    def __init__(self, checkpoint: Checkpoint, activation: str = "int8", dtype: str = "auto", head: str = "auto"):
        if not isinstance(checkpoint, Checkpoint):
            raise ArgumentTypeError(
                f"checkpoint: expected a Checkpoint, got {type(checkpoint).__name__} (from_pretrained takes a path)"
            )
        check_option("activation", activation, ACTIVATIONS)
        check_option("dtype", dtype, ("auto", *MODEL_DTYPES))
        check_option("head", head, ("auto", *ROW_DTYPES))
        self._cp = require_gpu()
        self._facts = current_facts()
        if reason := tuning.head_unsupported(checkpoint.config, self._facts):
            raise ArgumentValueError(reason)
        self._device = self._cp.cuda.runtime.getDevice()
        self.config, self.activation = checkpoint.config, activation
        self.dtype = "float16" if dtype == "auto" else dtype
        self._layers = [self._to_device(layer) for layer in checkpoint.layers]
        self._final_norm = self._cp.asarray(checkpoint.final_norm)
        self._embedding = self._rows_to_device(checkpoint.embedding, head)
        tied = checkpoint.config.tied_head
        self._head = self._embedding if tied else self._rows_to_device(checkpoint.head, head)
        # As ternary weights do: kernels read the head before the kernels in front of them have ended.
        self._cp.cuda.get_current_stream().synchronize()

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0, **options: Any) -> TernaryTransformer:
        """A model with seeded random ternary weights; `options` go to the constructor."""
        return cls(Checkpoint.random(config, seed), **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> TernaryTransformer:
        """A model from a checkpoint, a file or a folder: see :func:`edgellm_cupy.formats.load_checkpoint`.

        `options` go to the constructor.
        """
        return cls(load_checkpoint(path), **options)

    @property
    def head_dtype(self) -> str:
        """What the head is stored as."""
        return self._head.dtype

    @property
    def head_bytes(self) -> int:
        """Bytes of the head: what one token reads of it."""
        return self._head.nbytes

    def new_cache(self, max_len: int, batch: int = 1, dtype: str = "auto", sampling: Sampling | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens.

        Args:
            dtype: of keys and values: ``"auto"`` (the model's) or ``"int8"``, with a scale a vector.
            sampling: how the next tokens are chosen; greedy without it.

        Raises:
            ArgumentTypeError, ArgumentValueError: a number that is no integer or below 1, an unknown dtype, a cache
                too large for the kernels; the model is on another device.
        """
        check_cache_size(max_len, batch)
        check_option("dtype", dtype, ("auto", self.dtype, "int8"))
        self._check_device()
        sampling = Sampling() if sampling is None else sampling
        return KVCache(self, max_len, batch, self.dtype if dtype == "auto" else dtype, sampling)

    # ---- using it ---------------------------------------------------------------------------------------------------

    def prefill(self, token_ids: Any, cache: KVCache) -> Any:
        """Append a prompt to the cache, in pieces that bound the memory of intermediate results.

        Args:
            token_ids: integers in host memory, B the cache's batch: [N], [B, N], or B sequences of different lengths.

        Returns:
            float32 CuPy array [V] or [B, V]: the logits of each sequence's last position. They are `cache.logits`,
            which the next step overwrites. `cache.token` holds the tokens chosen by `cache.sampling`.

        Raises:
            ArgumentTypeError, ArgumentValueError: dtype, shape, a token outside the vocabulary, no room left in the
                cache, or a cache of another model. Nothing has changed then.
        """
        self._check_cache(cache)
        rows = as_sequences(token_ids, cache.batch)
        one = is_one_sequence(token_ids)
        self._check_tokens(rows, cache)
        if len({row.size for row in rows}) == 1:
            self._prefill(np.stack(rows), cache, 0)
        else:  # one after the other: no work is spent on padding
            for b, row in enumerate(rows):
                self._prefill(row[None], cache, b)
        return cache.logits[0] if one else cache.logits

    def _prefill(self, rows: np.ndarray, cache: KVCache, first: int) -> None:
        """rows: [B', N] of the sequences first, first + 1, ...; the head is only computed for the last piece."""
        batch, n = rows.shape
        piece = max(1, _PREFILL_TOKENS // batch)
        for start in range(0, n, piece):
            part = rows[:, start : start + piece]
            buffers = self._new_buffers(cache, part.size, batch)
            ids = self._cp.asarray(np.ascontiguousarray(part, np.int32).ravel())
            self._forward(ids, cache, buffers, first, batch, head=start + piece >= n)
            for b in range(first, first + batch):
                cache._lengths[b] += part.shape[1]

    def decode_one_token(self, token: Any, cache: KVCache) -> Any:
        """Append one token a sequence and choose the next ones: one graph launch, no synchronisation.

        Args:
            token: int32 CuPy array [B]; best the array that the last call returned, which costs no copy. Its values
                are not checked, because they stay on the device. An int or a NumPy array is uploaded.

        Returns:
            int32 CuPy array [B], the next tokens, chosen by `cache.sampling`. It is `cache.token`: the next call
            overwrites it.

        Raises:
            ArgumentTypeError, ArgumentValueError: dtype, shape, no room left in the cache, or a cache of another model.
                Nothing has changed then.
        """
        self._check_cache(cache)
        if cache.length >= cache.max_len:
            raise ArgumentValueError(f"the cache is full: max_len = {cache.max_len}")
        if token is not cache.token:
            self._take_token(token, cache)
        cluster = tuning.cluster_size(self.config, self.dtype, cache.batch, cache.length + 1, self._facts)
        kind = cache.sampling.greedy, cluster
        graph = cache._graphs.get(kind)
        if graph is None:
            if cache._decode_buffers is None:
                cache._decode_buffers = self._new_buffers(cache, cache.batch, cache.batch)
            buffers = replace(cache._decode_buffers, cluster=cluster)
            graph = cache._graphs[kind] = capture(
                lambda: self._forward(cache.token, cache, buffers, 0, cache.batch, head=True)
            )
        graph.launch()
        cache._lengths = [length + 1 for length in cache._lengths]
        return cache.token

    def _take_token(self, token: Any, cache: KVCache) -> None:
        cp = self._cp
        if isinstance(token, cp.ndarray):
            if token.dtype != cp.int32:
                raise ArgumentTypeError(f"token.dtype is {token.dtype}, expected int32")
            if token.size != cache.batch:
                raise ArgumentValueError(f"token.shape is {token.shape}, expected [{cache.batch}]")
        else:
            rows = as_sequences(np.asarray(token).reshape(-1, 1), cache.batch)
            self._check_tokens(rows, cache)
            token = cp.asarray(np.concatenate(rows).astype(np.int32))
        cache.token[...] = token.reshape(-1)

    def generate(
        self,
        token_ids: Any,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Iterable[int] = (),
        kv_dtype: str = "auto",
    ) -> Iterator[Any]:
        """Continuation of one prompt or of several, token by token.

        Reading a token out is the only synchronisation, and the next step is on its way by then.

        Args:
            token_ids: integers in host memory: one prompt [N], or several as [B, N] or a list of B sequences.
            max_new_tokens: at most so many a sequence.
            sampling: how tokens are chosen; greedy without it.
            stop_tokens: end a sequence; they are not yielded.
            kv_dtype: of the cache, as in :meth:`new_cache`.

        Yields:
            One prompt: int. Several: int32 NumPy arrays [B], with -1 for sequences that have ended.

        Raises:
            ArgumentTypeError, ArgumentValueError: at once, not when the first token is asked for.
        """
        self._check_device()
        one, rows, stop = check_generation(token_ids, max_new_tokens, stop_tokens, self.config.vocab_size)
        longest = max(row.size for row in rows)
        cache = self.new_cache(longest + max(max_new_tokens, 1), len(rows), kv_dtype, sampling)
        if max_new_tokens == 0:
            return iter(())
        steps = self._steps(rows, cache, max_new_tokens, stop)
        return (int(tokens[0]) for tokens in steps) if one else steps

    def _steps(self, rows: list[np.ndarray], cache: KVCache, steps: int, stop: frozenset[int]) -> Iterator[np.ndarray]:
        self.prefill(rows, cache)
        running = np.ones(cache.batch, bool)
        reader = _TokenReader(self._cp, cache.token)
        for remaining in reversed(range(steps)):
            reader.start()
            if remaining:
                self.decode_one_token(cache.token, cache)
            tokens = reader.finish()
            running &= ~np.isin(tokens, list(stop))
            if not running.any():
                return
            yield np.where(running, tokens, -1).astype(np.int32)

    def _check_device(self) -> None:
        current = self._cp.cuda.runtime.getDevice()
        if current != self._device:
            raise ArgumentValueError(f"the model is on device {self._device}, but the current device is {current}")

    def _check_cache(self, cache: KVCache) -> None:
        self._check_device()
        if cache._model is not self:
            raise ArgumentValueError("cache belongs to another model, expected one of this model's new_cache()")

    def _check_tokens(self, rows: list[np.ndarray], cache: KVCache) -> None:
        for row, length in zip(rows, cache._lengths, strict=True):
            check_tokens(row[None], 1, length, cache.max_len, self.config.vocab_size)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _forward(self, ids: Any, cache: KVCache, b: _Buffers, first: int, batch: int, head: bool) -> None:
        """Enqueue one step of the sequences first .. first + batch - 1.

        ids int32 [batch * N] in, the cache N longer, and with `head` logits and tokens out.
        """
        c, e = self.config, self._embedding
        tokens = b.x.shape[0]
        n = tokens // batch
        part = slice(first, first + batch)
        lengths, token, best = cache._device_lengths[part], cache.token[part], cache._best[part]
        seen, logits = cache._seen[part], cache.logits[part]
        load(tuning.embed_spec(e.dtype))(
            (tokens, 1, 1),
            (tuning.THREADS, 1, 1),
            (
                *(ids, e.values, e.values.shape[1], e.scale, b.x, enqueue.DTYPE_TAGS[b.x.dtype], c.hidden_size),
                *(seen, n, c.vocab_size),
            ),
        )
        scaled = c.ffn_activation == "relu2" and c.sub_norms
        sub_eps = c.rms_eps * SQUARED_UNIT**2 if scaled else c.rms_eps
        ffn = enqueue.FFN["relu2 scaled" if scaled else c.ffn_activation] + enqueue.FFN_GATED * c.gated
        for i, layer in enumerate(self._layers):
            self._product(b.x, layer.attn_norm, layer.qkv, None, b.qkv)
            self._attention(cache, i, b, first, n)
            self._product(b.attended, layer.attn_sub_norm, layer.out, b.x, b.x)
            self._product(b.x, layer.ffn_norm, layer.up, None, b.h, ffn=ffn)
            self._product(b.h, layer.ffn_sub_norm, layer.down, b.x, b.x, eps=sub_eps)

        sampled = head and not cache.sampling.greedy
        if head:
            self._logits(b.x, n, logits, None if sampled else best)
        if sampled:
            load(tuning.SAMPLE)(
                (batch, 1, 1),
                (tuning.SAMPLE_THREADS, 1, 1),
                (logits, seen, cache._numbers, cache._integers, token, lengths, first, c.vocab_size, n),
            )
        else:
            load(tuning.NEXT_TOKEN)((1, 1, 1), (32, 1, 1), (best if head else None, token, lengths, batch, n))

    def _product(
        self, x: Any, gamma: Any, weight: TernaryWeight, residual: Any, out: Any, eps: float | None = None, ffn: int = 0
    ) -> None:
        eps = self.config.rms_eps if eps is None else eps
        enqueue.product(self._cp, x, gamma, weight, eps, self.activation, residual, "adaptive", out, ffn)

    def _logits(self, x: Any, n: int, logits: Any, best: Any) -> None:
        """Final norm, logits and their largest, for the last of each sequence's n tokens."""
        c, batch = self.config, logits.shape[0]
        plan = tuning.head_launch(c.hidden_size, c.vocab_size, batch, self._head.dtype, self.dtype, self._facts)
        last = x.reshape(batch, n, -1)[:, -1]
        _launch(
            plan,
            (
                *(last, n * c.hidden_size, self._final_norm, self._head.values, self._head.scale),
                *(logits, best, c.vocab_size, c.hidden_size, batch, c.rms_eps),
            ),
        )

    def _attention(self, cache: KVCache, layer: int, b: _Buffers, first: int, n: int) -> None:
        """Rotary embedding, append to the cache, attention over the cache: b.qkv -> b.attended."""
        c, tokens = self.config, b.x.shape[0]
        batch = tokens // n
        part = slice(first, first + batch)
        keys, values = cache.keys[layer, part], cache.values[layer, part]
        scales = [None if s is None else s[layer, part] for s in (cache.key_scales, cache.value_scales)]
        lengths, pitch, q_pitch = cache._device_lengths[part], keys.shape[-1], b.qkv.shape[1]
        sizes = (c.num_heads, c.num_kv_heads, pitch, cache.max_len, c.head_dim**-0.5)
        if n > 1:
            load(attention.append_spec(self.dtype, cache.dtype))(
                (tokens, 1, 1),
                (attention.APPEND_THREADS, 1, 1),
                (
                    *(b.qkv, q_pitch, keys, values, *scales, cache._turns, lengths),
                    *(n, c.num_heads, c.num_kv_heads, c.head_dim, pitch, cache.max_len),
                ),
            )
        if b.partial is None:
            prefill = attention.prefill_launch(
                c.num_heads, c.num_kv_heads, c.head_dim, self.dtype, cache.dtype, batch, n, self._facts
            )
            args = (b.qkv, q_pitch, keys, values, *scales, lengths, n, c.num_heads, c.num_kv_heads, cache.max_len)
            _launch(prefill.launch, (*args, c.head_dim**-0.5, b.attended, prefill.slots))
            return
        front = (b.qkv, q_pitch, keys, values, *scales, cache._turns, lengths)
        if b.cluster:
            plan = tuning.decode_launch(c, self.dtype, cache.dtype, tokens, b.splits, b.cluster)
            _launch(plan, (*front, *sizes, None, None, b.attended))
            return
        shares = (b.partial, b.stats)
        if n > 1 or tuning.decode_unsupported(self.dtype, self._facts):
            plan = tuning.attention_launch(c, self.dtype, cache.dtype, n == 1, tokens, b.splits)
            _launch(plan, (*front, n, *sizes, *shares))
        else:
            _launch(tuning.decode_launch(c, self.dtype, cache.dtype, tokens, b.splits), (*front, *sizes, *shares, None))
        _launch(
            tuning.combine_launch(c, self.dtype, tokens),
            (b.partial, b.stats, lengths, n, b.splits, b.attended),
        )

    def _new_buffers(self, cache: KVCache, tokens: int, batch: int) -> _Buffers:
        cp, c = self._cp, self.config
        dtype = MODEL_DTYPES[self.dtype]
        splits = tuning.attention_splits(c, tokens, cache.max_len, self._facts)
        # Prompts go through tensor cores where those know the dtype.
        single = tokens == batch or attention.prefill_unsupported(c.head_dim, self.dtype, cache.dtype, self._facts)
        shares = (tokens, c.num_heads, splits)
        return _Buffers(
            x=cp.empty((tokens, c.hidden_size), dtype),
            qkv=cp.empty((tokens, c.q_rows + 2 * c.kv_rows), dtype),
            attended=cp.empty((tokens, c.q_rows), dtype),
            h=cp.empty((tokens, c.intermediate_size), dtype),
            partial=cp.empty((*shares, c.head_dim), cp.float32) if single else None,
            stats=cp.empty((*shares, 2), cp.float32) if single else None,
            splits=splits,
        )

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _to_device(self, w: LayerWeights) -> _Layer:
        c = self.config
        up = w.up
        if c.gated:  # a product's results meet their partners in the next row: ffn.cuh
            order = np.arange(2 * c.intermediate_size).reshape(2, -1).T.ravel()
            up = TernaryWeight(up.packed[order], up.scale if up.scale.size == 1 else up.scale[order], up.shape)
        return _Layer(
            attn_norm=self._norm_to_device(w.attn_norm),
            qkv=w.qkv.to_device(),
            attn_sub_norm=self._norm_to_device(w.attn_sub_norm),
            out=w.out.to_device(),
            ffn_norm=self._norm_to_device(w.ffn_norm),
            up=up.to_device(),
            ffn_sub_norm=self._norm_to_device(w.ffn_sub_norm),
            down=w.down.to_device(),
        )

    def _norm_to_device(self, gamma: np.ndarray | None) -> Any:
        """In the model's dtype where that holds every weight exactly, as it does most of what was trained in bfloat16:
        each block of a product reads all of them."""
        if gamma is None:
            return None
        with np.errstate(over="ignore"):
            narrow = gamma.astype(MODEL_DTYPES[self.dtype])
        exact = np.array_equal(narrow.astype(np.float32), gamma)
        return self._cp.asarray(narrow if exact else gamma)

    def _rows_to_device(self, rows: Rows, dtype: str) -> _DeviceRows:
        rows = rows if dtype == "auto" else rows.astype(dtype)
        values, cp = rows.values, self._cp
        padding = -values.shape[1] % (16 // values.itemsize)
        values = cp.asarray(np.pad(values, ((0, 0), (0, padding))) if padding else values)
        return _DeviceRows(values, None if rows.scale is None else cp.asarray(rows.scale), rows.dtype)


def _launch(plan: Launch, args: tuple[Any, ...]) -> None:
    load(plan.spec)(plan.grid, plan.block, args, plan.shared_bytes, plan.cluster)


class _TokenReader:
    """Brings tokens to the host while the step behind them runs already."""

    def __init__(self, cp: Any, token: Any):
        self._token, self._done = token, cp.cuda.Event(disable_timing=True)
        self._host = np.frombuffer(cp.cuda.alloc_pinned_memory(token.nbytes), np.int32, token.size)

    def start(self) -> None:
        """Enqueue the copy of the tokens as they are at this point of the stream."""
        self._token.get(out=self._host, blocking=False)
        self._done.record()

    def finish(self) -> np.ndarray:
        """Wait for it. int32 [B], a copy."""
        self._done.synchronize()
        return self._host.copy()
