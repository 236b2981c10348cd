"""Networks of other libraries, where they are installed: the same outputs, and by the engine."""

import pytest
import torch

import fastseg
from tests.models.reference import randomize
from tests.peers import segmentation_models, torchvision

from .test_unharmed import check

pytestmark = pytest.mark.slow


def of_torchvision(name, **options):
    build = getattr(torchvision().models.segmentation, name)
    return build(weights=None, weights_backbone=None, **options)


def of_smp(name, encoder="resnet34", **options):
    return getattr(segmentation_models(), name)(encoder, encoder_weights=None, classes=5, **options)


CASES = {
    "fcn_resnet50": (of_torchvision, {"aux_loss": True}, 57),
    "deeplabv3_resnet50": (of_torchvision, {}, 61),
    "lraspp_mobilenet_v3_large": (of_torchvision, {}, 51),
    "Unet": (of_smp, {}, 47),
    "UnetPlusPlus": (of_smp, {"encoder": "resnet18"}, 43),
    "Unet mobilenet": (of_smp, {"encoder": "mobilenet_v2"}, 46),
    "Unet efficientnet": (of_smp, {"encoder": "efficientnet-b0"}, 75),
    "Unet densenet": (of_smp, {"encoder": "densenet121"}, 131),
    "Unet timm": (of_smp, {"encoder": "tu-resnet34"}, 47),
    "PSPNet": (of_smp, {"encoder": "resnet50"}, 30),
    "DeepLabV3": (of_smp, {"encoder": "resnet50"}, 61),
    "DeepLabV3Plus": (of_smp, {"encoder": "resnet50"}, 63),
    "FPN": (of_smp, {}, 48),
    "Linknet": (of_smp, {}, 47),
    "MAnet": (of_smp, {"encoder": "resnet18"}, 51),
    "Segformer": (of_smp, {"encoder": "mit_b0"}, 60),
    "Unet convnext": (of_smp, {"encoder": "tu-convnext_tiny"}, 60),
    "Unet regnet": (of_smp, {"encoder": "tu-regnety_002"}, 80),
}


@pytest.mark.parametrize("name", CASES)
def test_same_outputs(name):
    build, options, engine = CASES[name]
    model = randomize(build(name.split()[0], **options)).eval()
    fast = check(model, torch.randn(2, 3, 96, 128))
    assert fastseg.explain(fast).count("convolution engine") >= engine


@torch.no_grad()
def test_compiled():
    """In one graph, sizes known."""
    torch.compiler.reset()
    model = randomize(of_smp("PSPNet", "resnet18")).eval()
    x = torch.randn(1, 3, 64, 96)
    out = torch.compile(model, backend="fastseg", fullgraph=True)(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
