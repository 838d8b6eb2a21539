"""Tokenizers: text to token ids and back, from the files beside a checkpoint or from a GGUF file's own header.

Encoding is the work of the package `tokenizers`. A ``tokenizer.json`` is its own format; what a GGUF header says
(tokens, merges or scores, the name of the rule that splits text) is built into the same thing by :func:`_from_gguf`.

Decoding is done here: every token stands for some bytes, and text is what those bytes are in UTF-8. So text can be
shown while it is made: a piece is handed out as soon as its bytes are whole characters, and never changes afterwards.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentTypeError, ArgumentValueError, CheckpointError, MissingDependencyError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
_MODEL_FILE = "config.json"
_OPTIONAL_FILES = (CONFIG_FILE, GENERATION_FILE, "special_tokens_map.json", "chat_template.jinja")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type

_SPACE = "▁"  # U+2581, which stands for a space in SentencePiece's tokens
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint, a file or a folder.

    In a folder the file counts that :func:`edgellm_cupy.formats.load_checkpoint` takes. A GGUF file brings its own
    tokenizer in its header; else it is the ``tokenizer.json`` beside the weights, with the
    ``tokenizer_config.json``, ``generation_config.json`` and ``config.json`` that stand there.

    Raises:
        CheckpointError: there is none, or it is damaged or of a kind that is not known; says what was looked for.
        MissingDependencyError: the extra ``models`` is not installed.
    """
    path = Path(path)
    if gguf := _gguf_file(path):
        fields = _Fields(gguf)
        if fields.has_tokenizer:
            return _from_gguf(fields)
    folder = path if path.is_dir() else path.parent
    if not (folder / TOKENIZER_FILE).is_file():
        header = f" and no tokenizer.ggml.model in the header of {gguf.name}" if gguf else ""
        raise CheckpointError(f"{path}: no tokenizer: there is no {TOKENIZER_FILE} in {folder}{header}")
    return _from_files(folder)


