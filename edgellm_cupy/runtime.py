"""Is there a usable GPU, and if not, which layer is missing? Nothing here imports CuPy before it is asked for."""

from __future__ import annotations

from typing import Any

from .errors import ArgumentValueError, GpuUnavailableError

_EXTRA = "pip install 'edgellm-cupy[cuda13]' (driver 580 or newer) or '[cuda12]'"


def require_cupy() -> Any:
    """The `cupy` module, on a machine where a device answers.

    Raises:
        GpuUnavailableError: names the first layer that failed (CuPy, driver, device) and how to mend it.
    """
    try:
        import cupy
    except ImportError as e:
        raise GpuUnavailableError("CuPy", f"import cupy failed ({_first_line(e)})", _EXTRA) from e
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        text = _first_line(e)
        if "NoDevice" in text or "no CUDA-capable device" in text:
            raise GpuUnavailableError("device", text, "check CUDA_VISIBLE_DEVICES and nvidia-smi") from e
        raise GpuUnavailableError("driver", text, "install or update the NVIDIA driver, then check nvidia-smi") from e
    if count == 0:
        raise GpuUnavailableError("device", "the driver reports 0 devices", "check CUDA_VISIBLE_DEVICES and nvidia-smi")
    return cupy


def require_gpu() -> Any:
    """:func:`require_cupy`, and NVRTC and its headers are there to compile kernels with.

    Raises:
        GpuUnavailableError: names the first layer that failed (CuPy, driver, device, NVRTC) and how to mend it.
    """
    cupy = require_cupy()
    from .kernels import nvrtc

    nvrtc.require()
    return cupy


def cuda_available() -> bool:
    """True when CuPy is installed, a driver answers and it reports at least one device."""
    try:
        require_cupy()
    except GpuUnavailableError:
        return False
    return True


def device_name(device: int | None = None) -> str:
    """Name of CUDA device number `device` (default: the current one), such as ``"NVIDIA H200"``.

    Raises:
        ArgumentValueError: no such device.
        GpuUnavailableError: no usable GPU.
    """
    cupy = require_cupy()
    index = cupy.cuda.runtime.getDevice() if device is None else device
    if not 0 <= index < cupy.cuda.runtime.getDeviceCount():
        raise ArgumentValueError(f"device is {index}, expected 0 to {cupy.cuda.runtime.getDeviceCount() - 1}")
    return str(cupy.cuda.runtime.getDeviceProperties(index)["name"].decode())


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
