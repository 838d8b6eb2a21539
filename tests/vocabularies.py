"""Small tokenizers for tests: as tokenizer.json and in the header of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

END = "<|end|>"
# Each pair of these merges becomes a token behind the 256 of the bytes.
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "12 3", "123 4", "! !", "Ġ i", "Ġi t", "' s", "Ã ¼"]


def bytes_as_characters() -> list[str]:
    """The byte-level alphabet of the package, in the order of its characters."""
    return sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())


def byte_level_tokens() -> list[str]:
    """256 bytes, the results of MERGES, END, and a word that no merge makes."""
    return [*bytes_as_characters(), *(merge.replace(" ", "") for merge in MERGES), END, "xyz"]


def byte_level_fields(**changed: Any) -> dict[str, Any]:
    """Header fields of a byte-level tokenizer, by their names behind ``tokenizer.ggml.``; None leaves one out."""
    tokens = byte_level_tokens()
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token == END else 1 for token in tokens],
        "merges": MERGES,
        "eos_token_id": tokens.index(END),
    }
    return fields | changed


def sentencepiece_fields(**changed: Any) -> dict[str, Any]:
    """Header fields of a SentencePiece tokenizer: control tokens, bytes, and pieces with better scores for longer."""
    pieces = ["▁", *"helowrd!", "he", "ll", "hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "scores": [0.0] * 259 + [-1e6 if len(piece) == 1 else -float(i) for i, piece in enumerate(pieces)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return fields | changed


def write_gguf(path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray] | None = None, **model: Any) -> Path:
    """A GGUF file of architecture llama: `fields` below ``tokenizer.ggml.``, `model` below ``llama.``."""
    writer = pytest.importorskip("gguf").GGUFWriter(path, "llama")
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    named |= {f"llama.{key.replace('__', '.')}": value for key, value in model.items()}
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in named.items():
        if value is not None:
            (add | {list: writer.add_array})[type(value)](key, value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer_json(folder: Path, post_processor: Any = None, **changed: Any) -> Path:
    """The byte-level tokenizer as tokenizer.json, parts of it `changed`."""
    package = pytest.importorskip("tokenizers")
    tokens = byte_level_tokens()
    model = package.Tokenizer(
        package.models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split()) for m in MERGES])
    )
    model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = package.decoders.ByteLevel()
    model.add_special_tokens([package.AddedToken(END, special=True, normalized=False)])
    if post_processor is not None:
        model.post_processor = post_processor
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(model.to_str()) | changed))
    return file


def write_json(file: Path, values: Any) -> Path:
    file.write_text(json.dumps(values))
    return file
