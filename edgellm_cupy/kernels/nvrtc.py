"""NVRTC: from source text to a cubin, without a device.

CuPy's public route compiles only on a machine with a driver; its NVRTC binding needs none. That binding is private,
so it is used in this module and nowhere else. Compiled kernels are kept in the user's cache folder under a hash of
everything that determines them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import GpuUnavailableError, KernelCompileError
from .spec import KernelSpec

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
"""Compute capabilities (times ten) that this package promises and its tests compile for."""

_REMEDY = "pip install 'edgellm-cupy[cuda13]' or '[cuda12]', which bring NVRTC and the CUDA headers"


def options(arch: int) -> tuple[str, ...]:
    """The options that every kernel is compiled with, except for its macros and the header folder."""
    return (
        "--std=c++17",
        f"--gpu-architecture=sm_{arch}",
        "--ftz=true",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
    )


def version() -> str:
    """NVRTC's version, such as ``"13.0"``.

    Raises:
        GpuUnavailableError: CuPy or the NVRTC library is missing.
    """
    major, minor = require().getVersion()
    return f"{major}.{minor}"


@cache
def require() -> Any:
    """CuPy's NVRTC binding, with the library loaded and the headers found.

    Raises:
        GpuUnavailableError: layer ``"CuPy"`` or ``"NVRTC"``.
    """
    try:
        import cupy  # noqa: F401 (loads the libraries of the pip wheels)
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as e:
        raise GpuUnavailableError("CuPy", f"import cupy failed ({e})", _REMEDY) from e
    try:
        nvrtc.getVersion()
    except (RuntimeError, OSError, ImportError) as e:
        raise GpuUnavailableError("NVRTC", f"the library does not load ({e})", _REMEDY) from e
    _header_folder()
    return nvrtc


@cache
def _header_folder() -> str:
    """The folder of cuda_fp16.h: the pip wheel of CuPy's own CUDA version first, then an installed toolkit."""
    import cupy

    try:
        import nvidia  # the namespace package of NVIDIA's wheels

        roots = list(nvidia.__path__)
    except ImportError:
        roots = []
    newest_first = (
        ("cu13/include", "cuda_runtime/include")
        if cupy.cuda.runtime.runtimeGetVersion() >= 13000
        else ("cuda_runtime/include", "cu13/include")
    )
    candidates = [Path(root) / sub for sub in newest_first for root in roots]
    toolkit = os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    candidates.append(Path(toolkit) / "include")
    for folder in candidates:
        if (folder / "cuda_fp16.h").is_file():
            return str(folder)
    raise GpuUnavailableError("NVRTC", "cuda_fp16.h was not found", _REMEDY)


def compile_to_cubin(spec: KernelSpec, arch: int) -> tuple[bytes, str]:
    """Compile one specialisation for sm_`arch`.

    Returns:
        The cubin, and ptxas' report (registers, spills, shared memory).

    Raises:
        KernelCompileError: with the compiler's log.
        GpuUnavailableError: no NVRTC.
    """
    nvrtc = require()
    program = nvrtc.createProgram(spec.source(), spec.name + ".cu", (), ())
    try:
        macros = tuple(f"-D{name}={value}" for name, value in spec.defines())
        try:
            nvrtc.compileProgram(program, (*options(arch), f"-I{_header_folder()}", *_cccl(), *macros))
        except nvrtc.NVRTCError as e:
            log = nvrtc.getProgramLog(program)
            raise KernelCompileError(f"{spec.name} for sm_{arch}: {e}\n{log}") from e
        # CuPy's binding drops the cubin's last byte.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


@cache
def _cccl() -> tuple[str, ...]:
    """cuda_fp16.h of CUDA 13 includes <nv/target>, which CuPy brings along."""
    import cupy

    include = Path(cupy.__file__).parent / "_core" / "include" / "cupy" / "_cccl"
    return tuple(f"-I{include / part}" for part in ("libcudacxx",) if (include / part).is_dir())


def cache_folder() -> Path:
    """Where compiled kernels are kept: $EDGELLM_CACHE_DIR, else the user's cache folder."""
    if folder := os.environ.get("EDGELLM_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellm-cupy"


def cubin_file(spec: KernelSpec, arch: int) -> Path:
    """The file that holds the compiled specialisation; compiled now unless it is in the cache already."""
    key = "\0".join((spec.source(), *map(str, spec.defines()), *options(arch), version(), _header_folder()))
    path = cache_folder() / f"{spec.name[:80]}_sm{arch}_{hashlib.sha256(key.encode()).hexdigest()[:20]}.cubin"
    if path.is_file():
        return path
    cubin, _ = compile_to_cubin(spec, arch)
    try:
        return _write(path, cubin)
    except OSError:
        # A cache that cannot be written costs the next process a compilation, not this one its kernel.
        return _write(Path(tempfile.mkdtemp(prefix="edgellm-")) / path.name, cubin)


def _write(path: Path, content: bytes) -> Path:
    """Write beside and rename: another process may compile the same kernel at this moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
