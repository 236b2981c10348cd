"""Networks optimised for bfloat16: no further from float64 than torch's own in bfloat16."""

import copy
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves

import fastseg
from fastseg import _C
from fastseg.nn.packed import PackedConv2d
from tests.test_memory_plan import Pyramid
from tests.test_optimize import Block, Net, Untraceable, randomise


def outputs(y):
    return y["out"] if isinstance(y, dict) else y[0] if isinstance(y, tuple) else y


def rms_error(y, exact):
    return ((y.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@torch.no_grad()
def check(model, x, factor=1.1, **options):
    """At most ``factor`` times the error of torch's eager network in bfloat16; a little above 1, as
    both round the same activations, of which some happen to be near a step."""
    fast = fastseg.optimize(model, dtype=torch.bfloat16, **options)
    y = outputs(fast(x))
    assert y.dtype == torch.float32
    exact = outputs(copy.deepcopy(model).double()(x.double()))
    plain = outputs(copy.deepcopy(model).bfloat16()(x.bfloat16()))
    ours, theirs = rms_error(y, exact), rms_error(plain, exact)
    assert ours <= factor * theirs, f"{ours:.2e}, torch {theirs:.2e}"
    return fast


@pytest.fixture(params=["float32 products", "avx512_bf16", "amx"])
def bf16_products(request, monkeypatch):
    """Whether products are in bfloat16: chosen as on CPUs whose fast products are those."""
    fast, before = request.param != "float32 products", _C.bf16_products()
    if fast:
        monkeypatch.setattr(_C, "cpu_isa", lambda: request.param)
    _C.set_bf16_products(fast)
    yield fast
    _C.set_bf16_products(before)


@pytest.mark.parametrize("accuracy", ["strict", "default", "fast"])
@pytest.mark.parametrize("build", [Net, Block, Untraceable, Pyramid])
def test_small_networks(build, accuracy, bf16_products):
    # In so few layers the transforms' rounding is not small against that of the activations.
    factor = {"strict": 1.1, "default": 2.0, "fast": 4.0}[accuracy] if bf16_products else 1.1
    fast = check(randomise(build()), torch.randn(2, 3, 45, 37), factor, accuracy=accuracy)
    assert all(m.dtype == torch.bfloat16 for m in fast.modules() if isinstance(m, PackedConv2d))


def calibrated(model, size=65):
    """Random weights with the batch statistics of a random image, as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.reset_running_stats()
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, size, size))
    return model.eval()


NETWORKS = ["deeplabv3_resnet50", "fcn_resnet50", "pspnet_resnet50", "segnet_vgg16", "u2netp"]


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", ["strict", "default", "fast"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, accuracy, bf16_products):
    factor = 1.3 if accuracy == "fast" and bf16_products else 1.1
    model = calibrated(fastseg.models.create_model(name))
    check(model, torch.randn(1, 3, 97, 131), factor, accuracy=accuracy)


def test_results_survive_later_calls():
    fast = fastseg.optimize(Pyramid().eval(), dtype=torch.bfloat16)
    with torch.no_grad():
        x = torch.randn(2, 3, 24, 32)
        score, flat = fast(x)
        kept = score.clone(), flat.clone()
        fast(torch.randn(2, 3, 40, 24))
        assert torch.equal(score, kept[0])
        assert torch.equal(flat, kept[1])
        assert all(torch.equal(a, b) for a, b in zip(fast(x), kept, strict=True))
        assert torch.equal(copy.deepcopy(fast)(x)[0], score)


def test_dtypes_and_empty_batches():
    fast = fastseg.optimize(randomise(Net()), dtype=torch.bfloat16)
    x = torch.randn(2, 3, 31, 33)
    with torch.no_grad():
        y = fast(x)["out"]
        for other in (x.bfloat16(), x.double(), x.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(fast(other)["out"], y)
        assert fast(x[:0])["out"].shape == (0, 5, 31, 33)


@pytest.mark.parametrize(("build", "layers"), [(Net, 10), (Untraceable, 11)])
@torch.no_grad()
def test_models_in_bfloat16_are_taken(build, layers):
    """Without a dtype their results keep theirs."""
    model, x = randomise(build()).bfloat16(), torch.randn(2, 3, 31, 33).bfloat16()
    fast, plain = fastseg.optimize(model, dtype=torch.bfloat16), fastseg.optimize(model)
    for network, dtype in ((fast, torch.float32), (plain, torch.bfloat16)):
        assert sum(isinstance(m, PackedConv2d) for m in network.modules()) == layers
        assert all(y.dtype == dtype for y in tree_leaves(network(x)))
        torch.testing.assert_close(
            outputs(network(x)).float(), outputs(fast(x)), rtol=0.02, atol=0.02
        )
    assert next(model.parameters()).dtype == torch.bfloat16
    model.float()
    assert all(y.dtype == torch.float32 for y in tree_leaves(fastseg.optimize(model)(x.float())))


class Ordered(Net):
    """As torchvision's networks return their maps."""

    def forward(self, x):
        result = OrderedDict()
        result["out"] = super().forward(x)["out"]
        return result


@pytest.mark.parametrize("build", [Net, Ordered])
def test_last_resize_is_not_rounded(build):
    """With one output channel per pixel and a resize, float32 shows values between bfloat16's."""
    fast = fastseg.optimize(randomise(build()), dtype=torch.bfloat16)
    with torch.no_grad():
        y = fast(torch.randn(1, 3, 33, 35))["out"]
    assert not torch.equal(y, y.bfloat16().float())


class Offset(nn.Module):
    """A channel near 300, on two ways to a layer that takes it out again by its bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 4, 1)
        self.cancel = nn.Conv2d(20, 8, 3)
        self.score = nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            self.offset.bias[3] = 300.3
            for channel, weight in ((3, 1.0), (11, -0.5)):
                self.cancel.weight[:, channel] += weight
            self.cancel.bias -= 300.3 * self.cancel.weight[:, [3, 11]].sum((1, 2, 3))

    def forward(self, x):
        x = self.stem(x).relu()
        y = (self.offset(x) + x).relu()
        small = nn.functional.max_pool2d(y, 2)
        whole = nn.functional.interpolate(small, y.shape[2:], mode="bilinear")
        joined = torch.cat([whole, y, self.other(y)], 1)
        return self.score(self.cancel(joined).relu() + x[:, :, 1:-1, 1:-1])


def test_large_constants_stay_float32(bf16_products):
    model, x = Offset().eval(), torch.randn(2, 3, 45, 37)
    fast = check(model, x, 0.1)
    wide = {name for name, m in fast.named_modules() if getattr(m, "dtype", None) == torch.float32}
    assert wide == {"offset", "cancel"}
    assert "cancel: in float32 from offset, offset on" in fastseg.explain(fast)
    with torch.no_grad():
        model.cancel.weight *= 0.1  # now the other channels count for more, and a few large
        model.cancel.weight[:, 19] += 30
    fast = fastseg.optimize(model, dtype=torch.bfloat16)
    assert "constants" not in fastseg.explain(fast)


def test_shipped_weights(bf16_products):
    """U2-Net-p has a channel near 226 that varies by 0.2: torch's logits are 10 % off by it."""
    model = fastseg.models.create_model("u2netp", weights="shipped").eval()
    photo = np.array(Image.open(Path(__file__).with_name("data") / "nuclei.png")) / 255
    photo = torch.from_numpy((photo - 0.45) / 0.225).float()
    check(model, photo[:256, 256:].expand(1, 3, -1, -1), 0.3)
