"""From kernel specialisations to shared objects: g++, many specialisations a file, cached by content."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime"

COMPILER = os.environ.get("CXX", "g++")
COMMON_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-g1", "-gdwarf-4")
RUNTIME_FLAGS = (*COMMON_FLAGS, "-O2")
KERNEL_FLAGS = (
    *COMMON_FLAGS,
    "-O1",
    "-w",  # NVRTC warns about kernels; g++ does not know their dialect
    "-DEDGELLM_EMULATOR",
    # Every load and store calls the runtime (which is not libtsan: nothing of it is linked).
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "--param=tsan-distinguish-volatile=1",
    # Misaligned vector loads, indices outside an array, shifts beyond the width also call the runtime.
    "-fsanitize=alignment,bounds,shift-exponent",
    # CUDA's dialect: type punning through pointers and wrapping integers are fine.
    "-fno-strict-aliasing",
    "-fwrapv",
    # Loads and stores as written, not merged into others or into memcpy.
    "-fno-tree-vectorize",
    "-fno-tree-loop-distribute-patterns",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-fno-gnu-unique",  # each object has its own shared memory, also when two hold a template of one name
)


class EmulatorBuildError(RuntimeError):
    """g++ refused a kernel; the message is what it said."""


@dataclass(frozen=True)
class Kernel:
    """One specialisation: the expanded text of a .cu file, its -D macros, the name that KERNEL_NAME gets."""

    name: str
    source: str
    macros: tuple[tuple[str, str], ...] = ()

    def namespace(self) -> str:
        return f"emu_spec_{self.name}"

    def text(self) -> str:
        """The specialisation as a namespace of its own; what it defines is undefined behind it."""
        macros = dict(self.macros)
        macros.setdefault("KERNEL_NAME", self.name)
        defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
        defined = [*macros, *re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", self.source, re.MULTILINE)]
        undefines = "".join(f"#undef {name}\n" for name in dict.fromkeys(defined))
        body = _SYSTEM_INCLUDE.sub("", self.source)  # they come first, outside the namespace
        return (
            f"namespace {self.namespace()} {{ namespace {{\n{defines}"
            f'#line 1 "{self.name}.cu"\n{body}\n#line 1 "{self.name} (emulator)"\n{undefines}}} }}\n'
            f"EMULATOR_KERNEL({self.namespace()}, {self.name})\n"
        )


_SYSTEM_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<[^>]+>.*$", re.MULTILINE)


class Specialisation(Protocol):
    """What `edgellm_cupy.kernels.spec.KernelSpec` looks like from here."""

    @property
    def name(self) -> str: ...

    @property
    def macros(self) -> Iterable[tuple[str, str]] | Mapping[str, str]: ...

    def source(self) -> str: ...


def as_kernel(specialisation: Kernel | Specialisation) -> Kernel:
    if isinstance(specialisation, Kernel):
        return specialisation
    macros = specialisation.macros
    pairs = macros.items() if isinstance(macros, Mapping) else macros
    return Kernel(specialisation.name, specialisation.source(), tuple((name, str(value)) for name, value in pairs))


class Library:
    """A compiled file: finds its kernels, their static shared variables, and source lines of addresses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = ctypes.CDLL(str(path))

    @cached_property
    def symbols(self) -> list[tuple[int, int, str, str]]:
        """(address in the file, size, kind as nm prints it, name)"""
        output = subprocess.run(
            ["nm", "-S", "--defined-only", str(self.path)], check=True, capture_output=True, text=True
        ).stdout
        rows = [line.split() for line in output.splitlines()]
        sized = [(int(r[0], 16), int(r[1], 16), r[2], r[3]) for r in rows if len(r) == 4]
        return sized + [(int(r[0], 16), 0, r[1], r[2]) for r in rows if len(r) == 3]

    @cached_property
    def base(self) -> int:
        """What the loader added to the addresses of the file."""
        address, name = next((a, n) for a, _, _, n in self.symbols if n.startswith("emu_entry_"))
        return ctypes.addressof(ctypes.c_char.in_dll(self.handle, name)) - address

    @cached_property
    def image(self) -> tuple[int, int]:
        end = max(address + size for address, size, _, _ in self.symbols)
        return self.base, self.base + end

    def entry(self, name: str) -> int:
        return ctypes.addressof(ctypes.c_char.in_dll(self.handle, f"emu_entry_{name}"))

    def shared_variables(self, kernel: Kernel) -> list[tuple[int, int, str]]:
        """(address, bytes, mangled name) of the kernel's `__shared__` variables: all that lies in .bss."""
        space = f"{len(kernel.namespace())}{kernel.namespace()}"
        function = f"_ZZ{len(kernel.name)}{kernel.name}E"  # a local of an extern "C" function
        return sorted(
            (self.base + address, size, name)
            for address, size, kind, name in self.symbols
            if kind in "bB" and (space in name or name.startswith(function))
        )

    def source_line(self, pc: int) -> str:
        """`file.cu:12` of a return address, or `header.cuh:3 < file.cu:12` where calls were inlined."""
        output = subprocess.run(
            ["addr2line", "-i", "-e", str(self.path), hex(pc - self.base - 1)],
            capture_output=True,
            text=True,
        ).stdout
        lines = [re.sub(r" \(discriminator \d+\)", "", line) for line in output.splitlines()]
        own = [line for line in lines if not line.startswith((str(INCLUDE), "??", "/usr/"))]
        return " < ".join(Path(line).name for line in own)


