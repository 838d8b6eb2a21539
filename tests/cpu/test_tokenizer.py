"""Tokenizers: the ids that other programs give, text that streams, and what damaged files do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm_cupy import ArgumentTypeError, ArgumentValueError, CheckpointError, MissingDependencyError
from edgellm_cupy.formats.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from tests.checkpoints import damaged_json, fuzz, read_or_refused, real_smollm2
from tests.vocabularies import (
    END,
    byte_level_fields,
    byte_level_tokens,
    bytes_as_characters,
    sentencepiece_fields,
    write_gguf,
    write_json,
    write_tokenizer_json,
)

package = pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests/data/smollm2_tokens.json").read_text())
TOKENS = byte_level_tokens()
EOS = TOKENS.index(END)
TEXT = "hello it's 1234!! über xyz\n  😀"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(real_smollm2())


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("a") / "a.gguf", byte_level_fields()))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("b") / "b.gguf", sentencepiece_fields()))


def of_fields(tmp_path: Path, fields: dict) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path / "model.gguf", fields))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer._model.id_to_token(token) for token in tokenizer.encode(text)]


# ---- the ids that others give ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: ascii(case["text"])[:30])
def test_smollm2_encodes_as_llama_cpp(smollm2, case):
    assert smollm2.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: ascii(case["text"])[:30])
def test_smollm2_decodes_what_it_encoded(smollm2, case):
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>")
    text = case["text"]
    for token in special:
        text = text.replace(token, "")
    assert smollm2.decode(case["ids"]) == text


def test_smollm2_ends_its_turn(smollm2):
    assert smollm2.stop_tokens == (smollm2.encode("<|im_end|>")[0],)
    assert smollm2.bos is None


@pytest.mark.parametrize("name", ["gpt-2", "starcoder", "falcon", "llama-bpe", "llama-spm", "phi-3"])
def test_public_vocabularies_encode_as_their_own_programs(name):
    """The folder models/ in the source of llama-cpp-python (vendor/llama.cpp/models), copied to models/vocabularies."""
    file = ROOT / "models" / "vocabularies" / f"ggml-vocab-{name}.gguf"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    texts = Path(f"{file}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(token) for token in line.split()] for line in Path(f"{file}.out").read_text().split("\n")]
    tokenizer = load_tokenizer(file)
    tokenizer.bos = None
    assert len(texts) == len(expected) > 40
    assert [tokenizer.encode(text) for text in texts] == expected


# ---- byte-level -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["hello", "Ġit", "'s", "Ġ", "1234", "!!", "Ġ", "Ã¼"]),
        ("smollm", ["hello", "Ġit", "'s", "Ġ", "1", "2", "3", "4", "!!", "Ġ", "Ã¼"]),
        ("llama-bpe", ["hello", "Ġit", "'s", "Ġ", "123", "4", "!!", "Ġ", "Ã¼"]),
        ("falcon", ["hello", "Ġit", "'", "s", "Ġ", "123", "4", "!!", "Ġ", "Ã", "¼"]),  # ¼: a digit
    ],
)
def test_text_is_split_by_the_rule_that_the_header_names(tmp_path, pre, expected):
    assert pieces(of_fields(tmp_path, byte_level_fields(pre=pre)), "hello it's 1234!! ü") == expected


@pytest.mark.parametrize(("pre", "expected"), [("gpt-2", ["x", "y", "z"]), ("falcon3", ["xyz"])])
def test_only_llama_3_takes_a_word_whole_that_no_merges_make(tmp_path, pre, expected):
    assert pieces(of_fields(tmp_path, byte_level_fields(pre=pre)), "xyz") == expected


@given(st.text())
def test_byte_level_round_trip(byte_level, text):
    text = text.replace(END, "")
    assert byte_level.decode(byte_level.encode(text)) == text


@given(st.lists(st.integers(0, len(TOKENS) - 1)))
def test_byte_level_decodes_as_the_package_does(byte_level, tokens):
    """Also bytes that are not UTF-8."""
    assert byte_level.decode(tokens) == byte_level._model.decode(tokens, skip_special_tokens=True)


def test_special_tokens_are_read_in_text_and_are_no_text(byte_level):
    assert byte_level.encode(f"he{END}ll") == [TOKENS.index("he"), EOS, TOKENS.index("ll")]
    assert byte_level.decode([TOKENS.index("he"), EOS, TOKENS.index("ll")]) == "hell"


def test_a_token_added_by_users_is_text_and_is_never_split(tmp_path):
    word = "«hello it»"
    fields = byte_level_fields()
    fields |= {"tokens": [*fields["tokens"], word], "token_type": [*fields["token_type"], 4]}
    tokenizer = of_fields(tmp_path, fields)
    assert tokenizer.encode(f"he{word}") == [TOKENS.index("he"), len(TOKENS)]
    assert tokenizer.decode([len(TOKENS)]) == word


def test_ids_behind_the_vocabulary_are_no_text(byte_level):
    assert len(byte_level) == len(TOKENS)
    assert byte_level.decode([len(TOKENS), TOKENS.index("he"), 2**31 - 1]) == "he"


def test_lone_surrogates_are_refused(byte_level):
    with pytest.raises(ArgumentValueError, match="character 1 is half of a surrogate pair"):
        byte_level.encode("a\udc80")
    with pytest.raises(ArgumentTypeError, match="expected str, got bytes"):
        byte_level.encode(b"a")


# ---- SentencePiece --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello world", ["<s>", "▁hello", "▁world"]),
        ("hell", ["<s>", "▁", "hell"]),  # "▁hell" is no token; "hell" scores better than "▁" and "h"
        ("  hello", ["<s>", "▁▁", "▁hello"]),
        ("lld!", ["<s>", "▁", "ll", "d", "!"]),
        ("hü", ["<s>", "▁", "h", "<0xC3>", "<0xBC>"]),
        ("", ["<s>"]),
        ("<s>hello", ["<s>", "▁hello"]),  # not twice
    ],
)
def test_sentencepiece_merges_the_best_score_first(sentencepiece, text, expected):
    assert pieces(sentencepiece, text) == expected


@given(st.text())
def test_sentencepiece_round_trip(sentencepiece, text):
    """Behind the space in front, and but for U+2581, which stands for a space."""
    for token in ("<unk>", "<s>", "</s>"):
        text = text.replace(token, "")
    expected = text.replace("▁", " ")
    assert sentencepiece.decode(sentencepiece.encode(text)) == (f" {expected}" if text else "")


def test_sentencepiece_without_a_space_in_front(tmp_path):
    tokenizer = of_fields(tmp_path, sentencepiece_fields(add_space_prefix=False, add_bos_token=False))
    assert pieces(tokenizer, "hello world") == ["hello", "▁world"]
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


# ---- text as it comes -----------------------------------------------------------------------------------------------


def test_a_character_is_held_back_until_it_is_whole(byte_level):
    consumed: list[int] = []

    def coming():
        for token in [*byte_level.encode("he😀ll"), byte_level.encode("😀")[0]]:
            consumed.append(token)
            yield token

    arrived = [(len(consumed), piece) for piece in byte_level.stream(coming())]
    assert arrived == [(1, "he"), (5, "😀"), (6, "ll"), (7, "\ufffd")]  # the end shows what was never finished


@given(st.lists(st.integers(0, len(TOKENS) - 1)), st.integers(0, 20))
def test_what_was_streamed_never_changes(byte_level, tokens, cut):
    """The pieces of a beginning are the beginning of the pieces; only what was held back is shown by its end."""
    whole = byte_level.decode(tokens)
    begun = "".join(byte_level.stream(tokens[:cut]))
    assert whole.startswith(begun.rstrip("\ufffd"))
    assert "" not in list(byte_level.stream(tokens))


def test_bytes_of_sentencepiece_stream_as_characters(sentencepiece):
    tokens = sentencepiece.encode("hü")
    assert list(sentencepiece.stream(tokens)) == [" ", "h", "ü"]


# ---- the files beside the weights -----------------------------------------------------------------------------------


def test_tokenizer_json_is_the_same_as_the_header(tmp_path, byte_level):
    write_tokenizer_json(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode(TEXT) == byte_level.encode(TEXT)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert tokenizer.bos is None


def test_a_gguf_file_is_asked_before_the_files_beside_it(tmp_path):
    write_tokenizer_json(tmp_path)
    bare = write_gguf(tmp_path / "bare.gguf", {})
    assert pieces(load_tokenizer(bare), "1234") == ["1234"]  # its header has none
    full = write_gguf(tmp_path / "full.gguf", byte_level_fields(pre="smollm"))
    assert pieces(load_tokenizer(full), "1234") == ["1", "2", "3", "4"]


def test_a_folder_with_one_gguf_file(tmp_path):
    write_gguf(tmp_path / "a.gguf", byte_level_fields())
    assert has_tokenizer(tmp_path)
    assert pieces(load_tokenizer(tmp_path), "hello") == ["hello"]


def test_a_gguf_file_that_is_not_the_weights_of_its_folder_is_not_asked(tmp_path):
    write_gguf(tmp_path / "other.gguf", byte_level_fields(pre="smollm"))
    (tmp_path / "model.safetensors").touch()
    assert not has_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path)
    write_tokenizer_json(tmp_path)
    assert pieces(load_tokenizer(tmp_path), "1234") == ["1234"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": 5}}, (5,)),
        ({"generation_config.json": {"eos_token_id": [7, 5]}, "config.json": {"eos_token_id": 9}}, (5, 7, 9)),
        ({"config.json": {"eos_token_id": None}, "tokenizer_config.json": {"eos_token": END}}, (EOS,)),
        ({"tokenizer_config.json": {"eos_token": {"content": END}}, "config.json": {"eos_token_id": EOS}}, (EOS,)),
        ({}, ()),
    ],
)
def test_stop_tokens_of_the_files(tmp_path, files, expected):
    write_tokenizer_json(tmp_path)
    for name, values in files.items():
        write_json(tmp_path / name, values)
    assert load_tokenizer(tmp_path).stop_tokens == expected


def test_stop_tokens_of_a_header(tmp_path):
    fields = byte_level_fields(eos_token_id=3, eot_token_id=9, eom_token_id=3)
    assert of_fields(tmp_path, fields).stop_tokens == (3, 9)


BOS_IN_FRONT = package.processors.TemplateProcessing(single=[END, "$A"], special_tokens=[(END, EOS)])


@pytest.mark.parametrize(
    ("post_processor", "config", "expected"),
    [
        (None, {}, None),
        (None, {"bos_token": END}, None),
        (None, {"bos_token": END, "add_bos_token": True}, EOS),
        (BOS_IN_FRONT, {}, EOS),
        (BOS_IN_FRONT, {"bos_token": END, "eos_token": END}, EOS),
        (BOS_IN_FRONT, {"bos_token": END, "add_bos_token": False}, None),
        (BOS_IN_FRONT, {"eos_token": END}, None),  # a template that only ends a text
    ],
)
def test_the_token_in_front_of_a_prompt(tmp_path, post_processor, config, expected):
    write_tokenizer_json(tmp_path, post_processor)
    write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos == expected
    assert tokenizer.encode("he") == [*([] if expected is None else [expected]), TOKENS.index("he")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (byte_level_fields(bos_token_id=EOS), None),
        (byte_level_fields(bos_token_id=EOS, add_bos_token=True), EOS),
        (byte_level_fields(bos_token_id=EOS, pre="llama-bpe"), EOS),
        (byte_level_fields(bos_token_id=EOS, pre="llama-bpe", add_bos_token=False), None),
        (sentencepiece_fields(bos_token_id=None), 1),
        (sentencepiece_fields(add_bos_token=False), None),
    ],
)
def test_the_token_in_front_that_a_header_asks_for(tmp_path, fields, expected):
    assert of_fields(tmp_path, fields).bos == expected


def test_truncation_and_padding_of_the_training_are_off(tmp_path):
    token = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    write_tokenizer_json(
        tmp_path,
        truncation={"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        padding=token | {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
    )
    assert len(load_tokenizer(tmp_path).encode("x" * 10)) == 10


# ---- the same tokenizer in another folder ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        byte_level_fields(pre="llama-bpe", bos_token_id=EOS, eos_token_id=3),
        byte_level_fields(pre="smollm", bos_token_id=EOS, eot_token_id=7),
        sentencepiece_fields(),
        sentencepiece_fields(add_space_prefix=False, add_bos_token=False),
    ],
)
def test_files_made_of_a_header(tmp_path, fields):
    first = of_fields(tmp_path, fields)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in first.files().items():
        (copy / name).write_bytes(data)
    second = load_tokenizer(copy)
    assert second.encode(TEXT) == first.encode(TEXT)
    assert second.decode(first.encode(TEXT)) == first.decode(first.encode(TEXT))
    assert (second.bos, second.stop_tokens) == (first.bos, first.stop_tokens)
    # Other programs go by tokenizer.json alone.
    bare = package.Tokenizer.from_file(str(copy / "tokenizer.json"))
    assert bare.encode(TEXT).ids == first.encode(TEXT)


def test_files_are_copied_as_they_are_and_name_the_stop_tokens(tmp_path):
    write_tokenizer_json(tmp_path)
    write_json(
        tmp_path / "tokenizer_config.json", {"bos_token": END, "add_bos_token": True, "chat_template": "{{ x }}"}
    )
    write_json(tmp_path / "generation_config.json", {"temperature": 0.5})
    write_json(tmp_path / "config.json", {"eos_token_id": 5})
    files = load_tokenizer(tmp_path).files()
    assert sorted(files) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert files[name] == (tmp_path / name).read_bytes()
    assert json.loads(files["generation_config.json"]) == {"temperature": 0.5, "eos_token_id": [5]}


# ---- what is wrong --------------------------------------------------------------------------------------------------


def test_no_tokenizer_says_what_was_looked_for(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.touch()
    for path in (weights, tmp_path):
        assert not has_tokenizer(path)
        with pytest.raises(CheckpointError) as error:
            load_tokenizer(path)
        assert str(error.value) == f"{path}: no tokenizer: there is no tokenizer.json in {tmp_path}"
    bare = write_gguf(tmp_path / "bare.gguf", {})
    assert not has_tokenizer(bare)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.ggml\.model in the header of bare\.gguf"):
        load_tokenizer(bare)
    with pytest.raises(CheckpointError, match=r"nothing: not a readable file: No such file"):
        load_tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (byte_level_fields(pre="gpt-5"), "tokenizer.ggml.pre is 'gpt-5', an unknown rule, expected one of gpt-2, "),
        (byte_level_fields(pre=None), "the header field tokenizer.ggml.pre, which says how text is split, is missing"),
        (byte_level_fields(pre=3), "the header field tokenizer.ggml.pre is 3, expected str"),
        (byte_level_fields(model="bert"), "its tokenizer is of the kind 'bert', expected 'gpt2'"),
        (byte_level_fields(tokens=None), "the header field tokenizer.ggml.tokens is missing"),
        (byte_level_fields(tokens=[1, 2]), "the header field tokenizer.ggml.tokens is no array of str"),
        (byte_level_fields(token_type=None), "the header field tokenizer.ggml.token_type is missing"),
        (byte_level_fields(token_type=[1, 1]), f"token_type has 2 elements, but there are {len(TOKENS)} tokens"),
        (byte_level_fields(merges=None), "the header field tokenizer.ggml.merges is missing"),
        (byte_level_fields(merges=["he"]), "tokenizer.ggml.merges holds 'he', expected two tokens"),
        (byte_level_fields(merges=["x y"]), "its tokenizer cannot be built: "),
        (
            byte_level_fields(eos_token_id=len(TOKENS)),
            f"eos_token_id is {len(TOKENS)}, but there are {len(TOKENS)} tok",
        ),
        (byte_level_fields(add_bos_token=1), "the header field tokenizer.ggml.add_bos_token is 1, expected bool"),
        (byte_level_fields(eos_token_id=True), "the header field tokenizer.ggml.eos_token_id is True, expected int"),
        (sentencepiece_fields(scores=None), "the header field tokenizer.ggml.scores is missing"),
        (sentencepiece_fields(scores=[0.5]), "tokenizer.ggml.scores has 1 elements, but there are "),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, fields, message):
    with pytest.raises(CheckpointError) as error:
        of_fields(tmp_path, fields)
    assert str(error.value).startswith(f"{tmp_path / 'model.gguf'}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("fields", [byte_level_fields(), sentencepiece_fields()], ids=["byte-level", "sentencepiece"])
def test_a_fuzzed_header(tmp_path, fields):
    data = write_gguf(tmp_path / "model.gguf", fields).read_bytes()
    fuzz(tmp_path / "fuzzed.gguf", data, lambda path: load_tokenizer(path).encode(TEXT), len(data), runs=300)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a readable tokenizer: "),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json: not a readable tokenizer: "),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not a readable JSON file: "),
        (
            "tokenizer_config.json",
            '{"add_bos_token": true, "bos_token": "x?"}',
            "tokenizer_config.json: add_bos_token is set",
        ),
        ("config.json", "[1]", "config.json: expected a JSON object"),
        ("config.json", '{"eos_token_id": "x"}', "config.json: eos_token_id is 'x', expected a token id or a list"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', "generation_config.json: eos_token_id is -1, expected"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, text, message):
    write_tokenizer_json(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / message}")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_with_a_damaged_value(tmp_path, name):
    config = {"bos_token": END, "add_bos_token": True, "eos_token": {"content": END}}
    good = {
        "tokenizer.json": json.loads(write_tokenizer_json(tmp_path, BOS_IN_FRONT).read_text()),
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": [EOS, 3]},
    }
    for file, values in good.items():
        write_json(tmp_path / file, values)
    if name == "tokenizer.json":  # one token and one merge stand for all
        good[name]["model"] |= {"vocab": {END: 0, "h": 1, "e": 2, "he": 3}, "merges": [["h", "e"]]}
    outcomes = set()
    for values in damaged_json(good[name]):
        write_json(tmp_path / name, values)
        outcomes.add(read_or_refused(lambda: load_tokenizer(tmp_path).encode(TEXT), tmp_path / name))
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("decoder", "found"),
    [
        (None, "missing"),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"),
        ({"type": "Sequence", "decoders": [{"type": "Fuse"}]}, "Fuse"),
    ],
)
def test_a_decoder_that_is_not_known_is_refused(tmp_path, decoder, found):
    write_tokenizer_json(tmp_path, decoder=decoder)
    with pytest.raises(CheckpointError, match=f"its decoder is {found}, expected ByteLevel"):
        load_tokenizer(tmp_path)


def test_without_the_package(tmp_path, monkeypatch):
    write_tokenizer_json(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs the package tokenizers: pip install 'edgellm-cupy\[models\]'"
    ):
        load_tokenizer(tmp_path)


def test_the_alphabet_of_bytes_is_the_packages():
    from edgellm_cupy.formats.tokenizer import _ALPHABET

    assert sorted(_ALPHABET) == bytes_as_characters()
    assert sorted(_ALPHABET.values()) == list(range(256))
