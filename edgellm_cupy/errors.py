"""Every exception that this package raises on purpose.

All of them share the base :class:`EdgeLLMError`; the two that stand for bad arguments are also the builtin
``TypeError`` or ``ValueError``, so that callers may catch either. A message names the argument, what was expected
and what came, for example ``x.shape[-1] is 512, but the weight has K = 576``.
"""

from __future__ import annotations


class EdgeLLMError(Exception):
    """Base of every error raised by edgellm_cupy."""


class ArgumentTypeError(EdgeLLMError, TypeError):
    """An argument has the wrong type: NumPy where CuPy is needed, an unsupported dtype."""


class ArgumentValueError(EdgeLLMError, ValueError):
    """An argument has the right type and a wrong value: shape, contiguity, device, code, option."""


class CheckpointError(EdgeLLMError, ValueError):
    """A checkpoint file is unreadable; the message names the file and, where there is one, the tensor."""


class GpuUnavailableError(EdgeLLMError, RuntimeError):
    """A GPU is needed and one layer below us is missing.

    Attributes:
        layer: the first layer that failed: ``"CuPy"``, ``"driver"``, ``"device"`` or ``"NVRTC"``.
    """

    def __init__(self, layer: str, reason: str, remedy: str):
        super().__init__(f"no usable GPU: {layer}: {reason}; {remedy}")
        self.layer, self.reason, self.remedy = layer, reason, remedy

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.layer, self.reason, self.remedy)


class MissingDependencyError(EdgeLLMError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class KernelCompileError(EdgeLLMError, RuntimeError):
    """NVRTC refused a kernel: a bug of ours, or an architecture that this NVRTC does not know."""
