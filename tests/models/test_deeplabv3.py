import pytest
import torch
import torch.nn.functional as F

from fastseg.models.deeplabv3 import deeplabv3, deeplabv3_cascade

from .reference import (
    DEPTH,
    SMALL_RESNET,
    STRIDE_8,
    STRIDE_8_FULL,
    STRIDE_16,
    Weights,
    assert_same_network,
    bottleneck,
    fcn_head,
    resnet,
    up,
)

GRID_16 = (*STRIDE_16[:3], [(1, 2), (1, 4), (1, 8)])
GRID_8 = (*STRIDE_8[:3], [(1, 4), (1, 8), (1, 16)])


def aspp(w: Weights, x, name, rates, project_padding=0):
    maps = [w.conv_bn_relu(x, f"{name}.branches.0")]
    for i, r in enumerate(rates, 1):
        maps.append(w.conv_bn_relu(x, f"{name}.branches.{i}", padding=r, dilation=r))
    pooled = w.conv_bn_relu(F.adaptive_avg_pool2d(x, 1), f"{name}.pool")
    maps.append(up(pooled, x, False))
    return w.conv_bn_relu(torch.cat(maps, 1), f"{name}.project", padding=project_padding)


def deeplabv3_plain(
    w: Weights, x, blocks, rates, *, refine=False, corners=False, aux=False, deep=False, padding=0
):
    _, _, c4, c5 = resnet(w, x, *blocks, deep=deep)
    y = aspp(w, c5, "classifier.aspp", rates, padding)
    if refine:
        y = w.conv_bn_relu(y, "classifier.refine", padding=1)
    out = {"out": up(w.conv(y, "classifier.score"), x, corners)}
    if aux:
        out["aux"] = up(fcn_head(w, c4, "aux_classifier"), x, corners)
    return out


VARIANTS = {
    "torchvision": (
        {"aux": True},
        {"blocks": STRIDE_8, "rates": (12, 24, 36), "refine": True, "aux": True},
    ),
    "paper": ({}, {"blocks": GRID_16, "rates": (6, 12, 18), "corners": True}),
    "mmseg": ({}, {"blocks": STRIDE_8, "rates": (12, 24, 36), "deep": True, "padding": 1}),
    "smp": (
        {"output_stride": 8},
        {"blocks": STRIDE_8_FULL, "rates": (12, 24, 36), "refine": True, "corners": True},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_restatement(variant):
    options, form = VARIANTS[variant]
    model = deeplabv3(DEPTH, **SMALL_RESNET, variant=variant, **options)
    assert_same_network(
        model, lambda w, x: deeplabv3_plain(w, x, **form), (2, 2, 65, 65), (1, 2, 33, 70)
    )


def test_switch_of_output_stride():
    model = deeplabv3(DEPTH, **SMALL_RESNET, variant="paper").eval()
    names = list(model.state_dict())
    model.output_stride = 8
    assert list(model.state_dict()) == names
    form = {"blocks": GRID_8, "rates": (12, 24, 36), "corners": True}
    assert_same_network(model, lambda w, x: deeplabv3_plain(w, x, **form), (1, 2, 65, 65))
    model.output_stride = 16
    form = {"blocks": GRID_16, "rates": (6, 12, 18), "corners": True}
    assert_same_network(model, lambda w, x: deeplabv3_plain(w, x, **form), (1, 2, 65, 65))


@pytest.mark.parametrize("stride", [16, 8])
def test_cascade(stride):
    def restatement(w, x):
        rate = 32 // stride
        blocks = STRIDE_8[:3] if stride == 8 else STRIDE_16[:3]
        y = resnet(w, x, *blocks, [(1, rate), (1, 2 * rate), (1, rate)])[-1]
        for block in (5, 6, 7):
            rate *= 2
            for i, grid in enumerate((1, 2, 1)):
                y = bottleneck(w, y, f"classifier.block{block}.{i}", dilation=rate * grid)
        return {"out": up(w.conv(y, "classifier.score"), x, True)}

    model = deeplabv3_cascade(DEPTH, **SMALL_RESNET)
    model.output_stride = stride
    assert_same_network(model, restatement, (1, 2, 65, 65), (1, 2, 33, 70))


def test_bad_options():
    with pytest.raises(ValueError, match="blocks must be 4 to 7, got 8"):
        deeplabv3_cascade(DEPTH, **SMALL_RESNET, blocks=8)
    with pytest.raises(ValueError, match="variant must be torchvision, paper, mmseg, smp, got 'x'"):
        deeplabv3(DEPTH, variant="x")
    with pytest.raises(ValueError, match="ASPP: needs 3 rates, got"):
        deeplabv3(DEPTH, **SMALL_RESNET).classifier.aspp.set_rates((1, 2))


def test_one_image_in_training():
    model = deeplabv3((1, 1, 1, 1), **SMALL_RESNET).train()
    with pytest.raises(ValueError, match="ASPP: batch norm of the 1x1 pooled map needs a batch"):
        model(torch.randn(1, 2, 40, 40))
    model.freeze_bn().train()(torch.randn(1, 2, 40, 40))
    assert not model.backbone.stem[0].bn.weight.requires_grad
    model.freeze_bn(False)
    assert model.backbone.stem[0].bn.training
    assert model.backbone.stem[0].bn.weight.requires_grad
