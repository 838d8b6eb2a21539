"""Checkpoint: a configuration and the weights of a decoder, whatever file they come from, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import ml_dtypes
import numpy as np

from ..errors import ArgumentValueError
from .config import ModelConfig
from .packing import CHUNK_BYTES, chunks
from .ternary import TernaryWeight

ROW_DTYPES = {
    "int8": np.dtype(np.int8),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
"""What embedding and head may be stored as."""

_ROWS_AT_ONCE = 4096  # bounds the float32 copies while a matrix is converted


@dataclass(frozen=True)
class Rows:
    """An embedding or an output head, row by row. `values` may be a memory-mapped file.

    int8 halves the bytes of float16 rows; each row keeps its own scale, so an element is off by at most
    absmax(row) / 254.

    Attributes:
        values: int8, float16, bfloat16 or float32 [V, H].
        scale: float32 [V] where `values` are int8 (row v ~ values[v] * scale[v]), else None.
    """

    values: np.ndarray
    scale: np.ndarray | None = None

    @property
    def dtype(self) -> str:
        """Of the values, by name: a key of :data:`ROW_DTYPES`."""
        return self.values.dtype.name

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return int(self.values.nbytes + (0 if self.scale is None else self.scale.nbytes))

    @classmethod
    def from_float(cls, rows: np.ndarray, dtype: str) -> Rows:
        """Store float16, bfloat16 or float32 [V, H] as `dtype`; int8 by each row's absmax, half to even.

        Raises:
            ArgumentValueError: an unknown dtype, or a value that `dtype` cannot hold.
        """
        return cls(rows).astype(dtype)

    def to_float(self, ids: Any = slice(None)) -> np.ndarray:
        """Rows `ids` as float32."""
        values = self.values[ids].astype(np.float32)
        return values if self.scale is None else values * self.scale[ids][..., None]

    def astype(self, dtype: str) -> Rows:
        """The same matrix stored as `dtype`; itself when it is already.

        Raises:
            ArgumentValueError: an unknown dtype, or a value that `dtype` cannot hold.
        """
        if dtype not in ROW_DTYPES:
            raise ArgumentValueError(f"dtype is {dtype!r}, expected one of {', '.join(ROW_DTYPES)}")
        if dtype == self.dtype:
            return self
        values = np.empty(self.values.shape, ROW_DTYPES[dtype])
        scale = np.empty(len(values), np.float32) if dtype == "int8" else None
        for start in range(0, len(values), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            rows = self.to_float(part)
            if scale is None:
                with np.errstate(over="ignore"):
                    values[part] = rows.astype(values.dtype)
                if not np.isfinite(values[part].astype(np.float32)).all():
                    raise ArgumentValueError(f"a value of the embedding or head is not finite as {dtype}")
            else:
                values[part], scale[part] = _int8_rows(rows)
        return Rows(values, scale)


def _int8_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(rows).max(axis=1) / np.float32(127)
    values = np.rint(rows / np.where(scale == 0, np.float32(1), scale)[:, None])
    # A subnormal absmax rounds the scale down so far that the quotient can leave the range.
    return np.clip(values, -127, 127).astype(np.int8), scale


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norm weights are float32 [K]; the products have the shapes of `ModelConfig.products()`.

    `qkv` stacks the rows of query, key and value; `up` stacks gate and up when the FFN is gated. Rotary embedding
    turns the two halves of a head against each other. The sub-norms stand in front of out and down, where the
    configuration has them.
    """

    attn_norm: np.ndarray
    qkv: TernaryWeight
    out: TernaryWeight
    ffn_norm: np.ndarray
    up: TernaryWeight
    down: TernaryWeight
    attn_sub_norm: np.ndarray | None = None
    ffn_sub_norm: np.ndarray | None = None


class Layers(Sequence[LayerWeights]):
    """Layers that are read, and checked, each time they are asked for: only one of them is in memory at a time."""

    def __init__(self, count: int, read: Callable[[int], LayerWeights]):
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._read(i) for i in range(self._count)[index]]
        return self._read(range(self._count)[index])

    def __iter__(self) -> Iterator[LayerWeights]:
        return map(self._read, range(self._count))


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a decoder needs.

    Attributes:
        config: the architecture and its sizes.
        layers: `config.num_layers` of them; reading one may raise CheckpointError.
        final_norm: float32 [H].
        source: where it came from: ``"random (seed 0)"`` or a file name, for reports.
        read_embedding: returns the rows [V, H] of the embedding.
        read_head: returns those of the output head; the same as `read_embedding` when it is tied.
    """

    config: ModelConfig
    layers: Sequence[LayerWeights]
    final_norm: np.ndarray
    source: str
    read_embedding: Callable[[], Rows]
    read_head: Callable[[], Rows]

    @property
    def embedding(self) -> Rows:
        """The embedding, read anew each time."""
        return self.read_embedding()

    @property
    def head(self) -> Rows:
        """The output head, read anew each time."""
        return self.read_head()

    @property
    def body_bytes(self) -> int:
        """Bytes of all ternary weights with a scale a row: what one token must read of them."""
        products = self.config.products().values()
        return self.config.num_layers * sum(m * (chunks(k) * CHUNK_BYTES + 4) for m, k in products)

    @property
    def norm_bytes(self) -> int:
        """Bytes of all norm weights in float32."""
        c = self.config
        layer = 2 * c.hidden_size + (c.q_rows + c.intermediate_size if c.sub_norms else 0)
        return 4 * (c.num_layers * layer + c.hidden_size)

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0, head: str = "float16") -> Checkpoint:
        """Seeded weights: each ternary value equally likely, scaled so that a layer keeps its input's variance.

        Args:
            head: dtype of embedding and head, a key of :data:`ROW_DTYPES`.
        """
        h = config.hidden_size

        def ternary(rng: np.random.Generator, shape: tuple[int, int]) -> TernaryWeight:
            t = rng.integers(-1, 2, shape, dtype=np.int8)
            return TernaryWeight.from_int8(t, float(np.sqrt(1.5 / shape[1])))

        def norm(rng: np.random.Generator, k: int) -> np.ndarray:
            # As trained ones are: numbers of bfloat16.
            return rng.uniform(0.5, 1.5, k).astype(ROW_DTYPES["bfloat16"]).astype(np.float32)

        def layer(i: int) -> LayerWeights:
            rng = np.random.default_rng((seed, i))
            (qkv, out, up, down), sub = config.products().values(), config.sub_norms
            return LayerWeights(
                attn_norm=norm(rng, h),
                qkv=ternary(rng, qkv),
                out=ternary(rng, out),
                ffn_norm=norm(rng, h),
                up=ternary(rng, up),
                down=ternary(rng, down),
                attn_sub_norm=norm(rng, out[1]) if sub else None,
                ffn_sub_norm=norm(rng, down[1]) if sub else None,
            )

        def rows(stream: int) -> Callable[[], Rows]:
            def read() -> Rows:
                rng = np.random.default_rng((seed, config.num_layers + stream))
                values = rng.integers(-127, 128, (config.vocab_size, h), dtype=np.int8)
                scale = np.full(config.vocab_size, np.sqrt(3 / h) / 127, dtype=np.float32)
                return Rows(values, scale).astype(head)

            return read

        embedding = rows(0)
        return cls(
            config=config,
            layers=Layers(config.num_layers, layer),
            final_norm=norm(np.random.default_rng((seed, config.num_layers + 2)), h),
            source=f"random (seed {seed})",
            read_embedding=embedding,
            read_head=embedding if config.tied_head else rows(1),
        )