def has_tokenizer(path: str | Path) -> bool:
    """Whether :func:`load_tokenizer` finds something to read."""
    path = Path(path)
    if (gguf := _gguf_file(path)) and _Fields(gguf).has_tokenizer:
        return True
    return ((path if path.is_dir() else path.parent) / TOKENIZER_FILE).is_file()


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        bos: the token in front of every prompt; None: none.
        stop_tokens: those that end a text or a turn.
    """

    def __init__(
        self,
        model: Any,
        source: Path,
        bos: int | None,
        stop_tokens: Iterable[int],
        files: Callable[[Tokenizer], dict[str, bytes]],
    ):
        """model: a `tokenizers.Tokenizer`. files: see :meth:`files`."""
        self._model, self._source, self._files = model, source, files
        self.bos, self.stop_tokens = bos, tuple(sorted(set(stop_tokens)))
        added = model.get_added_tokens_decoder()
        # Special tokens are not text; other added tokens are, as they stand.
        self._added = {token: b"" if a.special else a.content.encode() for token, a in added.items()}
        # The state that pickle uses is the decoder's own JSON; the whole tokenizer's would take half a second.
        decoder = json.loads(model.decoder.__getstate__()) if model.decoder else None
        self._bytes_of_piece = _decoding(decoder, source)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._model.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, `bos` in front. Special tokens that are spelled out in the text are those tokens.

        Raises:
            ArgumentTypeError, ArgumentValueError: not a str, or one with lone surrogates.
            CheckpointError: a damaged tokenizer, which has no tokens for this text.
        """
        if not isinstance(text, str):
            raise ArgumentTypeError(f"text: expected str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ArgumentValueError(f"text: character {e.start} is half of a surrogate pair, not Unicode") from e
        with _refused(f"{self._source}: cannot encode this text"):
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        if self.bos is not None and ids[:1] != [self.bos]:  # unless the user wrote it
            ids.insert(0, self.bos)
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text that `tokens` stand for, where they continue another text.

        A space that SentencePiece's tokenizers put in front of a prompt is therefore kept; special tokens and ids
        that no token has are left out. Bytes that are not UTF-8 become U+FFFD.
        """
        return "".join(self.stream(tokens))

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """:meth:`decode`, piece by piece: each is yielded before the next token is asked for, none is empty."""
        text = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if piece := text.decode(self._bytes(token)):
                yield piece
        if rest := text.decode(b"", final=True):
            yield rest

    def files(self) -> dict[str, bytes]:
        """The files, by name, that make the same tokenizer of another folder; the stop tokens are among them."""
        return self._files(self)

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        piece = self._model.id_to_token(token)
        return b"" if piece is None else self._bytes_of_piece(piece)


# ---- bytes of a token -----------------------------------------------------------------------------------------------


def _decoding(decoder: Any, source: Path) -> Callable[[str], bytes]:
    """What turns a token into bytes, by the decoder that a tokenizer.json names."""
    kinds = set(_types(decoder))
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece_bytes
    found = "+".join(sorted(kinds)) or "missing"
    raise CheckpointError(f"{source}: its decoder is {found}, expected ByteLevel, ByteFallback or Metaspace")


def _types(part: Any) -> Iterator[str]:
    """The types of a decoder and of those in a sequence of them."""
    if isinstance(part, dict):
        if "decoders" in part:
            for inner in part["decoders"]:
                yield from _types(inner)
        else:
            yield str(part.get("type"))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet, a visible character for every byte: Latin-1's own, and U+0100 onwards for those it lacks."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in piece)
    except KeyError:
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(_SPACE, " ").encode()


# ---- from the files of Hugging Face ---------------------------------------------------------------------------------


def _from_files(folder: Path) -> Tokenizer:
    package = _require_tokenizers(folder / TOKENIZER_FILE)
    source = folder / TOKENIZER_FILE
    with _refused(f"{source}: not a readable tokenizer"):
        model = package.Tokenizer.from_buffer(source.read_bytes())
        model.no_truncation()  # some are stored as they were used in training
        model.no_padding()
        in_front = model.encode("", add_special_tokens=True).ids[:1]  # what the tokenizer adds by itself
        vocabulary = model.get_vocab()
    config, generation = _json_object(folder / CONFIG_FILE), _json_object(folder / GENERATION_FILE)

    def named(key: str) -> int | None:
        """The token that tokenizer_config.json gives the part `key`, a string or an object."""
        value = config.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        return vocabulary.get(content) if isinstance(content, str) else None

    bos, eos = named("bos_token"), named("eos_token")
    stop_tokens = set() if eos is None else {eos}
    for file, values in ((GENERATION_FILE, generation), (_MODEL_FILE, _json_object(folder / _MODEL_FILE))):
        stop_tokens |= _ids(values.get("eos_token_id"), folder / file)
    add_bos = config.get("add_bos_token")
    if add_bos and bos is None:
        raise CheckpointError(f"{folder / CONFIG_FILE}: add_bos_token is set, but bos_token names no token")
    if add_bos is None:  # then the tokenizer's own way counts, unless what it adds is there to end a text
        bos = in_front[0] if in_front and (in_front[0] == bos or in_front[0] not in stop_tokens) else None
    elif not add_bos:
        bos = None

    def files(tokenizer: Tokenizer) -> dict[str, bytes]:
        copies = {name: (folder / name).read_bytes() for name in _OPTIONAL_FILES if (folder / name).is_file()}
        return {
            TOKENIZER_FILE: source.read_bytes(),
            **copies,
            # config.json, which may be the only one to name a stop token, belongs to the weights and is not copied.
            GENERATION_FILE: _json_bytes({**generation, "eos_token_id": list(tokenizer.stop_tokens)}),
        }

    return Tokenizer(model, source, bos, stop_tokens, files)


def _json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: not a readable JSON file: {e}") from e
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return values


def _ids(value: Any, file: Path) -> set[int]:
    """eos_token_id: null, a number or a list of them."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if wrong := [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0]:
        raise CheckpointError(f"{file}: eos_token_id is {wrong[0]!r}, expected a token id or a list of them")
    return set(ids)


# ---- from the header of a GGUF file ---------------------------------------------------------------------------------


class _Fields:
    """The fields ``tokenizer.*`` of a GGUF header, checked as they are asked for."""

    def __init__(self, path: Path):
        from .gguf import read_metadata

        self.path, self._values = path, read_metadata(path, "tokenizer.")

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.model" in self._values

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The field ``tokenizer.ggml.KEY``, of type `kind`; `default` where there is none."""
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"the header field tokenizer.ggml.{key} is {value!r:.80}, expected {kind.__name__}")
        return value

    def array(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        """An array of `kind`, of `length` elements where that is known."""
        values: Any = self._values.get(f"tokenizer.ggml.{key}")
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            what = "is missing" if values is None else f"is no array of {kind.__name__}"
            raise self.error(f"the header field tokenizer.ggml.{key} {what}")
        if length is not None and len(values) != length:
            raise self.error(f"tokenizer.ggml.{key} has {len(values)} elements, but there are {length} tokens")
        return values

    def token(self, key: str, tokens: Sequence[str], default: int | None = None) -> int | None:
        """A field that names a token."""
        token: int | None = self.get(key, int, default)
        if token is not None and not 0 <= token < len(tokens):
            raise self.error(f"tokenizer.ggml.{key} is {token}, but there are {len(tokens)} tokens")
        return token

    def chat_template(self) -> str | None:
        template = self._values.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that holds the weights of the folder that it is."""
    from . import _in_folder

    if path.is_dir():
        try:
            path = _in_folder(path)
        except CheckpointError:  # no weights; a tokenizer may be there all the same
            return None
    try:
        with path.open("rb") as f:
            return path if f.read(4) == b"GGUF" else None
    except OSError as e:
        raise CheckpointError(f"{path}: not a readable file: {e.strerror}") from e


def _from_gguf(fields: _Fields) -> Tokenizer:
    package = _require_tokenizers(fields.path)
    kind = fields.get("model", str)
    if kind not in ("gpt2", "llama"):
        raise fields.error(f"its tokenizer is of the kind {kind!r}, expected 'gpt2' (byte-level) or 'llama'")
    tokens = fields.array("tokens", str)
    types = fields.array("token_type", int, len(tokens))
    with _refused(f"{fields.path}: its tokenizer cannot be built"):  # such as of a merge of what is no token
        build = _byte_level if kind == "gpt2" else _sentencepiece
        model, bos_by_default = build(fields, tokens, types)

    def added(types_wanted: tuple[int, ...], special: bool) -> list[Any]:
        chosen = (token for token, its in zip(tokens, types, strict=True) if its in types_wanted and token)
        return [package.AddedToken(token, special=special, normalized=False) for token in chosen]

    model.add_special_tokens(added((_CONTROL, _UNKNOWN), special=True))
    model.add_tokens(added((_USER_DEFINED,), special=False))

    sentencepiece = kind == "llama"
    bos = fields.token("bos_token_id", tokens, 1 if sentencepiece else None)
    if not fields.get("add_bos_token", bool, bos_by_default):
        bos = None
    eos = fields.token("eos_token_id", tokens, 2 if sentencepiece else None)
    ends = [eos, *(fields.token(key, tokens) for key in ("eot_token_id", "eom_token_id"))]
    if bos is not None:
        model.post_processor = package.processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )

    def files(tokenizer: Tokenizer) -> dict[str, bytes]:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": bos is not None,
            "bos_token": None if bos is None else tokens[bos],
            "eos_token": None if eos is None else tokens[eos],
            "chat_template": fields.chat_template(),
            "clean_up_tokenization_spaces": False,
        }
        return {
            TOKENIZER_FILE: model.to_str().encode(),
            CONFIG_FILE: _json_bytes({key: value for key, value in config.items() if value is not None}),
            GENERATION_FILE: _json_bytes({"eos_token_id": list(tokenizer.stop_tokens)}),
        }

    return Tokenizer(model, fields.path, bos, (token for token in ends if token is not None), files)


