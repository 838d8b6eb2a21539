"""The command: exit codes, what goes to stdout and what to stderr, and machines that lack something."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import edgellm_cupy as ec
from edgellm_cupy import cli, runtime, tuning, verify, version
from edgellm_cupy.bench import suite
from edgellm_cupy.bench.parts import scaling
from edgellm_cupy.bench.reporting import report
from edgellm_cupy.cli import bench as bench_command
from edgellm_cupy.cli import generate as generate_command
from edgellm_cupy.formats import compact, huggingface, load_checkpoint
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.formats.safetensors_file import SafetensorsFile
from edgellm_cupy.formats.tokenizer import load_tokenizer
from edgellm_cupy.reference import decoder as reference
from tests.emulated import H200
from tests.vocabularies import END, byte_level_fields, byte_level_tokens, write_gguf, write_json, write_tokenizer_json

TINY = {
    "name": "tiny",
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": len(byte_level_tokens()),
}
ROOT = Path(ec.__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from edgellm_cupy.cli import main; main()"]
NO_CUPY = "raise ImportError(\"No module named 'cupy'\")"
# CuPy as far as it is asked before the driver's absence shows. Its NVRTC binding is hidden with it.
NO_DRIVER = """
class CUDARuntimeError(RuntimeError):
    pass

class cuda:
    class runtime:
        CUDARuntimeError = CUDARuntimeError

        def getDeviceCount():
            raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
