"""The version: the installed distribution's, or, for a bare checkout on sys.path, that of pyproject.toml, marked so."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_NAME = "edgellm-cupy"


def _uninstalled(pyproject: Path) -> str:
    """The version that `pyproject` gives, if it is ours, with ``+uninstalled``."""
    text = pyproject.read_text(encoding="utf-8") if pyproject.is_file() else ""
    ours = re.search(rf'^name = "{_NAME}"$', text, re.MULTILINE)
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE) if ours else None
    return f"{found[1] if found else 0}+uninstalled"


try:
    __version__ = version(_NAME)
except PackageNotFoundError:
    __version__ = _uninstalled(Path(__file__).parents[1] / "pyproject.toml")
