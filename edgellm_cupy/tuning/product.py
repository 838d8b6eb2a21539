"""Launch configurations of the ternary product: pure functions of (problem, device).

`product_launch` chooses; `product_specs` lists everything that it can choose, from the same tables. Set
EDGELLM_PRINT_CONFIG=1 to see each choice once, on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..formats.packing import chunks
from ..kernels.spec import KernelSpec, Launch
from .device import DeviceFacts

X_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "int8": "signed char"}
"""C++ type of x by dtype name; int8 stands for activations that rmsnorm_quantise.cu has quantised."""

NORM_THREADS = 256  # block of rmsnorm.cu and rmsnorm_quantise.cu
STREAMING_TOKENS = 8
"""Up to this many tokens "adaptive" norms them inside the product; beyond, each token is normed once, before it."""

_STATIC_SHARED_BYTES = 2048  # reserved for the static shared memory of the product's specialisations


@dataclass(frozen=True)
class ProductConfig:
    """The compile-time shape of a product kernel; kernels_cu/include/ternary_product.cuh draws it.

    Attributes:
        tokens: tokens that one block serves at a time.
        lanes: threads side by side along a row.
        rows: rows of a group of lanes at a time.
        ahead: chunks of each row that a lane loads at a time.
        threads: of a block.
        held: vectors of four activations that a thread keeps in registers from the norm to the product; 0: reads twice.
        resident: blocks a multiprocessor that the compiler leaves registers for.
    """

    tokens: int
    lanes: int
    rows: int
    ahead: int
    threads: int = 256
    held: int = 0
    resident: int = 2

    @property
    def step(self) -> int:
        """64-code chunks of a row that one step covers."""
        return self.lanes * self.ahead

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.threads // self.lanes * self.rows

    @property
    def longest(self) -> int | None:
        """Largest K whose activations fit the registers; None: any."""
        return 4 * self.held * self.threads if self.held else None


# One token: the first whose activations fit its registers. Measured on an H200 with a cold L2: a block as wide as the
# token is long, so that each thread holds one vector, wins up to K = 2560; beyond, two or more vectors in 512 threads
# beat wider blocks, whose registers run short.
_ONE_TOKEN = (
    ProductConfig(1, 16, 1, 1, 192, 1, 3),
    ProductConfig(1, 32, 1, 1, 384, 1, 2),
    ProductConfig(1, 32, 1, 2, 640, 1, 1),
    ProductConfig(1, 32, 2, 2, 512, 2, 1),
    ProductConfig(1, 32, 2, 2, 512, 4, 1),
    ProductConfig(1, 32, 2, 2, 512, 8, 1),
    ProductConfig(1, 32, 2, 2, 512, 0, 1),
)
# Instead of the third, where it would need more than one tile a block: narrower groups, so that the tile is taller.
_ONE_TOKEN_TALL = ProductConfig(1, 16, 1, 3, 640, 1, 1)
# More: the rows share each word of weights among the tokens, so that fewer rows keep the registers within bounds.
_MORE_TOKENS = {n: (ProductConfig(n, 16, 1, 1), ProductConfig(n, 32, 1 if n == 8 else 2, 1)) for n in (2, 4, 8)}

CONFIGS = (*_ONE_TOKEN, _ONE_TOKEN_TALL, *(config for pair in _MORE_TOKENS.values() for config in pair))


@dataclass(frozen=True)
class ProductLaunch:
    """A launch of the product, with the two numbers that its kernel takes beside the problem.

    Attributes:
        slice_steps: steps whose activations lie in shared memory at a time.
        pitch: 16-byte pieces from one piece of a chunk's activations to the next.
    """

    launch: Launch
    config: ProductConfig
    slice_steps: int
    pitch: int


def choose_config(m: int, n: int, k: int, activation: str, device: DeviceFacts) -> ProductConfig:
    """The kernel shape for y[n, m] over k features."""
    if n > 1:
        tokens = 2 if n == 2 else 4 if n <= 4 else 8
        while True:
            short, long = _MORE_TOKENS[tokens]
            config = short if chunks(k) <= short.lanes else long
            # At least one step's activations have to lie in shared memory.
            if tokens == 2 or _staged_bytes(config, activation, min(chunks(k), config.step)) <= _shared_limit(device):
                return config
            tokens //= 2
    config = next(c for c in _ONE_TOKEN if c.longest is None or k <= c.longest)
    if config.longest == _ONE_TOKEN_TALL.longest and m > config.tile * device.multiprocessors:
        return _ONE_TOKEN_TALL
    return config


def _shared_limit(device: DeviceFacts) -> int:
    """Dynamic shared memory that one block may have."""
    return device.block_shared_bytes - _STATIC_SHARED_BYTES


def _pitch(activation: str, staged_chunks: int) -> int:
    """16-byte pieces from one piece of a chunk's activations to the next.

    int8 is written in words of 4 bytes, four to a piece: a pitch of 2 mod 4 spreads them over the banks. float32 is
    written in whole pieces, which an odd pitch spreads.
    """
    return staged_chunks + (2 - staged_chunks) % 4 if activation == "int8" else staged_chunks | 1


def _staged_bytes(config: ProductConfig, activation: str, staged_chunks: int) -> int:
    """Shared memory for the activations of so many chunks."""
    pieces = 4 if activation == "int8" else 16
    return config.tokens * pieces * _pitch(activation, staged_chunks) * 16


def product_spec(x_dtype: str, norm: bool, activation: str, config: ProductConfig) -> KernelSpec:
    """The specialisation for one kernel shape."""
    held = config.held
    if x_dtype == "int8" or not (norm or activation == "int8"):
        held = 0  # x is looked at once
    elif held > 4 and (x_dtype == "float32" or activation == "float"):
        held = 0  # eight vectors beside wide gammas or many partial sums would spill
    return KernelSpec(
        "rmsnorm_ternary_matmul.cu" if norm else "ternary_matmul.cu",
        (
            ("X_T", X_TYPES[x_dtype]),
            ("INT8", "1" if activation == "int8" else "0"),
            ("TOKENS", str(config.tokens)),
            ("LANES", str(config.lanes)),
            ("ROWS", str(config.rows)),
            ("AHEAD", str(config.ahead)),
            ("THREADS", str(config.threads)),
            ("HELD", str(held)),
            ("RESIDENT", str(config.resident)),
        ),
    )


@lru_cache(maxsize=4096)
def product_launch(
    m: int,
    n: int,
    k: int,
    x_dtype: str,
    norm: bool,
    activation: str,
    device: DeviceFacts,
    config: ProductConfig | None = None,
) -> ProductLaunch:
    """The launch for y[n, m] over k features; `config` overrides the choice (for tuning)."""
    config = config or choose_config(m, n, k, activation, device)
    row = chunks(k)
    steps = -(-row // config.step)
    slice_steps = steps
    while slice_steps > 1 and _staged_bytes(config, activation, min(row, slice_steps * config.step)) > _shared_limit(
        device
    ):
        slice_steps -= 1
    staged = min(row, slice_steps * config.step)
    shared = _staged_bytes(config, activation, staged)

    # A persistent grid: as many blocks as are resident, evened out so that each has the same number of tiles.
    resident = min(
        device.threads // config.threads,
        max(device.shared_bytes // (shared + _STATIC_SHARED_BYTES), 1),
        config.resident,
    )
    tiles = -(-m // config.tile)
    token_blocks = min(-(-n // config.tokens), 65535)
    columns = max(device.multiprocessors * resident // token_blocks, 1)
    grid = -(-tiles // -(-tiles // columns))

    launch = Launch(
        product_spec(x_dtype, norm, activation, config), (grid, token_blocks, 1), (config.threads, 1, 1), shared
    )
    if os.environ.get("EDGELLM_PRINT_CONFIG") == "1":
        print(f"edgellm: M={m} N={n} K={k} {x_dtype} {activation}: {launch}", file=sys.stderr)
    return ProductLaunch(launch, config, slice_steps, _pitch(activation, staged))


def norm_spec(x_dtype: str) -> KernelSpec:
    """rmsnorm.cu for x's dtype."""
    return KernelSpec("rmsnorm.cu", (("X_T", X_TYPES[x_dtype]), ("THREADS", str(NORM_THREADS))))


def quantise_spec(x_dtype: str, norm: bool) -> KernelSpec:
    """rmsnorm_quantise.cu for x's dtype, with or without the norm."""
    return KernelSpec(
        "rmsnorm_quantise.cu",
        (("X_T", X_TYPES[x_dtype]), ("NORM", str(int(norm))), ("THREADS", str(NORM_THREADS))),
    )


def product_specs() -> Iterator[KernelSpec]:
    """Every specialisation of norm, quantisation and product that dispatch can reach."""
    floats = ("float16", "bfloat16", "float32")
    for dtype in floats:
        yield norm_spec(dtype)
        yield quantise_spec(dtype, True)
        yield quantise_spec(dtype, False)
    for config in CONFIGS:
        for dtype in floats:
            for norm in (False, True):
                for activation in ("float", "int8"):
                    yield product_spec(dtype, norm, activation, config)
        yield product_spec("int8", False, "int8", config)
