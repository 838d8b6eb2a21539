"""The meaning of every operation, in NumPy: the oracle of the tests, and the backend where there is no GPU.

The public functions have the names, arguments and errors of the ones on CuPy arrays.
"""

from .decoder import KVCache, TernaryTransformer
from .ops import rmsnorm, rmsnorm_ternary_matmul, ternary_matmul

__all__ = ["KVCache", "TernaryTransformer", "rmsnorm", "rmsnorm_ternary_matmul", "ternary_matmul"]
