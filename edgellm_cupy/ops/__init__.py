"""The public operations on CuPy arrays."""

from .public import rmsnorm, rmsnorm_ternary_matmul, ternary_matmul

__all__ = ["rmsnorm", "rmsnorm_ternary_matmul", "ternary_matmul"]