"""


@pytest.fixture
def tiny(tmp_path) -> str:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return str(file)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint with random weights and a byte-level tokenizer."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    compact.write(Checkpoint.random(ec.ModelConfig.from_dict(TINY)), path / "model.safetensors")
    write_tokenizer_json(path)
    return path


class Canned:
    """A model that says what it is told to, and notes what it was asked."""

    says = "hello"  # tokens with spaces between them
    interrupted = False  # behind the last one

    def __init__(self, checkpoint, **options):
        Canned.options, Canned.consumed = options, 0
        self.config = checkpoint.config

    def generate(self, token_ids, max_new_tokens, **options):
        Canned.asked = {"token_ids": token_ids, "max_new_tokens": max_new_tokens, **options}
        for token in [byte_level_tokens().index(piece) for piece in self.says.split()][:max_new_tokens]:
            if token in options["stop_tokens"]:
                return
            Canned.consumed += 1
            yield token
        if self.interrupted:
            raise KeyboardInterrupt


@pytest.fixture
def canned(monkeypatch) -> type[Canned]:
    monkeypatch.setattr(reference, "TernaryTransformer", Canned)
    monkeypatch.setattr(Canned, "says", "hello")
    monkeypatch.setattr(Canned, "interrupted", False)
    return Canned


def invoke(*arguments: str, stdin: bytes | None = None):
    """In this process: fast, for what does not depend on streams or on the machine."""
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


def generate(path: Path | str, *arguments: str, stdin: bytes | None = None):
    return invoke("generate", str(path), "--backend", "numpy", *arguments, stdin=stdin)


def environment(tmp_path: Path, cupy: str | None = None) -> dict[str, str]:
    """Of a process that finds this package, and in place of CuPy a module with the source `cupy`."""
    path = [str(ROOT)]
    if cupy is not None:
        stand_in = tmp_path / "stand_in"
        stand_in.mkdir(exist_ok=True)
        (stand_in / "cupy.py").write_text(cupy)
        (stand_in / "cupy_backends.py").write_text(NO_CUPY)
        path.insert(0, str(stand_in))
    unset = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "PYTHONUNBUFFERED", "PYTHONIOENCODING")
    return {**{k: v for k, v in os.environ.items() if k not in unset}, "PYTHONPATH": os.pathsep.join(path)}


def edgellm(tmp_path: Path, *arguments: str, cupy: str | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own, in `tmp_path`."""
    env = environment(tmp_path, cupy)
    return subprocess.run([*COMMAND, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


def kept(tmp_path: Path) -> Path:
    """The folder of the only run in .edgellm/runs."""
    (folder,) = (tmp_path / ".edgellm" / "runs").glob("*/*")
    return folder


# ---- 0: done --------------------------------------------------------------------------------------------------------


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output == f"edgellm-cupy {ec.__version__}\n"


@pytest.mark.parametrize(
    ("pyproject", "expected"),
    [
        ('[project]\nname = "edgellm-cupy"\nversion = "1.2.3"\n', "1.2.3+uninstalled"),
        ('[project]\nname = "other"\nversion = "1.2.3"\n', "0+uninstalled"),
        (None, "0+uninstalled"),
    ],
)
def test_version_of_a_checkout_that_is_not_installed(tmp_path, pyproject, expected):
    file = tmp_path / "pyproject.toml"
    if pyproject:
        file.write_text(pyproject)
    assert version._uninstalled(file) == expected


def test_parts_are_those_of_the_suite():
    assert list(bench_command.PARTS) == list(suite.PARTS)


@pytest.mark.parametrize("cupy", [NO_CUPY, NO_DRIVER], ids=["no CuPy", "no driver"])
def test_bench_without_a_gpu_measures_on_the_host_and_says_so(tmp_path, tiny, cupy):
    done = edgellm(tmp_path, "bench", "--model", tiny, "--quick", cupy=cupy)
    assert done.returncode == 0, done.stderr
    assert "No GPU was measured" in done.stdout
    assert "throughput_tok_s" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    layer = "CuPy" if cupy == NO_CUPY else "driver"
    first, second = done.stderr.splitlines()[:2]
    assert re.fullmatch(rf"edgellm bench: (no usable GPU: {layer}: .*; .*install.*)\. Measuring on .*", first)
    assert re.fullmatch(r"edgellm bench: 0:0\d hardware, about \d:\d\d left", second)
    folder = kept(tmp_path)
    assert folder.parent.name.startswith("numpy-")
    assert {path.name for path in folder.iterdir()} >= {"report.json", "report.md", "rows.jsonl"}
    report = json.loads((folder / "report.json").read_text())
    assert report["command"] == f"edgellm bench --model {tiny} --quick"
    assert report["backend"] == "numpy"
    assert report["quick"] is True
    reason = report["summary"]["gpu_model"]["reason"]
    assert reason.startswith(f"no usable GPU: {layer}: ")
    assert report["no_gpu"].startswith(f"{reason}; ")  # and what to do about it, once
    assert report["no_gpu"].partition("; ")[2] in (folder / "report.md").read_text().partition("## ")[0]


def test_one_part_is_a_run_of_its_own(tmp_path, tiny):
    done = edgellm(tmp_path, "bench", "hardware", "--model", tiny, "--backend", "numpy")
    assert done.returncode == 0, done.stderr
    report = json.loads((kept(tmp_path) / "report.json").read_text())
    assert list(report["parts"]) == ["hardware"]
    assert report["summary"]["throughput_tok_s"] == {"value": None, "reason": "part tokens not run"}


@pytest.mark.parametrize(("cupy", "layer"), [(NO_CUPY, "CuPy"), (NO_DRIVER, "driver")])
def test_info_says_what_is_missing(tmp_path, cupy, layer):
    done = edgellm(tmp_path, "info", cupy=cupy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"no usable GPU: {layer}: ")
    as_json = json.loads(edgellm(tmp_path, "info", "--json", cupy=cupy).stdout)
    assert as_json["gpu_model"]["value"] is None
    assert as_json["cpu_threads"]["value"] >= 1


def test_report_makes_the_markdown_again(tmp_path, tiny):
    first = tmp_path / "first"
    assert invoke("bench", "hardware", "--model", tiny, "--backend", "numpy", "--out", str(first)).exit_code == 0
    result = invoke("report", str(first / "report.json"), "--out", str(tmp_path / "again"))
    assert result.exit_code == 0
    assert (tmp_path / "again" / "report.md").read_bytes() == (first / "report.md").read_bytes()


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_prints_the_models_own_continuation(folder):
    tokenizer, model = load_tokenizer(folder), ec.reference.TernaryTransformer.from_pretrained(folder)
    sampling = ec.Sampling(temperature=0.9, top_k=50, seed=7)
    expected = list(model.generate(tokenizer.encode("hello it"), 12, sampling=sampling))
    options = ["-n", "12", "--temperature", "0.9", "--top-k", "50", "--seed", "7"]
    for path in (folder, folder / "model.safetensors"):
        result = generate(path, "-p", "hello it", *options)
        assert result.exit_code == 0, result.output
        assert result.stdout == tokenizer.decode(expected) + "\n"
        assert result.stderr == ""
    ids = ",".join(map(str, tokenizer.encode("hello it")))
    (folder / "tokenizer.json").unlink()
    assert generate(folder, "--ids", ids, *options).stdout == " ".join(map(str, expected)) + "\n"


def test_generate_with_a_preset_and_ids(monkeypatch):
    monkeypatch.setitem(generate_command.PRESETS, "tiny", ec.ModelConfig.from_dict(TINY))
    expected = ec.reference.TernaryTransformer.random(generate_command.PRESETS["tiny"]).generate([1, 2, 3], 8)
    result = generate("tiny", "--ids", "1,2,3", "-n", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout == " ".join(map(str, expected)) + "\n"


@pytest.mark.parametrize("text", [b"hello", b"hello\n", b"hello\r\n"])
def test_generate_from_a_file_and_from_stdin(tmp_path, folder, canned, text):
    (tmp_path / "prompt").write_bytes(text)
    hello = [byte_level_tokens().index("hello")]
    assert generate(folder, "--prompt-file", str(tmp_path / "prompt")).exit_code == 0
    assert canned.asked["token_ids"] == hello
    assert generate(folder, "--prompt-file", "-", stdin=text).exit_code == 0
    assert canned.asked["token_ids"] == hello


def test_generate_leaves_to_the_model_what_was_not_chosen(folder, canned):
    assert generate(folder, "-p", "he").exit_code == 0
    assert canned.options == {"activation": "int8"}
    end = byte_level_tokens().index(END)
    assert canned.asked == {
        "token_ids": [byte_level_tokens().index("he")],
        "max_new_tokens": 128,
        "sampling": ec.Sampling(),
        "stop_tokens": (),
    }
    write_json(folder / "generation_config.json", {"eos_token_id": end})
    options = "--activation float --dtype bfloat16 --head int8 --kv-dtype int8 --temperature 0.5 --top-k 3 --top-p 0.9"
    more = "--min-p 0.1 --repetition-penalty 1.2 --seed 5 -n 7"
    assert generate(folder, "-p", "he", *options.split(), *more.split()).exit_code == 0
    assert canned.options == {"activation": "float", "dtype": "bfloat16", "head": "int8"}
    assert canned.asked["sampling"] == ec.Sampling(0.5, 3, 0.9, 0.1, 1.2, 5)
    assert canned.asked["max_new_tokens"] == 7
    assert canned.asked["stop_tokens"] == (end,)
    assert canned.asked["kv_dtype"] == "int8"


def test_generate_ends_with_the_text_unless_told_to_go_on(folder, canned, monkeypatch):
    write_json(folder / "generation_config.json", {"eos_token_id": byte_level_tokens().index(END)})
    monkeypatch.setattr(canned, "says", f"he {END} ll")
    assert generate(folder, "-p", "x").stdout == "he\n"
    assert generate(folder, "-p", "x", "--ignore-eos").stdout == "hell\n"


def test_generate_shows_each_character_as_soon_as_it_is_whole(folder, canned, monkeypatch):
    events = []
    monkeypatch.setattr(generate_command, "put", lambda text: events.append((canned.consumed, text)) or True)
    monkeypatch.setattr(canned, "says", "he Ã ¼ ll")
    generate(folder, "-p", "x")
    assert events == [(1, "he"), (3, "ü"), (4, "ll"), (4, "\n")]


def test_generate_says_how_fast_when_asked(folder, canned, monkeypatch):
    monkeypatch.setattr(canned, "says", "he ll he")
    assert generate(folder, "-p", "xyz").stderr == ""
    rate = r"in \d+\.\d{3} s, [\d,]+\.\d tok/s"
    line = rf"prefill: 3 tokens {rate}; decode: 2 tokens {rate}\n"
    assert re.fullmatch(line, generate(folder, "-p", "xyz", "--stats").stderr)


def test_pace_tells_the_prefill_from_the_rest(monkeypatch):
    clock = iter([10.0, 10.5, 10.6, 10.75])  # the start, then each token
    monkeypatch.setattr(generate_command.time, "perf_counter", lambda: next(clock))
    pace = generate_command._Pace(prompt=100)
    assert list(pace.of([7, 8, 9])) == [7, 8, 9]
    assert str(pace) == "prefill: 100 tokens in 0.500 s, 200.0 tok/s; decode: 2 tokens in 0.250 s, 8.0 tok/s"


def test_generate_keeps_within_the_context(folder, canned):
    assert generate(folder, "-p", "xyz", "--context", "8").exit_code == 0
    assert canned.asked["max_new_tokens"] == 5
    generate(folder, "-p", "xyz", "--context", "8", "-n", "2")
    assert canned.asked["max_new_tokens"] == 2
    result = generate(folder, "-p", "xyz", "--context", "3")
    assert result.exit_code == 2
    assert result.stderr == "error: --context is 3, but the prompt alone has 3 tokens\n"


@pytest.mark.parametrize(
    ("n", "said"), [(2045, ""), (2046, "warning: up to 2049 tokens, but the model was made for 2048\n")]
)
def test_generate_warns_beyond_what_the_model_was_made_for(folder, canned, n, said):
    result = generate(folder, "-p", "xyz", "-n", str(n))
    assert result.exit_code == 0
    assert result.stderr == said


def test_generate_without_a_gpu_says_so_once(tmp_path, folder):
    done = edgellm(tmp_path, "generate", str(folder), "-p", "hello", "-n", "3", cupy=NO_CUPY)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"edgellm generate: no usable GPU: CuPy: .*install.*\. Generating on the NumPy .*\n", done.stderr
    )
    assert done.stdout == generate(folder, "-p", "hello", "-n", "3").stdout


def test_generate_interrupted_keeps_what_was_said(folder, canned, monkeypatch):
    monkeypatch.setattr(canned, "says", "he ll")
    monkeypatch.setattr(canned, "interrupted", True)
    result = generate(folder, "-p", "x", "--stats")
    assert result.exit_code == 130
    assert result.stdout == "hell\n"
    assert result.stderr == "error: interrupted\n"


def with_model_that(does: str) -> list[str]:
    """The command, with a model on the host whose `generate` has this body."""
    code = f"""
import time
from edgellm_cupy import cli
from edgellm_cupy.reference import decoder

def generate(*arguments, **options):
    {does}

decoder.TernaryTransformer.generate = generate
cli.main()
"""
    return [sys.executable, "-c", code]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_while_text_streams(tmp_path, folder):
    command = with_model_that(f"yield {byte_level_tokens().index('he')}; time.sleep(30)")
    with subprocess.Popen(
        [*command, "generate", str(folder), "--backend", "numpy", "-p", "x"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        start = time.perf_counter()
        assert process.stdout.read(2) == b"he"  # arrives while the model is still at work
        assert time.perf_counter() - start < 25
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest, errors) == (130, b"\n", b"error: interrupted\n")


def test_a_reader_of_text_that_goes_away_ends_the_work(folder, canned, monkeypatch):
    monkeypatch.setattr(canned, "says", "he ll he ll")
    monkeypatch.setattr(generate_command, "put", lambda text: False)
    assert generate(folder, "-p", "x").exit_code == 0
    assert canned.consumed == 1


def test_a_terminal_without_unicode(tmp_path, folder):
    env = environment(tmp_path) | {"PYTHONIOENCODING": "ascii"}
    tokens = [byte_level_tokens().index(piece) for piece in ("he", "Ã", "¼")]
    command = with_model_that(f"return iter({tokens})")
    arguments = [*command, "generate", str(folder), "-p", "x", "--backend", "numpy"]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "he?\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt, --prompt-file and --ids"),
        (["-p", "a", "--ids", "1"], "give one of --prompt, --prompt-file and --ids"),
        (["-p", ""], "the prompt is empty"),
        (["--ids", "1,x"], "--ids is '1,x', expected token ids such as 1,2,3"),
        (["--ids", "1,99999"], "99999"),
        (["-p", "a", "--top-p", "1.5"], "top_p is 1.5, expected above 0, up to 1"),
        (["-p", "a", "--temperature", "nan"], "temperature is nan"),
        (["-p", "a", "--seed", "-1"], "seed is -1"),
        (["-p", "a", "-n", str(2**70)], f"--max-new-tokens is {2**70}, expected at most {2**31 - 1}"),
        (["--prompt-file", "x" * 300], "File name too long"),
        (["--prompt-file", "missing"], "--prompt-file: missing: not a readable file: No such file"),
        (["--prompt-file", "latin"], "--prompt-file: latin: byte 1 is not UTF-8"),
        (["-p", "a", "--backend", "cuda"], "no usable GPU"),
    ],
)
def test_generate_refuses(tmp_path, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin").write_bytes(b"a\xfc")
    monkeypatch.setattr(runtime, "require_gpu", lambda: _raise(ec.GpuUnavailableError("driver", "none", "install it")))
    result = generate(folder, *arguments)
    assert result.exit_code == (3 if "cuda" in arguments else 2)
    assert result.stdout in ("", "\n")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def _raise(exception: BaseException) -> None:
    raise exception


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("smollm-135m", "error: smollm-135m is a preset with random weights and no tokenizer: give --ids\n"),
        ("missing", "error: missing: not a readable file: No such file or directory\n"),
        ("bare.safetensors", "error: bare.safetensors: no tokenizer: there is no tokenizer.json in .\n"),
    ],
)
def test_generate_from_text_needs_a_tokenizer(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    compact.write(Checkpoint.random(ec.ModelConfig.from_dict(TINY)), tmp_path / "bare.safetensors")
    result = generate(path, "-p", "a")
    assert (result.exit_code, result.stderr) == (2, message)


def test_out_of_memory_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(reference, "TernaryTransformer", lambda *a, **k: _raise(MemoryError("3 GB wanted")))
    result = generate(folder, "-p", "a")
    assert (result.exit_code, result.stderr) == (2, "error: out of memory: 3 GB wanted\n")


# ---- convert --------------------------------------------------------------------------------------------------------


def gguf_model(path: Path) -> Path:
    """A whole Llama of the sizes TINY, with random float weights and a tokenizer in its header."""
    c = ec.ModelConfig.from_dict(TINY)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (c.vocab_size, c.hidden_size), "output_norm": (c.hidden_size,)}
    for i in range(c.num_layers):
        shapes |= {
            f"blk.{i}.attn_norm": (c.hidden_size,),
            f"blk.{i}.attn_q": (c.q_rows, c.hidden_size),
            f"blk.{i}.attn_k": (c.kv_rows, c.hidden_size),
            f"blk.{i}.attn_v": (c.kv_rows, c.hidden_size),
            f"blk.{i}.attn_output": (c.hidden_size, c.q_rows),
            f"blk.{i}.ffn_norm": (c.hidden_size,),
            f"blk.{i}.ffn_gate": (c.intermediate_size, c.hidden_size),
            f"blk.{i}.ffn_up": (c.intermediate_size, c.hidden_size),
            f"blk.{i}.ffn_down": (c.hidden_size, c.intermediate_size),
        }
    return write_gguf(
        path,
        byte_level_fields(pre="smollm", bos_token_id=0, add_bos_token=True),
        {f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()},
        block_count=c.num_layers,
        embedding_length=c.hidden_size,
        feed_forward_length=c.intermediate_size,
        attention__head_count=c.num_heads,
        attention__head_count_kv=c.num_kv_heads,
        attention__layer_norm_rms_epsilon=1e-5,
        context_length=c.max_context,
    )


