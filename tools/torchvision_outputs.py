"""Writes tests/models/torchvision_outputs.npz: what torchvision's networks compute.

Run from the repository's root where torchvision is installed: python -m tools.torchvision_outputs
"""

import numpy as np
import torch
from torchvision.models import segmentation

from tests.models.test_torchvision import NETWORKS, STORED, image, made_up_weights


@torch.inference_mode()
def main() -> None:
    arrays = {}
    for name in NETWORKS:
        model = getattr(segmentation, name)(weights=None, weights_backbone=None, aux_loss=True)
        state = model.state_dict()
        model.load_state_dict(made_up_weights(state, (v.shape for v in state.values())))
        arrays[f"{name}.names"] = np.array(list(state))
        arrays[f"{name}.shapes"] = np.array([" ".join(map(str, v.shape)) for v in state.values()])
        for key, y in model.eval()(image()).items():
            print(name, key, tuple(y.shape), f"up to {y.abs().max():.3g}")
            arrays[f"{name}.{key}"] = y[..., ::8, ::8].numpy()
    np.savez_compressed(STORED, **arrays)


if __name__ == "__main__":
    main()
