"""What someone needs to repeat this run: versions, commit, compiler options, environment, how the clocks behaved.

Results of :func:`run`: nvcc_version and gcc_version (of the PATH; nothing here uses them), nvrtc_version, build_flags
(what NVRTC is really given), clock_locking, versions, source, python, environment, blas, weights, prompt_seed.

The commit is that of the checkout that this code runs from; of what pip installed, the one that pip fetched, or that
of the checkout in which the command is called, if its code is this code. A copy of the tree whose .git is missing or
behind, such as one on another machine, is told its commit by the environment variable EDGELLM_COMMIT.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import Any

import numpy as np

from ... import runtime
from ...errors import GpuUnavailableError
from ...kernels import nvrtc
from ...tuning import tuned
from ...version import __version__
from ..context import Context
from ..machine import doctor_host, telemetry
from ..machine.nvml import SLOWED_DOWN
from ..metrics import Metric, measured, missing
from . import hardware, utilisation
from .tokens import PROMPT_SEED

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
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_CHANGING = (*_BLAS_THREADS, *doctor_host.VARIABLES)
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_PATH", "CUDA_HOME", "CUDA_CACHE_PATH", *_CHANGING)
_PREFIXES = ("EDGELLM_", "CUPY_", "OPENBLAS_", "MKL_")


def run(ctx: Context) -> dict[str, Any]:
    """Versions and settings; on CUDA also one second of load, to see what the clocks do."""
    ctx.progress("versions and settings")
    return {
        "nvcc_version": _tool("nvcc", last_line=True),
        "gcc_version": _tool("gcc"),
        "nvrtc_version": _nvrtc_version(),
        "build_flags": _build_flags(ctx),
        "clock_locking": missing(ctx.no_gpu)
        if ctx.no_gpu
        else ctx.row("reproducibility/clock locking", "engine", lambda: _clock_locking(ctx)),
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
        "prompt_seed": PROMPT_SEED,
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
        "tuned": measured(entries, "entries", file=path and str(path), **({"sha256": _sha256(path)} if path else {})),
    }


def _sha256(path: Path) -> str | None:
    """Of a file's content; None when it is gone by now."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


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


def changing_variables() -> dict[str, str]:
    """Those variables of this process that can change what is measured."""
    return {name: os.environ[name] for name in _CHANGING if name in os.environ}


def source() -> dict[str, Metric]:
    """The git commit of this code, where it can be known, and whether the files of its checkout differ from it."""
    if told := os.environ.get("EDGELLM_COMMIT"):
        return _only_commit(told, "EDGELLM_COMMIT")
    checkout = _checkout()
    if checkout is None and (fetched := _fetched_commit()):
        return _only_commit(fetched, "pip")
    if checkout is None:
        return dict.fromkeys(("git_commit", "git_modified"), missing("not run from a git checkout"))
    commit, changes = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "status", "--porcelain")
    modified = changes if changes["value"] is None else measured(bool(changes["value"]))
    return {"git_commit": commit, "git_modified": modified}


def _only_commit(commit: str, source: str) -> dict[str, Metric]:
    return {
        "git_commit": measured(commit, source=source),
        "git_modified": missing(f"the commit is what {source} says, nothing was compared with it"),
    }


_HERE = Path(__file__).resolve().parents[2]  # the package, or a checkout, in which bench stands beside it
_PACKAGE = _HERE if (_HERE / "runtime.py").is_file() else _HERE / "edgellm_cupy"


def _checkout() -> Path | None:
    """The checkout that this code runs from, or where it was installed from if that is the working folder."""
    if (_HERE / ".git").exists():
        return _HERE
    try:
        at = Path.cwd()
    except OSError:  # was deleted
        return None
    root = next((folder for folder in (at, *at.parents) if (folder / ".git").exists()), None)
    same = root and (root / "edgellm_cupy" / "runtime.py").is_file() and code_hash(root / "edgellm_cupy") == code_hash()
    return root if same else None


def _fetched_commit() -> str | None:
    """The commit that pip fetched, as of `pip install git+https://...`; see PEP 610."""
    try:
        found = json.loads(distribution("edgellm-cupy").read_text("direct_url.json") or "{}")
        commit = found.get("vcs_info", {}).get("commit_id")
    except (PackageNotFoundError, ValueError, AttributeError):
        return None
    return commit if isinstance(commit, str) else None


def code_hash(package: Path = _PACKAGE) -> str:
    """SHA-256 of a package's Python and CUDA sources: the same code, whatever git knows of it."""
    digest = hashlib.sha256()
    inner = ("bench", "kernels_cu")  # links in a checkout
    for part in ("", *inner):
        root = (package / part).resolve()
        files = {path.relative_to(root): path for path in root.rglob("*") if path.suffix in (".py", ".cu", ".cuh")}
        for name in sorted(name for name in files if part or name.parts[0] not in inner):
            digest.update(f"{part}/{name.as_posix()}\n".encode() + files[name].read_bytes())
    return digest.hexdigest()


def _git(root: Path, *arguments: str) -> Metric:
    """What git prints about the checkout `root`, or its complaint as the reason."""
    # git reads no folder of another owner, as a copy or a container may have it. The code of this one runs already.
    trusted = ["-c", f"safe.directory={root}"] if root == _HERE else []
    command = ["git", *trusted, "--no-optional-locks", "-C", str(root), *arguments]
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
