import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.models.pspnet import PSPHead
from fastseg.nn import PyramidConv2d, PyramidPooling
from fastseg.nn.pyramid_pooling import GridPool2d


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (12, 5), (60, 31)])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("align_corners", [True, False])
def test_pyramid_conv_is_the_convolution_of_the_resized_grids(size, k, align_corners, device):
    bins = (1, 2, 3, 6)
    grids = [torch.randn(2, 3, b, b, dtype=torch.float64, device=device) for b in bins]
    weight = torch.randn(5, 12, k, k, dtype=torch.float64, device=device)
    maps = [F.interpolate(g, size, mode="bilinear", align_corners=align_corners) for g in grids]
    expected = F.conv2d(torch.cat(maps, 1), weight, padding=k // 2)
    torch.testing.assert_close(PyramidConv2d(weight, bins, align_corners)(grids, size), expected)


@pytest.mark.parametrize("form", [torch.nn.Identity(), fastseg.optimize])
def test_head_is_the_plain_composition(form):
    head = PSPHead(64, 5).eval()
    x = torch.randn(2, 64, 20, 33)
    with torch.inference_mode():
        plain = head.score(head.bottleneck(head.ppm(x)))
        torch.testing.assert_close(form(head)(x), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (5, 12), (65, 33)])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format, "image", "part"])
def test_grids_are_those_of_adaptive_pooling(size, form):
    bins = (1, 2, 3, 6)
    x = torch.randn(2, 5, *size)
    if form == "image":
        x = x[0]
    elif form == "part":  # some channels of a larger map
        x = torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last)[:, 2:7]
    else:
        x = x.contiguous(memory_format=form)
    for grid, b in zip(GridPool2d(bins)(x), bins, strict=True):
        assert grid.shape == (*x.shape[:-2], b, b)
        exact = F.adaptive_avg_pool2d(x.double(), b)
        torch.testing.assert_close(grid.double(), exact, rtol=0, atol=1e-6)


def test_no_images():
    assert [g.shape for g in GridPool2d((1, 2))(torch.zeros(0, 3, 4, 5))] == [
        (0, 3, 1, 1),
        (0, 3, 2, 2),
    ]


def test_one_image_in_training():
    layer = PyramidPooling(8, (1, 2)).train()
    with pytest.raises(ValueError, match="PyramidPooling: batch norm of the 1x1 pooled map needs"):
        layer(torch.randn(1, 8, 5, 5))
    assert layer(torch.randn(2, 8, 5, 5)).shape == (2, 16, 5, 5)
    assert PyramidPooling(8, (2, 3)).train()(torch.randn(1, 8, 5, 5)).shape == (1, 16, 5, 5)
