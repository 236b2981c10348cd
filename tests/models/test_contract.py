"""What every network of the registry must do, at a small width."""

import copy
import io
import pickle

import pytest
import torch

import fastseg
from fastseg import models

from .reference import randomize

VGG = {"width": 2, "hidden": 4}
RESNET = {"width": 4}
# Options that make each family small; by the longest prefix of the name.
SMALL = {
    "": {},
    "fcn32s_vgg16": VGG,
    "fcn16s_vgg16": VGG,
    "fcn8s_vgg16": VGG,
    "crfrnn": {**VGG, "iters": 2},
    "fcn": RESNET,
    "segnet_vgg16": {"width": 2},
    "segnet_basic": {"width": 2},
    "unet": {"width": 2},
    "dilated": VGG,
    "deeplabv1": VGG,
    "deeplabv2_vgg16": VGG,
    "deeplabv2": RESNET,
    "deeplabv3": RESNET,
    "deeplabv3_cascade": {**RESNET, "multi_grid": (2,)},
    "refinenet": RESNET,
    "pspnet": RESNET,
    "gcn": {**RESNET, "kernel_size": 5},
}
# Deeper trunks and fewer skips of a family have nothing of their own to test.
SAME = ("_resnet152", "u2net", "fcn16s_vgg16", "fcn16s_resnet50", "fcn32s_resnet50")
NAMES = [
    name
    for name in models.list_models()
    if not name.endswith(SAME)
    and name.replace("resnet101", "resnet50") not in set(models.list_models()) - {name}
]


def small(name, **options):
    prefix = max((p for p in SMALL if name.startswith(p)), key=len)
    return models.create_model(name, num_classes=3, in_channels=4, **SMALL[prefix], **options)


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    """All ResNets get one block per stage."""
    blocks = dict.fromkeys((50, 101, 152), (1, 1, 1, 1))
    monkeypatch.setattr("fastseg.models.resnet.BLOCKS", blocks)


@pytest.fixture(params=NAMES)
def model(request):
    return randomize(small(request.param))


# 112 layers take long to trace, and all blocks of U2-Net are tested on their own.
TRACED = pytest.mark.parametrize(
    "model",
    [pytest.param(n, marks=pytest.mark.slow if n == "u2netp" else ()) for n in NAMES],
    indirect=True,
)


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_close(out, expected):
    """Up to 1e-4 of the largest logit: a sum over thousands of products in another order."""
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
def test_any_size(model):
    model.eval()
    for size in [(1, 1), (1, 40), (33, 1), (2, 3), (37, 65)]:
        out = model(image(2, 4, *size))["out"]
        assert out.shape == (2, 3, *size)
        assert out.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(models.list_models()) - set(NAMES)))
@torch.no_grad()
def test_the_others_of_a_family(name):
    """What the tests below leave out because another trunk stands for it."""
    options = (
        {} if name == "u2net" else SMALL[max((p for p in SMALL if name.startswith(p)), key=len)]
    )
    model = models.create_model(name, num_classes=3, in_channels=4, **options).eval()
    assert model(image(1, 4, 37, 33))["out"].shape == (1, 3, 37, 33)


def test_training_with_one_image(model):
    """It trains, or one sentence says why it cannot."""
    model.train()
    x = image(1, 4, 65, 65)
    pooled = (fastseg.nn.ASPP, fastseg.nn.PyramidPooling)
    if any(isinstance(m, pooled) for m in model.modules()):
        with pytest.raises(ValueError, match="needs a batch of at least 2 in training"):
            model(x)
        model.freeze_bn()
    loss = model(x)["out"].square().mean()
    loss.backward()
    assert loss.isfinite()


@torch.no_grad()
def test_batch_of_images_is_each_image(model):
    model.eval()
    x = image(3, 4, 40, 33)
    together = model(x)["out"]
    for i in range(3):
        assert_close(model(x[i : i + 1])["out"][0], together[i])


@torch.no_grad()
def test_labels(model):
    x = image(2, 4, 33, 48)
    labels = model.eval().labels(x)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), model(x)["out"].argmax(1))


@torch.no_grad()
def test_channels_last(model):
    model.eval()
    x = image(2, 4, 33, 48)
    expected = model(x)["out"]
    out = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert_close(out["out"], expected)


@torch.no_grad()
def test_bfloat16_autocast(model):
    model.eval()
    x = image(2, 4, 33, 48)
    expected = model(x)["out"]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)["out"]
    error = (out.float() - expected).norm() / expected.norm()
    # Rounding moves some maxima to a neighbour, and SegNet unpools to there.
    assert error < (0.3 if isinstance(model, (models.SegNet, models.SegNetBasic)) else 0.05)


@torch.no_grad()
def test_copies_and_files(model):
    model.eval()
    x = image(1, 4, 33, 40)
    expected = model(x)["out"]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.nn.init.normal_(next(model.parameters()))
    torch.testing.assert_close(copy.deepcopy(model)(x)["out"], model(x)["out"], rtol=0, atol=0)
    model.load_state_dict(torch.load(file, weights_only=True))
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(x)["out"], expected, rtol=0, atol=0)


def test_training_step(model):
    model.train()
    x = image(2, 4, 48, 33)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = torch.nn.functional.cross_entropy(model(x)["out"], x[:, 0].gt(0).long())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert any((p != q).any() for p, q in zip(model.parameters(), before, strict=True))


@torch.no_grad()
def test_optimize(model):
    x = image(2, 4, 33, 48)
    expected = model.eval()(x)["out"]
    assert_close(fastseg.optimize(model)(x)["out"], expected)


@TRACED
@torch.no_grad()
def test_compile(model):
    model.eval()
    x = image(1, 4, 33, 40)
    expected = model(x)["out"]
    torch.compiler.reset()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)["out"]
    assert_close(out, expected)


@TRACED
@torch.no_grad()
def test_export(model):
    model.eval()
    x = image(1, 4, 33, 40)
    program = torch.export.export(model, (x,))
    assert_close(program.module()(x)["out"], model(x)["out"])


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "pspnet_resnet50", "deeplabv3_resnet50", "deeplabv3_cascade_resnet50"]
)
def test_auxiliary_head(name):
    model = small(name, aux=True).eval()
    out = model(image(2, 4, 33, 40))
    assert out.keys() == {"out", "aux"}
    assert out["aux"].shape == (2, 3, 33, 40)
