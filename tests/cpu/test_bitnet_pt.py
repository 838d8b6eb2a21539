"""microsoft/BitNet's GPU checkpoint: what is read of it, and what becomes of damaged and of hostile files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edgellm_cupy import CheckpointError, ModelConfig
from edgellm_cupy.formats import bitnet_pt, load_checkpoint
from edgellm_cupy.formats.config import PRESETS
from edgellm_cupy.formats.torch_file import TorchFile
from tests.checkpoints import fuzz, written

# Made by torch itself: tests/data/make_bitnet_pt.py.
GOLDEN = Path(__file__).parent.parent / "data" / "bitnet_int2.pt"

# Of 2B4T are the activation, the sub-norms, theta, epsilon and context. All products are whole tiles of 16 x 32; 96
# columns are no whole chunks of our packing.
SMALL = dataclasses.replace(
    ModelConfig.preset("bitnet-2b4t"),
    name="model_state_int2",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=40,
)
BESIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "relu2"}
PARTS = {
    "attention.wqkv": (SMALL.q_rows, SMALL.kv_rows, SMALL.kv_rows),
    "attention.wo": (SMALL.hidden_size,),
    "feed_forward.w13": (SMALL.intermediate_size, SMALL.intermediate_size),
    "feed_forward.w2": (SMALL.hidden_size,),
}
PRODUCTS = dict(zip(PARTS, ("qkv", "out", "up", "down"), strict=True))


# ---- a model, and how microsoft's tools pack it, one weight after the other -----------------------------------------


def numbers(count: int, seed: int, below: int) -> np.ndarray:
    """Integers from 0 to below - 1 that are the same everywhere and for ever (the golden file was made of them)."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(1 + 1_000_003 * seed)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((x >> np.uint64(33)) % np.uint64(below)).astype(np.int64)


def model() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Floats as the file holds them, and the ternary matrices in Hugging Face's order of rows, by product."""
    c = SMALL
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def floats(seed: int, *shape: int) -> np.ndarray:
        return ((numbers(math.prod(shape), seed, 255) - 127) / 64).astype(bfloat16).reshape(shape)

    tensors = {"tok_embeddings.weight": floats(0, c.vocab_size, c.hidden_size), "norm.weight": floats(1, c.hidden_size)}
    ternary = {}
    for i in range(c.num_layers):
        sizes = {"attention_norm": 64, "ffn_norm": 64, "attention.attn_sub_norm": 64, "feed_forward.ffn_sub_norm": 96}
        for seed, (name, k) in enumerate(sizes.items()):
            tensors[f"layers.{i}.{name}.weight"] = floats(10 * i + seed + 2, k)
        for seed, (name, (m, k)) in enumerate(zip(PARTS, c.products().values(), strict=True)):
            ternary[f"layers.{i}.{name}"] = numbers(m * k, 100 + 10 * i + seed, 3).reshape(m, k) - 1
            scales = (1 + numbers(4, 200 + 10 * i + seed, 100)) / 64
            scales[len(PARTS[name]) :] = 0
            tensors[f"layers.{i}.{name}.weight_scale"] = scales.astype(bfloat16)
    return tensors, ternary


def pairs_from_halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows (h l d) to (h d l), l = 2."""
    half = len(w) // heads // 2
    out = np.empty_like(w)
    for h in range(heads):
        for side in range(2):
            for d in range(half):
                out[(h * half + d) * 2 + side] = w[(h * 2 + side) * half + d]
    return out


def pack(t: np.ndarray) -> np.ndarray:
    """int8 [M, K / 4]: tiles of 16 x 32 codes, whose words are interleaved."""
    m, k = t.shape
    out = bytearray()
    for tile_row in range(m // 16):
        for tile_column in range(k // 32):
            codes = []
            for i in range(16):
                for j in range(32):
                    tid = 2 * i + j // 16
                    row, column = (tid // 16) * 8 + tid % 8, j % 16 + 16 * ((tid % 16) // 8)
                    codes.append(int(t[16 * tile_row + row, 32 * tile_column + column]) + 2)
            for start in range(0, 512, 16):
                word = 0
                for i in range(4):  # (word >> 2i) & 0x03030303 are the codes 4i to 4i + 3
                    for y in range(4):
                        word |= codes[start + 4 * i + y] << 2 * i + 8 * y
                out += word.to_bytes(4, "little")
    return np.frombuffer(bytes(out), np.int8).reshape(m, k // 4)


def tensors_of(floats: dict[str, np.ndarray], ternary: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the file holds."""
    tensors = dict(floats)
    q, kv = SMALL.q_rows, SMALL.kv_rows
    for name, t in ternary.items():
        if name.endswith("wqkv"):
            query, key = pairs_from_halves(t[:q], SMALL.num_heads), pairs_from_halves(t[q : q + kv], SMALL.num_kv_heads)
            t = np.concatenate([query, key, t[q + kv :]])
        tensors[f"{name}.weight"] = pack(t)
    return tensors


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    return tensors_of(*model())


