"""Which kernels compute a product: a pure function of (problem, device), and what has been tuned.

Two strategies. *streaming*: one launch that norms its tokens in every block (tuning.product). *separate*: a launch that
norms and quantises each token once, then the tensor-core product (tuning.gemm). A choice is the configuration of one or
the other; its type says which. Set EDGELLM_PRINT_CONFIG=1 to see each choice once, on stderr.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from typing import NamedTuple

from .device import DeviceFacts
from .gemm import PLANES, GemmConfig, GemmLaunch, choose_gemm, gemm_candidates, gemm_launch
from .product import ProductConfig, ProductLaunch, choose_config, product_candidates, product_launch

Config = ProductConfig | GemmConfig


class Problem(NamedTuple):
    """What a choice depends on, beside the device.

    Attributes:
        m, n, k: y[n, m] over k features.
        x_dtype: name of x's dtype.
        gamma: name of gamma's dtype; None without a norm.
        aligned: every row of x, and gamma, can be loaded four elements at a time.
        activation: "int8" or "float".
    """

    m: int
    n: int
    k: int
    x_dtype: str
    gamma: str | None
    aligned: bool
    activation: str

    @property
    def planes(self) -> int:
        """Columns that an activation takes in the tensor-core product."""
        return 1 if self.activation == "int8" else PLANES[self.x_dtype]


def streams(problem: Problem, device: DeviceFacts) -> bool:
    """Whether "adaptive" norms the tokens inside the product.

    Every block does it again, which grows with its tokens and with k, unless it has so many rows that this does not
    matter; every block of tokens reads the weights again, which is free while all blocks lie side by side. The launch
    in front that it saves costs 1 to 2 us. The numbers separate what was measured on an H200 (`--shapes table`).
    """
    m, n, k = problem[:3]
    if n == 1:
        return True
    if not problem.aligned or problem.x_dtype == "float32":
        return False  # only one token is laid out for these
    config = choose_config(n, k, problem.x_dtype, problem.aligned, problem.activation, device)
    token_blocks, tiles = -(-n // config.tokens), -(-m // config.tile)
    if token_blocks == 1:
        return config.tokens * k <= 16384 or tiles >= 8 * device.multiprocessors
    side_by_side = token_blocks * tiles * config.threads <= 576 * device.multiprocessors
    return side_by_side and config.tokens * k <= 10240 and n * k <= 24576


def choose(problem: Problem, strategy: str, device: DeviceFacts) -> Config:
    """The configuration for a strategy: "streaming", "separate" or "adaptive"."""
    m, n, k = problem[:3]
    if strategy == "streaming" or (strategy == "adaptive" and streams(problem, device)):
        return choose_config(n, k, problem.x_dtype, problem.aligned, problem.activation, device)
    return choose_gemm(m, n, k, problem.activation, problem.planes, device)


def candidates(problem: Problem, device: DeviceFacts) -> tuple[Config, ...]:
    """Every enumerated configuration that can serve the problem on this device, of both strategies."""
    n, k = problem[1:3]
    return (
        *product_candidates(n, k, problem.x_dtype, problem.aligned, problem.activation, device),
        *gemm_candidates(problem.activation, problem.planes, device),
    )


@lru_cache(maxsize=4096)
def launch(problem: Problem, choice: str | Config, device: DeviceFacts) -> ProductLaunch | GemmLaunch:
    """The launch for a strategy, or for a configuration."""
    config = choose(problem, choice, device) if isinstance(choice, str) else choice
    m, n, k = problem[:3]
    plan: ProductLaunch | GemmLaunch
    if isinstance(config, ProductConfig):
        plan = product_launch(
            m, n, k, problem.x_dtype, problem.gamma, problem.aligned, problem.activation, device, config
        )
    else:
        plan = gemm_launch(m, n, k, problem.activation, problem.planes, device, config)
    if os.environ.get("EDGELLM_PRINT_CONFIG") == "1":
        print(f"edgellm: {problem}: {plan.launch}", file=sys.stderr)
    return plan
