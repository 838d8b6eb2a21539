"""Tests marked `gpu` are skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest

from edgellm_cupy.errors import GpuUnavailableError
from edgellm_cupy.runtime import require_gpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        require_gpu()
    except GpuUnavailableError as e:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=str(e)))