# ---- torch.save without torch ---------------------------------------------------------------------------------------

STORAGE = {"int8": "CharStorage", "uint8": "ByteStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}
STORAGE |= {"float32": "FloatStorage", "int64": "LongStorage"}


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def integers(values) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


EMPTY = name("collections", "OrderedDict") + b")R"


def tensor(dtype: str, key: str, count: int, shape, stride=None, offset: int = 0) -> bytes:
    """The pickle of one tensor."""
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))] if stride is None else stride
    storage = b"(" + text("storage") + name("torch", STORAGE[dtype]) + text(key) + text("cpu")
    storage += b"J" + struct.pack("<i", count) + b"tQ"
    body = storage + b"J" + struct.pack("<i", offset) + integers(shape) + integers(stride) + b"\x89" + EMPTY
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + body + b"tR"


def parameter(inner: bytes) -> bytes:
    return name("torch._utils", "_rebuild_parameter") + b"(" + inner + b"\x89" + EMPTY + b"tR"


def dictionary(items: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


def archive(path: Path, pkl: bytes, storages: dict[str, bytes], method=zipfile.ZIP_STORED, byteorder=b"little") -> Path:
    with zipfile.ZipFile(path, "w", method) as f:
        f.writestr("model/data.pkl", pkl)
        f.writestr("model/byteorder", byteorder)
        for key, data in storages.items():
            f.writestr(f"model/data/{key}", data)
        f.writestr("model/version", b"3\n")
    return path


def save(path: Path, tensors: dict[str, np.ndarray], config: dict | None = BESIDE, **how) -> Path:
    items, storages = {}, {}
    for key, (tensor_name, array) in enumerate(tensors.items()):
        items[tensor_name] = tensor(array.dtype.name, str(key), array.size, array.shape)
        storages[str(key)] = array.tobytes()
    if config is not None:
        path.with_name("config.json").write_text(json.dumps(config))
    return archive(path, dictionary(items), storages, **how)


def read_all(path: Path) -> None:
    checkpoint = bitnet_pt.read(path)
    assert len(list(checkpoint.layers)) == checkpoint.config.num_layers
    assert checkpoint.embedding.values.shape == checkpoint.head.values.shape


# ---- what is read ---------------------------------------------------------------------------------------------------


def assert_is_the_model(checkpoint) -> None:
    floats, ternary = model()
    np.testing.assert_array_equal(checkpoint.embedding.values, floats["tok_embeddings.weight"])
    np.testing.assert_array_equal(checkpoint.final_norm, floats["norm.weight"].astype(np.float32))
    assert len(checkpoint.layers) == SMALL.num_layers
    for i, layer in enumerate(checkpoint.layers):
        for ours, theirs in (
            (layer.attn_norm, "attention_norm"),
            (layer.ffn_norm, "ffn_norm"),
            (layer.attn_sub_norm, "attention.attn_sub_norm"),
            (layer.ffn_sub_norm, "feed_forward.ffn_sub_norm"),
        ):
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(ours, floats[f"layers.{i}.{theirs}.weight"].astype(np.float32))
        for theirs, ours in PRODUCTS.items():
            weight, parts = getattr(layer, ours), PARTS[theirs]
            np.testing.assert_array_equal(weight.to_int8(), ternary[f"layers.{i}.{theirs}"])
            scales = floats[f"layers.{i}.{theirs}.weight_scale"].astype(np.float32)[: len(parts)]
            assert weight.scale.shape == ((1,) if len(parts) == 1 else (sum(parts),))
            np.testing.assert_array_equal(np.broadcast_to(weight.scale, sum(parts)), scales.repeat(parts))


def test_a_checkpoint_is_read_exactly(tmp_path, stored):
    checkpoint = bitnet_pt.read(save(tmp_path / "model_state_int2.pt", stored))
    assert checkpoint.config == SMALL
    assert checkpoint.source == "model_state_int2.pt"
    assert_is_the_model(checkpoint)
    assert checkpoint.embedding.dtype == "bfloat16"
    assert not checkpoint.embedding.values.flags.writeable  # the file's own memory


def test_a_file_of_torch_itself(tmp_path):
    """Its output head shares the storage of its embedding."""
    assert GOLDEN.stat().st_size < 100_000
    path = written(tmp_path / "model_state_int2.pt", GOLDEN.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(BESIDE))
    assert "output.weight" in TorchFile(path).tensors
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == SMALL
    assert_is_the_model(checkpoint)


def test_the_configuration_beside_it(tmp_path, stored):
    path = save(tmp_path / "model_state_int2.pt", stored, config=None)
    with pytest.raises(
        CheckpointError, match=r"num_layers = 2, not 30 as BitNet b1.58 2B4T has, and there is no config"
    ):
        bitnet_pt.read(path)
    meta = {"n_heads": 4, "n_kv_heads": 2, "rope_theta": 1e4, "norm_eps": 1e-6, "max_seq_len": 99, "dim": 64}
    (tmp_path / "params.json").write_text(json.dumps(meta))
    expected = dataclasses.replace(SMALL, rope_theta=1e4, rms_eps=1e-6, max_context=99)
    assert bitnet_pt.read(path).config == expected
    theirs = {**BESIDE, "rope_theta": 2e4, "rms_norm_eps": 1e-4, "max_position_embeddings": 77}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert bitnet_pt.read(path).config == dataclasses.replace(SMALL, rope_theta=2e4, rms_eps=1e-4, max_context=77)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BESIDE, "num_attention_heads": 3}, "gives 3 heads, which do not divide the 64 rows of query"),
        ({**BESIDE, "num_attention_heads": "4"}, "gives '4' heads"),
        ({**BESIDE, "num_key_value_heads": 1}, "4 heads and 1 KV heads of 16 do not give"),
        ({**BESIDE, "num_key_value_heads": 3}, "num_kv_heads is 3, expected a divisor"),
        ({**BESIDE, "rope_theta": "big"}, "rope_theta is 'big', expected float"),
        ({**BESIDE, "hidden_act": "silu"}, "only the activation relu2 without rotary scaling"),
        ({**BESIDE, "rope_scaling": {"type": "yarn"}}, "only the activation relu2 without rotary scaling"),
        ({**BESIDE, "rope_scaling": "yarn"}, "only the activation relu2 without rotary scaling"),
        ({**BESIDE, "rope_parameters": {"rope_type": "llama3", "factor": 8}}, "only the activation relu2 without rot"),
        ({**BESIDE, "rope_parameters": {"rope_theta": 1e4, "factor": 8}}, "only the activation relu2 without rotary"),
        ({**BESIDE, "use_scaled_rope": True}, "only the activation relu2 without rotary scaling"),
        ({**BESIDE, "rope_theta": 1e300}, "rope_theta 1e+300, expected finite numbers"),
        ({**BESIDE, "hidden_size": 128}, "config.json gives hidden_size = 128, but its tensors give 64"),
        ({**BESIDE, "num_hidden_layers": 3}, "config.json gives num_layers = 3, but its tensors give 2"),
        ({**BESIDE, "intermediate_size": 1}, "config.json gives intermediate_size = 1, but its tensors give 96"),
        ({**BESIDE, "vocab_size": 41}, "config.json gives vocab_size = 41, but its tensors give 40"),
        ({**BESIDE, "head_dim": 32}, "config.json gives head_dim = 32, but its tensors give 16"),
        ([], "config.json: expected a JSON object"),
    ],
)
def test_refuses_a_configuration(tmp_path, stored, config, message):
    path = save(tmp_path / "model_state_int2.pt", stored, config)
    with pytest.raises(CheckpointError) as e:
        bitnet_pt.read(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


def test_a_configuration_nested_too_deeply(tmp_path, stored):
    path = save(tmp_path / "model_state_int2.pt", stored)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"config.json: not a readable JSON file"):
        bitnet_pt.read(path)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 3e4}, {"rope_theta": 3e4}])