def _byte_level(fields: _Fields, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """Merges of pairs over the bytes of UTF-8, within the pieces that the rule `pre` splits a text into."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models

    pre = fields.get("pre", str)
    if pre is None:
        raise fields.error("the header field tokenizer.ggml.pre, which says how text is split, is missing")
    if pre not in _SPLITS:
        raise fields.error(f"tokenizer.ggml.pre is {pre!r}, an unknown rule, expected one of {', '.join(_SPLITS)}")
    split = _SPLITS[pre]
    llama3 = split is _llama3_split
    merges = [tuple(merge.split(" ")) for merge in fields.array("merges", str)]
    if wrong := [merge for merge in merges if len(merge) != 2]:
        raise fields.error(f"tokenizer.ggml.merges holds {' '.join(wrong[0])!r:.80}, expected two tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # With Llama 3's rule a piece that is a token is taken whole, whatever the merges would make of it.
    model = Model(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    model.pre_tokenizer = split()
    model.decoder = decoders.ByteLevel()
    return model, llama3


def _gpt2_split() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_split() -> Any:
    """Every digit for itself, the rest as GPT-2."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _falcon_split() -> Any:
    """Runs of punctuation, then GPT-2, then threes of digits.

    In Falcon's own order, in which digits are looked for among the characters that stand for bytes: ¼ is one, too.
    """
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            _gpt2_split(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


def _llama3_split() -> Any:
    """Words with what stands in front of them, numbers in threes from the left, punctuation, line ends, spaces."""
    from tokenizers import Regex, pre_tokenizers

    alternatives = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(alternatives)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_SPLITS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), _gpt2_split),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _digits_split),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), _llama3_split),
    "falcon": _falcon_split,
}
"""How a text is split, by tokenizer.ggml.pre."""


def _sentencepiece(fields: _Fields, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """SentencePiece's merges, which are those that make a token, the best score first; unknown characters as bytes."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, normalizers

    scores = fields.array("scores", float, len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    parts = {token for token, kind in zip(tokens, types, strict=True) if kind in (_NORMAL, _USER_DEFINED)}
    merges = [
        (-scores[vocabulary[token]], vocabulary[left], vocabulary[right], left, right)
        for token in parts
        for left, right in ((token[:at], token[at:]) for at in range(1, len(token)))
        if left in parts and right in parts
    ]
    merges.sort()
    unknown = fields.token("unknown_token_id", tokens, 0)
    model = Model(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    in_front = fields.get("add_space_prefix", bool, True)
    model.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if in_front else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if in_front else steps)
    return model, True


# ---- their parts ----------------------------------------------------------------------------------------------------


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever the package raises about its input, bare exceptions and the panics of Rust, as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise  # such as a KeyboardInterrupt
        raise CheckpointError(f"{what}: {(str(e).splitlines() or [type(e).__name__])[0]}") from e


def _json_bytes(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _require_tokenizers(path: Path) -> Any:
    try:
        import tokenizers
        import tokenizers.processors
    except ImportError as e:
        raise MissingDependencyError(
            f"the tokenizer of {path} needs the package tokenizers: pip install 'edgellm-cupy[models]' ({e})"
        ) from e
    return tokenizers
