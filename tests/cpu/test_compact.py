"""Our compact safetensors: exact round trips, and what becomes of damaged files."""

from __future__ import annotations

import dataclasses
import json
import resource
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from edgellm_cupy import CheckpointError, ModelConfig, TernaryWeight
from edgellm_cupy.formats import compact, load_checkpoint
from edgellm_cupy.formats.checkpoint import Checkpoint, Layers, Rows
from edgellm_cupy.formats.rotary import RopeScaling
from tests.checkpoints import PRODUCTS, TINY, assert_same, damaged_json, fuzz, read_all, read_or_refused, written

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="the extra `models` is not installed")

BITNET = dataclasses.replace(TINY, ffn_activation="relu2", sub_norms=True, tied_head=False)

# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        BITNET,
        dataclasses.replace(TINY, gated=False, num_kv_heads=4, hidden_size=72, intermediate_size=65, vocab_size=3),
        dataclasses.replace(TINY, name='größer ≥ 1 "x"', rope_theta=1e5 / 3, rms_eps=0.0, num_layers=1),
        dataclasses.replace(TINY, rope_scaling=RopeScaling("llama3", 8.0, original_context=256, high_freq_factor=3.0)),
        dataclasses.replace(
            TINY,
            tied_head=False,
            rope_scaling=RopeScaling(
                "longrope", original_context=64, short_factor=(1.0,) * 8, long_factor=(1.5, *range(2, 9))
            ),
        ),
    ],
    ids=["llama", "bitnet", "ungated", "name", "llama3", "longrope"],
)
def test_compact_round_trip(tmp_path, config, head):
    checkpoint = Checkpoint.random(config, seed=3, head=head)
    path = tmp_path / "model.safetensors"
    compact.write(checkpoint, path)
    assert_same(compact.read(path), checkpoint)
    assert_same(load_checkpoint(str(path)), checkpoint)
    if not config.tied_head:
        assert not np.array_equal(compact.read(path).head.to_float(), compact.read(path).embedding.to_float())


def test_compact_keeps_a_scale_a_row(tmp_path):
    checkpoint = Checkpoint.random(TINY)
    layers = []
    for layer in checkpoint.layers:
        scale = np.linspace(0.5, 2, layer.qkv.shape[0], dtype=np.float32)
        layers.append(
            dataclasses.replace(layer, qkv=TernaryWeight.from_packed(layer.qkv.packed, scale, layer.qkv.shape))
        )
    checkpoint = dataclasses.replace(checkpoint, layers=layers)
    compact.write(checkpoint, tmp_path / "m")
    assert_same(compact.read(tmp_path / "m"), checkpoint)


def test_compact_is_read_by_the_package(tmp_path):
    """Every tensor, by the documented name, and on an address that its dtype allows."""
    checkpoint = Checkpoint.random(dataclasses.replace(BITNET, vocab_size=41), head="float16")
    compact.write(checkpoint, path := tmp_path / "m.safetensors")
    tensors = safetensors_numpy.load_file(path)
    products = {f"layers.{i}.{name}.{part}" for i in (0, 1) for name in PRODUCTS for part in ("packed", "scale")}
    norms = {
        f"layers.{i}.{name}" for i in (0, 1) for name in ("attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm")
    }
    assert tensors.keys() == products | norms | {"final_norm", "embedding.values", "head.values"}
    np.testing.assert_array_equal(tensors["head.values"], checkpoint.head.values)
    np.testing.assert_array_equal(tensors["layers.1.up.packed"], checkpoint.layers[1].up.packed)
    np.testing.assert_array_equal(tensors["layers.1.ffn_sub_norm"], checkpoint.layers[1].ffn_sub_norm)

    read = compact.read(path)
    arrays = [read.final_norm, read.embedding.values, read.head.values]
    for layer in read.layers:
        arrays += [layer.attn_norm, layer.ffn_sub_norm, layer.down.packed, layer.down.scale]
    assert all(a.flags.aligned for a in arrays)


