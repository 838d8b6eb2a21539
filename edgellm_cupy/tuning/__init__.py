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


_KIB = 1024
ANY_DEVICE = (
    DeviceFacts(arch=75, multiprocessors=1, threads=1024, shared_bytes=64 * _KIB, block_shared_bytes=64 * _KIB),
    DeviceFacts(arch=90, multiprocessors=1, threads=2048, shared_bytes=228 * _KIB, block_shared_bytes=227 * _KIB),
)
"""The decoder's kernels are chosen by what tensor cores and clusters there are; the presets fit the least memory."""


def floor_spec(threads: int, check: bool = False) -> KernelSpec:
    """read_floor.cu: the benchmark's yardstick, or the variant that proves what it reads."""
    return KernelSpec("read_floor.cu", (("THREADS", str(threads)), ("CHECK", str(int(check)))))


def specialisations(device: DeviceFacts | None = None) -> tuple[KernelSpec, ...]:
    """Every kernel specialisation that dispatch can reach, for the products and for the presets' decoders; on any
    device, or on this one."""
    specs = [
        *product_specs(device),
        *gemm_specs(device),
        *(
            spec
            for facts in ([device] if device else ANY_DEVICE)
            for config in PRESETS.values()
            for spec in decoder_specs(config, facts)
        ),
    ]
    specs += [floor_spec(threads, check) for threads in FLOOR_THREADS for check in (False, True)]
    return tuple(dict.fromkeys(specs))
