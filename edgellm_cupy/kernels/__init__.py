"""From `.cu` text to a callable: source -> spec -> nvrtc (no device) -> loader. Nothing here knows about LLMs."""

from .loader import (
    Graph,
    Kernel,
    KernelInfo,
    LaunchCounter,
    capture,
    count_launches,
    keep_while_captured,
    load,
    loaded,
)
from .spec import KernelSpec, Launch

__all__ = [
    "Graph",
    "Kernel",
    "KernelInfo",
    "KernelSpec",
    "Launch",
    "LaunchCounter",
    "capture",
    "count_launches",
    "keep_while_captured",
    "load",
    "loaded",
]
