"""The roofline of the ternary products: what a product could reach at its intensity, and how much of that it does.

The roof is the smaller of two: the memory bandwidth that this run measured, times the operations a byte; and the peak
of the tensor cores, which is theoretical: multiprocessors x dense operations a clock and multiprocessor x the highest
SM clock. A ternary product counts as 2 M K N operations, as if it were dense, on int8 or on float16.

Result of :func:`roofline`:

    bandwidth_gb_s       the bandwidth that was measured
    peak                 {int8_tops, float16_tflops, how}
    ridge_ops_per_byte   intensity from which on int8 operations bound, not bytes; of float16 in `float16`
    points               one row a product, activation and L2: {name, n, l2, activation, intensity_ops_per_byte,
                         tera_ops_per_s, pct_of_roof}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..metrics import Metric, is_metric, measured, missing

L2 = ("cold", "warm")
_PEAK_OF = {"int8": "int8_tops", "float": "float16_tflops"}


class Rate(NamedTuple):
    """Dense tensor-core operations a clock and multiprocessor, a multiply-add being two.

    Attributes:
        int8, float16: operations; float16 with float16 sums.
        source: NVIDIA's figure that it is taken or computed from.
        note: what keeps a program from it, if anything known does.
    """

    int8: int
    float16: int
    source: str
    note: str = ""


_HALF_WITH_FLOAT32_SUMS = "GeForce boards do half as many float16 operations with float32 sums, which ours have"

RATES = {
    75: Rate(
        2048,
        1024,
        "Turing GPU architecture whitepaper (WP-09183-001): 8 tensor cores of 64 FMA, int8 twice that",
        _HALF_WITH_FLOAT32_SUMS,
    ),
    80: Rate(
        4096,
        2048,
        "A100 whitepaper: 4 tensor cores of 256 FMA; 312 TFLOPS and 624 TOPS of 108 multiprocessors at 1,410 MHz",
    ),
    86: Rate(
        2048,
        1024,
        "GA102 whitepaper: 4 tensor cores of 128 FMA, int8 twice that",
        _HALF_WITH_FLOAT32_SUMS,
    ),
    87: Rate(
        4096,
        2048,
        "computed from the Jetson AGX Orin technical brief: 170 sparse int8 TOPS of 16 multiprocessors at 1.3 GHz, "
        "dense half of it, float16 half of that",
    ),
    89: Rate(
        2048,
        1024,
        "computed from the Ada GPU architecture whitepaper: RTX 4090, 330.3 TFLOPS and 660.6 TOPS of 128 "
        "multiprocessors at 2,520 MHz",
        _HALF_WITH_FLOAT32_SUMS,
    ),
    90: Rate(
        8192,
        4096,
        "computed from the H100 datasheet: SXM5, 989.4 TFLOPS and 1,979 TOPS of 132 multiprocessors at 1,830 MHz",
        "only wgmma reaches it; mma.sync, which our kernels use, reaches less (arXiv:2402.13499)",
    ),
    100: Rate(
        16384,
        8192,
        "computed from the Blackwell datasheet: HGX B200, 2.25 PFLOPS and 4.5 POPS of 148 multiprocessors at 1,860 MHz",
        "only tcgen05.mma reaches it; our kernels use mma.sync",
    ),
    120: Rate(
        2048,
        1024,
        "computed from the RTX Blackwell whitepaper: RTX 5090, 419 TFLOPS and 838 TOPS of 170 multiprocessors at "
        "2,407 MHz",
        _HALF_WITH_FLOAT32_SUMS,
    ),
}
"""By compute capability times ten."""


@dataclass(frozen=True)
class RoofFacts:
    """What the peak of a device is computed from.

    Attributes:
        arch: compute capability times ten.
        multiprocessors: their number.
        max_sm_clock_mhz: the highest SM clock, as a figure that may be null.
    """

    arch: int
    multiprocessors: int
    max_sm_clock_mhz: Metric


def current_roof_facts() -> RoofFacts:
    """Of the current CUDA device."""
    import cupy

    device = cupy.cuda.Device()
    khz = device.attributes.get("ClockRate", 0)
    clock = measured(khz / 1e3, "MHz") if khz else missing("the driver tells no SM clock", "MHz")
    return RoofFacts(int(device.compute_capability), device.attributes["MultiProcessorCount"], clock)


def roofline(
    products: Mapping[str, Any] | Sequence[Mapping[str, Any]], bandwidth: Metric, facts: RoofFacts
) -> dict[str, Any]:
    """The module's result. Nothing is measured here.

    Args:
        products: of :mod:`.latency`: layer type -> product; or the shapes of :mod:`.table`.
        bandwidth: GB/s that this run measured.
        facts: of the device.
    """
    peak = theoretical_peak(facts)
    ridges = {activation: _ridge(peak[key], bandwidth) for activation, key in _PEAK_OF.items()}
    ridge = ridges["int8"]
    if ridge["value"] is not None:
        ridge = {**ridge, "of": "int8", "float16": ridges["float"]["value"]}
    return {
        "bandwidth_gb_s": bandwidth,
        "peak": peak,
        "ridge_ops_per_byte": ridge,
        "points": [
            _point(name, m, k, row, l2, bandwidth, peak[_PEAK_OF[row["activation"]]])
            for name, m, k, row in _rows(products)
            for l2 in L2
        ],
    }


def theoretical_peak(facts: RoofFacts) -> dict[str, Any]:
    """{int8_tops, float16_tflops, how}: null with the reason for a device whose rates or clock are not known."""
    rate, clock = RATES.get(facts.arch), facts.max_sm_clock_mhz
    if rate is None:
        return _no_peak(f"no published tensor-core rate known for compute capability {facts.arch / 10:.1f}")
    if clock["value"] is None:
        return _no_peak(clock["reason"])

    def tera(operations: int, unit: str) -> Metric:
        return measured(
            facts.multiprocessors * operations * clock["value"] / 1e6, unit, theoretical=True, ops_per_clock=operations
        )

    how = (
        f"theoretical: {facts.multiprocessors} multiprocessors x dense operations a clock x {clock['value']:g} MHz. "
        f"Source: {rate.source}"
    )
    return {
        "int8_tops": tera(rate.int8, "TOPS"),
        "float16_tflops": tera(rate.float16, "TFLOPS"),
        "how": f"{how}. {rate.note}" if rate.note else how,
    }


def _no_peak(reason: str) -> dict[str, Any]:
    return {"int8_tops": missing(reason, "TOPS"), "float16_tflops": missing(reason, "TFLOPS"), "how": reason}


def _rows(products: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """Name, M, K and row of everything that was measured."""
    if isinstance(products, Mapping):
        for layer, product in products.items():
            for row in product["rows"]:
                yield f"{layer}, {row['op']}", product["m"], product["k"], row
        return
    for shape in products:
        for entry in shape["tokens"]:
            for row in entry["rows"]:
                name = f"{shape['model']} {shape['layer']}, N = {entry['n']}"
                yield name, shape["m"], shape["k"], {"n": entry["n"], "bytes": entry["bytes"], **row}


def _point(
    name: str, m: int, k: int, row: Mapping[str, Any], l2: str, bandwidth: Metric, peak: Metric
) -> dict[str, Any]:
    operations, moved, series = 2 * m * k * row["n"], row["bytes"], row["kernel"][l2]
    time = series if is_metric(series) else series["median"]
    if moved["value"] is None:
        intensity = missing(moved["reason"], "op/byte")
    else:
        intensity = measured(operations / moved["value"], "op/byte")
    if time["value"] is None:
        rate = missing(time["reason"], "Top/s")
    else:
        rate = measured(operations / time["value"] / 1e6, "Top/s")
    return {
        "name": name,
        "n": row["n"],
        "l2": l2,
        "activation": row["activation"],
        "intensity_ops_per_byte": intensity,
        "tera_ops_per_s": rate,
        "pct_of_roof": _share(rate, intensity, l2, bandwidth, peak),
    }


def _share(rate: Metric, intensity: Metric, l2: str, bandwidth: Metric, peak: Metric) -> Metric:
    if l2 == "warm":
        return missing("warm weights come from the L2, whose bandwidth was not measured", "%")
    for figure in (rate, intensity, bandwidth, peak):
        if figure["value"] is None:
            return missing(figure["reason"], "%")
    memory = bandwidth["value"] * intensity["value"] / 1e3
    bound = "memory" if memory < peak["value"] else "tensor cores"
    return measured(100 * rate["value"] / min(memory, peak["value"]), "%", bound=bound)


def _ridge(peak: Metric, bandwidth: Metric) -> Metric:
    for figure in (peak, bandwidth):
        if figure["value"] is None:
            return missing(figure["reason"], "op/byte")
    return measured(1e3 * peak["value"] / bandwidth["value"], "op/byte")