@pytest.mark.parametrize("to", ["compact", "huggingface"])
def test_convert_from_gguf_generates_the_same_text(tmp_path, to):
    source = gguf_model(tmp_path / "model.gguf")
    out = tmp_path / "out"
    if to == "compact":
        out.mkdir()
    target = out / "model.safetensors" if to == "compact" else out
    result = invoke("convert", str(source), str(target), "--to", to, "--head", "float32")
    assert result.exit_code == 0, result.output
    files = {path.name for path in out.iterdir()}
    assert files - {"config.json"} == {
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"
    }  # fmt: skip
    assert sorted(re.findall(r"written: (\S+), [\d.]+ (?:MB|bytes)\n", result.stdout)) == sorted(
        str(out / name) for name in files
    )
    options = ["-p", "hello it's 12", "-n", "20", "--activation", "float", "--head", "float32"]
    assert generate(out, *options).stdout == generate(source, *options).stdout
    first, second = load_tokenizer(source), load_tokenizer(out)
    assert second.encode("hello 12") == first.encode("hello 12")
    assert second.stop_tokens == first.stop_tokens == (byte_level_tokens().index(END),)


def test_convert_copies_the_tokenizer_and_bench_takes_the_result(tmp_path, folder):
    write_json(folder / "tokenizer_config.json", {"bos_token": END, "add_bos_token": True})
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "b.safetensors"
    for _ in range(2):  # the same files may stand there already
        result = invoke("convert", str(folder), str(target))
        assert result.exit_code == 0, result.output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target.parent / name).read_bytes() == (folder / name).read_bytes()
    assert result.stderr == ""
    result = invoke("bench", "hardware", "--weights", str(target), "--backend", "numpy", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report.json").read_text())["model"]["config"]["name"] == "tiny"


def test_convert_without_a_tokenizer_says_so(tmp_path, folder):
    (folder / "tokenizer.json").unlink()
    result = invoke("convert", str(folder / "model.safetensors"), str(tmp_path / "b.safetensors"))
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"warning: \S+model.safetensors has no tokenizer: `edgellm generate` .* --ids\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["b.safetensors"]


@pytest.mark.parametrize(
    ("head", "expected"), [("auto", "float16"), ("int8", "int8"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_convert_stores_the_head_as_it_is_told(tmp_path, head, expected):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    compact.write(Checkpoint.random(ec.ModelConfig.from_dict(TINY | {"tied_head": False})), source)
    result = invoke("convert", str(source), str(target), "--head", head)
    assert result.exit_code == 0, result.output
    before, after = load_checkpoint(source), load_checkpoint(target)
    for rows, original in ((after.embedding, before.embedding), (after.head, before.head)):
        assert rows.dtype == expected
        np.testing.assert_allclose(rows.to_float(), original.to_float(), rtol=2**-8, atol=1 / 254)


def test_convert_refuses_a_target_before_it_reads(tmp_path, folder):
    weights = folder / "model.safetensors"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = weights.read_bytes()
    for source, target, options, message in (
        (weights, weights / "none" / "b", [], "cannot be written"),
        (weights, weights, [], "this is the checkpoint that is to be converted"),
        (weights, tmp_path, [], f"a folder; name the file, such as {tmp_path / 'model.safetensors'}"),
        (weights, tmp_path / "full", ["--to", "huggingface"], "expected a folder that is new or empty"),
        (folder, weights, ["--to", "huggingface"], "expected a folder that is new or empty"),
        (folder, weights, [], "lies in the folder of the checkpoint that is to be converted"),
        (weights, folder / "tokenizer.json", [], "lies in the folder of the checkpoint that is to be converted"),
        (folder, tmp_path / "out", ["--to", "huggingface", "--head", "int8"], "--to huggingface has no int8 rows"),
        ("missing", tmp_path / "b", [], "not a readable file"),
    ):
        result = invoke("convert", str(source), str(target), *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert weights.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "full"]


def test_convert_leaves_the_tokenizer_of_another_model_alone(tmp_path, folder):
    (tmp_path / "tokenizer.json").write_text("{}")
    result = invoke("convert", str(folder), str(tmp_path / "b.safetensors"))
    assert result.exit_code == 2
    assert (
        result.stderr == f"error: {tmp_path / 'tokenizer.json'}: belongs to another model; choose a folder of its own\n"
    )
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_convert_that_fails_leaves_nothing(tmp_path, folder, monkeypatch, existing):
    def fail(folder, checkpoint, add):
        add("model.norm.weight", checkpoint.final_norm)
        raise ec.CheckpointError("layer 1 is damaged")

    monkeypatch.setattr(huggingface, "_write_tensors", fail)
    if existing:
        (tmp_path / "out").mkdir()
    result = invoke("convert", str(folder), str(tmp_path / "out"), "--to", "huggingface")
    assert (result.exit_code, result.stderr) == (2, "error: layer 1 is damaged\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", *["out"] * existing]


def test_convert_leaves_every_shard_of_its_source_alone(tmp_path):
    folder = tmp_path / "sharded"
    huggingface.write(Checkpoint.random(ec.ModelConfig.from_dict(TINY)), folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    shard = SafetensorsFile(folder / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(shard.entries, shard.path.name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    load_checkpoint(folder)
    before = shard.path.read_bytes()
    (tmp_path / "link").symlink_to(shard.path)
    for source in (folder, folder / "model.safetensors.index.json"):
        for target in (shard.path, tmp_path / "link"):
            result = invoke("convert", str(source), str(target))
            assert result.exit_code == 2
            assert "lies in the folder of the checkpoint" in result.stderr
    assert shard.path.read_bytes() == before


def test_convert_replaces_an_earlier_result(tmp_path, folder):
    target = tmp_path / "b.safetensors"
    for head in ("float32", "bfloat16"):
        assert invoke("convert", str(folder), str(target), "--head", head).exit_code == 0
        assert load_checkpoint(target).embedding.dtype == head


@pytest.mark.parametrize("to", ["compact", "huggingface"])
def test_a_tokenizer_that_cannot_be_used_is_left_out(tmp_path, folder, to, monkeypatch):
    ids = ["--ids", "1,2", "-n", "3"]
    (folder / "tokenizer.json").unlink()
    expected = generate(folder, *ids).stdout
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "b.safetensors" if to == "compact" else tmp_path / "out"
    warning = r"warning: going on without the tokenizer: \S+tokenizer.json: not a readable tokenizer: .*\n"
    result = invoke("convert", str(folder), str(target), "--to", to)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(warning, result.stderr)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    result = generate(folder, *ids)
    assert re.fullmatch(warning, result.stderr)
    assert result.stdout == expected
    assert generate(folder, "-p", "a").exit_code == 2

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    result = generate(folder, *ids)
    assert result.stdout == expected
    assert re.fullmatch(r"warning: going on without .* pip install 'edgellm-cupy\[models\]'.*\n", result.stderr)


def test_convert_adopts_no_tokenizer(tmp_path, folder):
    ours = (folder / "tokenizer.json").read_bytes()
    bare, out = tmp_path / "bare.safetensors", tmp_path / "out"
    compact.write(Checkpoint.random(ec.ModelConfig.from_dict(TINY)), bare)
    out.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (out / name).write_text("{}")
        result = invoke("convert", str(bare), str(out / "b.safetensors"))
        assert result.exit_code == 2
        assert result.stderr == f"error: {out / name}: belongs to another model; choose a folder of its own\n"
        (out / name).unlink()
    (out / "tokenizer_config.json").write_text("{}")  # not among the files of this source
    assert "belongs to another model" in invoke("convert", str(folder), str(out / "b.safetensors")).stderr
    assert not (out / "b.safetensors").exists()
    result = invoke("convert", str(folder), str(folder / "b.safetensors"))  # beside its own
    assert result.exit_code == 0, result.output
    assert (folder / "tokenizer.json").read_bytes() == ours


def test_convert_into_the_current_folder(tmp_path, folder, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    result = invoke("convert", str(folder), ".", "--to", "huggingface")
    assert result.exit_code == 0, result.output
    names = sorted(os.listdir("."))  # the folder itself is still there
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert re.findall(r"written: (\S+),", result.stdout) == names
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "out"]


def test_convert_says_that_int8_rows_become_float32(tmp_path, folder):
    assert invoke("convert", str(folder), str(tmp_path / "a"), "--head", "int8").exit_code == 0
    result = invoke("convert", str(tmp_path / "a"), str(tmp_path / "out"), "--to", "huggingface")
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "warning: embedding and head are int8, which this format does not have; written as float32\n"
    )
    assert load_checkpoint(tmp_path / "out").embedding.dtype == "float32"


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_convert_names_the_table_that_a_dtype_cannot_hold(tmp_path, name):
    checkpoint = Checkpoint.random(ec.ModelConfig.from_dict(TINY | {"tied_head": False}), head="float32")
    rows = checkpoint.embedding
    rows.values[3, 4] = 1e6
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    compact.write(replace(checkpoint, **{f"read_{name}": lambda: rows}), source)
    result = invoke("convert", str(source), str(target), "--head", "float16")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {source}: {name}: a value ")
    assert result.stderr.endswith("is not finite as float16\n")
    assert not target.exists()


def test_what_the_system_refuses_is_one_line(tmp_path, folder, monkeypatch):
    long = "x" * 300
    for arguments in (["convert", str(folder), long], ["convert", long, "x"], ["generate", long, "--ids", "1"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert re.fullmatch(rf"error: (\S*/)?{long}: .*File name too long\n", result.stderr)
    denied = PermissionError(13, "Permission denied", "secret")
    monkeypatch.setattr(generate_command.formats, "load_checkpoint", lambda path: _raise(denied))
    result = invoke("convert", str(folder), str(tmp_path / "x"))
    assert (result.exit_code, result.stderr) == (2, "error: secret: Permission denied\n")


# ---- 2: wrong usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "nonsense"], "utilisation"),
        (["bench", "--nonsense"], "--nonsense"),
        (["bench", "--backend", "opencl"], "numpy"),
        (["nonsense"], "nonsense"),
        (["bench", "--model", "llama", "--backend", "numpy"], "error: no model preset 'llama'"),
        (["bench", "--model", "missing.json", "--backend", "numpy"], "error: missing.json: not a readable"),
        (["bench", "--model", "a", "--weights", "b", "--backend", "numpy"], "error: --model and --weights"),
        (["bench", "--weights", "missing.gguf", "--backend", "numpy"], "error: missing.gguf: "),
        (["convert", "missing.gguf", "x"], "error: missing.gguf: "),
        (["report", "missing.json"], "error: missing.json: "),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_wrong_file_is_one_line_on_stderr(tmp_path, tiny):
    done = edgellm(tmp_path, "bench", "--weights", tiny, "--backend", "numpy")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"error: {tiny}: neither safetensors, nor GGUF.*\n", done.stderr)


def test_an_output_folder_that_is_a_file_is_refused_before_the_work(tmp_path, tiny):
    done = edgellm(tmp_path, "bench", "--model", tiny, "--backend", "numpy", "--out", tiny)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*tiny\.json: cannot be made: File exists\n", done.stderr)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody can write to")
def test_an_output_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, tiny):
    done = edgellm(tmp_path, "bench", "--model", tiny, "--backend", "numpy", "--out", "/proc/self")
    assert done.returncode == 2
    assert re.fullmatch(r"error: /proc/self: cannot be written to: .*\n", done.stderr)


def test_a_disk_that_is_full_at_the_end_still_shows_the_summary(tmp_path, tiny, monkeypatch):
    def full(result, folder):
        raise report.ReportError("report.json: cannot be written: No space left on device")

    monkeypatch.setattr(report, "write", full)
    result = invoke("bench", "cpu", "--model", tiny, "--backend", "numpy", "--quick", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "cpu_utilization_pct" in result.stdout
    assert result.stderr.endswith("error: report.json: cannot be written: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that nothing fits into")
@pytest.mark.parametrize("command", [["info"], ["--help"], ["bench", "hardware", "--backend", "numpy"]])
def test_a_full_stdout_is_one_line_on_stderr(tmp_path, command):
    with open("/dev/full", "w") as full:
        streams = {"stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run([*COMMAND, *command], cwd=tmp_path, env=environment(tmp_path), **streams, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: stdout: cannot be written: No space left on device"
    assert "Traceback" not in done.stderr


# ---- 3: no GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["bench", "--backend", "cuda"], ["verify"], ["generate", "smollm-135m", "--ids", "1", "--backend", "cuda"]],
)
@pytest.mark.parametrize(("cupy", "layer"), [(NO_CUPY, "CuPy"), (NO_DRIVER, "driver")])
def test_a_demanded_gpu_that_is_missing(tmp_path, arguments, cupy, layer):
    done = edgellm(tmp_path, *arguments, cupy=cupy)
    assert done.returncode == 3
    assert done.stdout == ""
    assert re.fullmatch(rf"error: no usable GPU: {layer}: .*; .*install.*\n", done.stderr)


# ---- 4, 6, 130: a run that does not end well ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exception", "code"), [(RuntimeError("broken"), 6), (KeyboardInterrupt(), 130), (ec.CheckpointError("x"), 6)]
)
def test_a_part_that_fails_still_leaves_a_report(tmp_path, tiny, monkeypatch, exception, code):
    def run(ctx):
        raise exception

    monkeypatch.setattr(scaling, "run", run)
    out = str(tmp_path / "out")
    result = invoke("bench", "scaling", "--model", tiny, "--backend", "numpy", "--out", out)
    assert result.exit_code == code
    assert (tmp_path / "out" / "report.md").exists()


def test_a_wrong_result_ends_with_4(tmp_path, tiny, monkeypatch):
    def run(ctx):
        ctx.failures.append("qkv: wrong")
        return {}

    monkeypatch.setattr(scaling, "run", run)
    result = invoke("bench", "scaling", "--model", tiny, "--backend", "numpy", "--out", str(tmp_path / "out"))
    assert result.exit_code == 4
    assert "Wrong result: qkv: wrong" in result.output


@pytest.mark.parametrize(
    ("failures", "code", "said"),
    [
        ([], 0, r"\d+ cases and \d+ kernel specialisations on Test GPU: every result agrees with the reference\n"),
        (["M=1: wrong"], 4, r"wrong: M=1: wrong\n1 failures in \d+ cases and \d+ kernel spec.* on Test GPU\n"),
    ],
)
def test_verify_says_how_much_it_checked(monkeypatch, failures, code, said):
    monkeypatch.setattr(runtime, "require_gpu", lambda: None)
    monkeypatch.setattr(runtime, "device_name", lambda: "Test GPU")
    monkeypatch.setattr(tuning.device, "current_facts", lambda: H200)
    monkeypatch.setattr(verify, "run", lambda progress: failures)
    result = invoke("verify")
    assert result.exit_code == code
    assert re.fullmatch(said, result.stdout)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_writes_what_is_finished_and_the_run_can_go_on(tmp_path, tiny):
    arguments = ["bench", "--model", tiny, "--backend", "numpy", "--quick"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, env=environment(tmp_path), **streams) as process:
        for line in process.stderr:
            if re.match(r"edgellm bench: \d+:\d\d tokens", line):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    first = json.loads((kept(tmp_path) / "report.json").read_text())
    assert first["interrupted"] is True
    assert first["summary"]["os"]["value"]
    assert first["summary"]["throughput_tok_s"]["value"] is None
    rows = (kept(tmp_path) / "rows.jsonl").read_text().splitlines()
    assert {json.loads(row)["key"].partition("/")[0] for row in rows[1:]} >= {"latency"}

    done = edgellm(tmp_path, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert (kept(tmp_path) / "rows.jsonl").read_text().splitlines()[: len(rows)] == rows
    second = json.loads((kept(tmp_path) / "report.json").read_text())
    assert second["interrupted"] is False
    assert second["resumed_rows"] == len(rows) - 1
    taken = [product["rows"] for product in second["parts"]["latency"]["products"].values()]
    assert [row["conditions"].pop("resumed") for rows in taken for row in rows] == [True] * sum(map(len, taken))
    assert second["parts"]["latency"]["products"] == first["parts"]["latency"]["products"]
    assert second["summary"]["throughput_tok_s"]["value"] > 0


# ---- pipes and terminals --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["bench", "hardware", "--backend", "numpy"],
        ["generate", "smollm-135m-notebook", "--ids", "1", "-n", "2", "--backend", "numpy"],
    ],
)
def test_a_reader_that_goes_away_is_no_error(tmp_path, command):
    read, write = os.pipe()
    os.close(read)
    try:
        streams = {"stdout": write, "stderr": subprocess.PIPE}
        process = subprocess.run([*COMMAND, *command], cwd=tmp_path, env=environment(tmp_path), **streams, text=True)
    finally:
        os.close(write)
    assert process.returncode == 0
    assert "Traceback" not in process.stderr
    assert "BrokenPipe" not in process.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
def test_generate_says_how_fast_on_a_terminal(tmp_path, folder):
    terminal, end = os.openpty()
    arguments = [*COMMAND, "generate", str(folder), "-p", "hello", "-n", "3", "--backend", "numpy"]
    try:
        done = subprocess.run(arguments, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=end, text=True)
        seen = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert done.returncode == 0
    assert re.search(r"prefill: 1 tokens in .* s, .* tok/s; decode: 2 tokens in ", seen)
    assert "\x1b" not in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
@pytest.mark.parametrize("no_color", [False, True])
def test_a_bar_on_a_terminal_only_and_not_under_no_color(tmp_path, tiny, no_color):
    terminal, end = os.openpty()
    env = environment(tmp_path) | {"TERM": "xterm"} | ({"NO_COLOR": "1"} if no_color else {})
    arguments = [*COMMAND, "bench", "hardware", "--model", tiny, "--backend", "numpy"]
    try:
        done = subprocess.run(arguments, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=end, text=True)
        seen = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert done.returncode == 0
    assert ("\x1b[" in seen) == (not no_color)
    assert "\x1b" not in done.stdout
