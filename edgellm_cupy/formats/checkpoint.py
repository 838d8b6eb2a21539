"""Checkpoint: a configuration and the weights of a decoder in host memory, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import ModelConfig
from .ternary import TernaryWeight


@dataclass(frozen=True)
class Int8Rows:
    """A matrix quantised to int8 row by row: row v ~ values[v] * scale[v]. Used for the tied embedding and head.

    Against float16 rows it halves the head's bytes; each row keeps its own scale, so the error of a logit is about
    absmax(row) / 254 per feature.

    Attributes:
        values: int8 [V, H].
        scale: float32 [V].
    """

    values: np.ndarray
    scale: np.ndarray

    @classmethod
    def from_float(cls, rows: np.ndarray) -> Int8Rows:
        """Quantise float [V, H] by each row's absmax, half to even."""
        rows = rows.astype(np.float32)
        scale = np.abs(rows).max(axis=1) / np.float32(127)
        values = np.rint(rows / np.where(scale == 0, np.float32(1), scale)[:, None])
        # A subnormal absmax rounds the scale down so far that the quotient can leave the range.
        return cls(np.clip(values, -127, 127).astype(np.int8), scale)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norm weights are float32 [H]; the products have the shapes of `ModelConfig.products()`.

    `qkv` stacks the rows of query, key and value; `up` stacks gate and up when the FFN is gated.
    """

    attn_norm: np.ndarray
    qkv: TernaryWeight
    out: TernaryWeight
    ffn_norm: np.ndarray
    up: TernaryWeight
    down: TernaryWeight


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a decoder needs.

    Attributes:
        config: the sizes.
        embedding: [V, H], also the output head (tied).
        layers: `config.num_layers` of them.
        final_norm: float32 [H].
        source: where it came from: ``"random (seed 0)"`` or a file name, for reports.
    """

    config: ModelConfig
    embedding: Int8Rows
    layers: tuple[LayerWeights, ...]
    final_norm: np.ndarray
    source: str

    @property
    def body_bytes(self) -> int:
        """Bytes of all ternary weights with their scales: what one token must read of them."""
        return sum(w.nbytes for layer in self.layers for w in (layer.qkv, layer.out, layer.up, layer.down))

    @property
    def head_bytes(self) -> int:
        return int(self.embedding.values.nbytes + self.embedding.scale.nbytes)

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0) -> Checkpoint:
        """Seeded weights: each ternary value equally likely, scaled so that a layer keeps its input's variance."""
        rng = np.random.default_rng(seed)

        def ternary(shape: tuple[int, int]) -> TernaryWeight:
            t = rng.integers(-1, 2, shape, dtype=np.int8)
            return TernaryWeight.from_int8(t, float(np.sqrt(1.5 / shape[1])))

        def norm() -> np.ndarray:
            return rng.uniform(0.5, 1.5, config.hidden_size).astype(np.float32)

        qkv, out, up, down = config.products().values()
        layers = tuple(
            LayerWeights(norm(), ternary(qkv), ternary(out), norm(), ternary(up), ternary(down))
            for _ in range(config.num_layers)
        )
        values = rng.integers(-127, 128, (config.vocab_size, config.hidden_size), dtype=np.int8)
        scale = np.full(config.vocab_size, np.sqrt(3 / config.hidden_size) / 127, dtype=np.float32)
        return cls(config, Int8Rows(values, scale), layers, norm(), f"random (seed {seed})")
