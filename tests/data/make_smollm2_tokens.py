"""Makes smollm2_tokens.json: what llama.cpp makes of some texts with the tokenizer of the real SmolLM2.

pip install llama-cpp-python==0.3.36    # in an environment of its own; built from source, minutes
python tests/data/make_smollm2_tokens.py models/SmolLM2-135M-Instruct.Q4_1.gguf
"""
# ruff: noqa: RUF001

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n\t\n",
    "Once upon a time",
    " Once upon a time",
    "   three spaces in front, two behind  ",
    "The quick brown fox doesn't jump; it's over there, we've seen it, I'd say they'll come.",
    "DON'T SHOUT, IT'S LATE. don’t use “typographic” quotes… or do — as you like",
    "def f(x: int) -> int:\n    if x < 2:\n        return 1\n    return x * f(x - 1)  # n!\n",
    "for (int i = 0; i < n; ++i) {\n\ts[i] ^= 0xFF;\r\n}\r\n",
    "https://example.org/a/b?c=1&d=%20#top user@example.org",
    "0 1 12 123 1234 12345 3.14159 1,000,000 2026-11-22T16:26:00Z 5e-7",
    "½ ² Ⅳ ٣٤ १२३ 一二三",
    "Größe, Äpfel, naïve café, Łódź, Ångström, señor, ﬁn",
    "e\u0301 a\u0308 n\u0303",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "你好，世界。こんにちは世界 안녕하세요 สวัสดีชาวโลก नमस्ते दुनिया",
    "😀🎉 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ \U0001f9ff",
    "∑ᵢ xᵢ² ≤ ∞, ∀ε>0 ∃δ: |x−a|<δ ⇒ |f(x)−L|<ε",
    "a\u00a0b\u2003c\u200bd\ufeffe\u3000f",
    "!!! ??? ... --- === *** ((())) [[]] {{}} <<>> //// \\\\ ~~ `code` $x_1$ 100%",
    "supercalifragilisticexpialidocious antidisestablishmentarianism hhhhhhhhhhhhh",
    "tabs\tand\t\ttabs \t mixed",
    "\x00\x01\x7f\x80",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name>edgellm <file_sep> <|im_end> <|im_start|",
]


def main(model: str) -> None:
    from llama_cpp import Llama

    llama = Llama(model, vocab_only=True, verbose=False)
    cases = [{"text": text, "ids": llama.tokenize(text.encode(), add_bos=True, special=True)} for text in TEXTS]
    made_by = f"llama-cpp-python {version('llama-cpp-python')}, {Path(model).name}"
    target = Path(__file__).with_name("smollm2_tokens.json")
    lines = ",\n".join(map(json.dumps, cases))
    target.write_text(f'{{"made by": {json.dumps(made_by)}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
