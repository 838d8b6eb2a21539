"""Launch configurations of a prompt's attention: pure functions of (problem, device).

rope_append.cu brings a prompt's keys and values into the cache, attention_prefill.cu attends to them on the tensor
cores. Where `prefill_unsupported` gives a reason, a prompt takes the decoder's attention, a token at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..kernels.spec import KernelSpec, Launch
from .device import DeviceFacts
from .product import X_TYPES

KV_TYPES = {**X_TYPES, "int8": "signed char"}
"""C++ type of the cache's elements by dtype name."""

APPEND_THREADS, PREFILL_THREADS = 256, 128
_LARGEST_HEAD_DIM = 256
_RESERVED_SHARED_BYTES = 1024  # of each block, by CUDA itself
_LEAST_SHARED_BYTES = 64 * 1024  # that a block may have on any promised GPU
_RESIDENT = 2  # blocks a multiprocessor that attention_prefill.cu leaves registers for


def cached_dim(head_dim: int, kv_dtype: str) -> int:
    """Elements from one vector of the cache to the next: whole 16-byte pieces, the last filled up with zeros."""
    piece = {"int8": 16, "float32": 4}.get(kv_dtype, 8)
    return -(-head_dim // piece) * piece


@lru_cache
def append_spec(dtype: str, kv_dtype: str) -> KernelSpec:
    """rope_append.cu; a block of APPEND_THREADS a token."""
    macros = (("X_T", X_TYPES[dtype]), ("KV_T", KV_TYPES[kv_dtype]), ("THREADS", str(APPEND_THREADS)))
    return KernelSpec("rope_append.cu", macros)


@dataclass(frozen=True)
class PrefillConfig:
    """The tile of a block of attention_prefill.cu.

    Attributes:
        row_tiles: tiles of 16 queries that a warp computes.
        keys: keys of a tile.
    """

    row_tiles: int
    keys: int

    @property
    def rows(self) -> int:
        """Queries of a block: tokens times the group's heads."""
        return 16 * self.row_tiles * PREFILL_THREADS // 32

    def shared_bytes(self, head_dim: int, slots: int) -> int:
        """Dynamic shared memory: the queries, and `slots` tiles of keys or values."""
        return (self.rows + slots * self.keys) * (_padded(head_dim) * 2 + 16)


@dataclass(frozen=True)
class PrefillLaunch:
    """A launch of attention_prefill.cu, with the number that the kernel takes beside the problem.

    Attributes:
        slots: tiles that its shared memory holds.
    """

    launch: Launch
    config: PrefillConfig
    slots: int


def prefill_unsupported(head_dim: int, dtype: str, kv_dtype: str, device: DeviceFacts) -> str | None:
    """Why attention_prefill.cu cannot serve such a model on this device; None when it can."""
    if dtype == "float32":
        return "activations are float32, which the tensor cores would round to 11 bits, expected float16 or bfloat16"
    if dtype == "bfloat16" and device.arch < 80:
        return f"activations are bfloat16, which the tensor cores take from sm_80 on; this GPU is sm_{device.arch}"
    if kv_dtype not in (dtype, "int8"):
        return f"the cache is {kv_dtype}, expected {dtype} or int8"
    if head_dim % 2 or head_dim > _LARGEST_HEAD_DIM:
        return f"head_dim is {head_dim}, expected an even number up to {_LARGEST_HEAD_DIM}"
    return None


@lru_cache(maxsize=4096)
def prefill_launch(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    kv_dtype: str,
    batch: int,
    tokens: int,
    device: DeviceFacts,
    config: PrefillConfig | None = None,
) -> PrefillLaunch:
    """The launch for `tokens` tokens of each of `batch` sequences, for a model that is not `prefill_unsupported`.

    config: one of `prefill_configs`, in place of the choice.
    """
    config = config or _choose(heads, kv_heads, head_dim, kv_dtype, batch, tokens, device)
    grid = (batch * kv_heads, _row_blocks(config, heads, kv_heads, tokens), 1)
    slots = _slots(config, head_dim, kv_dtype, -(-grid[0] * grid[1] // device.multiprocessors), device)
    spec = prefill_spec(head_dim, dtype, kv_dtype, config)
    return PrefillLaunch(
        Launch(spec, grid, (PREFILL_THREADS, 1, 1), config.shared_bytes(head_dim, slots)), config, slots
    )


def prefill_spec(head_dim: int, dtype: str, kv_dtype: str, config: PrefillConfig) -> KernelSpec:
    macros = (
        ("X_T", X_TYPES[dtype]),
        ("KV_T", KV_TYPES[kv_dtype]),
        ("HEAD_DIM", str(head_dim)),
        ("ROW_TILES", str(config.row_tiles)),
        ("KEYS", str(config.keys)),
        ("THREADS", str(PREFILL_THREADS)),
    )
    return KernelSpec("attention_prefill.cu", macros)


def prefill_configs(head_dim: int, kv_dtype: str) -> tuple[PrefillConfig, ...]:
    """Every configuration that dispatch chooses from: as large as the registers allow, smaller ones behind it."""
    dim = _padded(head_dim)
    if dim > 128:
        low, lower = PrefillConfig(1, 32), PrefillConfig(1, 16)
        return (low,) if low.shared_bytes(dim, 2) <= _LEAST_SHARED_BYTES else (low, lower)
    high = PrefillConfig(2, 64 if dim <= 64 else 32 if kv_dtype == "int8" else 48)
    return (high, PrefillConfig(1, 64))


def prefill_specs(head_dim: int, dtype: str, kv_dtype: str) -> Iterator[KernelSpec]:
    """Every specialisation of attention_prefill.cu that models of this head_dim can reach."""
    for config in prefill_configs(head_dim, kv_dtype):
        yield prefill_spec(head_dim, dtype, kv_dtype, config)


def _choose(
    heads: int, kv_heads: int, head_dim: int, kv_dtype: str, batch: int, tokens: int, device: DeviceFacts
) -> PrefillConfig:
    """The largest tile of which there are enough to fill the GPU, else the smallest that fits into shared memory."""
    configs = prefill_configs(head_dim, kv_dtype)
    fitting = [c for c in configs if c.shared_bytes(head_dim, 2) <= device.block_shared_bytes]
    enough = _RESIDENT * device.multiprocessors
    filling = (c for c in fitting if batch * kv_heads * _row_blocks(c, heads, kv_heads, tokens) >= enough)
    return next(filling, fitting[-1])


def _row_blocks(config: PrefillConfig, heads: int, kv_heads: int, tokens: int) -> int:
    return -(-tokens * (heads // kv_heads) // config.rows)


def _slots(config: PrefillConfig, head_dim: int, kv_dtype: str, blocks: int, device: DeviceFacts) -> int:
    """Tiles in flight: as many as leave room for the other of a multiprocessor's `blocks`. int8: in registers."""
    if kv_dtype == "int8":
        return 2

    def resident(slots: int) -> int:
        block = config.shared_bytes(head_dim, slots) + _RESERVED_SHARED_BYTES
        return min(_RESIDENT, blocks, device.shared_bytes // block)

    fitting = (s for s in (2, 3, 4) if config.shared_bytes(head_dim, s) <= device.block_shared_bytes)
    return max(fitting, key=lambda slots: (resident(slots), slots))


def _padded(head_dim: int) -> int:
    """With the zeros that fill up the last instruction."""
    return -(-head_dim // 16) * 16