def test_a_base_alone_is_no_scaling(tmp_path, stored, rope):
    path = save(tmp_path / "model_state_int2.pt", stored, {**BESIDE, "rope_parameters": rope, "rope_scaling": None})
    assert bitnet_pt.read(path).config == dataclasses.replace(SMALL, rope_theta=3e4)


def test_a_model_of_the_presets_sizes_needs_no_configuration(tmp_path, stored, monkeypatch):
    monkeypatch.setitem(PRESETS, "bitnet-2b4t", dataclasses.replace(SMALL, name="preset"))
    checkpoint = bitnet_pt.read(save(tmp_path / "model_state_int2.pt", stored, config=None))
    assert checkpoint.config == dataclasses.replace(SMALL, name="preset")
    monkeypatch.setitem(PRESETS, "bitnet-2b4t", dataclasses.replace(SMALL, num_kv_heads=4))
    with pytest.raises(CheckpointError, match="4 heads and 4 KV heads of 16 do not give"):
        bitnet_pt.read(tmp_path / "model_state_int2.pt")


def test_heads(tmp_path, stored):
    embedding = stored["tok_embeddings.weight"]
    path = save(tmp_path / "model_state_int2.pt", {**stored, "output.weight": embedding})
    assert bitnet_pt.read(path).config.tied_head
    path = save(path, {**stored, "output.weight": embedding[::-1].copy()})
    checkpoint = bitnet_pt.read(path)
    assert checkpoint.config == dataclasses.replace(SMALL, tied_head=False)
    np.testing.assert_array_equal(checkpoint.head.values, embedding[::-1])
    np.testing.assert_array_equal(checkpoint.embedding.values, embedding)


