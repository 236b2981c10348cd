"""Whole networks: fastseg.optimize against eager torch and torch.compile with frozen weights."""

import copy

import pytest
import torch
from torch import nn

import fastseg

CASES = [
    ("deeplabv3_resnet50", (513, 513)),
    ("fcn_resnet50", (513, 513)),
    ("pspnet_resnet50", (513, 513)),
    ("segnet_vgg16", (360, 480)),
    ("u2netp", (320, 320)),
]


def unfused(model: nn.Module) -> nn.Module:
    """The network in torch's own modules."""
    for name, child in model.named_children():
        if isinstance(child, fastseg.nn.ConvBNReLU2d):
            setattr(model, name, child.unfuse())
        else:
            unfused(child)
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "size"), CASES)
def bench_models(compare, benchmark, name, size, dtype, compiled):
    benchmark.group = f"{name} {size[0]}x{size[1]} {dtype}"
    torch.manual_seed(0)
    model = fastseg.models.create_model(name).eval()
    x = torch.randn(1, 3, *size)
    fast = fastseg.optimize(model, dtype=dtype)
    plain = unfused(copy.deepcopy(model)).to(dtype, memory_format=torch.channels_last)
    variants = {"fastseg": lambda: fast(x)["out"], "torch": lambda: plain(x_last)["out"]}
    x_last = x.to(dtype, memory_format=torch.channels_last)
    if compiled:
        torch._inductor.config.freezing = True
        with torch.no_grad():
            frozen = torch.compile(plain)
            frozen(x_last)
        variants["torch.compile"] = lambda: frozen(x_last)["out"]
    # In SegNet a near-tie of the pooling may flip an index, in torch's networks too.
    with torch.inference_mode():
        exact = unfused(copy.deepcopy(model)).double()(x.double())["out"]
        tolerance = 1e-2
        if dtype == torch.bfloat16:
            tolerance = 1.2 * ((plain(x_last)["out"] - exact).abs().max() / exact.abs().max())
    compare(variants, exact=exact, tolerance=float(tolerance), rounds=7)
