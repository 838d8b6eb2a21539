"""What a user installs: the wheel's contents and what importing the package needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel that is built from a copy of the sources, without the network."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("edgellm_cupy", "bench", "kernels_cu"):
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    build = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (path,) = (copy / "wheel").glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_holds_every_module_and_kernel(wheel):
    expected = {
        f"edgellm_cupy/{path.relative_to(ROOT / 'edgellm_cupy')}" for path in (ROOT / "edgellm_cupy").rglob("*.py")
    }
    for folder, pattern in (("bench", "*.py"), ("kernels_cu", "*.cu"), ("kernels_cu", "*.cuh")):
        expected |= {f"edgellm_cupy/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob(pattern)}
    expected.add("edgellm_cupy/py.typed")
    assert not expected - wheel
    assert len([name for name in wheel if name.endswith((".cu", ".cuh"))]) >= 13


def test_wheel_holds_nothing_else(wheel):
    strangers = {name for name in wheel if not name.startswith(("edgellm_cupy/", "edgellm_cupy-"))}
    assert not strangers
    assert not [name for name in wheel if "results" in name or "tests" in name]


def test_import_needs_neither_cupy_nor_nvml():
    code = (
        "import sys, edgellm_cupy as ec\n"
        "ec.ModelConfig.preset('smollm-135m')\n"
        "print([m for m in ('cupy', 'pynvml', 'gguf', 'typer') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names():
    import edgellm_cupy as ec

    assert {"rmsnorm", "ternary_matmul", "rmsnorm_ternary_matmul"} <= set(ec.__all__) & set(dir(ec.reference))
    for name in ec.__all__:
        assert getattr(ec, name) is not None
