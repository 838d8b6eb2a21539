"""Launch configurations of the decoder's own kernels: pure functions of (model, device)."""

from __future__ import annotations

from collections.abc import Iterator

from ..formats.config import ModelConfig
from ..kernels.spec import KernelSpec, Launch
from .attention import KV_TYPES, append_spec, prefill_specs
from .device import DeviceFacts
from .product import X_TYPES, norm_spec

THREADS = 256
_HEAD_THREADS = 256
_HEAD_STATIC_BYTES = 1024  # of shared memory, at most, beside the tokens
_LARGEST_VOCABULARY = 2**22  # sums of masses of sample.cu
_HEAD_BYTES = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
_DEEPEST = 10  # vectors of the head in flight a lane
_COMBINE_THREADS = 256
_MERGED_BYTES = 40 * 1024  # static shared memory of attention.cu for its warps' results
DECODE_WARPS = 4
_DECODE_SHARED_BYTES = 47 * 1024  # static shared memory of attention_decode.cu, with a little room
PORTABLE_CLUSTER, LARGE_CLUSTER = 8, 16  # blocks: the most of every GPU with clusters, and of those for data centres
PORTABLE_KEYS = 512  # the longest context of the first: what its blocks load before the queries are there
LARGE_KEYS = 512  # and for each cluster of the second: longer contexts need more blocks
_LEAST_CLUSTERS = 4  # fewer leave most of the GPU idle
KEYS_A_SPLIT = 64  # splits.cuh
NEXT_TOKEN = KernelSpec("next_token.cu", (("THREADS", "32"),))
SAMPLE_THREADS = 1024
SAMPLE = KernelSpec("sample.cu", (("THREADS", str(SAMPLE_THREADS)),))


# ---- embedding and head ---------------------------------------------------------------------------------------------


def embed_spec(rows: str) -> KernelSpec:
    """rows: dtype of the embedding."""
    return KernelSpec("embed.cu", (("W_T", KV_TYPES[rows]), ("THREADS", str(THREADS))))


def head_unsupported(config: ModelConfig, device: DeviceFacts) -> str | None:
    """Why head and sampling cannot serve this model on the device; None when they can."""
    needed = head_launch(config.hidden_size, config.vocab_size, 1, "float32", "float32", device).shared_bytes
    if needed > device.block_shared_bytes - _HEAD_STATIC_BYTES:
        return (
            f"hidden_size is {config.hidden_size}: the head would take {needed} bytes of shared memory, of which this "
            f"GPU gives a block {device.block_shared_bytes - _HEAD_STATIC_BYTES}"
        )
    if config.vocab_size > _LARGEST_VOCABULARY:
        return f"vocab_size is {config.vocab_size}, expected at most {_LARGEST_VOCABULARY} on the GPU"
    return None


