"""Launch configurations of the tensor-core product for many tokens: pure functions of (problem, device).

`choose_gemm` compares the enumerated tile shapes by a small model of what bounds each; `gemm_specs` lists everything
that dispatch can reach. kernels_cu/ternary_gemm.cu draws the tiles, kernels_cu/include/fragments.cuh their contents.

A launch asks for so much shared memory that a multiprocessor takes no more of its blocks than an even distribution
gives it. Blocks start while earlier kernels still run (programmatic dependent launch), wherever there is room. On an
H200 with room for two, 60 to 132 blocks took as long as 264 of them: some multiprocessors had two and others none, it
seems (31 us in place of 21 for 3840 x 2560, N = 512, in blocks of 128 x 128).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..formats.packing import CHUNK_BYTES, chunks
from ..kernels.spec import KernelSpec, Launch
from .device import DeviceFacts
from .product import X_TYPES

QUANTISE_TILES_THREADS = 1024
"""Threads of a block of the prepass, at most."""

PLANES = {"float16": 1, "bfloat16": 1, "float32": 2}
"""float16 planes that hold a float activation of x's dtype; int8 activations are one plane of their own."""

_BLOCK_CHUNKS, _TILE_COLUMNS, _TILE_ROWS = 4, 8, 16  # fragments.cuh
_PIECES = {"int8": 4, "float": 8}  # 16-byte pieces of a chunk's activations
_STATIC_SHARED_BYTES = 2048  # reserved for the kernel's static shared memory
_RESERVED_SHARED_BYTES = 1024  # of each block, by CUDA itself


