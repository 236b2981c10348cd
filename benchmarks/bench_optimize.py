"""Other libraries' networks: fastseg.optimize against themselves, eager and channels last."""

import copy

import pytest
import torch

import fastseg
from tests.peers import segmentation_models, torchvision

CASES = [
    ("torchvision", "deeplabv3_resnet50", None, 513),
    ("torchvision", "lraspp_mobilenet_v3_large", None, 512),
    ("smp", "Unet", "resnet34", 512),
    ("smp", "Unet", "mobilenet_v2", 512),
    ("smp", "Unet", "efficientnet-b0", 512),
    ("smp", "PSPNet", "resnet50", 512),
    ("smp", "DeepLabV3Plus", "resnet50", 512),
    ("smp", "FPN", "resnet34", 512),
    ("smp", "Linknet", "resnet34", 512),
]


@pytest.mark.parametrize(("library", "name", "encoder", "size"), CASES)
def bench_optimize(compare, benchmark, library, name, encoder, size):
    benchmark.group = f"{library} {name} {size}x{size}"
    torch.manual_seed(0)
    if library == "torchvision":
        build = getattr(torchvision().models.segmentation, name)
        model = build(weights=None, weights_backbone=None).eval()
    else:
        build = getattr(segmentation_models(), name)
        model = build(encoder, encoder_weights=None, classes=21).eval()
    x = torch.randn(1, 3, size, size)
    fast = fastseg.optimize(model)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)

    def out(y):
        return y["out"] if isinstance(y, dict) else y

    compare(
        {"fastseg": lambda: out(fast(x)), "torch": lambda: out(model(x_last))},
        tolerance=1e-4,
        rounds=7,
    )
