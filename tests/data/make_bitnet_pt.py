"""Makes bitnet_int2.pt, a file of torch.save: the tiny model of tests/cpu/test_bitnet_pt.py.

    PYTHONPATH=. python tests/data/make_bitnet_pt.py            (needs torch, and what the tests need)

The head shares the storage of the embedding, as it does when a converter writes one tensor under two names.
"""

from pathlib import Path

import numpy as np
import torch

from tests.cpu.test_bitnet_pt import model, tensors_of


def as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


tensors = {name: as_tensor(array) for name, array in tensors_of(*model()).items()}
torch.save({**tensors, "output.weight": tensors["tok_embeddings.weight"]}, Path(__file__).parent / "bitnet_int2.pt")
