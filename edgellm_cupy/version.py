"""The version, as the installed distribution says; a bare checkout on sys.path has none and says so."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("edgellm-cupy")
except PackageNotFoundError:
    __version__ = "0+uninstalled"
