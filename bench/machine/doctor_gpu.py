"""What NVML shows of a GPU that makes its results unsteady. Each check reads, and changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

from ..metrics import Metric
from .finding import Finding, note, ok, unread, warning
from .nvml import MIB, SLOWED_DOWN, NvmlDevice

BUSY_PCT = 5
"""Utilisation above which somebody else is at work: nothing of ours runs while the doctor looks."""
HOT_C = 10
"""Degrees below the slowdown threshold that a GPU needs to warm up under load."""

_SHARED = "it takes compute time, bandwidth and power when nobody expects it"


def findings(device: NvmlDevice, pcie: Callable[[], Mapping[str, Metric]]) -> Iterator[Finding]:
    """Everything about one GPU.

    Args:
        pcie: measures the link while it copies: `pcie_generation_under_load` and `pcie_width_under_load`.
    """
    if device.unavailable:
        yield note("GPU: NVML says nothing", device.unavailable)
        return
    yield _utilisation(device)  # before the link is put under load
    yield _processes(device)
    yield _display(device)
    yield _clock(device)
    yield _application_clocks(device)
    yield _throttling(device)
    yield _temperature(device)
    yield _power_limit(device)
    yield _persistence(device)
    yield from _memory_errors(device)
    yield _mig(device)
    yield _compute_mode(device)
    yield _virtualisation(device)
    yield from _link(device, pcie)


# ---- who else -------------------------------------------------------------------------------------------------------


def _utilisation(device: NvmlDevice) -> Finding:
    busy = device.read("UtilizationRates", unit="%", convert=lambda rates: rates.gpu)
    if busy["value"] is None:
        return unread("GPU utilisation", busy)
    if busy["value"] > BUSY_PCT:
        return warning(
            f"the GPU is {busy['value']} % busy before anything of ours runs",
            f"somebody else uses it: {_SHARED}",
            "wait, or end the other work (nvidia-smi lists it)",
        )
    return ok(f"GPU {busy['value']} % busy")


def _processes(device: NvmlDevice) -> Finding:
    listed = device.read("ComputeRunningProcesses_v3")
    if listed["value"] is None:
        return unread("processes on the GPU", listed)
    others = [p for p in listed["value"] if p.pid != os.getpid()]
    if not others:
        return ok("no other process computes on the GPU")
    named = [(p, _name(p.pid)) for p in others]
    what = f"on the GPU: {', '.join(_described(p, name) for p, name in named)}"
    if len(named) == 1 and named[0][1] is None and len(others) == len(listed["value"]):
        # A container has its own numbers of processes: the one process on the list may be this very one.
        return note(what, f"its number means nothing in this container, so it may be this process; if not, {_SHARED}")
    return warning(what, _SHARED, "end them, or choose another GPU with CUDA_VISIBLE_DEVICES")


def _name(pid: int) -> str | None:
    """None for a process that cannot be seen from here."""
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None


def _described(process: Any, name: str | None) -> str:
    memory = "" if process.usedGpuMemory is None else f", {process.usedGpuMemory / MIB:.0f} MiB"
    return f"{name or 'a process of another container'} (process {process.pid}{memory})"


def _display(device: NvmlDevice) -> Finding:
    active = device.read("DisplayActive")
    drawing = device.read("GraphicsRunningProcesses_v3", convert=len)
    if active["value"] is None:
        return unread("display", active)
    if active["value"] or drawing["value"]:
        return warning(
            f"the GPU draws a screen ({drawing['value'] or 0} graphics processes)",
            _SHARED,
            "run the screen on another GPU, or stop the desktop while measuring",
        )
    return ok("the GPU draws no screen")


# ---- clocks, heat and power -----------------------------------------------------------------------------------------


def _clock(device: NvmlDevice) -> Finding:
    now, highest = device.sm_clock(), device.read("MaxClockInfo", "NVML_CLOCK_SM", unit="MHz")
    for figure in (now, highest):
        if figure["value"] is None:
            return unread("SM clock", figure)
    return note(
        f"SM clock {now['value']} MHz now, at most {highest['value']} MHz",
        "a free clock moves with load and heat; NVML cannot tell whether it is locked",
        "to lock it: sudo nvidia-smi --lock-gpu-clocks=MHZ,MHZ, afterwards --reset-gpu-clocks",
    )


def _application_clocks(device: NvmlDevice) -> Finding:
    now = device.read("ApplicationsClock", "NVML_CLOCK_SM", unit="MHz")
    default = device.read("DefaultApplicationsClock", "NVML_CLOCK_SM", unit="MHz")
    for figure in (now, default):
        if figure["value"] is None:
            return unread("application clocks", figure)
    if now["value"] < default["value"]:
        return warning(
            f"application clock {now['value']} MHz, below the default {default['value']} MHz",
            "results are lower than those of a GPU as it is delivered",
            "sudo nvidia-smi --reset-applications-clocks",
        )
    return ok(f"application clock {now['value']} MHz, default {default['value']} MHz")


def _throttling(device: NvmlDevice) -> Finding:
    reasons = device.throttle_reasons()
    if reasons["value"] is None:
        return unread("throttle reasons", reasons)
    if slowed := [reason for reason in reasons["value"] if reason in SLOWED_DOWN]:
        return warning(
            f"the GPU holds its clocks down: {', '.join(slowed)}",
            "results depend on heat or power of this moment",
            "better cooling or a higher power limit; wait until the GPU is cool",
        )
    if held := [reason for reason in reasons["value"] if reason != "GpuIdle"]:
        return note(f"clocks are held by: {', '.join(held)}", "a setting of the owner, or of GPUs that boost together")
    return ok("nothing holds the clocks down")


def _temperature(device: NvmlDevice) -> Finding:
    margin = device.degrees_to_slowdown()
    if margin["value"] is None:
        return unread("temperature", margin)
    what = f"{margin['value']} degrees below the temperature at which the GPU slows down"
    if margin["value"] < HOT_C:
        return warning(what, "it will slow down under load", "let it cool down; look at fans and airflow")
    return ok(what)


def _power_limit(device: NvmlDevice) -> Finding:
    now = device.read("PowerManagementLimit", unit="W", convert=_watts)
    default = device.read("PowerManagementDefaultLimit", unit="W", convert=_watts)
    for figure in (now, default):
        if figure["value"] is None:
            return unread("power limit", figure)
    what = f"power limit {now['value']:g} W, default {default['value']:g} W"
    if now["value"] < default["value"]:
        return warning(
            what,
            "the clock sinks under load to keep the limit",
            f"sudo nvidia-smi --power-limit={default['value']:g}",
        )
    if now["value"] > default["value"]:
        return note(what, "results are higher than those of a GPU as it is delivered")
    return ok(what)


def _watts(milliwatts: int) -> float:
    return milliwatts / 1e3


def _persistence(device: NvmlDevice) -> Finding:
    mode = device.read("PersistenceMode")
    if mode["value"] is None:
        return unread("persistence mode", mode)
    if mode["value"]:
        return ok("persistence mode on")
    return warning(
        "persistence mode off",
        "between two programs the driver unloads: each start is slow, settings are lost",
        "sudo nvidia-smi --persistence-mode=1",
    )


# ---- state of the board ---------------------------------------------------------------------------------------------


def _memory_errors(device: NvmlDevice) -> Iterator[Finding]:
    ecc = device.read("EccMode", convert=list)
    if ecc["value"] is None:
        yield unread("ECC", ecc)
    elif ecc["value"][0] != ecc["value"][1]:
        yield warning(
            f"ECC is {_on(ecc['value'][0])}, and will be {_on(ecc['value'][1])} after the next reset",
            "memory bandwidth and size depend on it, so later runs will differ",
            "reset the GPU before measuring",
        )
    else:
        yield ok(f"ECC {_on(ecc['value'][0])}")

    # Boards before Ampere retire pages, later ones remap rows; each refuses the other question.
    pages = device.read("RetiredPagesPendingStatus", convert=bool)
    rows = device.read("RemappedRows", convert=lambda remapped: bool(remapped[2] or remapped[3]))
    if pages["value"] is None and rows["value"] is None:
        yield unread("failing memory", rows)
    elif pages["value"] or rows["value"]:
        yield warning(
            "memory of the GPU is failing: pages or rows wait to be replaced",
            "errors are corrected while we measure, or not",
            "reset the GPU; if it comes back, have it replaced",
        )
    else:
        yield ok("no failing memory")


def _on(mode: int) -> str:
    return "on" if mode else "off"


def _mig(device: NvmlDevice) -> Finding:
    if device.instance:
        return warning(
            f"this is a MIG instance ({device.instance})",
            "other instances share power and clocks of the board; power and utilisation are not readable",
            "measure on a whole GPU, or keep the other instances idle",
        )
    mode = device.mig_mode()
    return unread("MIG", mode) if mode["value"] is None else ok("MIG off")


def _compute_mode(device: NvmlDevice) -> Finding:
    mode = device.compute_mode()
    if mode["value"] is None:
        return unread("compute mode", mode)
    if mode["value"] == "prohibited":
        return warning(
            "compute mode prohibited", "no program may compute on this GPU", "sudo nvidia-smi --compute-mode=0"
        )
    return ok(f"compute mode {mode['value']}")


def _virtualisation(device: NvmlDevice) -> Finding:
    mode = device.virtualisation()
    if mode["value"] is None:
        return unread("virtualisation", mode)
    if mode["value"] == "virtual GPU":
        return warning(
            "this is a virtual GPU",
            "other machines take their turns on the same board; power is not readable",
            "measure on a whole GPU",
        )
    if mode["value"] == "pass-through":
        return note("the GPU is passed through to a virtual machine", "the host's other guests may disturb the CPU")
    return ok("the GPU is not virtual")


def _link(device: NvmlDevice, pcie: Callable[[], Mapping[str, Metric]]) -> Iterator[Finding]:
    try:
        under_load = pcie()
    except (MemoryError, RuntimeError) as e:  # CuPy: no memory is left, or the GPU is somebody's alone
        yield note("PCIe link: not readable", f"nothing could be copied to the GPU: {e}")
        return
    for name, what in (("Generation", "generation"), ("Width", "width")):
        highest, now = device.read(f"MaxPcieLink{name}"), under_load[f"pcie_{what}_under_load"]
        unknown = [figure for figure in (highest, now) if figure["value"] is None]
        if unknown:
            yield unread(f"PCIe {what}", unknown[0])
        elif now["value"] < highest["value"]:
            yield warning(
                f"PCIe {what} {now['value']} under load, the board and slot could do {highest['value']}",
                "copies between host and GPU are slower than they could be",
                "look at slot, riser and BIOS settings",
            )
        else:
            yield ok(f"PCIe {what} {now['value']}, the highest")
