"""Ternary (BitNet 1.58-bit) LLM inference on NVIDIA GPUs from pure Python.

``import edgellm_cupy`` needs neither CuPy nor a GPU; what needs them says so when it is called.
"""

from __future__ import annotations

from . import reference
from .errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointError,
    EdgeLLMError,
    GpuUnavailableError,
    KernelCompileError,
    MissingDependencyError,
)
from .formats.config import ModelConfig
from .formats.ternary import TernaryWeight
from .model.decoder import KVCache, TernaryTransformer
from .ops import rmsnorm, rmsnorm_ternary_matmul, ternary_matmul
from .runtime import cuda_available, device_name
from .sampling import Sampling
from .version import __version__

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "CheckpointError",
    "EdgeLLMError",
    "GpuUnavailableError",
    "KVCache",
    "KernelCompileError",
    "MissingDependencyError",
    "ModelConfig",
    "Sampling",
    "TernaryTransformer",
    "TernaryWeight",
    "__version__",
    "cuda_available",
    "device_name",
    "reference",
    "rmsnorm",
    "rmsnorm_ternary_matmul",
    "ternary_matmul",
]
