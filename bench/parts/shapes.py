"""The products of public models: what the table of `edgellm bench latency --shapes table` measures."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One matrix of a decoder layer.

    Attributes:
        model: of the group of shapes, such as ``"2B4T"`` (microsoft/bitnet-b1.58-2B-4T).
        layer: its place in a decoder layer; stacked matrices are one product.
        m, k: output and input features.
    """

    model: str
    layer: str
    m: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.layer}"


TABLE = (
    Shape("Notebook", "qkv", 1728, 576),
    Shape("Notebook", "up", 1536, 576),
    Shape("SmolLM", "qkv", 960, 576),
    Shape("SmolLM", "out", 576, 576),
    Shape("SmolLM", "gate+up", 3072, 576),
    Shape("SmolLM", "down", 576, 1536),
    Shape("2B4T", "qkv", 3840, 2560),
    Shape("2B4T", "out", 2560, 2560),
    Shape("2B4T", "gate+up", 13824, 2560),
    Shape("2B4T", "down", 2560, 6912),
    Shape("Llama-8B", "qkv", 6144, 4096),
    Shape("Llama-8B", "out", 4096, 4096),
    Shape("Llama-8B", "gate+up", 28672, 4096),
    Shape("Llama-8B", "down", 4096, 14336),
    Shape("Llama-70B", "gate+up", 57344, 8192),
    Shape("Llama-70B", "down", 8192, 28672),
)
"""SmolLM-135M and the notebook that this project began with, BitNet b1.58 2B4T, Llama 8B and 70B."""

TOKENS = (1, 2, 4, 8, 16, 64, 256, 2048)
"""Tokens at once, from decoding to prefill."""