def test_layers_are_read_when_they_are_asked_for(tmp_path, stored):
    path = save(tmp_path / "model_state_int2.pt", stored)
    checkpoint = bitnet_pt.read(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tensor layers.0.attention_norm.weight cannot be read any more"):
        _ = checkpoint.layers[0]


# ---- damaged tensors ------------------------------------------------------------------------------------------------


def _put(key, at, value):
    def edit(tensors):
        tensors[key] = tensors[key].copy()
        tensors[key][at] = value

    return edit


WQKV, W2 = "layers.1.attention.wqkv.weight", "layers.1.feed_forward.w2.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        # Stored byte 5 is word 1, so row 1; byte 1 of it. The code of element 4x + 1 with x = 2 becomes 0.
        (_put(W2, (0, 5), 0b01000101), f"tensor {W2}: row 1, columns 1, 5, 9, 13: a code is 0, no ternary weight"),
        (_put(W2, ..., -86), f"tensor {W2}, rows 0 to 63: every weight is 0, which no trained model has"),
        (_put(W2, ..., 0x55), f"tensor {W2}, rows 0 to 63: every weight is -1, which no trained model has"),
        (_put(W2, ..., -1), f"tensor {W2}, rows 0 to 63: every weight is 1, which no trained model has"),
        (_put(WQKV, slice(64, 96), -1), f"tensor {WQKV}, rows 64 to 95: every weight is 1, which no trained model"),
        (_put(f"{WQKV}_scale", 2, np.nan), f"tensor {WQKV}_scale is ["),
        (_put(f"{WQKV}_scale", 1, 0), f"tensor {WQKV}_scale is ["),
        (_put("layers.0.ffn_norm.weight", 3, np.inf), "tensor layers.0.ffn_norm.weight: element [3] is not a finite"),
        (_put("layers.0.ffn_norm.weight", ..., 0), "tensor layers.0.ffn_norm.weight is all zero"),
        (_put("tok_embeddings.weight", (7, 9), np.nan), "tensor tok_embeddings.weight: element [7, 9] is not a finite"),
        (lambda t: t.pop(WQKV), "tensor layers.1.attention.attn_sub_norm.weight: this decoder has no place for it"),
        (lambda t: t.pop(W2), f"tensor {W2} is missing"),
        (lambda t: t.pop("norm.weight"), "tensor norm.weight is missing"),
        (lambda t: t.pop("tok_embeddings.weight"), "tensor tok_embeddings.weight is missing"),
        (lambda t: t.pop("layers.0.attention.wo.weight"), "tensor layers.0.attention.wo.weight is missing"),
        (lambda t: t.update({W2: t[W2].ravel()}), f"tensor {W2} is int8 [1536], expected int8 or uint8 [64, 24]"),
        (lambda t: t.update({W2: t[W2].astype(np.int64)}), f"tensor {W2} is int64 [64, 24], expected int8"),
        (lambda t: t.update({"x.bias": t["norm.weight"]}), "tensor x.bias: this decoder has no place for it"),
    ],
)
def test_refuses_a_damaged_tensor(tmp_path, stored, edit, message):
    tensors = dict(stored)
    edit(tensors)
    path = save(tmp_path / "damaged.pt", tensors)
    with pytest.raises(CheckpointError) as e:
        read_all(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


def test_an_unused_scale_may_be_anything(tmp_path, stored):
    tensors = dict(stored)
    _put(f"{WQKV}_scale", 3, np.nan)(tensors)
    assert_is_the_model(bitnet_pt.read(save(tmp_path / "model_state_int2.pt", tensors)))


# ---- the container --------------------------------------------------------------------------------------------------

FOUR = np.arange(4, dtype=np.float32)


def test_container_of_a_state_dictionary(tmp_path):
    """An OrderedDict with attributes, a parameter, a view into a storage, and references to what was made before."""
    views = {"a": tensor("float32", "0", 4, (2, 2)), "b": tensor("float32", "0", 4, (2,), offset=1)}
    pkl = b"\x80\x02" + EMPTY + b"q\x00(" + text("a") + views["a"] + b"r\x01\x00\x00\x00"
    pkl += text("b") + parameter(views["b"]) + text("c") + b"h\x01u" + b"}" + text("_metadata") + EMPTY + b"sb."
    file = TorchFile(archive(tmp_path / "x.pt", pkl, {"0": FOUR.tobytes()}))
    np.testing.assert_array_equal(file.array("a"), [[0, 1], [2, 3]])
    np.testing.assert_array_equal(file.array("b"), [1, 2])
    np.testing.assert_array_equal(file.array("c"), file.array("a"))


class _Bomb:
    """What a hostile file would run."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_file_is_run(tmp_path, protocol):
    target = tmp_path / "was here"
    bomb = pickle.dumps({"norm.weight": _Bomb(target)}, protocol)
    path = archive(tmp_path / "bomb.pt", bomb, {})
    with pytest.raises(CheckpointError, match=r"bomb.pt: not a readable PyTorch file: data.pkl "):
        bitnet_pt.read(path)
    assert not target.exists()
    pickle.loads(bomb)
    assert target.exists(), "the bomb does not work"


@pytest.mark.parametrize(
    "asked",
    ["builtins eval", "os system", "torch load", "torch._utils _rebuild_tensor", "numpy.core.multiarray _reconstruct"],
)
def test_names_that_no_tensor_needs_are_refused(tmp_path, asked):
    pkl = b"\x80\x02" + name(*asked.split()) + b"."
    with pytest.raises(CheckpointError, match=f"data.pkl asks for {asked.replace(' ', '.')}, which no tensor needs"):
        TorchFile(archive(tmp_path / "x.pt", pkl, {}))


DEEP = b"\x80\x02}" + b")" + b"\x85" * 1_000_000  # ((((...)))): hashing that overflows the stack


@pytest.mark.parametrize(
    ("pkl", "message"),
    [
        (b"", "pickle exhausted before seeing STOP"),
        (b"\x80\x02.", "its stack is empty"),
        (b"\x80\x02}u.", "a mark is missing"),
        (b"\x80\x02h\x05.", "it uses what it has not made"),
        (b"\x80\x02}" + text("a") + b"s.", "its stack is empty"),
        (b"\x80\x02(}u.", "its stack is empty"),
        (b"\x80\x02)" + text("a") + b"Ns.", "an item without a dictionary"),
        (b"\x80\x02}K\x01Ns.", "a key that is no text"),
        (DEEP + b"Ns.", "a key that is no text"),
        (b"\x80\x02}" + text("a") + DEEP[3:] + b"s.", "a is no tensor"),
        (b"\x80\x02]q\x00h\x00a.", "data.pkl has the operation EMPTY_LIST, which no tensor needs"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "it holds no dictionary of tensors"),
        (b"\x80\x02N.", "it holds no dictionary of tensors"),
        (dictionary({"a": b"K\x01"}), "a is no tensor"),
        (dictionary({"a": b"K\x01K\x02R"}), "a call that makes no tensor"),
        (dictionary({"a": name("torch", "FloatStorage") + b")R"}), "a call that makes no tensor"),
        (dictionary({"a": text("storage") + b"\x85Q"}), "a storage of an unknown kind"),
        (dictionary({"a": tensor("float32", "1", 4, (4,))}), "tensor a: its storage data/1 is missing"),
        (dictionary({"a": tensor("float32", "../0", 4, (4,))}), "tensor a: its storage data/../0 is missing"),
        (dictionary({"a": tensor("float32", "0", 5, (4,))}), "5 elements of float32 are needed, 16 bytes are there"),
        (dictionary({"a": tensor("int64", "0", 4, (4,))}), "4 elements of int64 are needed, 16 bytes are there"),
        (dictionary({"a": tensor("float32", "0", 4, (5,))}), "tensor a of shape (5,) reaches behind the end of data/0"),
        (dictionary({"a": tensor("float32", "0", 4, (4,), offset=1)}), "reaches behind the end of data/0"),
        (dictionary({"a": tensor("float32", "0", 4, (4,), offset=-1)}), "a call that makes no tensor"),
        (dictionary({"a": tensor("float32", "0", 4, (-4,))}), "a call that makes no tensor"),
        (dictionary({"a": tensor("float32", "0", 4, (1 << 30, 1 << 30))}), "reaches behind the end of data/0"),
        (dictionary({"a": tensor("float32", "0", 4, (1 << 30, 4), (0, 1))}), "has strides (0, 1): not row after row"),
        (dictionary({"a": tensor("float32", "0", 4, (2, 2), (1, 2))}), "has strides (1, 2): not row after row"),
        (dictionary({"a": tensor("float32", "0", 4, (2, 2), (2,))}), "has strides (2,): not row after row"),
        (dictionary({"a": tensor("float32", "0", 4, (1,) * 100_000, (1,) * 100_000)}), "a call that makes no tensor"),
    ],
)
def test_refuses_a_damaged_pickle(tmp_path, pkl, message):
    path = archive(tmp_path / "x.pt", pkl, {"0": FOUR.tobytes()})
    with pytest.raises(CheckpointError) as e:
        TorchFile(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


def test_refuses_another_archive(tmp_path, stored):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as f:
        f.writestr("word/document.xml", "<x/>")
    with pytest.raises(CheckpointError, match=r"not one that torch.save wrote"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="the other byte order"):
        TorchFile(save(path, stored, byteorder=b"big"))
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        TorchFile(save(path, stored, method=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match=r"model/data.pkl has 20000000 bytes, which no state dictionary needs"):
        TorchFile(archive(path, bytes(20_000_000), {}, method=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match=r"missing.pt: not a readable PyTorch file"):
        TorchFile(tmp_path / "missing.pt")


def test_truncated(tmp_path, stored):
    data = save(tmp_path / "whole.pt", stored).read_bytes()
    path = tmp_path / "short.pt"
    for kept in [*range(0, 100), *range(100, len(data), 997), len(data) - 23, len(data) - 1]:
        with pytest.raises(CheckpointError, match=r"short.pt: not a readable PyTorch file: "):
            bitnet_pt.read(written(path, data[:kept]))


def test_fuzzed_archive(tmp_path, stored):
    data = save(tmp_path / "whole.pt", stored).read_bytes()
    fuzz(tmp_path / "fuzzed.pt", data, read_all, header=len(data), runs=300)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # of pickletools
def test_fuzzed_pickle(tmp_path, stored):
    """In an archive whose check sums are right."""
    storages = {str(key): array.tobytes() for key, array in enumerate(stored.values())}
    with zipfile.ZipFile(save(tmp_path / "whole.pt", stored)) as f:
        pkl = f.read("model/data.pkl")

    def read(path: Path) -> None:
        bitnet_pt.read(archive(path, path.read_bytes(), storages))

    fuzz(tmp_path / "fuzzed.pt", pkl, read, header=len(pkl), runs=2000)
