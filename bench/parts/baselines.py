"""What a user would otherwise take: cuBLAS in float16, called so that a CUDA graph can capture it.

CuPy refuses cuBLAS during a capture, and the extras `cuda12` and `cuda13` bring none, so the library is called through
ctypes: the pip wheel (extra `baselines`), a toolkit under CUDA_PATH, or whatever the loader finds. Where there is none
the baseline is null with the reason. The unfused ternary baseline needs no code: it is ``strategy="separate"``.
"""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import edgellm_cupy as ec

from ..metrics import Metric, measured, missing

# cublas_api.h and library_types.h; the values have been the same since CUDA 11.
_OP_N, _OP_T = 0, 1
_CUDA_R_16F = 2
_COMPUTE_32F = 68
_GEMM_DEFAULT = -1

_WORKSPACE_BYTES = 32 << 20  # what cuBLAS itself takes on Hopper; less on older GPUs


class BaselineUnavailableError(ec.EdgeLLMError):
    """A baseline's library is missing or refuses; the message is the reason that the report shows."""


def load_cublas() -> tuple[CuBlas | BaselineUnavailableError, Metric]:
    """cuBLAS, or why there is none; and which one, as a figure of the report."""
    try:
        cublas = CuBlas()
    except BaselineUnavailableError as e:
        return e, missing(str(e))
    return cublas, measured(cublas.version, library=cublas.library)


class CuBlas:
    """A cuBLAS handle on the current device, for float16 products with float32 accumulation. One serves a whole run.

    Attributes:
        library: the file or name that was loaded.
        version: such as ``"13.1.0"``.
    """

    def __init__(self) -> None:
        """Load the library of CuPy's own CUDA major version.

        Raises:
            BaselineUnavailableError: there is none, or it gives no handle.
        """
        import cupy as cp

        self._cp = cp
        self._cublas, self.library = load_library()
        self._handle = ctypes.c_void_p()
        self._check("cublasCreate_v2", ctypes.byref(self._handle))
        version = ctypes.c_int()
        self._check("cublasGetVersion_v2", self._handle, ctypes.byref(version))
        # 13.1.0 is 130100 and 12.9.1 is 120901, so cuBLAS 12 and newer; 11 counted by thousands and is too old for us.
        self.version = f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"
        self._workspace = cp.empty(_WORKSPACE_BYTES, dtype=cp.uint8)
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)  # alpha and beta, read on the host at the call

    def product(self, w: Any, x: Any, y: Any) -> None:
        """y = x @ w.T on the current stream. w: [M, K], x: [K] or [N, K], y: [M] or [N, M]; CuPy float16."""
        m, k = w.shape
        n = x.size // k
        # A handle that is given a stream forgets its workspace, so both are set, in this order, at each call. With a
        # workspace of its own cuBLAS allocates nothing, which a capture would forbid.
        self._check("cublasSetStream_v2", self._handle, ctypes.c_void_p(self._cp.cuda.get_current_stream().ptr))
        workspace = ctypes.c_void_p(self._workspace.data.ptr)
        self._check("cublasSetWorkspace_v2", self._handle, workspace, ctypes.c_size_t(_WORKSPACE_BYTES))
        # cuBLAS counts columns first: row-major w [M, K] is its K x M matrix, and y [N, M] its M x N.
        self._check(
            "cublasGemmEx",
            self._handle,
            *(_OP_T, _OP_N, m, n, k),
            ctypes.byref(self._one),
            *(ctypes.c_void_p(w.data.ptr), _CUDA_R_16F, k),
            *(ctypes.c_void_p(x.data.ptr), _CUDA_R_16F, k),
            ctypes.byref(self._zero),
            *(ctypes.c_void_p(y.data.ptr), _CUDA_R_16F, m),
            *(_COMPUTE_32F, _GEMM_DEFAULT),
        )

    def _check(self, function: str, *args: Any) -> None:
        status = getattr(self._cublas, function)(*args)
        if status:
            raise BaselineUnavailableError(f"{function} returned status {status} ({self.library})")


def load_library() -> tuple[ctypes.CDLL, str]:
    """cuBLAS of CuPy's own CUDA major version, and where it came from.

    Raises:
        BaselineUnavailableError: there is none that can be loaded.
    """
    import cupy as cp

    cuda_major = cp.cuda.runtime.runtimeGetVersion() // 1000
    name = f"libcublas.so.{cuda_major}"
    refused: list[str] = []
    for path in _candidates(name, cuda_major):
        library = _open(path, cuda_major)
        if isinstance(library, ctypes.CDLL):
            return library, str(path)
        refused.append(library)
    raise BaselineUnavailableError(
        f"{name} not found: pip install 'edgellm-cupy[baselines]' (CUDA 12: nvidia-cublas-cu12); {'; '.join(refused)}"
    )


def _open(path: Path, cuda_major: int) -> ctypes.CDLL | str:
    """The library, or the loader's complaint."""
    try:
        if path.is_absolute():
            # libcublas needs its neighbour, which only some wheels' run paths find.
            ctypes.CDLL(str(path.with_name(f"libcublasLt.so.{cuda_major}")), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as e:
        return str(e)


def _candidates(name: str, cuda_major: int) -> list[Path]:
    """Files that exist in wheels and toolkit, then the bare name for the loader's own search."""
    spec = find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    folders = [root / sub / "lib" for root in roots for sub in (f"cu{cuda_major}", "cublas")]
    folders += [Path(toolkit) / "lib64" for toolkit in (os.environ.get("CUDA_PATH"), "/usr/local/cuda") if toolkit]
    return [*(folder / name for folder in folders if (folder / name).is_file()), Path(name)]
