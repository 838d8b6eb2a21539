"""The roofline: its peaks agree with NVIDIA's published totals, and points lie where a hand computes them."""

from __future__ import annotations

import json

import pytest

from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.parts.roofline import RATES, RoofFacts, roofline, theoretical_peak
from edgellm_cupy.kernels.nvrtc import ARCHITECTURES

BANDWIDTH = measured(4000.0, "GB/s")


def facts(arch=90, multiprocessors=132, mhz=1980.0):
    return RoofFacts(arch, multiprocessors, measured(mhz, "MHz"))


def row(activation="int8", cold=2.0, warm=1.0, n=1, **more):
    return {
        "op": "ternary_matmul",
        "activation": activation,
        "n": n,
        "bytes": measured(1000, "bytes"),
        "kernel": {"cold": {"unit": "us", "median": measured(cold, "us")}, "warm": {"median": measured(warm, "us")}},
        **more,
    }


def products(*rows):
    return {"qkv": {"m": 1000, "k": 2000, "rows": list(rows)}}


# SMs, MHz, int8 TOPS, float16 TFLOPS as NVIDIA publishes them, dense: T4, A100 SXM, RTX 3090, RTX 4090, H100 SXM,
# HGX B200, RTX 5090. (The RTX 3090's are of the GA102 whitepaper.)
PUBLISHED = {
    75: (40, 1590, 130, 65),
    80: (108, 1410, 624, 312),
    86: (82, 1695, 284, 142),
    87: (16, 1300, 85, 42.5),
    89: (128, 2520, 660.6, 330.3),
    90: (132, 1830, 1979, 989.4),
    100: (148, 1860, 4500, 2250),
    120: (170, 2407, 838, 419),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_the_peak_is_what_nvidia_publishes(arch):
    sms, mhz, int8, float16 = PUBLISHED[arch]
    peak = theoretical_peak(facts(arch, sms, mhz))
    assert peak["int8_tops"]["value"] == pytest.approx(int8, rel=0.01)
    assert peak["float16_tflops"]["value"] == pytest.approx(float16, rel=0.01)
    assert peak["int8_tops"]["theoretical"]
    assert RATES[arch].source in peak["how"]
    assert RATES[arch].note in peak["how"]


def test_every_promised_architecture_has_a_peak():
    assert set(ARCHITECTURES) == set(RATES)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (facts(arch=103), "no published tensor-core rate known for compute capability 10.3"),
        (RoofFacts(90, 132, missing("the driver tells no SM clock", "MHz")), "the driver tells no SM clock"),
    ],
)
def test_without_a_rate_or_a_clock_there_is_no_peak_but_points(device, reason):
    found = roofline(products(row()), BANDWIDTH, device)
    assert found["peak"]["int8_tops"] == missing(reason, "TOPS")
    assert found["peak"]["float16_tflops"] == missing(reason, "TFLOPS")
    assert found["ridge_ops_per_byte"] == missing(reason, "op/byte")
    cold = found["points"][0]
    assert cold["tera_ops_per_s"]["value"] == 2.0
    assert cold["pct_of_roof"] == missing(reason, "%")


def test_a_point_under_the_memory_roof():
    found = roofline(products(row()), BANDWIDTH, facts())
    cold, warm = found["points"]
    # 2 x 1000 x 2000 operations on 1000 bytes in 2 us; the roof there is 4000 GB/s x 4000 op/byte = 16 Pop/s: the peak.
    assert (cold["name"], cold["l2"], cold["activation"], cold["n"]) == ("qkv, ternary_matmul", "cold", "int8", 1)
    assert cold["intensity_ops_per_byte"]["value"] == 4000
    assert cold["tera_ops_per_s"]["value"] == 2.0
    peak = 132 * 8192 * 1980 / 1e6
    assert cold["pct_of_roof"] == measured(100 * 2.0 / peak, "%", bound="tensor cores")
    assert warm["tera_ops_per_s"]["value"] == 4.0
    assert "bandwidth was not measured" in warm["pct_of_roof"]["reason"]

    lean = roofline(products(row(bytes=measured(100_000, "bytes"))), BANDWIDTH, facts())["points"][0]
    assert lean["intensity_ops_per_byte"]["value"] == 40
    assert lean["pct_of_roof"] == measured(100 * 2.0 / 160, "%", bound="memory")
    assert found["ridge_ops_per_byte"]["value"] == pytest.approx(peak * 1e3 / 4000)
    assert found["ridge_ops_per_byte"]["float16"] == pytest.approx(peak * 1e3 / 4000 / 2)
    assert found["bandwidth_gb_s"] is BANDWIDTH
    json.dumps(found, allow_nan=False)


def test_float_activations_are_held_against_the_float16_peak():
    cold = roofline(products(row("float")), BANDWIDTH, facts())["points"][0]
    assert cold["pct_of_roof"]["value"] == pytest.approx(100 * 2.0 / (132 * 4096 * 1980 / 1e6))


def test_a_wrong_product_has_no_rate():
    wrong = missing("wrong result: y[0]", "us")
    found = roofline(products(row(kernel={"cold": wrong, "warm": wrong})), BANDWIDTH, facts())
    for point in found["points"]:
        assert point["tera_ops_per_s"] == missing("wrong result: y[0]", "Top/s")
        assert point["intensity_ops_per_byte"]["value"] == 4000
        assert point["pct_of_roof"]["value"] is None


def test_no_bandwidth_no_share_and_no_ridge():
    found = roofline(products(row()), missing("too little memory", "GB/s"), facts())
    assert found["ridge_ops_per_byte"]["reason"] == "too little memory"
    assert found["points"][0]["pct_of_roof"]["reason"] == "too little memory"


def test_the_table_of_shapes_has_a_point_for_every_line():
    entry = {"n": 16, "bytes": measured(2000, "bytes"), "rows": [{k: v for k, v in row().items() if k != "bytes"}]}
    entry["rows"][0]["n"] = 16
    shapes = [{"model": "2B4T", "layer": "out", "m": 1000, "k": 2000, "tokens": [entry, {**entry, "n": 64}]}]
    found = roofline(shapes, BANDWIDTH, facts())
    assert [point["name"] for point in found["points"]][::2] == ["2B4T out, N = 16", "2B4T out, N = 64"]
    assert found["points"][0]["intensity_ops_per_byte"]["value"] == 2 * 1000 * 2000 * 16 / 2000