def test_compact_version_1(tmp_path):
    """A file as version 1 wrote it: an int8 embedding, and a configuration without the fields that came later."""
    checkpoint = Checkpoint.random(TINY, head="int8")
    tensors = {
        "embedding.values": checkpoint.embedding.values,
        "embedding.scale": checkpoint.embedding.scale,
        "final_norm": checkpoint.final_norm,
    }
    for i, layer in enumerate(checkpoint.layers):
        tensors |= {f"layers.{i}.{name}": getattr(layer, name) for name in ("attn_norm", "ffn_norm")}
        tensors |= {f"layers.{i}.{name}.packed": getattr(layer, name).packed for name in PRODUCTS}
        tensors |= {f"layers.{i}.{name}.scale": getattr(layer, name).scale for name in PRODUCTS}
    later = ("ffn_activation", "sub_norms", "tied_head", "rope_scaling")
    config = {key: value for key, value in TINY.to_dict().items() if key not in later}
    metadata = {"format": "edgellm-ternary-v1", "config": json.dumps(config), "source": checkpoint.source}
    path = written(tmp_path / "v1.safetensors", safetensors_numpy.save(tensors, metadata))
    assert_same(load_checkpoint(path), checkpoint)


def test_compact_is_two_bits_a_weight(tmp_path):
    config = dataclasses.replace(TINY, hidden_size=256, intermediate_size=512, num_heads=16, num_kv_heads=4)
    checkpoint = Checkpoint.random(config, head="int8")
    path = tmp_path / "model.safetensors"
    compact.write(checkpoint, path)
    weights = sum(m * k for m, k in config.products().values()) * config.num_layers
    embedding = config.vocab_size * config.hidden_size
    assert path.stat().st_size < 1.02 * (weights / 4 + embedding) + 16_000


def test_compact_replaces_what_a_link_leads_to(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = written(tmp_path / "there" / "real", b"old"), tmp_path / "link"
    link.symlink_to(real)
    compact.write(Checkpoint.random(TINY), link)
    assert link.is_symlink()
    assert_same(compact.read(real), compact.read(link))
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["real"]


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_compact_streams(tmp_path):
    """Writing and reading layer by layer holds a layer or the embedding, not the model; tracemalloc sees NumPy."""
    config = ModelConfig("wide", 24, 512, 1024, 8, 4, 64, vocab_size=2048)
    largest = config.vocab_size * config.hidden_size * 2
    assert Checkpoint.random(config).body_bytes > 5 * largest
    zeros = np.zeros((config.vocab_size, config.hidden_size), ml_dtypes.bfloat16)
    one = Checkpoint.random(config).layers[0]
    checkpoint = dataclasses.replace(
        Checkpoint.random(config),
        # Fresh arrays for each layer, as a reader makes them.
        layers=Layers(
            config.num_layers,
            lambda i: dataclasses.replace(
                one,
                **{n: TernaryWeight(w.packed.copy(), w.scale, w.shape) for n in PRODUCTS for w in [getattr(one, n)]},
            ),
        ),
        read_embedding=lambda: Rows(zeros.copy()),
    )
    path = tmp_path / "wide.safetensors"
    tracemalloc.start()
    try:
        compact.write(checkpoint, path)
        assert tracemalloc.get_traced_memory()[1] < 2 * largest
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        read_all(compact.read(path))
        assert tracemalloc.get_traced_memory()[1] - before < 2 * largest
    finally:
        tracemalloc.stop()


# ---- writing --------------------------------------------------------------------------------------------------------


def test_compact_replaces_in_one_step(tmp_path):
    path = tmp_path / "model.safetensors"
    first, second = Checkpoint.random(TINY, 1), Checkpoint.random(TINY, 2)
    compact.write(first, path)
    opened = compact.read(path)
    compact.write(second, path)
    assert_same(compact.read(path), second)
    assert_same(opened, first)  # what was open stays what it was

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))
    try:
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be written: .*File too large"):
            compact.write(first, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(compact.read(path), second)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_compact_of_a_damaged_source_leaves_nothing(tmp_path):
    def read(i: int):
        if i == 1:
            raise CheckpointError("source: layer 1 is damaged")
        return good.layers[i]

    good = Checkpoint.random(TINY)
    with pytest.raises(CheckpointError, match=r"^source: layer 1 is damaged$"):
        compact.write(dataclasses.replace(good, layers=Layers(2, read)), tmp_path / "m.safetensors")
    assert not any(tmp_path.iterdir())


def test_compact_writes_over_its_source(tmp_path):
    path = tmp_path / "m.safetensors"
    compact.write(Checkpoint.random(TINY), path)
    compact.write(compact.read(path), path)
    assert_same(compact.read(path), Checkpoint.random(TINY))


def test_compact_into_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.model.safetensors: cannot be written"):
        compact.write(Checkpoint.random(TINY), tmp_path / "nowhere" / "model.safetensors")


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_compact_writes_no_constant_matrix(tmp_path, value):
    checkpoint = Checkpoint.random(TINY)
    out = TernaryWeight.from_int8(np.full((64, 64), value, np.int8), 0.5)
    layers = [checkpoint.layers[0], dataclasses.replace(checkpoint.layers[1], out=out)]
    with pytest.raises(CheckpointError, match=rf"layer 1, out: every weight is {value}, which no trained model has"):
        compact.write(dataclasses.replace(checkpoint, layers=layers), tmp_path / "m")
    assert not any(tmp_path.iterdir())


# ---- damaged files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compact_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("compact") / "model.safetensors"
    compact.write(Checkpoint.random(BITNET, head="int8"), path)
    return path.read_bytes()


def rewrite(data: bytes, path, edit) -> None:
    """Write the file `data` to `path` after `edit(tensors, metadata)` changed the two dictionaries."""
    path.write_bytes(data)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata())  # noqa: SIM118
    edit(tensors, metadata)
    path.write_bytes(safetensors_numpy.save(tensors, metadata or None))


