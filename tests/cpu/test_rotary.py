"""The rotary embedding and its variants, against plain formulas and against what Hugging Face transformers computed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgellm_cupy import ArgumentValueError
from edgellm_cupy.formats.rotary import KINDS, RopeScaling, rotary_table

RECORDS = json.loads((Path(__file__).parents[1] / "data" / "rotary.json").read_text(encoding="utf-8"))["records"]
FACTORS = {"short_factor": (1.0, 1.5, 2.0, 3.0), "long_factor": (2.0, 4.0, 8.0, 16.0)}
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "dynamic": RopeScaling("dynamic", 2.0, 10),
    "yarn": RopeScaling("yarn", 4.0, 32),
    "llama3": RopeScaling("llama3", 8.0, 16),
    "longrope": RopeScaling("longrope", 4.0, 16, **FACTORS),
}


def angles_of(table):
    """Angles from cosine and sine, which are exact only modulo a whole turn; and the attention factor."""
    return np.arctan2(table[..., 1].astype(float), table[..., 0]), np.hypot(table[..., 0], table[..., 1].astype(float))


def assert_turns(table, positions, frequencies, attention=1.0, relative=1e-6):
    """`table` [n, D / 2, 2] turns by position * frequency, of frequencies that are right up to `relative`."""
    expected = np.asarray(positions, float)[:, None] * np.asarray(frequencies, float)
    angles, size = angles_of(table)
    off = (angles - expected + math.pi) % (2 * math.pi) - math.pi
    assert (np.abs(off) <= 1e-6 + relative * expected).all(), np.abs(off).max()
    np.testing.assert_allclose(size, attention, rtol=1e-6)


def test_without_a_scaling():
    table = rotary_table(10, 100.0, None, 50, 2048)
    assert table.shape == (50, 5, 2)
    assert table.dtype == np.float32
    assert table.flags.c_contiguous
    for position in (0, 1, 49):
        for i in range(5):
            angle = position * 100.0 ** (-2 * i / 10)
            np.testing.assert_allclose(table[position, i], [math.cos(angle), math.sin(angle)], atol=1e-7)


def test_angles_far_out_are_exact():
    """In float32 an angle of 2**20 would be off by a sixteenth."""
    table = rotary_table(2, 1e4, None, 2**20 + 1, 2**20)
    np.testing.assert_allclose(table[-1, 0], [math.cos(2**20), math.sin(2**20)], atol=1e-7)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['scaling']['kind']}-{r['length']}-{r['max_context']}")
def test_frequencies_are_those_of_transformers(record):
    scaling = RopeScaling.from_dict(record["scaling"])
    length = record["length"] or 300
    table = rotary_table(record["head_dim"], record["theta"], scaling, length, record["max_context"])
    # The last position of a dynamic table is the one that turns by the frequencies of this length.
    first = length - 1 if scaling.kind == "dynamic" else 0
    positions = np.arange(first, length)
    assert_turns(table[first:], positions, record["frequencies"], record["attention_factor"])


def test_the_record_holds_every_variant():
    assert {record["scaling"]["kind"] for record in RECORDS} == set(KINDS) == set(SCALINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_changes_the_angles(kind):
    scaled = rotary_table(8, 1e4, SCALINGS[kind], 64, 64)
    plain = rotary_table(8, 1e4, None, 64, 64)
    assert np.abs(scaled - plain).max() > 0.1


# ---- one variant after the other, from its paper's formula ----------------------------------------------------------


def test_linear_divides_the_positions():
    table = rotary_table(8, 1e4, SCALINGS["linear"], 21, 2048)
    np.testing.assert_array_equal(table[::4], rotary_table(8, 1e4, None, 6, 2048))


def test_dynamic_turns_each_position_as_the_last_of_its_sequence():
    """So that a table for a long cache begins with the one for a short cache."""
    table = rotary_table(8, 1e4, SCALINGS["dynamic"], 30, 10)
    np.testing.assert_array_equal(table[:10], rotary_table(8, 1e4, None, 10, 10))
    for position in (10, 17, 29):
        base = 1e4 * (2.0 * (position + 1) / 10 - 1) ** (8 / 6)
        assert_turns(table[position : position + 1], [position], [base ** (-2 * i / 8) for i in range(4)])
        shorter = rotary_table(8, 1e4, SCALINGS["dynamic"], position + 1, 10)
        np.testing.assert_array_equal(table[: position + 1], shorter)


def test_dynamic_heads_of_two_features_have_nothing_to_scale():
    np.testing.assert_array_equal(rotary_table(2, 1e4, SCALINGS["dynamic"], 30, 10), rotary_table(2, 1e4, None, 30, 10))


def test_llama3():
    """Wavelengths below 16 / 4 tokens stay, those above 16 / 1 are stretched eightfold, between them it blends."""
    table = rotary_table(16, 100.0, SCALINGS["llama3"], 40, 128)
    frequencies, kinds = [], set()
    for i in range(8):
        frequency = 100.0 ** (-2 * i / 16)
        wavelength = 2 * math.pi / frequency
        if wavelength < 16 / 4:
            kinds.add("stays")
        elif wavelength > 16 / 1:
            kinds.add("stretched")
            frequency /= 8
        else:
            kinds.add("blended")
            smooth = (16 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        frequencies.append(frequency)
    assert kinds == {"stretched", "blended"}  # the shortest wavelength there is, 2 pi, is longer than 4
    assert_turns(table, range(40), frequencies)
    # With 64 tokens of original context the first stays.
    far = rotary_table(16, 100.0, RopeScaling("llama3", 8.0, 64), 40, 512)
    np.testing.assert_array_equal(far[:, 0], rotary_table(16, 100.0, None, 40, 512)[:, 0])


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.75}, 0.75),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),  # needs the other one too
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
    ],
)
def test_yarn_attention_factor(changes, attention):
    table = rotary_table(8, 1e4, RopeScaling("yarn", 4.0, 32, **changes), 5, 128)
    np.testing.assert_allclose(angles_of(table)[1], attention, rtol=1e-6)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_ramp(truncate):
    scaling = RopeScaling("yarn", 4.0, 512, beta_fast=20.0, beta_slow=2.0, truncate=truncate)
    low, high = (16 * math.log(512 / (2 * math.pi * turns)) / (2 * math.log(100.0)) for turns in (20, 2))
    assert 1 < low < high < 8  # so that the ramp has both ends in the table
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    frequencies = []
    for i in range(8):
        slowed = min(max((i - low) / (high - low), 0), 1)
        frequencies.append(100.0 ** (-2 * i / 16) * (slowed / 4 + 1 - slowed))
    assert_turns(rotary_table(16, 100.0, scaling, 30, 2048), range(30), frequencies, 0.1 * math.log(4) + 1)


def test_yarn_ramp_without_a_width_is_a_step():
    scaling = RopeScaling("yarn", 4.0, 512, beta_fast=5.0, beta_slow=5.0, truncate=False)
    step = 16 * math.log(512 / (2 * math.pi * 5)) / (2 * math.log(100.0))
    assert 4 < step < 5  # and not at a whole number
    frequencies = [100.0 ** (-2 * i / 16) / (4 if i > step else 1) for i in range(8)]
    assert_turns(rotary_table(16, 100.0, scaling, 30, 2048), range(30), frequencies, 0.1 * math.log(4) + 1)


@pytest.mark.parametrize(("context", "max_context"), [(16, 8), (16, 16), (1, 64)])
def test_longrope_without_anything_to_stretch_leaves_the_attention_alone(context, max_context):
    table = rotary_table(8, 1e4, RopeScaling("longrope", 1.0, context, **FACTORS), 5, max_context)
    np.testing.assert_allclose(angles_of(table)[1], 1.0, rtol=1e-6)


def test_longrope_takes_its_factors_by_the_length_of_the_table():
    scaling, attention = SCALINGS["longrope"], math.sqrt(1 + math.log(4) / math.log(16))
    for length, factors in ((16, scaling.short_factor), (17, scaling.long_factor)):
        frequencies = [1e4 ** (-2 * i / 8) / factors[i] for i in range(4)]
        assert_turns(rotary_table(8, 1e4, scaling, length, 64), range(length), frequencies, attention)


def test_yarn_and_longrope_without_a_factor_take_it_from_the_context():
    for kind in ("yarn", "longrope"):
        fields = {"original_context": 16, **(FACTORS if kind == "longrope" else {})}
        implied = rotary_table(8, 1e4, RopeScaling(kind, **fields), 40, 80)
        np.testing.assert_array_equal(implied, rotary_table(8, 1e4, RopeScaling(kind, 5.0, **fields), 40, 80))
        none = rotary_table(8, 1e4, RopeScaling(kind, **fields), 10, 16)
        np.testing.assert_allclose(angles_of(none)[1], 1.0, rtol=1e-6)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_and_back(kind):
    scaling = SCALINGS[kind]
    assert RopeScaling.from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "su"}, "rope_scaling.kind is 'su', expected one of linear, dynamic, yarn, llama3, longrope"),
        ({"kind": "linear", "factor": 0}, "rope_scaling.factor is 0, expected above 0"),
        ({"kind": "linear", "factor": math.nan}, "rope_scaling.factor is nan, expected a finite number"),
        ({"kind": "linear", "factor": "4"}, "rope_scaling.factor is '4', expected a finite number"),
        ({"kind": "linear", "factor": True}, "rope_scaling.factor is True, expected a finite number"),
        ({"kind": "dynamic", "factor": 2.0}, "rope_scaling.original_context is 0, expected at least 1 for dynamic"),
        ({"kind": "yarn", "original_context": 1.5}, "rope_scaling.original_context is 1.5, expected at least 1"),
        ({"kind": "yarn", "original_context": True}, "rope_scaling.original_context is True, expected at least 1"),
        ({"kind": "dynamic", "factor": 0.5, "original_context": 8}, "rope_scaling.factor is 0.5, expected at least 1"),
        (
            {"kind": "llama3", "original_context": 8, "low_freq_factor": 4.0},
            "rope_scaling.low_freq_factor is 4.0, expected below high_freq_factor = 4.0",
        ),
        ({"kind": "yarn", "original_context": 8, "beta_slow": 0.0}, "rope_scaling.beta_slow is 0.0, expected above 0"),
        ({"kind": "yarn", "original_context": 8, "truncate": 1}, "rope_scaling.truncate is 1, expected true or false"),
        (
            {"kind": "longrope", "original_context": 8, "long_factor": [1.0, 0.0]},
            "rope_scaling.long_factor is (1.0, 0.0), expected finite numbers above 0",
        ),
        ({"kind": "longrope", "original_context": 8, "long_factor": 4}, "rope_scaling.long_factor is 4, expected"),
        ({"kind": "linear", "type": "linear"}, "rope_scaling is {'kind': 'linear', 'type': 'linear'}, expected"),
        ({"factor": 2.0}, "rope_scaling is {'factor': 2.0}, expected an object with"),
        (["linear"], "rope_scaling is ['linear'], expected an object with"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ArgumentValueError) as e:
        RopeScaling.from_dict(fields)
    assert str(e.value).startswith(message)


def test_a_scaling_that_does_not_fit_the_model():
    with pytest.raises(ArgumentValueError, match=r"long_factor has 4 numbers, expected head_dim / 2 = 8"):
        rotary_table(16, 1e4, SCALINGS["longrope"], 40, 64)
    with pytest.raises(ArgumentValueError, match=r"rope_theta is 1\.0, expected above 1 for yarn"):
        rotary_table(16, 1.0, SCALINGS["yarn"], 40, 64)
