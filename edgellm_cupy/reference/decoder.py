"""The decoder in NumPy: the oracle of the GPU decoder, and the backend where there is no GPU.

It keeps the ternary matrices as dense float32 (float64 beyond K = 132,000), because a BLAS product is the fastest exact
thing that NumPy has: an int8 activation times a ternary weight sums to less than 2**24 up to that K, so float32 holds
every partial sum exactly. Norms and the softmax are computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import ACTIVATIONS, MODEL_DTYPES, check_cache_size, check_tokens
from ..errors import ArgumentTypeError, ArgumentValueError
from ..formats import load_checkpoint
from ..formats.checkpoint import Checkpoint
from ..formats.config import ModelConfig
from ..formats.ternary import TernaryWeight
from .ops import normalise, quantise

_QUERIES_AT_ONCE = 256  # bounds the attention scores held in memory during prefill


class KVCache:
    """Keys and values of `batch` sequences of one common length.

    Attributes:
        keys, values: float32 [layer, batch, kv head, position, head_dim].
        length: positions filled so far.
        logits: float32 [batch, vocabulary] of the last step.
    """

    def __init__(self, config: ModelConfig, max_len: int, batch: int, dtype: str = "float32"):
        self._dtype = MODEL_DTYPES[dtype]  # random keys and values are rounded to it, as the GPU's are
        shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.max_len, self.batch, self.length = max_len, batch, 0
        self.logits = np.zeros((batch, config.vocab_size), np.float32)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; the next token goes there."""
        if not 0 <= length <= self.length:
            raise ArgumentValueError(f"length is {length}, expected 0 to the present {self.length}")
        self.length = length

    def fill_random(self, length: int, seed: int = 0) -> None:
        """Pretend that `length` positions were processed: random keys and values, for measuring at a depth."""
        if not 0 <= length <= self.max_len:
            raise ArgumentValueError(f"length is {length}, but the cache holds max_len = {self.max_len}")
        rng = np.random.default_rng(seed)
        block = rng.standard_normal((*self.keys.shape[1:3], length, self.keys.shape[-1]), dtype=np.float32)
        block = block.astype(self._dtype).astype(np.float32)
        self.keys[..., :length, :] = block
        self.values[..., :length, :] = block[..., ::-1]
        self.length = length