def _set(name, value):
    return lambda tensors, metadata: tensors.__setitem__(name, value)


def _poke(name, index, value):
    return lambda tensors, metadata: tensors[name].__setitem__(index, value)


def _metadata(key, value):
    return lambda tensors, metadata: metadata.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, m: t.pop("layers.1.up.packed"), "tensor layers.1.up.packed is missing"),
        (lambda t, m: t.pop("layers.1.ffn_sub_norm"), "tensor layers.1.ffn_sub_norm is missing"),
        (lambda t, m: t.pop("embedding.scale"), "tensor embedding.scale is missing"),
        (lambda t, m: t.pop("head.values"), "tensor head.values is missing"),
        (
            _set("layers.0.out.packed", np.zeros((3, 1, 16), np.uint8)),
            "tensor layers.0.out.packed is uint8 [3, 1, 16], but the configuration needs uint8 [64, 1, 16]",
        ),
        (_set("layers.0.out.packed", np.zeros((64, 1, 16), np.int8)), "tensor layers.0.out.packed is int8 [64, 1, 16]"),
        (
            _set("layers.0.out.scale", np.ones(3, np.float32)),
            "tensor layers.0.out.scale is float32 [3], but the configuration needs float32 [64] or [1]",
        ),
        (_set("layers.0.attn_sub_norm", np.ones(63, np.float32)), "tensor layers.0.attn_sub_norm is float32 [63]"),
        (_set("final_norm", np.ones(3, np.float32)), "tensor final_norm is float32 [3]"),
        (_set("final_norm", np.ones(64)), "tensor final_norm is float64 [64]"),
        (_set("embedding.values", np.zeros((40, 63), np.int8)), "tensor embedding.values is int8 [40, 63]"),
        (_set("head.values", np.zeros((40, 64), np.uint8)), "needs int8 or float16 or bfloat16 or float32 [40, 64]"),
        (_set("head.values", np.zeros((40, 64), np.float16)), "tensor head.scale: the configuration has no place for"),
        (_set("layers.2.bias", np.ones(3)), "tensor layers.2.bias: the configuration has no place for it"),
        (_metadata("format", "edgellm-ternary-v9"), "its format is 'edgellm-ternary-v9', but this version reads"),
        (lambda t, m: m.pop("config"), "its metadata holds no model configuration"),
        (_metadata("config", "{"), "its metadata holds no model configuration"),
        (_metadata("config", "[" * 100_000), "its metadata holds no model configuration"),
        (_metadata("config", "[]"), "expected a JSON object"),
        (_metadata("config", '{"name": "x"}'), "the model field 'num_layers' is missing"),
        (
            _metadata("config", json.dumps(BITNET.to_dict() | {"num_layers": 2**60})),
            "tensor layers.2.attn_norm is missing",
        ),
    ],
)
def test_compact_refuses_a_header(tmp_path, compact_bytes, edit, message):
    """Before anything is returned."""
    rewrite(compact_bytes, path := tmp_path / "damaged.safetensors", edit)
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_poke("layers.1.down.packed", (3, 0, 5), 0xFF), "tensor layers.1.down: packed row 3, byte 5 holds the code 3"),
        (_poke("layers.0.qkv.scale", 0, np.nan), "tensor layers.0.qkv.scale holds a value that is not finite"),
        (_poke("layers.0.out.scale", 0, 0), "tensor layers.0.out.packed: a scale is 0, which no trained model has"),
        (_poke("layers.0.out.packed", ..., 0), "tensor layers.0.out.packed: every weight is -1, which no trained"),
        (_poke("layers.1.down.packed", ..., 0x55), "tensor layers.1.down.packed: every weight is 0, which no trained"),
        (_poke("layers.0.ffn_norm", 7, np.inf), "layers.0.ffn_norm holds a value that is not finite, inf at [7]"),
        (_poke("embedding.scale", 7, -np.inf), "tensor embedding.scale holds a value that is not finite, -inf at [7]"),
    ],
)
def test_compact_refuses_a_value(tmp_path, compact_bytes, edit, message):
    """When it is read; the other layers are readable."""
    rewrite(compact_bytes, path := tmp_path / "damaged.safetensors", edit)
    checkpoint = load_checkpoint(path)
    with pytest.raises(CheckpointError) as e:
        read_all(checkpoint)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)
    good = [i for i in (0, 1) if f"layers.{i}." not in message]
    assert len([checkpoint.layers[i] for i in good]) >= 1


