"""Networks on ResNet of other libraries: the same scores as ours after conversion."""

import pytest
import torch
import torch.nn.functional as F

from fastseg import convert
from fastseg.models.deeplabv2 import deeplabv2_resnet
from fastseg.models.deeplabv3 import deeplabv3
from fastseg.models.fcn import fcn_resnet, fcn_skip_resnet
from fastseg.models.pspnet import pspnet

from .layouts import BLOCKS, Source, flip, resize, resnet, torchvision_aspp

WIDTH, CLASSES = 8, 3
C4, C5 = 16 * WIDTH, 32 * WIDTH  # channels of the last two maps
TINY = {"num_classes": CLASSES, "width": WIDTH}


def stem7(prefix=""):
    return [(prefix + "conv1", prefix + "bn1", WIDTH, 7, 2)]


def stem3(names, widths):
    layers = enumerate(zip(names, widths, strict=True))
    return [(conv, bn, n, 3, 1 if i else 2) for i, ((conv, bn), n) in layers]


def up(scores, x, align_corners):
    return {name: resize(y, x, align_corners) for name, y in scores.items()}


# torchvision


def torchvision_head(w, x, name):
    y = w.conv_bn_relu(x, f"{name}.0", f"{name}.1", x.shape[1] // 4, 3, padding=1)
    return w.conv(y, f"{name}.4", CLASSES, 1)


def torchvision_fcn(w, x):
    *_, c4, c5 = resnet(w, x, WIDTH, "backbone.", stem7("backbone."), dilation="contract")
    return up(
        {
            "out": torchvision_head(w, c5, "classifier"),
            "aux": torchvision_head(w, c4, "aux_classifier"),
        },
        x,
        False,
    )


def torchvision_deeplabv3(w, x):
    *_, c4, c5 = resnet(w, x, WIDTH, "backbone.", stem7("backbone."), dilation="contract")
    y = torchvision_aspp(w, c5, "classifier.0", C5 // 8)
    y = w.conv_bn_relu(y, "classifier.1", "classifier.2", C5 // 8, 3, padding=1)
    y = w.conv(y, "classifier.4", CLASSES, 1)
    return up({"out": y, "aux": torchvision_head(w, c4, "aux_classifier")}, x, False)


# hszhao/semseg


def semseg_pspnet(w, x):
    names = [(f"layer0.{i}", f"layer0.{i + 1}") for i in (0, 3, 6)]
    stem = stem3(names, (WIDTH, WIDTH, 2 * WIDTH))
    *_, c4, c5 = resnet(w, x, WIDTH, "", stem, dilation="full")
    maps = [c5]
    for i, size in enumerate((1, 2, 3, 6)):
        y = F.adaptive_avg_pool2d(c5, size)
        y = w.conv_bn_relu(y, f"ppm.features.{i}.1", f"ppm.features.{i}.2", C5 // 4, 1)
        maps.append(resize(y, c5, True))
    y = w.conv_bn_relu(torch.cat(maps, 1), "cls.0", "cls.1", C5 // 4, 3, padding=1)
    scores = {"out": w.conv(y, "cls.4", CLASSES, 1)}
    y = w.conv_bn_relu(c4, "aux.0", "aux.1", C4 // 4, 3, padding=1)
    return up(scores | {"aux": w.conv(y, "aux.4", CLASSES, 1)}, x, True)


# mmsegmentation


def module(w, x, name, channels, k):
    return w.conv_bn_relu(x, f"{name}.conv", f"{name}.bn", channels, k, padding=k // 2)


def mmseg(head):
    def forward(w, x):
        names = [(f"backbone.stem.{i}", f"backbone.stem.{i + 1}") for i in (0, 3, 6)]
        stem = stem3(names, (WIDTH // 2, WIDTH // 2, WIDTH))
        *_, c4, c5 = resnet(w, x, WIDTH, "backbone.", stem, dilation="contract")
        y = w.conv(head(w, c5), "decode_head.conv_seg", CLASSES, 1)
        aux = module(w, c4, "auxiliary_head.convs.0", C4 // 4, 3)
        aux = w.conv(aux, "auxiliary_head.conv_seg", CLASSES, 1)
        return up({"out": y, "aux": aux}, x, False)

    return forward


def mmseg_fcn_head(w, c5):
    y = module(w, c5, "decode_head.convs.0", C5 // 4, 3)
    y = module(w, y, "decode_head.convs.1", C5 // 4, 3)
    return module(w, torch.cat([c5, y], 1), "decode_head.conv_cat", C5 // 4, 3)


def mmseg_psp_head(w, c5):
    maps = [c5]
    for i, size in enumerate((1, 2, 3, 6)):
        y = F.adaptive_avg_pool2d(c5, size)
        maps.append(resize(module(w, y, f"decode_head.psp_modules.{i}.1", C5 // 4, 1), c5, False))
    return module(w, torch.cat(maps, 1), "decode_head.bottleneck", C5 // 4, 3)


def mmseg_aspp_head(w, c5):
    mean = F.adaptive_avg_pool2d(c5, 1)
    maps = [resize(module(w, mean, "decode_head.image_pool.1", C5 // 4, 1), c5, False)]
    for i, r in enumerate((1, 12, 24, 36)):
        conv, bn = (f"decode_head.aspp_modules.{i}.{part}" for part in ("conv", "bn"))
        k, p = (1, 0) if i == 0 else (3, r)
        maps.append(w.conv_bn_relu(c5, conv, bn, C5 // 4, k, padding=p, dilation=r))
    return module(w, torch.cat(maps, 1), "decode_head.bottleneck", C5 // 4, 3)


# segmentation-models-pytorch


def smp_deeplabv3(w, x):
    c5 = resnet(w, x, WIDTH, "encoder.", stem7("encoder."), dilation="full")[-1]
    y = torchvision_aspp(w, c5, "decoder.aspp", C5 // 8)
    y = w.conv_bn_relu(y, "decoder.conv", "decoder.bn", C5 // 8, 3, padding=1)
    return up({"out": w.conv(y, "segmentation_head.0", CLASSES, 1)}, x, True)


# kazuto1011/deeplab-pytorch


def msra_resnet(w, x, prefix):
    def unit(x, name, channels, k=1, relu=True, **options):
        y = w.conv(x, f"{name}.conv", channels, k, bias=False, **options)
        y = w.bn(y, f"{name}.bn")
        return F.relu(y) if relu else y

    x = unit(x, prefix + "layer1.conv1", WIDTH, 7, stride=2, padding=3)
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for s, (stride, d) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
        inner = WIDTH * 2**s
        for b in range(BLOCKS[s]):
            name = f"{prefix}layer{s + 2}.block{b + 1}."
            step = 1 if b else stride
            y = unit(x, name + "reduce", inner, stride=step)
            y = unit(y, name + "conv3x3", inner, 3, padding=d, dilation=d)
            y = unit(y, name + "increase", 4 * inner, relu=False)
            if b == 0:
                x = unit(x, name + "shortcut", 4 * inner, relu=False, stride=step)
            x = F.relu(x + y)
    return x


def deeplab_pytorch_v2(w, x):
    def score(x):
        c5 = msra_resnet(w, x, "base.")
        return sum(
            w.conv(c5, f"base.aspp.c{i}", CLASSES, 3, padding=r, dilation=r)
            for i, r in enumerate((6, 12, 18, 24))
        )

    best = score(x)
    for scale in (0.5, 0.75):
        smaller = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        best = torch.maximum(best, resize(score(smaller), best, False))
    return up({"out": best}, x, False)


CASES = {
    "torchvision_fcn": (torchvision_fcn, fcn_resnet, {"aux": True}, convert.torchvision),
    "torchvision_deeplabv3": (torchvision_deeplabv3, deeplabv3, {"aux": True}, convert.torchvision),
    "semseg_pspnet": (semseg_pspnet, pspnet, {"aux": True, "stem": "deep128"}, convert.semseg),
    "mmseg_fcn": (
        mmseg(mmseg_fcn_head),
        fcn_resnet,
        {"aux": True, "variant": "mmseg"},
        convert.mmseg,
    ),
    "mmseg_pspnet": (
        mmseg(mmseg_psp_head),
        pspnet,
        {"aux": True, "stem": "v1c", "dilation": "contract", "align_corners": False},
        convert.mmseg,
    ),
    "mmseg_deeplabv3": (
        mmseg(mmseg_aspp_head),
        deeplabv3,
        {"aux": True, "variant": "mmseg"},
        convert.mmseg,
    ),
    "smp_deeplabv3": (smp_deeplabv3, deeplabv3, {"variant": "smp"}, convert.smp),
    "deeplab_pytorch_v2": (
        deeplab_pytorch_v2,
        deeplabv2_resnet,
        {"scales": (1, 0.5, 0.75), "align_corners": False},
        convert.deeplab_pytorch,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_scores(name):
    forward, build, options, function = CASES[name]
    source, x = Source(), torch.randn(2, 3, 52, 76, dtype=torch.float64)
    layout = convert.LAYOUTS[name]
    with torch.no_grad():
        expected = forward(source, flip(x) if layout.bgr else x)
        model = build(BLOCKS, **TINY, **options).double().eval()
        report = convert.load(source, model)
        out = model(x)
    assert report.layout == name
    assert not report.kept
    assert not report.unused
    assert out.keys() == expected.keys()
    for key in out:
        torch.testing.assert_close(out[key], expected[key])
    again = build(BLOCKS, **TINY, **options)
    again.load_state_dict(function({"state_dict": {"module." + k: v for k, v in source.items()}}))


def test_auxiliary_head_is_optional():
    """Dropped where the network has none, missed where it has one."""
    source = Source()
    torchvision_fcn(source, torch.zeros(1, 3, 33, 33, dtype=torch.float64))
    report = convert.load(source, fcn_resnet(BLOCKS, **TINY))
    assert report.unused
    assert all(k.startswith("aux_classifier.") for k in report.unused)
    without = {k: v for k, v in source.items() if not k.startswith("aux")}
    with pytest.raises(ValueError, match=r"missing from the source: aux_classifier\.convs\.0"):
        convert.load(without, fcn_resnet(BLOCKS, **TINY, aux=True))


def classifier(names, dilation="contract"):
    """A source that holds an ImageNet ResNet, and its last map."""
    source = Source()
    x = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    c5 = resnet(source, x, WIDTH, "", names, dilation=dilation)[-1]
    source.tensor("fc.weight", 10, C5)
    source.tensor("fc.bias", 10)
    return source, x, c5


STEM3 = stem3([(f"conv{i}", f"bn{i}") for i in (1, 2, 3)], (WIDTH, WIDTH, 2 * WIDTH))


@pytest.mark.parametrize(
    ("layout", "names", "options"),
    [("resnet", stem7(), {}), ("semseg_resnet", STEM3, {"stem": "deep128"})],
)
def test_classifiers_fill_the_trunk(layout, names, options):
    source, x, c5 = classifier(names, "full")
    model = pspnet(BLOCKS, **TINY, **options).double().eval()
    report = convert.load(source, model)
    assert report.layout == layout
    assert report.unused == ["fc.weight", "fc.bias"]
    assert report.kept
    assert all(k.startswith("classifier.") for k in report.kept)
    torch.testing.assert_close(model.backbone(x)[-1], c5)
    with pytest.raises(ValueError, match=r"missing from the source: backbone\.layer4\.2"):
        convert.load(source, pspnet((1, 1, 2, 3), **TINY, **options))


def test_coco_initialisation_of_deeplab():
    source, x = Source(), torch.randn(1, 3, 65, 65, dtype=torch.float64)
    c5 = msra_resnet(source, flip(x), "")
    source.tensor("fc.weight", 91, C5, 1, 1)
    model = deeplabv2_resnet(BLOCKS, **TINY).double().eval()
    report = convert.load(source, model)
    assert report.layout == "deeplab_pytorch_resnet"
    assert len(report.kept) == 8  # weight and bias of four branches
    torch.testing.assert_close(model.backbone(x)[-1], c5)


def test_batch_norm_counters_may_be_absent():
    source, x, c5 = classifier(stem7(), "contract")
    old = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    model = fcn_resnet(BLOCKS, **TINY).double().eval()
    convert.load(old, model)
    torch.testing.assert_close(model.backbone(x)[-1], c5)


@pytest.mark.parametrize(
    ("layout", "decoder"),
    [
        ("smp_unet", "decoder.blocks.0.conv1.0.weight"),
        ("smp_pspnet", "decoder.psp.blocks.0.pool.1.0.weight"),
        ("smp_resnet", "decoder.p5.weight"),
    ],
)
def test_other_decoders_of_smp_leave_their_trunk(layout, decoder):
    source, x, c5 = classifier(stem7(), "contract")
    renamed = {f"encoder.{k}": v for k, v in source.items() if not k.startswith("fc")}
    renamed[decoder] = renamed["segmentation_head.0.weight"] = torch.ones(1)
    model = fcn_skip_resnet(BLOCKS, 8, **TINY).double().eval()
    report = convert.load(renamed, model)
    assert report.layout == layout
    assert report.unused == list(renamed)[-2:]
    model.backbone.set_output_stride(8)
    torch.testing.assert_close(model.backbone(x)[-1], c5)