@dataclass(frozen=True)
class GemmConfig:
    """The tile shape of a block, and how deep its pipeline is.

    Attributes:
        row_tiles: tiles of 16 rows that a warp computes.
        column_tiles: tiles of 8 columns that a warp computes.
        warp_rows: warps one below the other.
        warp_columns: warps side by side.
        splits: groups of warp_rows * warp_columns warps that share the block's K.
        stages: steps of `splits` * 256 k in shared memory, 2 to 4; fewer where they do not fit.
        resident: blocks a multiprocessor that the compiler leaves registers for.
    """

    row_tiles: int
    column_tiles: int
    warp_rows: int
    warp_columns: int
    splits: int
    stages: int
    resident: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return _TILE_ROWS * self.row_tiles * self.warp_rows

    @property
    def columns(self) -> int:
        """Columns of a block: tokens, or planes of tokens."""
        return _TILE_COLUMNS * self.column_tiles * self.warp_columns

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warp_rows * self.warp_columns * self.splits

    def stage_bytes(self, activation: str) -> int:
        """Shared memory of one stage."""
        chunk_bytes = CHUNK_BYTES * (self.rows + _PIECES[activation] * self.columns)
        return self.splits * _BLOCK_CHUNKS * chunk_bytes

    def shared_bytes(self, activation: str, planes: int, stages: int) -> int:
        """Dynamic shared memory: the stages, and afterwards the sums of every group on their way to y."""
        exchange = 4 * self.splits * (self.columns // planes) * (self.rows + 4 * planes)
        return max(stages * self.stage_bytes(activation), exchange)

    def fitting_stages(self, activation: str, planes: int, device: DeviceFacts) -> int:
        """Stages for this device, at most `stages`; below 2: it cannot run there."""
        limit = device.block_shared_bytes - _STATIC_SHARED_BYTES
        stages = self.stages
        while stages and self.shared_bytes(activation, planes, stages) > limit:
            stages -= 1
        return stages

    def serves(self, planes: int) -> bool:
        """Two planes keep a second set of sums, for which the largest warp tiles have no registers."""
        return planes == 1 or self.row_tiles * self.column_tiles <= 16


_SMALL = GemmConfig(2, 2, 2, 2, 1, 4, 2)  # 64 x 32: fits every device
_SPLIT_4 = GemmConfig(2, 2, 1, 1, 4, 3, 3)  # 32 x 16
_SPLIT_8 = GemmConfig(2, 2, 1, 1, 8, 2, 2)  # 32 x 16
_TALL_SPLIT_8 = GemmConfig(4, 2, 1, 1, 8, 2, 1)  # 64 x 16
_TALL = GemmConfig(4, 2, 2, 1, 2, 3, 3)  # 128 x 16
_SQUARE = GemmConfig(4, 4, 1, 1, 4, 2, 2)  # 64 x 32
_LOW = GemmConfig(2, 4, 2, 1, 2, 3, 3)  # 64 x 32
_MEDIUM = GemmConfig(4, 4, 2, 1, 2, 3, 2)  # 128 x 32
_LARGE = GemmConfig(4, 8, 2, 1, 2, 2, 2)  # 128 x 64
_LARGEST = GemmConfig(4, 8, 4, 1, 1, 2, 2)  # 256 x 64

GEMM_CONFIGS = {
    "int8": (_SPLIT_4, _SPLIT_8, _TALL, _LOW, _SQUARE, _MEDIUM, _LARGE, _LARGEST),
    "float": (_SMALL, _SPLIT_8, _TALL_SPLIT_8, _TALL, _SQUARE, _MEDIUM, _LARGE, _LARGEST),
}
"""The best of 42 tile shapes that were measured on an H200: 8 shapes of layers, N = 8 to 2048."""


@dataclass(frozen=True)
class GemmLaunch:
    """A launch of the product, with the number that its kernel takes beside the problem.

    Attributes:
        stages: steps that its shared memory holds.
    """

    launch: Launch
    config: GemmConfig
    stages: int


def gemm_candidates(activation: str, planes: int, device: DeviceFacts) -> tuple[GemmConfig, ...]:
    """Every enumerated configuration that this device can run, whatever the problem's size."""
    configs = GEMM_CONFIGS[activation]
    return tuple(c for c in configs if c.serves(planes) and c.fitting_stages(activation, planes, device) >= 2)


def choose_gemm(m: int, n: int, k: int, activation: str, planes: int, device: DeviceFacts) -> GemmConfig:
    """The configuration that the model below expects to be fastest."""
    return min(
        gemm_candidates(activation, planes, device),
        key=lambda config: _microseconds(config, m, n, k, activation, planes, device),
    )


# Microseconds on a multiprocessor of an H200, fitted to measurements; the choice depends on their proportions only.
_BLOCK_US = 1.8  # before and after a block's steps


@dataclass(frozen=True)
class _WarpCost:
    """What 256 k of a warp take while others keep the multiprocessor busy.

    Attributes:
        tile: multiplying one tile of 16 x 8.
        row_tile: unpacking the weights of 16 rows.
        column_tile: loading the activations of 8 columns.
        lone: a multiprocessor with fewer warps than this takes as long as with so many.
    """

    tile: float
    row_tile: float
    column_tile: float
    lone: float


_WARP_COST = {"int8": _WarpCost(0.0074, 0.0099, 0.0097, 4.45), "float": _WarpCost(0.0123, 0.0344, 0.0141, 4.9)}


def _microseconds(
    config: GemmConfig, m: int, n: int, k: int, activation: str, planes: int, device: DeviceFacts
) -> float:
    """What the busiest multiprocessor takes: its blocks in rounds of as many as it holds."""
    cost = _WARP_COST[activation]
    tiles = config.row_tiles * config.column_tiles
    warp = cost.tile * tiles + cost.row_tile * config.row_tiles + cost.column_tile * config.column_tiles
    steps = -(-_blocks(k) // config.splits)

    def round_of(blocks: int) -> float:
        return _BLOCK_US + steps * max(blocks * config.threads / 32, cost.lone) * warp

    resident = _resident(config, activation, planes, device)
    rounds, rest = divmod(-(-_grid(config, m, n, planes) // device.multiprocessors), resident)
    return rounds * round_of(resident) + (round_of(rest) if rest else 0.0)


def _blocks(k: int) -> int:
    """Blocks of 256 features."""
    return -(-chunks(k) // _BLOCK_CHUNKS)


def _grid(config: GemmConfig, m: int, n: int, planes: int) -> int:
    return -(-m // config.rows) * -(-n * planes // config.columns)


def _resident(config: GemmConfig, activation: str, planes: int, device: DeviceFacts) -> int:
    """Blocks that a multiprocessor may hold at a time."""
    stages = config.fitting_stages(activation, planes, device)
    block = config.shared_bytes(activation, planes, stages) + _STATIC_SHARED_BYTES + _RESERVED_SHARED_BYTES
    return max(min(config.resident, device.shared_bytes // block, device.threads // config.threads), 1)


def _crowding_bytes(blocks: int, device: DeviceFacts) -> int:
    """Dynamic shared memory of which a multiprocessor holds `blocks` times as much, and not once more."""
    share = device.shared_bytes // (blocks + 1) - _RESERVED_SHARED_BYTES
    return min(share // 16 * 16 + 16, device.block_shared_bytes - _STATIC_SHARED_BYTES)


def gemm_launch(
    m: int, n: int, k: int, activation: str, planes: int, device: DeviceFacts, config: GemmConfig | None = None
) -> GemmLaunch:
    """The launch for y[n, m] over k features; `config` overrides the choice (for tuning)."""
    config = config or choose_gemm(m, n, k, activation, planes, device)
    stages = config.fitting_stages(activation, planes, device)
    grid = _grid(config, m, n, planes)
    together = min(-(-grid // device.multiprocessors), _resident(config, activation, planes, device))
    shared = max(config.shared_bytes(activation, planes, stages), _crowding_bytes(together, device))
    launch = Launch(gemm_spec(activation, planes, config), (grid, 1, 1), (config.threads, 1, 1), shared)
    return GemmLaunch(launch, config, stages)


def gemm_spec(activation: str, planes: int, config: GemmConfig) -> KernelSpec:
    """The specialisation of ternary_gemm.cu for one tile shape."""
    return KernelSpec(
        "ternary_gemm.cu",
        (
            ("INT8", str(int(activation == "int8"))),
            ("PLANES", str(planes)),
            ("ROW_TILES", str(config.row_tiles)),
            ("COLUMN_TILES", str(config.column_tiles)),
            ("WARP_ROWS", str(config.warp_rows)),
            ("WARP_COLUMNS", str(config.warp_columns)),
            ("THREADS", str(config.threads)),
            ("RESIDENT", str(config.resident)),
        ),
    )


def quantise_tiles_spec(x_dtype: str, norm: bool, activation: str, planes: int) -> KernelSpec:
    """The specialisation of quantise_tiles.cu that makes the product's activations."""
    return KernelSpec(
        "quantise_tiles.cu",
        (
            ("X_T", X_TYPES[x_dtype]),
            ("NORM", str(int(norm))),
            ("INT8", str(int(activation == "int8"))),
            ("PLANES", str(planes)),
            ("THREADS", str(QUANTISE_TILES_THREADS)),
        ),
    )


@lru_cache(maxsize=4096)
def quantise_tiles_launch(n: int, k: int, x_dtype: str, norm: bool, activation: str) -> Launch:
    """The prepass over n tokens of k features: a block a token, a thread for each 16 features."""
    spec = quantise_tiles_spec(x_dtype, norm, activation, 1 if activation == "int8" else PLANES[x_dtype])
    threads = min(-(-_blocks(k) * 16 // 32) * 32, QUANTISE_TILES_THREADS)
    return Launch(spec, (n, 1, 1), (threads, 1, 1))


def tile_shape(n: int, k: int, activation: str, planes: int) -> tuple[int, ...]:
    """Shape of the uint8 workspace between the two: column tile, block of 256 k, piece, column, chunk, byte."""
    column_tiles = -(-n * planes // _TILE_COLUMNS)
    return column_tiles, _blocks(k), _PIECES[activation], _TILE_COLUMNS, _BLOCK_CHUNKS, CHUNK_BYTES


def gemm_specs(device: DeviceFacts | None = None) -> Iterator[KernelSpec]:
    """Every specialisation of the two kernels that dispatch can reach, on any device or on this one."""
    for dtype, planes in PLANES.items():
        for norm in (False, True):
            yield quantise_tiles_spec(dtype, norm, "int8", 1)
            yield quantise_tiles_spec(dtype, norm, "float", planes)
    for activation, planes in (("int8", 1), ("float", 1), ("float", 2)):
        for config in GEMM_CONFIGS[activation]:
            if config.serves(planes) and (device is None or config.fitting_stages(activation, planes, device) >= 2):
                yield gemm_spec(activation, planes, config)