class TernaryTransformer:
    """A decoder on the host; the same methods as :class:`edgellm_cupy.TernaryTransformer`, on NumPy arrays.

    Args (of the constructor):
        checkpoint: the weights.
        activation: ``"int8"`` (BitNet b1.58) or ``"float"``.
        dtype: intermediate results are rounded to it wherever the GPU decoder stores one of that dtype. With int8
            activations a rounding in float16 tips values over ties of the quantiser, and those tip others: only a
            reference that rounds alike stays close.

    Raises:
        ArgumentTypeError: no Checkpoint.
        ArgumentValueError: an unknown option.
    """

    def __init__(self, checkpoint: Checkpoint, activation: str = "int8", dtype: str = "float32"):
        if not isinstance(checkpoint, Checkpoint):
            raise ArgumentTypeError(
                f"checkpoint: expected a Checkpoint, got {type(checkpoint).__name__} (from_pretrained takes a path)"
            )
        if activation not in ACTIVATIONS:
            raise ArgumentValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if dtype not in MODEL_DTYPES:
            raise ArgumentValueError(f"dtype is {dtype!r}, expected one of {', '.join(MODEL_DTYPES)}")
        self.config, self.activation, self.checkpoint = checkpoint.config, activation, checkpoint
        self.dtype = dtype
        self._layers = tuple(checkpoint.layers)
        self._dense = [tuple(_dense(w) for w in (layer.qkv, layer.out, layer.up, layer.down)) for layer in self._layers]
        self._embedding = checkpoint.embedding
        self._head = self._embedding.values.astype(np.float32)
        half = np.arange(0, self.config.head_dim, 2, dtype=np.float64) / self.config.head_dim
        self._frequencies = self.config.rope_theta**-half

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0, **options: Any) -> TernaryTransformer:
        """A model with seeded random weights; `options` go to the constructor."""
        return cls(Checkpoint.random(config, seed), **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> TernaryTransformer:
        """A model from a checkpoint file; see :func:`edgellm_cupy.formats.load_checkpoint`."""
        return cls(load_checkpoint(path), **options)

    def new_cache(self, max_len: int, batch: int = 1) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens."""
        check_cache_size(max_len, batch)
        return KVCache(self.config, max_len, batch, self.dtype)

    # ---- using it ---------------------------------------------------------------------------------------------------

    def prefill(self, token_ids: Any, cache: KVCache) -> np.ndarray:
        """Append a prompt. token_ids: integers [N] or [B, N]. Returns the last position's logits, [V] or [B, V]."""
        ids = np.asarray(token_ids)
        logits = self._forward(np.atleast_2d(ids), cache)
        return logits[0] if ids.ndim == 1 else logits

    def decode_one_token(self, token: Any, cache: KVCache) -> np.ndarray:
        """Append one token a sequence (an integer, or int32 [B]); returns the greedy next tokens, int32 [B]."""
        ids = np.asarray(token).reshape(-1, 1)
        return self.sample(self._forward(ids, cache))

    @staticmethod
    def sample(logits: np.ndarray) -> np.ndarray:
        """Greedy: the index of the largest logit, the lowest index among equals. int32 [B]."""
        return np.argmax(np.atleast_2d(logits), axis=-1).astype(np.int32)

    def generate(self, token_ids: Any, max_new_tokens: int = 128) -> Iterator[int]:
        """Greedy continuation of one prompt, token by token. token_ids: integers [N].

        Raises:
            ArgumentTypeError, ArgumentValueError: at once, not when the first token is asked for.
        """
        ids = np.asarray(token_ids)
        check_tokens(np.atleast_2d(ids), 1, 0, ids.size, self.config.vocab_size)
        return self._generate(ids, max_new_tokens) if max_new_tokens > 0 else iter(())

    def _generate(self, ids: np.ndarray, max_new_tokens: int) -> Iterator[int]:
        cache = self.new_cache(ids.size + max_new_tokens)
        token = self.sample(self.prefill(ids, cache))
        yield int(token[0])
        for _ in range(max_new_tokens - 1):
            token = self.decode_one_token(token, cache)
            yield int(token[0])

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _forward(self, ids: np.ndarray, cache: KVCache) -> np.ndarray:
        """ids: [B, N]. Appends them to the cache; returns float32 [B, V], the logits of the last position."""
        check_tokens(ids, cache.batch, cache.length, cache.max_len, self.config.vocab_size)
        n = ids.shape[1]
        positions = cache.length + np.arange(n)
        x = self._stored(self._embedding.to_float(ids))
        for i, (layer, (qkv, out, up, down)) in enumerate(zip(self._layers, self._dense, strict=True)):
            projected = self._stored(self._product(self._norm(x, layer.attn_norm), qkv, layer.qkv))
            attended = self._stored(self._attention(projected, cache, i, positions))
            x = self._stored(x + self._product(attended, out, layer.out))
            h = self._stored(self._product(self._norm(x, layer.ffn_norm), up, layer.up))
            x = self._stored(x + self._product(self._stored(self._activate(h)), down, layer.down))
        cache.length += n
        last = self._norm(x[:, -1], self.checkpoint.final_norm).astype(np.float32)
        cache.logits = last @ self._head.T
        if self._embedding.scale is not None:
            cache.logits *= self._embedding.scale
        return cache.logits

    def _stored(self, values: np.ndarray) -> np.ndarray:
        """`values` as they come back from memory in the model's dtype, in float32."""
        return values if self.dtype == "float32" else values.astype(MODEL_DTYPES[self.dtype]).astype(np.float32)

    def _norm(self, x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        return normalise(x, gamma, self.config.rms_eps)

    def _product(self, n: np.ndarray, dense: np.ndarray, weight: TernaryWeight) -> np.ndarray:
        """scale * (t @ n) in float32, n [..., K]; quantised per token first when the activation is int8."""
        if self.activation == "int8":
            q, step, _ = quantise(n)
            return ((q.astype(dense.dtype) @ dense.T) * (step * weight.scale)).astype(np.float32)
        return (n.astype(np.float32) @ dense.T) * weight.scale

    def _activate(self, h: np.ndarray) -> np.ndarray:
        """silu(gate) * up, or silu(up) when the FFN has no gate."""
        gate = h[..., : self.config.intermediate_size]
        with np.errstate(over="ignore"):
            silu = gate / (1 + np.exp(-gate))
        return silu * h[..., self.config.intermediate_size :] if self.config.gated else silu

    def _rotate(self, heads: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rotary embedding (Su et al. 2021, arXiv:2104.09864), half against half. heads: [B, N, heads, head_dim]."""
        angle = positions[:, None, None] * self._frequencies
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        first, second = np.split(heads, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _attention(self, projected: np.ndarray, cache: KVCache, layer: int, positions: np.ndarray) -> np.ndarray:
        """Causal grouped-query attention over the cache, to which the new keys and values are appended first."""
        c = self.config
        batch, n, _ = projected.shape
        q, k, v = np.split(projected, [c.q_rows, c.q_rows + c.kv_rows], axis=-1)
        q = self._stored(self._rotate(q.reshape(batch, n, c.num_heads, c.head_dim), positions))
        k = self._stored(self._rotate(k.reshape(batch, n, c.num_kv_heads, c.head_dim), positions))
        v = v.reshape(batch, n, c.num_kv_heads, c.head_dim)
        end = cache.length + n
        cache.keys[layer, :, :, cache.length : end] = k.transpose(0, 2, 1, 3)
        cache.values[layer, :, :, cache.length : end] = v.transpose(0, 2, 1, 3)

        group = c.num_heads // c.num_kv_heads
        result = np.empty((batch, n, c.num_kv_heads, group, c.head_dim), np.float32)
        for start in range(0, n, _QUERIES_AT_ONCE):
            rows = slice(start, min(start + _QUERIES_AT_ONCE, n))
            seen = cache.length + rows.stop
            future = np.arange(seen) > positions[rows, None]  # [queries, keys]
            for b in range(batch):
                for h in range(c.num_kv_heads):
                    keys, values = cache.keys[layer, b, h, :seen], cache.values[layer, b, h, :seen]
                    queries = q[b, rows, h * group : (h + 1) * group].transpose(1, 0, 2)  # [group, queries, head_dim]
                    scores = (queries @ keys.T).astype(np.float64) / np.sqrt(c.head_dim)
                    scores[:, future] = -np.inf
                    scores -= scores.max(axis=-1, keepdims=True)
                    weights = np.exp(scores)
                    weights /= weights.sum(axis=-1, keepdims=True)
                    result[b, rows, h] = (weights.astype(np.float32) @ values).transpose(1, 0, 2)
        return result.reshape(batch, n, c.q_rows)


def _dense(weight: TernaryWeight) -> np.ndarray:
    """[M, K] in the narrowest float that keeps an int8 product exact."""
    exact_in_float32 = weight.shape[1] * 127 < 2**24
    return weight.to_int8().astype(np.float32 if exact_in_float32 else np.float64)