def cache_folder() -> Path:
    configured = os.environ.get("EDGELLM_EMULATOR_CACHE")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(configured) if configured else user_cache / "edgellm-emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_kernels(kernels: Sequence[Kernel], per_file: int, jobs: int) -> dict[str, Library]:
    """Compiles what the cache lacks, `per_file` specialisations a g++ run; returns each name's library."""
    paths = {kernel.name: path for kernel in kernels if (path := _kept_in(kernel).resolve()).exists()}
    groups: list[list[Kernel]] = []
    by_source: dict[str, list[Kernel]] = {}
    for kernel in sorted((k for k in kernels if k.name not in paths), key=lambda k: k.name):
        by_source.setdefault(kernel.source, []).append(kernel)
    small: list[Kernel] = []  # few specialisations of a file: share an object with those of other files
    for same in by_source.values():
        whole = len(same) - len(same) % per_file
        groups += [same[i : i + per_file] for i in range(0, whole, per_file)]
        small += same[whole:]
    groups += [small[i : i + per_file] for i in range(0, len(small), per_file)]

    def build(group: list[Kernel]) -> Path:
        return _compile(_translation_unit(group), KERNEL_FLAGS, _header_hash())

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for group, path in zip(groups, pool.map(build, groups), strict=True):
            for kernel in group:
                _link(_kept_in(kernel), path)
                paths[kernel.name] = path
    libraries = {path: Library(path) for path in set(paths.values())}
    return {name: libraries[path] for name, path in paths.items()}


def _kept_in(kernel: Kernel) -> Path:
    """A link in the cache to the shared object that holds the kernel, whichever others were compiled with it."""
    key = "\0".join([kernel.source, kernel.text(), _header_hash(), " ".join(KERNEL_FLAGS), _compiler_version()])
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.kernel"


def _link(link: Path, target: Path) -> None:
    """Another process may do the same at this moment."""
    new = link.with_name(f"{link.name}.{os.getpid()}.{threading.get_ident()}")
    new.symlink_to(target.name)
    os.replace(new, link)


def build_runtime() -> Path:
    """The runtime as a shared object; kernels find its functions because it is loaded globally."""
    sources = sorted([*RUNTIME.iterdir(), INCLUDE / "emu_abi.h"])
    content = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return _compile(f'#include "{RUNTIME / "runtime.cpp"}"\n', RUNTIME_FLAGS, content)


def _translation_unit(kernels: Sequence[Kernel]) -> str:
    """Kernels of one file follow one another; system headers come once, in front."""
    headers = dict.fromkeys(line.strip() for kernel in kernels for line in _SYSTEM_INCLUDE.findall(kernel.source))
    return "\n".join(['#include "cuda_emulator.h"', *headers, *(kernel.text() for kernel in kernels)])


@cache
def _header_hash() -> str:
    headers = sorted(path for path in INCLUDE.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()


@cache
def _compiler_version() -> str:
    try:
        return subprocess.run([COMPILER, "--version"], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise EmulatorBuildError(f"the emulator needs {COMPILER} on the PATH (or CXX in the environment)") from error


def _compile(text: str, flags: Sequence[str], dependencies: str) -> Path:
    """The shared object of a C++ text, from the cache or from g++; appears in the cache at once or not at all."""
    folder = cache_folder()
    key = "\0".join([text, dependencies, " ".join(flags), _compiler_version()])
    target = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
        source, objects, library = (Path(scratch) / name for name in ("unit.cpp", "unit.o", "unit.so"))
        source.write_text(text)
        # Linked apart: with -fsanitize=thread the linking g++ would add libtsan.
        _run([COMPILER, *flags, f"-I{INCLUDE}", "-c", str(source), "-o", str(objects)])
        _run([COMPILER, "-shared", str(objects), "-o", str(library)])
        os.replace(library, target)
    return target


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise EmulatorBuildError(f"{' '.join(command)}\n{result.stderr[:8000]}")
