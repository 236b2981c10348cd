"""The same outputs as torchvision, for whole networks with weights under torchvision's names.

torchvision_outputs.npz holds, for each network, the names and shapes of its state dict and every
fourth pixel of its outputs, written by tools/torchvision_outputs.py with torchvision's own code.
The weights are made up here, from the names' order alone.
"""

from collections.abc import Iterable
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseg import convert, models

STORED = Path(__file__).with_name("torchvision_outputs.npz")
NETWORKS = ("fcn_resnet50", "deeplabv3_resnet50")


def made_up_weights(names: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights whose activations keep their size, and batch-norm statistics away from 0 and 1."""
    rng = np.random.RandomState(0)
    weights = {}
    for name, shape in zip(names, shapes, strict=True):
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shape, np.int64)
        elif len(shape) == 4:
            values = noise * np.float32((2 / prod(shape[1:])) ** 0.5)
        elif name.endswith("running_var"):
            values = 0.5 + np.abs(noise)
        elif name.endswith("weight"):
            values = 0.5 + 0.1 * noise
        else:
            values = 0.1 * noise
        weights[name] = torch.from_numpy(np.asarray(values))
    return weights


def image() -> Tensor:
    """(2, 3, 65, 97): an odd size, not a multiple of the stride."""
    noise = np.random.RandomState(1).standard_normal((2, 3, 65, 97))
    return torch.from_numpy(noise.astype(np.float32))


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_same_outputs(name):
    stored = np.load(STORED)
    shapes = [tuple(map(int, s.split())) for s in stored[f"{name}.shapes"].tolist()]
    weights = made_up_weights(stored[f"{name}.names"].tolist(), shapes)
    model = models.create_model(name, aux=True)
    model.load_state_dict(convert.torchvision(weights))
    for key, y in model.eval()(image()).items():
        expected = torch.from_numpy(stored[f"{name}.{key}"])
        assert y.shape == (2, 21, 65, 97)
        # 1e-4 of the largest logit: float32 sums in another order, through 50 layers.
        tolerance = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(y[..., ::8, ::8], expected, rtol=0, atol=tolerance)
