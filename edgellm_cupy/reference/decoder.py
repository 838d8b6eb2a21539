"""The decoder in NumPy: the oracle of the GPU decoder, and the backend where there is no GPU.

Reads from top to bottom: the cache, the model, and `_body`, the layers. Matrices are dense, because a BLAS product is
the fastest exact thing that NumPy has: an int8 activation times a ternary weight sums to less than 2**24 up to
K = 132,000, so float32 holds every partial sum exactly (beyond that, float64). Norms and the softmax are computed in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
)
from ..errors import ArgumentTypeError, ArgumentValueError
from ..formats import load_checkpoint
from ..formats.checkpoint import ROW_DTYPES, Checkpoint, LayerWeights, Rows
from ..formats.config import SQUARED_UNIT, ModelConfig
from ..formats.rotary import rotary_table
from ..formats.ternary import TernaryWeight
from ..sampling import Sampling
from .ops import normalise, quantise
from .sampling import sample as draw

_QUERIES_AT_ONCE = 256  # bounds the attention scores held in memory during prefill
_TOKENS_AT_ONCE = 2048  # of each sequence; bounds the intermediate results of a prefill
_FLOAT_WEIGHTS = 500_000_000  # a model with more keeps its ternary matrices as int8, a quarter of the memory


class KVCache:
    """Keys and values of `batch` sequences, each of its own length.

    Attributes:
        keys, values: float32 [layer, batch, kv head, position, head_dim]; of an int8 cache what the integers stand for.
        lengths: positions filled so far, one a sequence.
        token: int32 [batch], the next tokens.
        logits: float32 [batch, vocabulary] of the last step.
        seen: bool [batch, vocabulary], the tokens that each sequence has had, for the repetition penalty.
        dtype: of keys and values, by name.
        max_len, batch: what it was made for.
    """

    def __init__(self, model: TernaryTransformer, max_len: int, batch: int, dtype: str, sampling: Sampling):
        """For :meth:`TernaryTransformer.new_cache`."""
        config = model.config
        shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.dtype, self.max_len, self.batch, self.sampling = dtype, max_len, batch, sampling
        self.lengths = (0,) * batch
        self.token = np.zeros(batch, np.int32)
        self.logits = np.zeros((batch, config.vocab_size), np.float32)
        self.seen = np.zeros((batch, config.vocab_size), bool)
        self._model = model
        self._turns = rotary_table(config.head_dim, config.rope_theta, config.rope_scaling, max_len, config.max_context)

    @property
    def length(self) -> int:
        """Positions filled so far, of the longest sequence."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that it can hold."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def sampling(self) -> Sampling:
        """How the next tokens are chosen from here on; may be set at any time."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        check_sampling(sampling)
        self._sampling = sampling

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on, of each sequence that is longer; the next token goes there.

        `seen` keeps the tokens that were cut, unless nothing is left: ``truncate(0)`` makes the cache as new.

        Raises:
            ArgumentValueError: longer than the longest sequence is now, or negative.
        """
        if not 0 <= length <= self.length:
            raise ArgumentValueError(f"length is {length}, expected 0 to the present {self.length}")
        self.lengths = tuple(min(present, length) for present in self.lengths)
        if length == 0:
            self.seen[:] = False

    def fill_random(self, length: int, seed: int = 0) -> None:
        """Pretend that `length` positions were processed: random keys and values, for measuring at a depth.

        Raises:
            ArgumentValueError: more than `max_len`, or negative.
        """
        if not 0 <= length <= self.max_len:
            raise ArgumentValueError(f"length is {length}, but the cache holds max_len = {self.max_len}")
        rng = np.random.default_rng(seed)
        block = rng.standard_normal((*self.keys.shape[1:3], length, self.keys.shape[-1]), dtype=np.float32)
        block = self._kept(self._model._stored(block))
        self.keys[..., :length, :] = block
        self.values[..., :length, :] = block[..., ::-1]
        self.lengths = (length,) * self.batch

    def _append(self, layer: int, sequence: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Put float32 [n, kv head, head_dim] behind the sequence's present end, which stays where it is."""
        start = self.lengths[sequence]
        for memory, new in ((self.keys, keys), (self.values, values)):
            memory[layer, sequence, :, start : start + len(new)] = self._kept(new).swapaxes(0, 1)

    def _kept(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [..., head_dim] as the cache's dtype gives them back."""
        if self.dtype != "int8":
            return self._model._stored(vectors)
        scale = np.abs(vectors).max(axis=-1, keepdims=True) / np.float32(127)
        # A subnormal absmax rounds the scale down so far that the quotient can leave the range.
        return np.clip(np.rint(vectors / np.where(scale == 0, np.float32(1), scale)), -127, 127) * scale


@dataclass(frozen=True)
class _Matrix:
    """scale * values: [M, K], as floats or int8; the scale is float32 [M] or [1]."""

    values: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, weight: TernaryWeight | np.ndarray, small: bool) -> _Matrix:
        """`small`: as int8, which every product converts again."""
        if isinstance(weight, np.ndarray):
            return cls(weight.astype(np.float32, copy=False), np.ones(1, np.float32))
        t = weight.to_int8()
        return cls(t if small else t.astype(_exact(weight.shape[1])), weight.scale)

    def times(self, n: np.ndarray, activation: str) -> np.ndarray:
        """Of tokens n [..., K], in float32; quantised per token first when the activation is int8."""
        dense: np.ndarray = self.values.astype(_exact(self.values.shape[1]), copy=False)
        if activation == "int8":
            q, step, _ = quantise(n)
            return ((q.astype(dense.dtype) @ dense.T) * (step * self.scale)).astype(np.float32)
        return ((n.astype(np.float32) @ dense.T) * self.scale).astype(np.float32, copy=False)


class _Layer:
    """One layer's weights; see formats.checkpoint.LayerWeights."""

    def __init__(self, weights: LayerWeights, small: bool):
        self.attn_norm, self.attn_sub_norm = weights.attn_norm, weights.attn_sub_norm
        self.ffn_norm, self.ffn_sub_norm = weights.ffn_norm, weights.ffn_sub_norm
        self.qkv, self.out = _Matrix.of(weights.qkv, small), _Matrix.of(weights.out, small)
        self.up, self.down = _Matrix.of(weights.up, small), _Matrix.of(weights.down, small)


class TernaryTransformer:
    """A decoder on the host; the same methods as :class:`edgellm_cupy.TernaryTransformer`, on NumPy arrays.

    Args (of the constructor):
        checkpoint: the weights. Here, and only here, the products of its layers may also be float arrays [M, K].
        activation: ``"int8"`` (BitNet b1.58) or ``"float"``.
        dtype: intermediate results are rounded to it wherever the GPU decoder stores one of that dtype. With int8
            activations a rounding in float16 tips values over ties of the quantiser, and those tip others: only a
            reference that rounds alike stays close. ``"auto"``: float32.
        head: what embedding and head are stored as: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"int8"``;
            ``"auto"``: as they are in the checkpoint. They are multiplied with float32 activations in all cases.

    Raises:
        ArgumentTypeError: no Checkpoint.
        ArgumentValueError: an unknown option, or a head with values that its dtype cannot hold.
    """

    def __init__(self, checkpoint: Checkpoint, activation: str = "int8", dtype: str = "float32", head: str = "auto"):
        if not isinstance(checkpoint, Checkpoint):
            raise ArgumentTypeError(
                f"checkpoint: expected a Checkpoint, got {type(checkpoint).__name__} (from_pretrained takes a path)"
            )
        check_option("activation", activation, ACTIVATIONS)
        check_option("dtype", dtype, ("auto", *MODEL_DTYPES))
        check_option("head", head, ("auto", *ROW_DTYPES))
        config = self.config = checkpoint.config
        self.checkpoint, self.activation = checkpoint, activation
        self.dtype = "float32" if dtype == "auto" else dtype
        weights = config.num_layers * sum(m * k for m, k in config.products().values())
        self._layers = [_Layer(layer, small=weights > _FLOAT_WEIGHTS) for layer in checkpoint.layers]

        def stored(rows: Rows) -> Rows:
            return rows if head == "auto" else rows.astype(head)

        self._embedding = stored(checkpoint.embedding)
        self._head = self._embedding if config.tied_head else stored(checkpoint.head)
        self._head_values = self._head.values.astype(np.float32)
        squared = config.ffn_activation == "relu2" and config.sub_norms
        self._hidden_unit = np.float32(SQUARED_UNIT if squared else 1.0)

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0, **options: Any) -> TernaryTransformer:
        """A model with seeded random weights; `options` go to the constructor."""
        return cls(Checkpoint.random(config, seed), **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> TernaryTransformer:
        """A model from a checkpoint; see :func:`edgellm_cupy.formats.load_checkpoint`."""
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
            dtype: of keys and values: ``"auto"``, the model's dtype, or ``"int8"``: each vector of a position and a
                head is quantised by its own absmax, half to even, from the float32 result of the rotation.
            sampling: how next tokens are chosen; None: greedily.

        Raises:
            ArgumentTypeError, ArgumentValueError: a size that is no integer or below 1, an unknown dtype, or a
                `sampling` that is none.
        """
        check_cache_size(max_len, batch)
        check_option("dtype", dtype, ("auto", self.dtype, "int8"))
        sampling = Sampling() if sampling is None else sampling
        return KVCache(self, max_len, batch, self.dtype if dtype == "auto" else dtype, sampling)

    # ---- using it ---------------------------------------------------------------------------------------------------

    def prefill(self, token_ids: Any, cache: KVCache) -> np.ndarray:
        """Append a prompt to each sequence of the cache.

        Args:
            token_ids: integers [N], [B, N], or B lists of different lengths; B the cache's batch.

        Returns:
            float32 [V] for [N], else [B, V]: the logits of each sequence's last position. `cache.token` holds the next
            tokens.

        Raises:
            ArgumentTypeError, ArgumentValueError: dtype, shape, a token outside the vocabulary, no room left in the
                cache, or a cache of another model. Nothing has changed then.
        """
        logits = self._forward(as_sequences(token_ids, cache.batch), cache)
        one = cache.batch == 1 and np.ndim(token_ids) < 2
        return logits[0] if one else logits

    def decode_one_token(self, token: Any, cache: KVCache) -> np.ndarray:
        """Append one token a sequence (an integer, or integers [B]); returns the next tokens, int32 [B].

        Raises:
            ArgumentTypeError, ArgumentValueError: as :meth:`prefill`.
        """
        self._forward(as_sequences(np.asarray(token).reshape(-1, 1), cache.batch), cache)
        return cache.token

    @staticmethod
    def sample(logits: np.ndarray) -> np.ndarray:
        """Greedy: the index of the largest logit, the lowest index among equals. int32 [B]."""
        return np.argmax(np.atleast_2d(logits), axis=-1).astype(np.int32)

    def generate(
        self,
        token_ids: Any,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop_tokens: Iterable[int] = (),
        kv_dtype: str = "auto",
    ) -> Iterator[Any]:
        """Continue one prompt or several, token by token.

        Args:
            token_ids: integers [N]; or several prompts, [B, N] or B lists of different lengths.
            max_new_tokens: of each sequence.
            sampling: how tokens are chosen; None: greedily.
            stop_tokens: a sequence ends before one of them, which is not yielded.
            kv_dtype: of the cache, as in :meth:`new_cache`.

        Yields:
            For one prompt an int; for several int32 [B], with -1 for sequences that have ended. Nothing more once all
            have.

        Raises:
            ArgumentTypeError, ArgumentValueError: at once, not when the first token is asked for.
        """
        one, sequences, stop = check_generation(token_ids, max_new_tokens, stop_tokens, self.config.vocab_size)
        longest = max(ids.size for ids in sequences)
        cache = self.new_cache(longest + max(max_new_tokens, 1), len(sequences), kv_dtype, sampling)
        if max_new_tokens == 0:
            return iter(())
        tokens = self._generate(sequences, int(max_new_tokens), cache, np.array(sorted(stop), np.int64))
        return (int(token[0]) for token in tokens) if one else tokens

    def _generate(
        self, sequences: Sequence[np.ndarray], max_new_tokens: int, cache: KVCache, stop: np.ndarray
    ) -> Iterator[np.ndarray]:
        self._forward(sequences, cache)
        ended = np.zeros(cache.batch, bool)
        for remaining in reversed(range(max_new_tokens)):
            ended |= np.isin(cache.token, stop)
            if ended.all():
                return
            yield np.where(ended, np.int32(-1), cache.token)
            if remaining:
                self.decode_one_token(cache.token, cache)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _forward(self, sequences: Sequence[np.ndarray], cache: KVCache) -> np.ndarray:
        """Append token ids, an array a sequence. Returns float32 [B, V], the logits of each one's last position."""
        if cache._model is not self:
            raise ArgumentValueError("cache belongs to another model, expected one of this model's new_cache()")
        for ids, length in zip(sequences, cache.lengths, strict=True):
            check_tokens(ids[None], 1, length, cache.max_len, self.config.vocab_size)

        last = np.empty((cache.batch, self.config.hidden_size), np.float32)
        for start in range(0, max(ids.size for ids in sequences), _TOKENS_AT_ONCE):
            pieces = [ids[start : start + _TOKENS_AT_ONCE] for ids in sequences]
            x = self._body(pieces, cache)
            end = 0
            for b, piece in enumerate(pieces):
                end += piece.size
                if piece.size:
                    last[b] = x[end - 1]
        for b, ids in enumerate(sequences):
            cache.seen[b, ids] = True

        normed = self._norm(last, self.checkpoint.final_norm).astype(np.float32)
        cache.logits = normed @ self._head_values.T
        if self._head.scale is not None:
            cache.logits *= self._head.scale
        if cache.sampling.greedy:
            cache.token = self.sample(cache.logits)
        else:
            cache.token = draw(cache.logits, cache.sampling, cache.seen, np.array(cache.lengths))
        return cache.logits

    def _body(self, pieces: Sequence[np.ndarray], cache: KVCache) -> np.ndarray:
        """Append a piece of each sequence, which may be empty, to the cache.

        Returns the residual stream after all layers, [tokens, hidden], the tokens of one sequence behind those of the
        other.
        """
        eps, unit = self.config.rms_eps, self._hidden_unit
        positions = [start + np.arange(piece.size) for start, piece in zip(cache.lengths, pieces, strict=True)]
        x = self._stored(self._embedding.to_float(np.concatenate(pieces)))
        for i, layer in enumerate(self._layers):
            n = self._norm(x, layer.attn_norm)
            projected = self._stored(layer.qkv.times(n, self.activation))
            attended = self._stored(self._attention(projected, cache, i, positions))
            if layer.attn_sub_norm is not None:
                attended = self._norm(attended, layer.attn_sub_norm)
            x = self._stored(x + layer.out.times(attended, self.activation))

            n = self._norm(x, layer.ffn_norm)
            h = self._stored(self._activate(layer.up.times(n, self.activation)) * unit)
            if layer.ffn_sub_norm is not None:
                h = normalise(h, layer.ffn_sub_norm, eps * float(unit) ** 2)
            x = self._stored(x + layer.down.times(h, self.activation))
        cache.lengths = tuple(start + p.size for start, p in zip(cache.lengths, pieces, strict=True))
        return x

    def _stored(self, values: np.ndarray) -> np.ndarray:
        """`values` as they come back from memory in the model's dtype, in float32."""
        if self.dtype == "float32":
            return values
        with np.errstate(over="ignore"):
            return values.astype(MODEL_DTYPES[self.dtype]).astype(np.float32)

    def _norm(self, x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        return normalise(x, gamma, self.config.rms_eps)

    def _activate(self, h: np.ndarray) -> np.ndarray:
        """f(gate) * up, or f(up) when the FFN has no gate; f is SiLU or the squared ReLU (Primer, arXiv:2109.08668)."""
        gate = h[..., : self.config.intermediate_size]
        if self.config.ffn_activation == "relu2":
            activated = np.square(np.maximum(gate, 0))
        else:
            with np.errstate(over="ignore"):
                activated = gate / (1 + np.exp(-gate))
        return activated * h[..., self.config.intermediate_size :] if self.config.gated else activated

    def _attention(
        self, projected: np.ndarray, cache: KVCache, layer: int, positions: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Causal grouped-query attention over the cache, to which the new keys and values are appended first.

        `positions`: of the tokens of each sequence, which lie behind one another in `projected`
        [tokens, q_rows + 2 * kv_rows].
        """
        c = self.config
        q, k, v = np.split(projected, [c.q_rows, c.q_rows + c.kv_rows], axis=-1)
        turns = cache._turns[np.concatenate(positions)]
        q = self._stored(_rotated(q.reshape(-1, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim), turns))
        k = _rotated(k.reshape(-1, c.num_kv_heads, c.head_dim), turns)
        v = v.reshape(-1, c.num_kv_heads, c.head_dim)
        ends = np.cumsum([seen.size for seen in positions])[:-1]
        result = []
        for b, (queries, keys, values) in enumerate(zip(*(np.split(a, ends) for a in (q, k, v)), strict=True)):
            cache._append(layer, b, keys, values)
            result.append(_attended(queries, cache.keys[layer, b], cache.values[layer, b], positions[b]))
        return np.concatenate(result).reshape(-1, c.q_rows)


def _attended(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence.

    queries: [N, kv head, group, head_dim] at `positions` [N], consecutive ones; keys, values: [kv head, max_len,
    head_dim].
    """
    result = np.empty_like(queries)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        context = int(positions[rows][-1]) + 1
        future = np.arange(context) > positions[rows, None]  # [queries, keys]
        for h in range(len(keys)):
            q = queries[rows, h].swapaxes(0, 1)  # [group, queries, head_dim]
            scores = (q @ keys[h, :context].T).astype(np.float64) / math.sqrt(q.shape[-1])
            scores[:, future] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores)
            weights /= weights.sum(axis=-1, keepdims=True)
            result[rows, h] = (weights.astype(np.float32) @ values[h, :context]).swapaxes(0, 1)
    return result


def _exact(k: int) -> Any:
    """The narrowest float that holds every sum of `k` int8 values exactly."""
    return np.float32 if k * 127 < 2**24 else np.float64


def _rotated(heads: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864), the first half of a head against the second.

    heads: [tokens, ..., head_dim]; turns: [tokens, head_dim / 2, 2], cosine and sine.
    """
    cos, sin = np.moveaxis(turns.reshape(len(turns), *[1] * (heads.ndim - 2), -1, 2), -1, 0)
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
