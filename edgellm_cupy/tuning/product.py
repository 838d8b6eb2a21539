"""Launch configurations of the streaming ternary product: pure functions of (problem, device).

`product_launch` chooses; `product_specs` lists everything that it can choose, from the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ..formats.packing import chunks
from ..kernels.spec import KernelSpec, Launch
from .device import DeviceFacts

X_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}
"""C++ type of x by dtype name."""

NORM_THREADS = 256  # block of rmsnorm.cu

_BLOCK_ROWS, _BLOCK_CHUNKS = 16, 4  # what a warp multiplies at a time: fragments.cuh
_STATIC_SHARED_BYTES = 2048  # at most: what the norm's reductions take


@dataclass(frozen=True)
class ProductConfig:
    """The compile-time shape of a product kernel; kernels_cu/include/ternary_product.cuh draws it.

    Attributes:
        tokens: tokens that one block serves at a time.
        spread: blocks of 256 k of a row that a warp reads side by side; its rows are 16 / spread.
        split: warps that share the same rows and take turns along K.
        ahead: units (spread blocks) whose weights a warp has in flight.
        threads: of a block.
        held: vectors of four activations that a thread keeps in registers from the norm to the product: all of the
            token; 0: reads it twice.
        resident: blocks a multiprocessor that the compiler leaves registers for.
    """

    tokens: int
    spread: int
    split: int
    ahead: int
    threads: int
    held: int = 0
    resident: int = 1

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.threads // 32 // self.split * (_BLOCK_ROWS // self.spread)

    @property
    def step(self) -> int:
        """Blocks of 256 k that the block's warps multiply between two loads of a register."""
        return self.spread * self.split * self.ahead

    @property
    def longest(self) -> int | None:
        """Largest K whose activations fit the registers, whole units of it; None: any."""
        unit = 256 * self.spread
        return 4 * self.held * self.threads // self.tokens // unit * unit if self.held else None


# Aligned float16 and bfloat16, by activation and tokens, then by K: the first that is long enough. Measured on an H200,
# chained and with a cold L2. Whole tokens in registers, and deep loads, are worth more than wide blocks; two blocks of
# 256 threads a multiprocessor more than one of 512, because the next kernel's weights arrive while this one works.
_TABLE = {
    ("int8", 1): (
        ProductConfig(1, 2, 2, 1, 128, 2, 4),
        ProductConfig(1, 2, 3, 1, 192, 2, 2),
        ProductConfig(1, 2, 1, 5, 256, 3, 2),
        ProductConfig(1, 4, 1, 4, 256, 4, 2),
        ProductConfig(1, 2, 2, 7, 384, 5),
        ProductConfig(1, 2, 4, 4, 512, 4),
        ProductConfig(1, 2, 8, 3, 512, 7),
        ProductConfig(1, 2, 8, 4, 512),
    ),
    ("int8", 2): (
        ProductConfig(2, 2, 1, 5, 256, 5),
        ProductConfig(2, 2, 2, 4, 512, 4),
        ProductConfig(2, 1, 8, 4, 512, 7),
        ProductConfig(2, 2, 4, 3, 512),
    ),
    ("int8", 4): (
        ProductConfig(4, 1, 4, 2, 512, 5),
        ProductConfig(4, 1, 4, 2, 512, 8),
        ProductConfig(4, 2, 4, 3, 512),
    ),
    ("float", 1): (
        ProductConfig(1, 1, 3, 1, 192, 1),
        ProductConfig(1, 1, 6, 1, 192, 2, 2),
        ProductConfig(1, 2, 1, 5, 256, 3, 2),
        ProductConfig(1, 2, 2, 3, 256, 4, 2),
        ProductConfig(1, 2, 2, 7, 384, 5),
        ProductConfig(1, 2, 4, 4, 512, 4),
        ProductConfig(1, 2, 8, 3, 512, 7),
        ProductConfig(1, 2, 8, 4, 512),
    ),
}
# float32, and rows that cannot be loaded four elements at a time: correct everywhere, tuned for nothing.
_ANY = ProductConfig(1, 1, 8, 2, 256)

CONFIGS = (*dict.fromkeys(config for configs in _TABLE.values() for config in configs), _ANY)


@dataclass(frozen=True)
class ProductLaunch:
    """A launch of the product, with the number that its kernel takes beside the problem.

    Attributes:
        slice_steps: steps whose activations lie in shared memory at a time.
    """

    launch: Launch
    config: ProductConfig
    slice_steps: int


def choose_config(n: int, k: int, x_dtype: str, aligned: bool, activation: str, device: DeviceFacts) -> ProductConfig:
    """The kernel shape for n tokens of k features."""
    return product_candidates(n, k, x_dtype, aligned, activation, device)[0]


def product_candidates(
    n: int, k: int, x_dtype: str, aligned: bool, activation: str, device: DeviceFacts
) -> tuple[ProductConfig, ...]:
    """Every enumerated kernel shape that can serve the problem on this device, best first where nothing was tuned."""
    if not aligned or x_dtype == "float32":
        return (_ANY,)
    # Float activations take four columns a token, of which eight are multiplied at a time: one token at a time there.
    tokens = 1 if n == 1 or activation == "float" else 2 if n == 2 else 4
    return (*(c for c in _TABLE[activation, tokens] if _serves(c, k, x_dtype, activation, device)), _ANY)