def head_launch(hidden: int, vocabulary: int, tokens: int, rows: str, x_dtype: str, device: DeviceFacts) -> Launch:
    """lm_head.cu for so many tokens: a persistent grid of two blocks a multiprocessor, evened out over the rows."""
    elements = 16 // _HEAD_BYTES[rows]  # of a vector
    vectors = -(-hidden // elements)
    lanes = 8 if vectors >= 8 else 2
    turns = -(-vectors // lanes)
    ahead = min(range(1, _DEEPEST + 1), key=lambda a: (-(-turns // a) * a - turns, -a))
    pieces = turns * lanes * (elements // 4)
    side_by_side = 4 if tokens > 1 and 4 * pieces * 16 <= device.block_shared_bytes - _HEAD_STATIC_BYTES else 1
    steps = -(-vocabulary // (_HEAD_THREADS // lanes))
    columns = min(2 * device.multiprocessors, steps)
    macros = (
        ("W_T", KV_TYPES[rows]),
        ("X_T", X_TYPES[x_dtype]),
        ("TOKENS", str(side_by_side)),
        ("LANES", str(lanes)),
        ("AHEAD", str(ahead)),
        ("THREADS", str(_HEAD_THREADS)),
    )
    return Launch(
        KernelSpec("lm_head.cu", macros),
        (-(-steps // -(-steps // columns)), -(-tokens // side_by_side), 1),
        (_HEAD_THREADS, 1, 1),
        side_by_side * pieces * 16,
    )


# ---- attention of single tokens -------------------------------------------------------------------------------------


def decode_unsupported(x_dtype: str, device: DeviceFacts) -> str | None:
    """Why attention_decode.cu cannot serve new tokens (attention.cu serves all); None when it can."""
    if x_dtype == "float32":
        return "tensor cores have no float32"
    if x_dtype == "bfloat16" and device.arch < 80:
        return "tensor cores have bfloat16 from sm_80 on"
    return None


def largest_cluster(device: DeviceFacts) -> int:
    """Blocks that a cluster may have; 0: the device knows no clusters."""
    if device.arch < 90:
        return 0
    return LARGE_CLUSTER if device.arch < 110 else PORTABLE_CLUSTER


def cluster_size(config: ModelConfig, x_dtype: str, tokens: int, keys: int, device: DeviceFacts) -> int:
    """Blocks of a cluster with which attention_decode.cu best serves new tokens that make contexts of up to `keys`.

    0: without clusters, which takes a second kernel. On an H200, microseconds a token (30 layers of bitnet-2b4t, five
    key/value heads; 9 of smollm-135m-notebook, nine; 30 of smollm-135m, three: too few blocks to read at speed):

        context            16   1024   2000        16   1024   2000        16   1024   2000
        without           620    681    712       106    117    128       315    343    361
        clusters of 8     602    692    755        98    113    132       320    370    445
        clusters of 16    611    651    694       102    108    116       336    366    393
    """
    count = config.num_kv_heads * _parts(config, 8)[0] * tokens
    largest, slots = largest_cluster(device), 2 * device.multiprocessors
    if decode_unsupported(x_dtype, device) or not largest or count < _LEAST_CLUSTERS:
        return 0
    if keys <= PORTABLE_KEYS:
        return PORTABLE_CLUSTER if PORTABLE_CLUSTER * count <= slots else 0
    fits = largest == LARGE_CLUSTER and LARGE_CLUSTER * count <= slots and keys <= LARGE_KEYS * count
    return LARGE_CLUSTER if fits else 0


def decode_launch(
    config: ModelConfig, x_dtype: str, kv_dtype: str, tokens: int, splits: int, cluster: int = 0
) -> Launch:
    """attention_decode.cu: four warps of 16 keys are a share's 64. cluster: 0, or the blocks of one."""
    parts, heads = _parts(config, 8)
    # Of each query the warps' results, the query itself and what comes from the cluster; and the new key and value.
    row = 4 * (-(-config.head_dim // 64) * 64)
    fits = row * (heads * (DECODE_WARPS + 2) + 2) <= _DECODE_SHARED_BYTES
    warps = DECODE_WARPS if fits or not cluster else DECODE_WARPS // 2
    macros = (
        ("X_T", X_TYPES[x_dtype]),
        ("KV_T", KV_TYPES[kv_dtype]),
        ("HEAD_DIM", str(config.head_dim)),
        ("HEADS", str(heads)),
        ("WARPS", str(warps)),
        ("CLUSTER", str(cluster)),
    )
    return Launch(
        KernelSpec("attention_decode.cu", macros),
        (cluster or splits, config.num_kv_heads * parts, tokens),
        (32 * warps, 1, 1),
        cluster=cluster or 1,
    )


def attention_launch(
    config: ModelConfig, x_dtype: str, kv_dtype: str, rotate: bool, tokens: int, splits: int
) -> Launch:
    """attention.cu: as many warps as make a tile of 64 keys with four a lane in flight, up to eight."""
    elements = {"float32": 4}.get(kv_dtype, 8)
    vectors = -(-config.head_dim // elements)
    lanes = min(32, 1 << (vectors - 1).bit_length())
    warps = min(8, max(2, 16 * lanes // 32))
    row = -(-vectors // lanes) * lanes * elements
    parts, heads = _parts(config, max(1, min(8, _MERGED_BYTES // (warps * row * 4))))
    macros = (
        ("X_T", X_TYPES[x_dtype]),
        ("KV_T", KV_TYPES[kv_dtype]),
        ("HEAD_DIM", str(config.head_dim)),
        ("HEADS", str(heads)),
        ("WARPS", str(warps)),
        ("ROTATE", str(int(rotate))),
    )
    return Launch(KernelSpec("attention.cu", macros), (splits, config.num_kv_heads * parts, tokens), (32 * warps, 1, 1))


def _parts(config: ModelConfig, largest: int) -> tuple[int, int]:
    """Blocks that share a key/value head's queries, and the queries of each, as even as can be."""
    group = config.num_heads // config.num_kv_heads
    parts = -(-group // largest)
    return parts, -(-group // parts)


def attention_splits(config: ModelConfig, tokens: int, max_len: int, device: DeviceFacts) -> int:
    """Blocks over which one token's context is divided: enough to fill the GPU twice, never fewer than 64 keys each."""
    fill = -(-2 * device.multiprocessors // (config.num_kv_heads * tokens))
    return max(1, min(fill, -(-max_len // KEYS_A_SPLIT)))


def combine_launch(config: ModelConfig, x_dtype: str, tokens: int) -> Launch:
    """attention_combine.cu."""
    macros = (("X_T", X_TYPES[x_dtype]), ("HEAD_DIM", str(config.head_dim)), ("THREADS", str(_COMBINE_THREADS)))
    return Launch(KernelSpec("attention_combine.cu", macros), (config.num_heads, tokens, 1), (_COMBINE_THREADS, 1, 1))


# ---- everything -----------------------------------------------------------------------------------------------------


def decoder_specs(config: ModelConfig, device: DeviceFacts) -> Iterator[KernelSpec]:
    """The specialisations that decoders of this configuration use on the device beside the products, for the usual
    choices: a head in the model's dtype or int8, a KV cache in the model's dtype or int8."""
    clusters = [size for size in (PORTABLE_CLUSTER, LARGE_CLUSTER) if size <= largest_cluster(device)]
    yield from (NEXT_TOKEN, SAMPLE)
    for dtype in ("float16", "bfloat16", "float32"):
        yield norm_spec(dtype)
        yield combine_launch(config, dtype, 1).spec
        for rows in (dtype, "int8"):
            yield embed_spec(rows)
            for tokens in (1, 4):
                yield head_launch(config.hidden_size, config.vocab_size, tokens, rows, dtype, device).spec
            yield append_spec(dtype, rows)
            if decode_unsupported(dtype, device):
                yield attention_launch(config, dtype, rows, True, 1, 1).spec
                yield attention_launch(config, dtype, rows, False, 1, 1).spec
            else:
                for cluster in (0, *clusters):
                    yield decode_launch(config, dtype, rows, 1, 1, cluster).spec
                yield from prefill_specs(config.head_dim, dtype, rows)
