"""The convolution for compute capability 9.0: what test_conv.py checks, with wgmma wherever it
serves."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastseg import _C

from . import build
from .test_conv import (
    BF16,
    HALF,
    LAYERS,
    Layer,
    branch_inputs,
    check,
    check_statistics,
    dilated,
)
from .test_kernels import OnCuda

LAYERS = {  # output channels are a multiple of 8: the rest is mma.sync's
    **{
        name: replace(layer, K=(layer.K + 7) // 8 * 8)
        for name, layer in LAYERS.items()
        if layer.dtype in (HALF, BF16)
    },
    "more steps than stages": Layer((1, 200, 9, 8), 64, **dilated(1)),
    "256 columns": Layer((1, 72, 16, 30), 520, **dilated(3)),
    "rate 127": Layer((2, 64, 16, 17), 128, BF16, **dilated(127)),
}
STATISTICS = ["taps skipped", "more tiles than blocks", "few columns, ragged", "256 columns"]


@pytest.fixture(autouse=True)
def _wgmma(monkeypatch):
    monkeypatch.setenv("FASTSEG_CONV", "wgmma")


def emulated_thrice(call):
    if build.cxx() is None:
        pytest.skip("no C++ compiler")
    torch.set_num_threads(1)  # under a sanitizer, torch's own threads would be reported
    emulator = build.emulated_library()
    results = []
    with emulator.compute_capability(9), emulator.counting() as counts:
        for seed in range(3):
            emulator.seed(seed)
            results.append(call(torch.ops.fastseg_emulated))
    emulator.seed(0)
    assert counts["wgmma"] > 0
    assert counts["mma"] == 0
    return results


def thrice_on_cuda(call):
    if not torch.cuda.is_available() or not _C.build_info()["cuda_archs"]:
        pytest.skip("needs a CUDA device and fastseg built for it")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    return [[t.cpu() for t in call(OnCuda())] for _ in range(3)]


@pytest.fixture(params=["emulated", "on_cuda"])
def seeded(request):
    """seeded(call): what call(ops) returns, the same bits three times."""

    def run(call):
        thrice = emulated_thrice if request.param == "emulated" else thrice_on_cuda
        first, *others = thrice(call)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        return first

    return run


@pytest.mark.parametrize(
    ("name", "slope"), [(n, (0.0, 0.1, 1.0)[i % 3]) for i, n in enumerate(LAYERS)]
)
def test_forward(name, slope, seeded):
    layer = LAYERS[name]
    x, weight = layer.tensors()
    bias = torch.randn(layer.K).to(layer.dtype)
    y = F.conv2d(x, weight, bias, *layer.geometry)
    residual = torch.randn_like(y) if slope < 1 else None
    (z,) = seeded(lambda ops: [ops.conv_act(x, weight, bias, residual, *layer.geometry, slope)])
    assert z.stride() == y.stride()

    def reference(cast):
        t = F.conv2d(cast(x), cast(weight), bias.to(cast(x).dtype), *layer.geometry)
        t = t if residual is None else t + residual
        return torch.where(t > 0, t, slope * t)

    check(layer, z, reference)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name, seeded):
    check_statistics(LAYERS[name], seeded)


@pytest.mark.parametrize("name", ["taps skipped", "1x15", "even kernel, wide padding"])
def test_gradient_of_the_input(name, seeded):
    layer = LAYERS[name]
    x, weight = layer.tensors()
    dy = torch.randn_like(F.conv2d(x, weight, None, *layer.geometry))
    (dx,) = seeded(lambda ops: ops.conv_backward(dy, x, weight, *layer.geometry, True, False)[:1])

    def reference(cast):
        operands = [cast(t) for t in (dy, x, weight)]
        return torch.ops.aten.convolution_backward(
            *operands, None, *layer.geometry[:3], False, [0, 0], 1, [True, False, False]
        )[0]

    check(layer, dx, reference)


@pytest.mark.parametrize(
    ("dtype", "rates", "channels"),
    [(HALF, [1, 2, 4, 6], [32, 72, 32, 32]), (BF16, [1, 3], [24, 136])],
    ids=str,
)
def test_branches(dtype, rates, channels, seeded):
    arguments = branch_inputs(dtype, rates, channels)
    (z,) = seeded(lambda ops: [ops.conv_branches(*arguments, 0.0)])
    expected = torch.ops.fastseg.conv_branches(*arguments, 0.0)
    assert z.stride() == expected.stride()
    tolerance = {HALF: 2e-3, BF16: 2e-2}[dtype]  # a rounding step of the largest
    torch.testing.assert_close(z, expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.skipif(build.cxx() is None, reason="no C++ compiler")
def test_instructions_are_those_of_the_taps_that_a_tile_uses():
    layer = Layer((2, 64, 16, 16), 128, **dilated(8))  # 512 pixels: 4 tiles of 8 rows
    x, weight = layer.tensors()
    emulator = build.emulated_library()
    with emulator.compute_capability(9), emulator.counting() as counts:
        torch.ops.fastseg_emulated.conv_act(x, weight, None, None, *layer.geometry, 0.0)
    # Each half of an image lacks one row of taps. A step is 4 products in each of 2 warpgroups.
    assert counts["wgmma"] == 4 * 6 * 4 * 2
    assert counts["mma"] == 0
    assert counts["sectors"] <= 1.1 * counts["ideal_sectors"]


@pytest.mark.skipif(build.cxx() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("channels", "dilation", "choice", "kernel"),
    [
        (16, 2, None, None),  # so small a layer is cuDNN's
        (512, 12, None, "wgmma"),
        (512, 12, "torch", None),
        (16, 2, "mma", "mma"),
        (16, 2, "wgmma", "wgmma"),
        (16, 2, "own", "wgmma"),
    ],
)
def test_choice_of_the_kernel(channels, dilation, choice, kernel, monkeypatch):
    if choice is None:
        monkeypatch.delenv("FASTSEG_CONV")
    else:
        monkeypatch.setenv("FASTSEG_CONV", choice)
    layer = Layer((1, channels, 16, 16), 32, **dilated(dilation))
    x, weight = layer.tensors()
    emulator = build.emulated_library()
    with emulator.compute_capability(9), emulator.counting() as counts:
        torch.ops.fastseg_emulated.conv_act(x, weight, None, None, *layer.geometry, 0.0)
    assert [name for name in ("wgmma", "mma") if counts[name] > 0] == ([kernel] if kernel else [])
