"""What someone needs to repeat this run: versions, commit, compiler options, environment, how the clocks behaved.

Results of :func:`run`: nvcc_version and gcc_version (of the PATH; nothing here uses them), nvrtc_version, build_flags
(what NVRTC is really given), clock_locking, versions, source, python, environment, blas, weights, prompt_seed.

A copy of the tree whose .git is missing or behind, such as one on another machine, is told its commit by the
environment variable EDGELLM_COMMIT.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

from ... import runtime
from ...errors import GpuUnavailableError
from ...kernels import nvrtc
from ...tuning import tuned
from ...version import __version__
from ..context import Context
from ..machine import telemetry
from ..machine.nvml import SLOWED_DOWN
from ..metrics import Metric, measured, missing
from . import hardware, utilisation

_PACKAGES = (
    "numpy",
    "ml_dtypes",
    "psutil",
    "nvidia-ml-py",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
)
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_PATH", "CUDA_HOME", "CUDA_CACHE_PATH", "OMP_NUM_THREADS", "PYTHONMALLOC")
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_PREFIXES = ("EDGELLM_", "CUPY_", "OPENBLAS_", "MKL_")


def run(ctx: Context) -> dict[str, Any]:
    """Versions and settings; on CUDA also one second of load, to see what the clocks do."""
    ctx.progress("versions and settings")
    return {
        "nvcc_version": _tool("nvcc", last_line=True),
        "gcc_version": _tool("gcc"),
        "nvrtc_version": _nvrtc_version(),
        "build_flags": _build_flags(ctx),
        "clock_locking": _clock_locking(ctx),
        "versions": versions(),
        "source": source(),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in _VARIABLES or name.startswith(_PREFIXES)
        },
        "blas": _blas(),
        "weights": ctx.checkpoint.source,  # names the seed when they are random
        "prompt_seed": 0,
    }


def environment(ctx: Context) -> dict[str, Metric]:
    """Where a report comes from, also that of a single part: commit, GPU, driver, CUDA and tuned choices, or CPU."""
    try:
        gpu = _gpu() if ctx.no_gpu is None else dict.fromkeys(_GPU_KEYS, missing(ctx.no_gpu))
    except GpuUnavailableError as e:  # no report is lost for want of a name
        gpu = dict.fromkeys(_GPU_KEYS, missing(str(e)))
    return {**source(), **gpu, "cpu_model": hardware.host()["cpu_model"]}


_GPU_KEYS = ("gpu_model", "driver_version", "cuda_version", "tuned")


def _gpu() -> dict[str, Metric]:
    name = runtime.device_name()
    import cupy

    entries, path = tuned.in_use()
    return {
        "gpu_model": measured(name),
        "driver_version": hardware.current_nvml_device().driver_version(),
        "cuda_version": measured(hardware.cuda_version(cupy.cuda.runtime.runtimeGetVersion())),
        "tuned": measured(entries, "entries", file=path and str(path)),
    }


# ---- software -------------------------------------------------------------------------------------------------------


def _tool(name: str, last_line: bool = False) -> Metric:
    """The line of ``name --version`` that holds the version."""
    if shutil.which(name) is None:
        return missing(f"no {name} on the PATH; nothing here needs one")
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        return missing(f"{name} --version failed: {e}")
    lines = done.stdout.strip().splitlines()
    return measured(lines[-1 if last_line else 0]) if lines else missing(f"{name} --version printed nothing")


def _nvrtc_version() -> Metric:
    try:
        return measured(nvrtc.version())
    except GpuUnavailableError as e:
        return missing(str(e))


def _build_flags(ctx: Context) -> Metric:
    if ctx.no_gpu:
        return missing(f"nothing was compiled: {ctx.no_gpu}")
    import cupy

    arch = int(cupy.cuda.Device().compute_capability)
    return measured(" ".join(nvrtc.options(arch)), compiler=f"NVRTC {nvrtc.version()}")


def versions() -> dict[str, str]:
    """Installed packages of those that matter; what is absent is left out."""
    installed = {(d.metadata["Name"] or "").lower(): d.version for d in distributions()}
    return {"edgellm-cupy": __version__, **{name: installed[name] for name in _PACKAGES if name in installed}}


def source() -> dict[str, Metric]:
    """The git commit when this package runs from a checkout, and whether files differ from it."""
    if told := os.environ.get("EDGELLM_COMMIT"):
        return {
            "git_commit": measured(told, source="EDGELLM_COMMIT"),
            "git_modified": missing("the commit is what EDGELLM_COMMIT says, nothing was compared with it"),
        }
    root = Path(__file__).resolve().parents[2]
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    modified = changes if changes["value"] is None else measured(bool(changes["value"]))
    return {"git_commit": commit, "git_modified": modified}


def code_hash() -> str:
    """SHA-256 of this package's Python and CUDA sources: the same code, whatever git knows of it."""
    package = Path(__file__).resolve().parents[2]
    package = package if (package / "runtime.py").is_file() else package / "edgellm_cupy"  # a checkout
    digest = hashlib.sha256()
    for root in (package, (package / "bench").resolve(), (package / "kernels_cu").resolve()):
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cu", ".cuh")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _git(root: Path, *arguments: str) -> Metric:
    """What git prints about the checkout `root`, or its complaint as the reason."""
    if not (root / ".git").exists():
        return missing("not run from a git checkout")
    # git reads no folder of another owner, as a copy or a container may have it. This one's code is running already.
    command = ["git", "-c", f"safe.directory={root}", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as e:
        return missing(f"git: {e}")
    if done.returncode:
        return missing(f"git: exit status {done.returncode}: {' '.join(done.stderr.split())}")
    return measured(done.stdout.strip())


def _blas() -> dict[str, Any]:
    """The BLAS behind NumPy's products, and the threads it may use."""
    build = getattr(np.__config__, "CONFIG", {})  # NumPy 1.24 has none
    blas = build.get("Build Dependencies", {}).get("blas", {})
    limits = [f"{name}={os.environ[name]}" for name in _BLAS_THREADS if name in os.environ]
    return {
        "library": measured(f"{blas['name']} {blas['version']}") if blas else missing("NumPy does not tell"),
        "thread_limit": measured(", ".join(limits)) if limits else missing("none is set: the library takes every core"),
    }


# ---- clocks ---------------------------------------------------------------------------------------------------------


def _clock_locking(ctx: Context) -> Metric:
    """Were the clocks locked? NVML can set locked clocks but not tell, so this is read off the clocks under load."""
    if ctx.no_gpu:
        return missing(ctx.no_gpu)
    ctx.progress("clocks under load")
    nvml = hardware.current_nvml_device()
    load = utilisation.Chunks(utilisation.DecodeLoop(ctx))
    load.for_seconds(0.3)  # the clock rises
    with telemetry.Sampler(telemetry.condition_probes(nvml), interval_s=0.02) as sampler:
        load.for_seconds(0.7)
    clocks = sampler.values("sm_clock_mhz")
    if not clocks:
        return missing(f"the SM clock is not readable: {nvml.sm_clock().get('reason')}")
    seen = sampler.union("throttle_reasons")["value"] or []
    slowed = [reason for reason in seen if reason in SLOWED_DOWN]
    return infer_clock_locking(clocks, nvml.figures()["max_sm_clock_mhz"]["value"], slowed)


def infer_clock_locking(clocks: list[int], highest: int | None, slowed: list[str]) -> Metric:
    """What SM clocks under load (MHz) allow to say.

    Args:
        clocks: samples, at least one.
        highest: the GPU's highest SM clock in MHz, None when not readable.
        slowed: throttle reasons seen meanwhile that hold a clock down by themselves.
    """
    low, high = min(clocks), max(clocks)
    detail: dict[str, Any] = {"inferred_from": f"{len(clocks)} SM clocks under load", "min_mhz": low, "max_mhz": high}
    if low != high:
        return measured(f"inferred: not locked, {low} to {high} MHz under load", **detail)
    if slowed:
        return missing(f"the SM clock stood at {low} MHz, but {', '.join(slowed)} held it down")
    if highest is None or low >= highest:
        return missing(f"the SM clock stood at {low} MHz, its highest: locked or not looks the same")
    return measured(f"inferred: locked at {low} MHz, below the highest {highest} MHz", **detail)
