"""KernelSpec and Launch: what to compile and how to start it, as plain values that need no device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from .source import expand


def without_comments(text: str) -> str:
    """CUDA source less what follows //."""
    return re.sub(r"//[^\n]*", "", text)


def _format(parameter: str) -> str:
    if "*" in parameter:
        return "P"
    kind = parameter.split()[0] if "long long" not in parameter else "long long"
    return {"int": "i", "long long": "q", "float": "f"}[kind]


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of one kernel file.

    Attributes:
        file: a file of kernels_cu, such as ``"ternary_matmul.cu"``.
        macros: the -D macros that its shell asks for, in a fixed order. KERNEL_NAME is added here.
    """

    file: str
    macros: tuple[tuple[str, str], ...] = ()

    @cached_property
    def name(self) -> str:
        """Unique C identifier; profilers and reports show it."""
        values = "_".join(re.sub(r"\W+", "", value) for _, value in self.macros)
        return "edgellm_" + self.file.removesuffix(".cu") + (f"_{values}" if values else "")

    @cached_property
    def _hash(self) -> int:
        return hash((self.file, self.macros))

    def __hash__(self) -> int:
        # Every launch looks its kernel up by the specialisation: hash the macros once.
        return self._hash

    def source(self) -> str:
        """The translation unit, without the macros."""
        return expand(self.file)

    @cached_property
    def parameters(self) -> str:
        """The kernel's parameters as a format of `struct`: P pointer, i int, q long long, f float."""
        shell = re.search(r"KERNEL_NAME\((.*?)\)\s*\{", without_comments(self.source()), re.DOTALL)
        if shell is None:
            raise ValueError(f"{self.file}: no kernel named KERNEL_NAME")
        return "".join(_format(parameter) for parameter in shell[1].split(","))

    @cached_property
    def waits(self) -> bool:
        """Whether the kernel itself waits for its predecessors, so that it may be launched before they have ended."""
        return "wait_for_previous_kernels();" in without_comments(self.source())

    def defines(self) -> tuple[tuple[str, str], ...]:
        """Every macro, KERNEL_NAME included."""
        return (*self.macros, ("KERNEL_NAME", self.name))


@dataclass(frozen=True)
class Launch:
    """A specialisation with its launch configuration.

    Attributes:
        grid, block: blocks and threads, (x, y, z).
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks, neighbours along x, that form a cluster.
    """

    spec: KernelSpec
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    cluster: int = 1
