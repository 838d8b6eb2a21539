"""What Hugging Face transformers answers. Only calling these functions needs torch, transformers and accelerate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .cases import PROMPT_TOKENS

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # BitNet's layers would be compiled with a C++ compiler otherwise


def load(folder: Path) -> Any:
    """The model in a folder, in float32, by its config.json's own class."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def stepwise_logits(model: Any, ids: np.ndarray, prompt: int = PROMPT_TOKENS) -> np.ndarray:
    """float32 [1 + steps, V]: after the prompt, and after each of the tokens that follow it, one at a time."""
    import torch

    with torch.no_grad():
        output = model(torch.tensor(ids[None, :prompt]), use_cache=True)
        logits = [output.logits[0, -1].numpy()]
        for token in ids[prompt:]:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0, -1].numpy())
    return np.stack(logits)
