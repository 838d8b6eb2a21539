"""Tests that came out of the mutation check (tests/mutation): faults that the other tests let pass."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm_cupy.tuning.decoder import ARGMAX, THREADS
from tests.emulator import ORDERS, Emulator


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator()
    emulator.build([ARGMAX])
    return emulator


@pytest.mark.parametrize("sign", [1, -1])
def test_the_greedy_choice_sees_the_last_bit(emulator, sign):
    """Two logits that are neighbours as floats, the larger one behind: not a tie."""
    logits = np.full((1, 2 * THREADS), sign, np.float32)
    logits[0, 400] = np.nextafter(logits[0, 400], np.float32(np.inf))
    best = np.zeros(1, np.uint64)
    emulator.launch_in_orders(ARGMAX.name, (2, 1), THREADS, [logits, best, np.int32(logits.shape[1])], orders=ORDERS)
    assert ~best.astype(np.uint32) == 400