def test_compact_refuses_a_final_norm_that_is_not_finite(tmp_path, compact_bytes):
    rewrite(compact_bytes, path := tmp_path / "damaged.safetensors", _poke("final_norm", 63, np.nan))
    with pytest.raises(CheckpointError, match="final_norm holds a value that is not finite, nan at"):
        load_checkpoint(path)


def test_compact_refuses_rows_that_are_not_finite(tmp_path):
    compact.write(Checkpoint.random(TINY, head="float16"), path := tmp_path / "m.safetensors")
    rewrite(path.read_bytes(), path, _poke("embedding.values", (39, 2), np.inf))
    checkpoint = compact.read(path)
    for read in (checkpoint.read_embedding, checkpoint.read_head):
        with pytest.raises(
            CheckpointError, match=r"embedding.values holds a value that is not finite, inf at \[39, 2\]"
        ):
            read()


def test_compact_read_by_name(tmp_path):
    """`compact.read` of another safetensors file says what it is not."""
    for metadata, stated in ({"format": "pt"}, "gives the format 'pt'"), (None, "gives no format"):
        path = written(tmp_path / "m.safetensors", safetensors_numpy.save({"x": np.ones(3)}, metadata))
        with pytest.raises(CheckpointError, match=rf"not one that edgellm wrote \(its metadata {stated}"):
            compact.read(path)


@pytest.mark.parametrize("kept", [9, 100, 2000, -1])
def test_compact_truncated(tmp_path, compact_bytes, kept):
    path = tmp_path / "short.safetensors"
    path.write_bytes(compact_bytes[:kept])
    with pytest.raises(CheckpointError, match=r"short.safetensors: not a readable safetensors file"):
        load_checkpoint(path)


def test_compact_fuzzed(tmp_path, compact_bytes):
    path = tmp_path / "fuzzed.safetensors"
    fuzz(path, compact_bytes, lambda p: read_all(compact.read(p)), header=7500)


def test_compact_with_any_header(tmp_path, compact_bytes):
    """What a header says of a tensor, and each field of the configuration, replaced by odd values."""
    end = 8 + int.from_bytes(compact_bytes[:8], "little")
    header, path = json.loads(compact_bytes[8:end]), tmp_path / "odd.safetensors"
    texts = header.pop("__metadata__")
    few = {name: header.pop(name) for name in ("layers.1.down.packed", "embedding.scale")}
    headers = [{"__metadata__": texts} | header | damaged for damaged in damaged_json(few)]
    headers += [header | few | {"__metadata__": metadata} for metadata in damaged_json(texts)]
    config = json.loads(texts["config"]) | {"rope_scaling": RopeScaling("longrope", original_context=64).to_dict()}
    headers += [
        header | few | {"__metadata__": texts | {"config": json.dumps(damaged)}} for damaged in damaged_json(config)
    ]

    refused = 0
    for damaged in headers:
        text = json.dumps(damaged).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + compact_bytes[end:])
        refused += read_or_refused(lambda: read_all(compact.read(path)), path)
    assert 0.5 * len(headers) < refused < len(headers)
