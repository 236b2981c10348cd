"""Networks learn from scratch what they are for, measured on pixels they have not seen."""

import pytest
import torch

from fastseg import models
from fastseg.models.deeplabv2 import deeplabv2_resnet
from fastseg.models.deeplabv3 import deeplabv3
from fastseg.models.fcn import fcn_resnet, fcn_skip_resnet
from fastseg.models.gcn import gcn
from fastseg.models.pspnet import pspnet
from fastseg.models.refinenet import refinenet

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
VGG = {"width": 8, "hidden": 64}
SAME = {**VGG, "padding": "same"}
# Builder with its first arguments, options, steps, learning rate, mean IoU to reach: a tenth below
# what it reaches. One class for all pixels reaches 0.13, chance 0.2. Networks without batch norm
# need the lower rates.
TEXTURES = {
    "fcn_resnet": (fcn_resnet, (BLOCKS,), {"width": 8, "aux": True}, 60, 0.01, 0.70),
    "fcn8s_resnet": (fcn_skip_resnet, (BLOCKS, 8), {"width": 8}, 60, 0.01, 0.55),
    "pspnet": (pspnet, (BLOCKS,), {"width": 8, "aux": True}, 60, 0.01, 0.65),
    "deeplabv3": (deeplabv3, (BLOCKS,), {"width": 8, "aux": True}, 60, 0.01, 0.70),
    "fcn8s_vgg16": (models.fcn8s_vgg16, (), VGG, 100, 0.003, 0.45),
    "segnet_basic": (models.segnet_basic, (), {"width": 16}, 60, 0.01, 0.42),
    "segnet_vgg16": (models.segnet_vgg16, (), {"width": 8}, 200, 0.005, 0.43),
    "dilated_frontend": (models.dilated_frontend_vgg16, (), SAME, 150, 0.001, 0.34),
    "deeplabv1": (models.deeplabv1_largefov_vgg16, (), VGG, 150, 0.001, 0.42),
    "deeplabv2_vgg16": (models.deeplabv2_vgg16, (), VGG, 150, 0.001, 0.38),
    "deeplabv2_resnet": (deeplabv2_resnet, (BLOCKS,), {"width": 8}, 60, 0.01, 0.45),
    "refinenet": (refinenet, (BLOCKS,), {"width": 8}, 80, 0.003, 0.42),
    "gcn": (gcn, (BLOCKS,), {"width": 8}, 60, 0.01, 0.45),
    "crfrnn": (models.crfrnn_fcn8s_vgg16, (), {**VGG, "mean": 128.0, "std": 50.0}, 60, 0.003, 0.27),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTURES)
def test_tells_textures_apart(name, threads):
    """Trained on mosaics of one half of three textures, tested on the other half."""
    threads(1)
    build, first, options, steps, lr, enough = TEXTURES[name]
    model = build(*first, num_classes=3, in_channels=1, **options)
    train(model, lambda: mosaics(False, 96, 4), steps=steps, lr=lr)
    torch.manual_seed(1)
    assert iou(model, *mosaics(True, 96, 12)).mean() >= enough


@pytest.mark.slow
@pytest.mark.parametrize("context", ["basic", "large"])
def test_context_module_improves_the_front_end(context, threads):
    """In the paper's two steps: the front end, then the context module on its frozen scores."""
    threads(1)
    options = {"num_classes": 3, "in_channels": 1, **SAME}
    front = models.dilated_frontend_vgg16(**options)
    train(front, lambda: mosaics(False, 96, 4), steps=150, lr=0.001)
    model = models.dilated8_vgg16(context=context, **options)
    missing, unexpected = model.load_state_dict(front.state_dict(), strict=False)
    assert all(key.startswith("context.") for key in missing)
    assert not unexpected
    for parameter in (*model.backbone.parameters(), *model.head.parameters()):
        parameter.requires_grad_(False)
    train(model, lambda: mosaics(False, 96, 4), steps=100, lr=0.001)
    torch.manual_seed(1)
    held_out = mosaics(True, 96, 12)
    before, after = (iou(m, *held_out).mean() for m in (front, model))
    assert before >= 0.34
    assert after > before