def _serves(config: ProductConfig, k: int, x_dtype: str, activation: str, device: DeviceFacts) -> bool:
    """Whether the token fits the registers, and shared memory what has to lie there at once: all that registers hold,
    else one step."""
    if config.longest is not None and k > config.longest:
        return False
    blocks = _whole_blocks(config, k) if config.held else min(_whole_blocks(config, k), config.step)
    return _shared_bytes(config, _columns(config, x_dtype, activation), blocks) <= _shared_limit(device)


def _whole_blocks(config: ProductConfig, k: int) -> int:
    """Blocks of 256 k, up to whole units."""
    return -(-chunks(k) // (_BLOCK_CHUNKS * config.spread)) * config.spread


def largest_k(config: ProductConfig, x_dtype: str, activation: str, device: DeviceFacts) -> int:
    """Largest K of those tried that the configuration serves on this device, a multiple of 4; 0: none."""
    tried = (config.longest or 17_000, *(units * 256 * config.spread for units in range(64, 0, -1)))
    return next((k - 4 for k in tried if _serves(config, k - 4, x_dtype, activation, device)), 0)


def _shared_limit(device: DeviceFacts) -> int:
    """Dynamic shared memory that one block may have."""
    return device.block_shared_bytes - _STATIC_SHARED_BYTES


def _columns(config: ProductConfig, x_dtype: str, activation: str) -> int:
    """Columns of activations in shared memory: one a token, or one a digit."""
    return config.tokens * (1 if activation == "int8" else 6 if x_dtype == "float32" else 4)


def _shared_bytes(config: ProductConfig, columns: int, blocks: int) -> int:
    """Dynamic shared memory: the activations of so many blocks of 256 k, and two sets of partial sums."""
    return blocks * 4 * (columns * _BLOCK_CHUNKS + 1) * 16 + 2 * config.threads // 32 * columns * _BLOCK_ROWS * 4


def product_spec(x_dtype: str, gamma: str | None, aligned: bool, activation: str, config: ProductConfig) -> KernelSpec:
    """The specialisation for one kernel shape. gamma: its dtype, None without a norm."""
    return KernelSpec(
        "ternary_matmul.cu" if gamma is None else "rmsnorm_ternary_matmul.cu",
        (
            ("X_T", X_TYPES[x_dtype]),
            *(() if gamma is None else (("GAMMA_F32", str(int(gamma == "float32"))),)),
            ("ALIGNED", str(int(aligned))),
            ("INT8", "1" if activation == "int8" else "0"),
            ("TOKENS", str(config.tokens)),
            ("SPREAD", str(config.spread)),
            ("SPLIT", str(config.split)),
            ("AHEAD", str(config.ahead)),
            ("THREADS", str(config.threads)),
            ("HELD", str(config.held)),
            ("RESIDENT", str(config.resident)),
        ),
    )


def product_launch(
    m: int,
    n: int,
    k: int,
    x_dtype: str,
    gamma: str | None,
    aligned: bool,
    activation: str,
    device: DeviceFacts,
    config: ProductConfig | None = None,
) -> ProductLaunch:
    """The launch for y[n, m] over k features; `config` overrides the choice (for tuning)."""
    config = config or choose_config(n, k, x_dtype, aligned, activation, device)
    blocks = _whole_blocks(config, k)
    slice_steps = -(-blocks // config.step)
    columns = _columns(config, x_dtype, activation)
    while slice_steps > 1 and _shared_bytes(config, columns, min(blocks, slice_steps * config.step)) > _shared_limit(
        device
    ):
        slice_steps -= 1
    shared = _shared_bytes(config, columns, min(blocks, slice_steps * config.step))

    # A persistent grid: as many blocks as are resident, evened out so that each has the same number of tiles.
    resident = min(
        device.threads // config.threads,
        max(device.shared_bytes // (shared + _STATIC_SHARED_BYTES), 1),
        config.resident,
    )
    tiles = -(-m // config.tile)
    token_blocks = min(-(-n // config.tokens), 65535)
    most = max(device.multiprocessors * resident // token_blocks, 1)
    grid = -(-tiles // -(-tiles // most))
    aligned = aligned and (config != _ANY or x_dtype == "float32")  # as product_specs enumerates them
    launch = Launch(
        product_spec(x_dtype, gamma, aligned, activation, config),
        (grid, token_blocks, 1),
        (config.threads, 1, 1),
        shared,
    )
    return ProductLaunch(launch, config, slice_steps)


@cache
def norm_spec(x_dtype: str) -> KernelSpec:
    """rmsnorm.cu for x's dtype."""
    return KernelSpec("rmsnorm.cu", (("X_T", X_TYPES[x_dtype]), ("THREADS", str(NORM_THREADS))))


def product_specs(device: DeviceFacts | None = None) -> Iterator[KernelSpec]:
    """Every specialisation of norm and product that dispatch can reach, on any device or on this one."""
    for dtype in X_TYPES:
        yield norm_spec(dtype)
    for dtype in X_TYPES:
        for gamma in dict.fromkeys((None, "float32", dtype)):
            for activation in ("float", "int8"):
                for aligned in (False, True):
                    if not aligned or dtype == "float32":
                        yield product_spec(dtype, gamma, aligned, activation, _ANY)
                    else:
                        for (kind, _), configs in _TABLE.items():
                            if kind == activation:
                                yield from (
                                    product_spec(dtype, gamma, aligned, activation, c)
                                    for c in configs
                                    if device is None or largest_k(c, dtype, activation, device)
                                )
