"""Runs the unmodified .cu kernels on the CPU, one fiber a CUDA thread, and finds their faults: see README.md."""

from .build import EmulatorBuildError, Kernel
from .emulator import ORDERS, Emulator, EmulatorFault, compare_orders
from .memory import Output, Scratch

__all__ = [
    "ORDERS",
    "Emulator",
    "EmulatorBuildError",
    "EmulatorFault",
    "Kernel",
    "Output",
    "Scratch",
    "compare_orders",
]
