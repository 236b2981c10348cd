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


def test_grids_in_bfloat16(cpu_isa):
    x = torch.randn(2, 33, 19, 14).bfloat16().contiguous(memory_format=torch.channels_last)
    for grid, b in zip(GridPool2d((1, 4, 5))(x), (1, 4, 5), strict=True):
        exact = F.adaptive_avg_pool2d(x.double(), b)
        torch.testing.assert_close(grid.double(), exact, rtol=2**-8, atol=1e-5)


def test_grids_on_any_number_of_threads(threads):
    x = torch.randn(1, 1100, 37, 23).contiguous(memory_format=torch.channels_last)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(GridPool2d((1, 2, 3, 6))(x))
    assert all(map(torch.equal, *results))


def test_nan_stays_in_its_cells():
    """Also where its cell contributes with weight 0 to the pixels of a grid that is spread."""
    x = torch.randn(1, 4, 12, 12).contiguous(memory_format=torch.channels_last)
    x[0, 0, 1, 1] = float("nan")
    (grid,) = GridPool2d((6,))(x)
    assert grid.isnan().nonzero().tolist() == [[0, 0, 0, 0]]
    y = PyramidConv2d(torch.randn(5, 4, 3, 3), (6,))([grid], (26, 26))
    assert y[..., :6, :6].isnan().any()
    assert not y[..., 7:, :].isnan().any()
    assert not y[..., 7:].isnan().any()


@pytest.mark.parametrize("channels", [5, 130])
def test_pyramid_conv_in_float32(channels, threads, cpu_isa):
    bins = (1, 6)
    grids = [torch.randn(2, 8, b, b) for b in bins]
    weight = torch.randn(channels, 16, 3, 3)
    layer = PyramidConv2d(weight, bins)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(layer(grids, (21, 17)))
    assert torch.equal(*results)
    exact = PyramidConv2d(weight.double(), bins)([g.double() for g in grids], (21, 17))
    torch.testing.assert_close(results[0].double(), exact, rtol=0, atol=2e-5)
    assert layer([g[:0] for g in grids], (21, 17)).shape == (0, channels, 21, 17)


def test_ops():
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fastseg.grid_pool, (x, [1, 3]))
    values = [torch.randn(2, b, b, 9 * 3) for b in (1, 2)]
    torch.library.opcheck(torch.ops.fastseg.pyramid_spread_out, (values, x, 3, True))
    with pytest.raises(ValueError, match="channels last"):
        torch.ops.fastseg.grid_pool(x.contiguous(), [1])
    with pytest.raises(ValueError, match="bins must be positive, got 0"):
        torch.ops.fastseg.grid_pool(x, [0])
    with pytest.raises(ValueError, match=r"values must be contiguous \(N, b, b, k \* k \* O\)"):
        torch.ops.fastseg.pyramid_spread_out(values[:1], x[:1], 3, True)


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
