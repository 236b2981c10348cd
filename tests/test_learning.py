"""Networks learn from scratch what they are for, measured on pixels they have not seen."""

import pytest
import torch

from fastseg import models
from fastseg.models.deeplabv3 import deeplabv3
from fastseg.models.fcn import fcn_resnet, fcn_skip_resnet
from fastseg.models.pspnet import pspnet

from .learning import crops, iou, mosaics, nuclei, train


def test_unet_finds_nuclei(threads):
    """Trained on the left half of a photograph, U-Net finds the nuclei of the right half."""
    threads(1)  # the same result everywhere, and quicker where other processes run
    x, y = nuclei()
    x = (x - x[..., :256].mean()) / x[..., :256].std()
    model = models.unet(num_classes=2, in_channels=1, width=16, levels=3)
    train(model, lambda: crops(x[..., :256], y[..., :256], 96, 4), steps=60, lr=0.01)
    assert iou(model, x[..., 256:], y[..., 256:])[1] >= 0.80


BLOCKS = (1, 1, 1, 1)  # per stage of a ResNet
# Builder with its first arguments, options, mean IoU to reach: a tenth below what it reaches.
TEXTURES = {
    "fcn_resnet": (fcn_resnet, (BLOCKS,), {"aux": True}, 0.70),
    "fcn8s_resnet": (fcn_skip_resnet, (BLOCKS, 8), {}, 0.55),
    "pspnet": (pspnet, (BLOCKS,), {"aux": True}, 0.65),
    "deeplabv3": (deeplabv3, (BLOCKS,), {"aux": True}, 0.70),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTURES)
def test_tells_textures_apart(name, threads):
    """Trained on mosaics of one half of three textures, tested on the other half."""
    threads(1)
    build, first, options, enough = TEXTURES[name]
    model = build(*first, num_classes=3, in_channels=1, width=8, **options)
    train(model, lambda: mosaics(False, 96, 4), steps=60, lr=0.01)
    torch.manual_seed(1)
    assert iou(model, *mosaics(True, 96, 12)).mean() >= enough
