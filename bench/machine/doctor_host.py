"""What the host shows that makes results unsteady. Each check reads files of the kernel or settings of this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .finding import Finding, note, ok, warning

MIB = 2**20
FREE_MIB = 256
"""Disk space below which a run may not be able to keep its report, samples and plots."""
SCARCE_MEMORY = 0.1
"""Share of the memory below which the kernel begins to evict."""

_CPU = "sys/devices/system/cpu"
_UNSTEADY = "times of the host, launches among them, will vary"


@dataclass(frozen=True)
class Host:
    """What the checks look at.

    Attributes:
        root: of the file system, with proc and sys below it.
        environment: this process's variables.
        cpus: that this process may use.
        folder: where a run puts its files.
    """

    root: Path
    environment: Mapping[str, str]
    cpus: int
    folder: Path

    def text(self, path: str) -> str:
        """The content of a file below :attr:`root`.

        Raises:
            OSError: it is not there or not readable.
        """
        return (self.root / path).read_text(errors="replace").strip("\0 \n")

    def texts(self, pattern: str) -> dict[Path, str]:
        """The contents of all files that match."""
        return {path: path.read_text().strip() for path in sorted(self.root.glob(pattern))}


def findings(host: Host) -> Iterator[Finding]:
    """Everything about the host. A file that is not readable is a note with its reason."""
    for subject, check in _CHECKS.items():
        yield _finding(subject, check, host)
    yield from _variables(host)


def _finding(subject: str, check: Callable[[Host], Finding], host: Host) -> Finding:
    try:
        return check(host)
    except (OSError, ValueError, LookupError) as e:
        return note(f"{subject}: not readable", str(e))


# ---- processor ------------------------------------------------------------------------------------------------------


def _governor(host: Host) -> Finding:
    governors = sorted(set(host.texts(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_governor").values()))
    if not governors:
        return note("CPU governor: not readable", "the kernel shows none, as in most virtual machines")
    what = f"CPU governor {', '.join(governors)}"
    remedy = "sudo cpupower frequency-set --governor performance"
    if "powersave" in governors:
        return warning(what, f"the CPU runs slowly until it is busy; {_UNSTEADY}", remedy)
    if governors != ["performance"]:
        return note(what, f"the CPU's clock follows its load; {_UNSTEADY}", remedy)
    return ok(what)


def _turbo(host: Host) -> Finding:
    intel = host.texts(f"{_CPU}/intel_pstate/no_turbo")
    others = host.texts(f"{_CPU}/cpufreq/boost")
    if not intel and not others:
        return note("CPU turbo: not readable", "the kernel shows no switch for it, as in most virtual machines")
    if "0" in intel.values() or "1" in others.values():
        path, value = next(iter((intel or others).items()))
        return note(
            "CPU turbo on",
            f"the CPU's clock depends on its heat; {_UNSTEADY}",
            f"to switch it off: echo {1 - int(value)} | sudo tee {path}",
        )
    return ok("CPU turbo off")


def _load(host: Host) -> Finding:
    load = float(host.text("proc/loadavg").split()[0])
    # Also in a container the kernel counts the whole machine's load, so it is held against all of its processors.
    processors = sum(line.startswith("processor") for line in host.text("proc/cpuinfo").splitlines()) or host.cpus
    what = f"load {load:g} on {processors} processors"
    remedy = "end or move the other work"
    if load > max(processors - 1, 0.5 * processors):  # no processor is left for our thread
        return warning(what, f"other programs take the processors; {_UNSTEADY}", remedy)
    if load > 0.5 * processors:
        return note(what, f"other programs share caches and clock; {_UNSTEADY}", remedy)
    return ok(what)


def _quota(host: Host) -> Finding:
    quotas = [*_quotas_v2(host), *_quotas_v1(host)]
    if not quotas:
        return ok("no CPU quota")
    what = f"CPU quota of {min(quotas):g} processors, {host.cpus} are usable"
    if min(quotas) < host.cpus:
        return warning(
            what,
            "when it is used up the kernel stops this process for the rest of each period, of mostly 100 ms",
            "raise the container's limit, or pin it to whole processors (--cpuset-cpus)",
        )
    return ok(what)


def _quotas_v2(host: Host) -> Iterator[float]:
    """Processors by the group of this process and by those above it."""
    own = [line.split(":", 2)[2] for line in host.text("proc/self/cgroup").splitlines() if line.startswith("0::")]
    for group in own:
        folder = host.root / "sys/fs/cgroup" / group.strip("/")
        for path in (at / "cpu.max" for at in (folder, *folder.parents) if at.is_relative_to(host.root / "sys")):
            if path.is_file():
                quota, period = path.read_text().split()
                if quota != "max":
                    yield int(quota) / int(period)


def _quotas_v1(host: Host) -> Iterator[float]:
    for path, quota in host.texts("sys/fs/cgroup/cpu*/cpu.cfs_quota_us").items():
        if int(quota) > 0:
            yield int(quota) / int(path.with_name("cpu.cfs_period_us").read_text())


# ---- machine --------------------------------------------------------------------------------------------------------


def _virtual(host: Host) -> Finding:
    if "microsoft" in host.text("proc/sys/kernel/osrelease").lower():
        return warning(
            "this is Windows' subsystem for Linux",
            "launches pass through Windows, which shares the GPU with its desktop",
            "measure on Linux itself",
        )
    flags = [line for line in host.text("proc/cpuinfo").splitlines() if line.startswith("flags")]
    if flags and "hypervisor" in flags[0].split():
        return note("this is a virtual machine", f"other guests share the processors; {_UNSTEADY}")
    return ok("not a virtual machine that says so")


def _power_supply(host: Host) -> Finding:
    mains = [path for path, kind in host.texts("sys/class/power_supply/*/type").items() if kind == "Mains"]
    online = [path.with_name("online").read_text().strip() for path in mains]
    if mains and "1" not in online:
        return warning("the machine runs on its battery", "CPU and GPU save power", "plug it in")
    return ok("not on battery")


def _jetson(host: Host) -> Finding:
    try:
        model = host.text("proc/device-tree/model")
    except FileNotFoundError:
        return ok("no Jetson")
    if "jetson" not in model.lower():
        return ok(model)
    return note(
        model,
        "its power mode sets clocks and processors, and its clocks follow the load",
        "sudo nvpmodel -m 0 (most boards: the highest mode), then sudo jetson_clocks",
    )


def _memory(host: Host) -> Finding:
    sizes = {}
    for line in host.text("proc/meminfo").splitlines():
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) / 1024
    swapped = sizes["SwapTotal"] - sizes["SwapFree"]
    available = sizes["MemAvailable"] / sizes["MemTotal"]
    what = f"{available:.0%} of the memory available, {swapped:.0f} MiB swapped out"
    remedy = "end what needs much memory; sudo swapoff -a brings back what was swapped out"
    if available < SCARCE_MEMORY:
        return warning(what, f"weights and code may be evicted while we measure; {_UNSTEADY}", remedy)
    if swapped > 0:
        return note(what, "memory of this process may be among it", remedy)
    return ok(what)


def _disk(host: Host) -> Finding:
    at = next(folder for folder in (host.folder.absolute(), *host.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(at).free / MIB
    what = f"{free:.0f} MiB free for the run at {at}"
    if free < FREE_MIB:
        return warning(what, "report, samples and plots may not fit", "make room, or give another folder to --out")
    return ok(what)


# ---- this process ---------------------------------------------------------------------------------------------------


def _interpreter(host: Host) -> Finding:
    slow = [
        name
        for name, on in {
            "development mode": sys.flags.dev_mode,
            "a debugger, a profiler or coverage": sys.gettrace() or sys.getprofile(),
            "a debug build": hasattr(sys, "gettotalrefcount"),
        }.items()
        if on
    ]
    if slow:
        return warning(f"Python runs with {' and '.join(slow)}", "every call costs more", "measure without")
    return ok("Python runs without debugger, profiler and development mode")


_SLOW_CALLS = "every call costs more"
_SLOW_START = "kernels are compiled anew in each process: only the start is slower"
VARIABLES: dict[str, tuple[tuple[str, ...] | None, bool, str]] = {
    "PYTHONMALLOC": (("debug", "malloc_debug", "pymalloc_debug"), True, _SLOW_CALLS),
    "PYTHONDEVMODE": (None, True, _SLOW_CALLS),
    "PYTHONTRACEMALLOC": (None, True, _SLOW_CALLS),
    "CUDA_LAUNCH_BLOCKING": (("1",), True, "each launch waits for its kernel: nothing overlaps"),
    "CUDA_DEVICE_MAX_CONNECTIONS": (None, True, "streams may have to share a queue"),
    "CUDA_INJECTION64_PATH": (None, True, "a profiler or debugger watches every call of CUDA"),
    "CUDA_ENABLE_COREDUMP_ON_EXCEPTION": (("1",), True, "kernels run in a mode for debugging"),
    "CUPY_CUDA_COMPILE_WITH_DEBUG": (("1",), True, "CuPy compiles its kernels for debugging"),
    "EDGELLM_OVERLAP": (("0",), True, "consecutive kernels do not overlap: a token takes longer"),
    "EDGELLM_TUNED": (("0",), False, "what `edgellm tune` found is not used"),
    "EDGELLM_PRINT_CONFIG": (("1",), False, "each choice of a kernel is printed once"),
    "CUDA_CACHE_DISABLE": (("1",), False, _SLOW_START),
    "CUPY_CACHE_IN_MEMORY": (("1",), False, _SLOW_START),
    "LD_PRELOAD": (None, False, "a library stands before those that are measured"),
}
"""Variable -> values that disturb (None: any), whether they change what is measured, and how."""


def _variables(host: Host) -> Iterator[Finding]:
    seen = False
    for name, (values, disturbs, why) in VARIABLES.items():
        value = host.environment.get(name, "")
        if value and (values is None or value in values):
            seen = True
            yield Finding("warning" if disturbs else "note", f"{name}={value}", why, f"unset {name}")
    if not seen:
        yield ok("no variable that disturbs is set")


def _matplotlib(host: Host) -> Finding:
    if find_spec("matplotlib") is None:
        return note("no matplotlib", "a report has no plots", "pip install matplotlib")
    return ok("matplotlib draws the plots")


def _ncu(host: Host) -> Finding:
    if shutil.which("ncu", path=host.environment.get("PATH")) is None:
        return note(
            "no Nsight Compute (ncu) on the PATH",
            "occupancy is theoretical only, not measured",
            "install it with the CUDA toolkit, if occupancy matters",
        )
    return ok("Nsight Compute measures occupancy")


_CHECKS: dict[str, Callable[[Host], Finding]] = {
    "kind of machine": _virtual,
    "board": _jetson,
    "CPU governor": _governor,
    "CPU turbo": _turbo,
    "load": _load,
    "CPU quota": _quota,
    "memory": _memory,
    "power supply": _power_supply,
    "disk space": _disk,
    "Python": _interpreter,
    "matplotlib": _matplotlib,
    "Nsight Compute": _ncu,
}
