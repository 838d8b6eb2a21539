"""Launch configurations of the decoder's own kernels: pure functions of (model, device)."""

from __future__ import annotations

from collections.abc import Iterator

from ..formats.config import ModelConfig
from ..kernels.spec import KernelSpec
from .device import DeviceFacts
from .product import X_TYPES, norm_spec

THREADS = 256
ATTENTION_THREADS = 128
_STATIC_SHARED_LIMIT = 48 * 1024
EMBED = KernelSpec("embed.cu", (("THREADS", str(THREADS)),))
LM_HEAD = KernelSpec("lm_head.cu", (("THREADS", str(THREADS)),))
ARGMAX = KernelSpec("argmax.cu", (("THREADS", str(THREADS)),))
NEXT_TOKEN = KernelSpec("next_token.cu", (("THREADS", "32"),))


def rope_spec(dtype: str) -> KernelSpec:
    return KernelSpec("rope_append.cu", (("X_T", X_TYPES[dtype]), ("THREADS", str(THREADS))))


def attention_spec(config: ModelConfig, dtype: str) -> KernelSpec:
    macros = (
        ("X_T", X_TYPES[dtype]),
        ("HEAD_DIM", str(config.head_dim)),
        ("GROUP", str(config.num_heads // config.num_kv_heads)),
        ("THREADS", str(ATTENTION_THREADS)),
    )
    return KernelSpec("attention.cu", macros)


def unsupported(config: ModelConfig) -> str | None:
    """Why the decoder's kernels cannot serve this configuration; None when they can."""
    if config.head_dim % 4:
        return f"head_dim is {config.head_dim}, expected a multiple of 4 on the GPU"
    group = config.num_heads // config.num_kv_heads
    # attention.cu keeps, for each query head of a group, the query, a tile of weights and three scalars.
    needed = group * (config.head_dim + ATTENTION_THREADS + 3) * 4
    if group > ATTENTION_THREADS or needed > _STATIC_SHARED_LIMIT:
        return (
            f"num_heads / num_kv_heads is {group} with head_dim {config.head_dim}: attention would take {needed} bytes "
            f"of static shared memory, expected at most {_STATIC_SHARED_LIMIT}"
        )
    return None


def combine_spec(config: ModelConfig, dtype: str) -> KernelSpec:
    return KernelSpec("attention_combine.cu", (("X_T", X_TYPES[dtype]), ("HEAD_DIM", str(config.head_dim))))


def silu_spec(config: ModelConfig, dtype: str) -> KernelSpec:
    return KernelSpec(
        "silu.cu", (("X_T", X_TYPES[dtype]), ("GATED", str(int(config.gated))), ("THREADS", str(THREADS)))
    )


def attention_splits(config: ModelConfig, tokens: int, max_len: int, device: DeviceFacts) -> int:
    """Blocks over which one token's context is divided: enough to fill the GPU twice, never fewer than 64 keys each."""
    fill = -(-2 * device.multiprocessors // (config.num_kv_heads * tokens))
    return max(1, min(fill, -(-max_len // 64)))


def head_grid(config: ModelConfig, tokens: int, device: DeviceFacts) -> tuple[int, int, int]:
    """Blocks of lm_head.cu: a persistent grid of full occupancy, evened out over the rows."""
    steps = -(-config.vocab_size // (THREADS // 4))
    columns = max(device.multiprocessors * (device.threads // THREADS) // tokens, 1)
    return (-(-steps // -(-steps // columns)), tokens, 1)


def decoder_specs(config: ModelConfig) -> Iterator[KernelSpec]:
    """Every specialisation that a decoder of this configuration uses beside the products."""
    yield from (EMBED, LM_HEAD, ARGMAX, NEXT_TOKEN)
    for dtype in ("float16", "bfloat16", "float32"):
        yield norm_spec(dtype)
        yield rope_spec(dtype)
        yield attention_spec(config, dtype)
        yield combine_spec(config, dtype)
        yield silu_spec(config, dtype)
