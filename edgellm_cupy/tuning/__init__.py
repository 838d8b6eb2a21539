"""Device facts -> launch configuration, as pure functions that need no device."""

from __future__ import annotations

from ..formats.config import PRESETS
from ..kernels.spec import KernelSpec
from .decoder import decoder_specs
from .device import DeviceFacts
from .gemm import gemm_specs
from .product import product_specs

FLOOR_THREADS = (256, 512, 1024)
"""Block sizes of the benchmark's floor kernel."""


SMALLEST = DeviceFacts(arch=75, multiprocessors=1, threads=1024, shared_bytes=64 * 1024, block_shared_bytes=64 * 1024)
"""Less than any GPU has: what the decoder's kernels choose by is shared memory, and the presets fit this."""


def floor_spec(threads: int, check: bool = False) -> KernelSpec:
    """read_floor.cu: the benchmark's yardstick, or the variant that proves what it reads."""
    return KernelSpec("read_floor.cu", (("THREADS", str(threads)), ("CHECK", str(int(check)))))


def specialisations(device: DeviceFacts | None = None) -> tuple[KernelSpec, ...]:
    """Every kernel specialisation that dispatch can reach, for the products and for the presets' decoders; on any
    device, or on this one."""
    specs = [
        *product_specs(device),
        *gemm_specs(device),
        *(spec for config in PRESETS.values() for spec in decoder_specs(config, device or SMALLEST)),
    ]
    specs += [floor_spec(threads, check) for threads in FLOOR_THREADS for check in (False, True)]
    return tuple(dict.fromkeys(specs))
