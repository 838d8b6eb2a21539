"""ModelConfig: what defines a decoder beside its weights, from a preset, a checkpoint or a JSON file."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentValueError, CheckpointError
from .rotary import RopeScaling

_FLOAT32 = np.finfo(np.float32)

FFN_ACTIVATIONS = ("silu", "relu2")
"""relu2: the squared ReLU of BitNet b1.58 2B4T."""

SQUARED_UNIT = 2.0**-8
"""relu(gate)**2 * up is stored as this times it (kernels_cu/include/ffn.cuh), because the square leaves float16's range
with ordinary activations. An RMSNorm behind it takes any factor out again but for its epsilon, which has to shrink by
the factor's square; a power of two rounds nothing."""


def _has_type(value: Any, name: str) -> bool:
    """Whether `value` is what a field of that type may hold; True and False are no numbers."""
    types: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
        "RopeScaling | None": (RopeScaling, type(None)),
    }
    return isinstance(value, types[name]) and (name == "bool" or not isinstance(value, bool))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama or the BitNet b1.58 architecture, whose four products a layer are ternary.

    Attributes:
        name: what reports call it.
        num_layers, hidden_size, intermediate_size, vocab_size: the usual sizes.
        num_heads, num_kv_heads: query heads and key/value heads (grouped-query attention).
        head_dim: features of a head; even, because rotary embedding turns pairs.
        gated: True: down(f(gate) * up); False: down(f(up)), with f the `ffn_activation`.
        rope_theta: base of the rotary embedding, which turns the two halves of a head against each other.
        rms_eps: epsilon of every RMSNorm.
        max_context: tokens that the model was made for; longer contexts run, and are marked as synthetic.
        ffn_activation: one of :data:`FFN_ACTIVATIONS`.
        sub_norms: an RMSNorm in front of the products out and down too, as BitNet b1.58 2B4T has it.
        tied_head: the embedding is also the output head.
        rope_scaling: how the rotary embedding was stretched to longer contexts; None: not.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    gated: bool = True
    rope_theta: float = 1e4
    rms_eps: float = 1e-5
    max_context: int = 2048
    ffn_activation: str = "silu"
    sub_norms: bool = False
    tied_head: bool = True
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value: Any = getattr(self, f.name)
            if not _has_type(value, str(f.type)):
                raise ArgumentValueError(f"{f.name} is {value!r}, expected {f.type}")
            if f.type == "int" and value < 1:
                raise ArgumentValueError(f"{f.name} is {value}, expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ArgumentValueError(
                f"num_kv_heads is {self.num_kv_heads}, expected a divisor of num_heads = {self.num_heads}"
            )
        if self.head_dim % 2 or self.head_dim > 256:
            raise ArgumentValueError(f"head_dim is {self.head_dim}, expected an even number up to 256")
        if self.ffn_activation not in FFN_ACTIVATIONS:
            raise ArgumentValueError(
                f"ffn_activation is {self.ffn_activation!r}, expected one of {', '.join(FFN_ACTIVATIONS)}"
            )
        largest, smallest = float(_FLOAT32.max), float(_FLOAT32.smallest_subnormal)
        if not (0 <= self.rms_eps <= largest and smallest <= self.rope_theta <= largest):
            raise ArgumentValueError(
                f"rms_eps is {self.rms_eps!r:.80} and rope_theta {self.rope_theta!r:.80}, expected finite numbers "
                ">= 0 and > 0 that float32 holds"
            )

    # ---- derived shapes ---------------------------------------------------------------------------------------------

    @property
    def q_rows(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.num_kv_heads * self.head_dim

    def products(self) -> dict[str, tuple[int, int]]:
        """(M, K) of the four ternary products of one layer, in the order in which they run."""
        up = self.intermediate_size * (2 if self.gated else 1)
        return {
            "qkv": (self.q_rows + 2 * self.kv_rows, self.hidden_size),
            "out": (self.hidden_size, self.q_rows),
            "gate_up" if self.gated else "up": (up, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }

    # ---- where one comes from ---------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A named configuration: one of :data:`PRESETS`.

        Raises:
            ArgumentValueError: no such preset; the message lists them.
        """
        if name not in PRESETS:
            raise ArgumentValueError(f"no model preset {name!r}, expected one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "values") -> ModelConfig:
        """From a dictionary with the attributes as keys; `source` is named in errors.

        Raises:
            CheckpointError: an unknown or missing key, or a value that makes no model.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"{source}: expected a JSON object with the fields of ModelConfig")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CheckpointError(f"{source}: unknown model field {unknown[0]!r}, expected {', '.join(sorted(known))}")
        required = [f.name for f in fields(cls) if f.default is MISSING]
        if missing := [name for name in required if name not in values]:
            raise CheckpointError(f"{source}: the model field {missing[0]!r} is missing")
        try:
            scaling = values.get("rope_scaling")
            return cls(**{**values, "rope_scaling": None if scaling is None else RopeScaling.from_dict(scaling)})
        except ArgumentValueError as e:
            raise CheckpointError(f"{source}: {e}") from e

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """From a JSON file that holds one object with the attributes as keys (see :meth:`to_dict`).

        Raises:
            CheckpointError: the file is missing, is not JSON, or makes no model.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise CheckpointError(f"{path}: not a readable JSON file: {e}") from e
        return cls.from_dict(values, str(path))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


PRESETS = {
    "smollm-135m": ModelConfig(
        name="smollm-135m",
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
    ),
    # The original notebook's shapes made a model: every head has its own keys and values, the FFN has no gate.
    "smollm-135m-notebook": ModelConfig(
        name="smollm-135m-notebook",
        num_layers=9,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=9,
        head_dim=64,
        vocab_size=49152,
        gated=False,
    ),
    # BitNet b1.58 2B4T (Ma et al. 2025, arXiv:2504.12285).
    "bitnet-2b4t": ModelConfig(
        name="bitnet-2b4t",
        num_layers=30,
        hidden_size=2560,
        intermediate_size=6912,
        num_heads=20,
        num_kv_heads=5,
        head_dim=128,
        vocab_size=128256,
        rope_theta=5e5,
        max_context=4096,
        ffn_activation="relu2",
        sub_norms=True,
    ),
}
