"""The convolution kernels on mma.sync, emulated and on CUDA: every code path against float64,
three orders of the threads, counts of instructions, and what autograd makes of the kernels.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastseg import _C
from fastseg.nn import ASPP
from fastseg.ops import conv_bn_act, conv_bn_act_reference
from tests.conftest import assert_as_accurate

from . import build
from .test_kernels import OnCuda

emulated = pytest.mark.skipif(build.cxx() is None, reason="no C++ compiler")

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch):
    monkeypatch.setenv("FASTSEG_CONV", "mma")


@dataclass
class Layer:
    """One convolution: x (N, C, H, W), K filters of `kernel`."""

    x: tuple[int, int, int, int]
    K: int
    dtype: torch.dtype = torch.float16
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def geometry(self):
        return [list(v) for v in (self.stride, self.padding, self.dilation)] + [1]

    def tensors(self):
        """x and weight as the kernels take them."""
        N, C, H, W = self.x
        x = torch.randn(N, C, H, W).to(self.dtype).contiguous(memory_format=LAST)
        if self.options.get("sliced"):  # some channels of a larger tensor
            wide = torch.full((N, C + 24, H, W), torch.nan).to(self.dtype)
            wide = wide.contiguous(memory_format=LAST)
            wide[:, 8 : 8 + C] = x
            x = wide[:, 8 : 8 + C]
        weight = torch.randn(self.K, C, *self.kernel) / (C * self.kernel[0] * self.kernel[1]) ** 0.5
        return x, weight.to(self.dtype)


def dilated(d, **options):
    return {"padding": (d, d), "dilation": (d, d), **options}


HALF, BF16, TF32 = torch.float16, torch.bfloat16, torch.float32
LAYERS = {
    "taps skipped": Layer((2, 64, 13, 11), 128, **dilated(6)),
    "more tiles than blocks": Layer((1, 8, 65, 3), 300, BF16, **dilated(2)),
    "few columns, ragged": Layer((2, 40, 9, 7), 21, BF16, **dilated(5)),
    "tf32": Layer((1, 36, 12, 11), 132, TF32, **dilated(4)),
    "tf32, few columns": Layer((3, 4, 8, 9), 7, TF32, **dilated(2)),
    "1x1": Layer((1, 96, 10, 12), 72, kernel=(1, 1), padding=(0, 0)),
    "strided": Layer((2, 24, 15, 16), 64, stride=(2, 3)),
    "1x15": Layer((1, 16, 6, 17), 16, BF16, kernel=(1, 15), padding=(0, 7)),
    "7x7": Layer((1, 16, 11, 10), 64, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    "even kernel, wide padding": Layer((1, 8, 6, 5), 8, kernel=(2, 4), padding=(5, 6)),
    "dilation beyond the image": Layer((1, 32, 5, 4), 16, BF16, **dilated(7)),
    "slice of channels": Layer((2, 16, 8, 9), 96, **dilated(3), options={"sliced": True}),
}


def tf32(x):
    """float32 rounded to 10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def emulated_thrice(call):
    torch.set_num_threads(1)  # under a sanitizer, torch's own threads would be reported
    emulator = build.emulated_library()
    with emulator.counting() as counts:
        results = [call(torch.ops.fastseg_emulated)]
    assert counts["mma"] > 0  # it was our kernels
    assert counts["bank_conflicts"] == 0
    for seed in (1, 2):
        emulator.seed(seed)
        results.append(call(torch.ops.fastseg_emulated))
    emulator.seed(0)
    return results


def thrice_on_cuda(call):
    if not torch.cuda.is_available() or not _C.build_info()["cuda_archs"]:
        pytest.skip("needs a CUDA device and fastseg built for it")
    return [[t.cpu() for t in call(OnCuda())] for _ in range(3)]


@pytest.fixture(params=[pytest.param("emulated", marks=emulated), "on_cuda"])
def seeded(request):
    """seeded(call): what call(ops) returns, the same bits three times."""

    def run(call):
        thrice = emulated_thrice if request.param == "emulated" else thrice_on_cuda
        first, *others = thrice(call)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        return first

    return run


def check(layer, fast, call):
    """fast against call(x, weight, ...) in float64, allowed what the same dtype costs in torch."""
    plain = call(tf32 if layer.dtype == TF32 else lambda t: t)
    exact = call(lambda t: t.double())
    assert_as_accurate(fast, plain.to(fast.dtype), exact)


@pytest.mark.parametrize(
    ("name", "slope"), [(n, (0.0, 0.1, 1.0)[i % 3]) for i, n in enumerate(LAYERS)]
)
def test_forward(name, slope, seeded):
    layer = LAYERS[name]
    x, weight = layer.tensors()
    bias = torch.randn(layer.K).to(layer.dtype)
    y = F.conv2d(x, weight, bias, *layer.geometry)
    residual = torch.randn_like(y) if slope < 1 else None
    (z,) = seeded(
        lambda ops: [ops.conv_act(x, weight, bias, residual, *layer.geometry, slope, True)]
    )
    assert z.stride() == y.stride()

    def reference(cast):
        t = F.conv2d(cast(x), cast(weight), bias.to(cast(x).dtype), *layer.geometry)
        t = t if residual is None else t + residual
        return torch.where(t > 0, t, slope * t)

    check(layer, z, reference)


@pytest.mark.parametrize(
    "name", ["taps skipped", "more tiles than blocks", "few columns, ragged", "tf32", "strided"]
)
def test_statistics(name, seeded):
    check_statistics(LAYERS[name], seeded)


def check_statistics(layer, seeded):
    x, weight = layer.tensors()
    bias = torch.randn(layer.K).to(layer.dtype) * 30  # means far from 0 against the deviation
    y, mean, var = seeded(lambda ops: ops.conv_stats(x, weight, bias, *layer.geometry, True))
    check(
        layer,
        y,
        lambda cast: F.conv2d(cast(x), cast(weight), bias.to(cast(x).dtype), *layer.geometry),
    )
    if layer.dtype == TF32:
        exact = F.conv2d(tf32(x).double(), tf32(weight).double(), bias.double(), *layer.geometry)
    else:
        exact = F.conv2d(x.double(), weight.double(), bias.double(), *layer.geometry)
    exact_var, exact_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", LAYERS)
def test_backward(name, seeded):
    layer = LAYERS[name]
    x, weight = layer.tensors()
    dy = torch.randn_like(F.conv2d(x, weight, None, *layer.geometry))
    if layer.K * dy.element_size() % 16 != 0:
        pytest.skip("channels of the gradient are not 16 bytes: torch's convolution")
    own = (layer.stride == (1, 1), layer.dtype != TF32)
    assert any(own)
    dx, dw = seeded(lambda ops: ops.conv_backward(dy, x, weight, *layer.geometry, *own, True))
    for fast, like in ((dx, x), (dw, weight)):
        assert fast.numel() == 0 or fast.shape == like.shape

    def reference(cast, which):
        mask = [which == 0, which == 1, False]
        operands = [cast(t) for t in (dy, x, weight)]
        return torch.ops.aten.convolution_backward(
            *operands, None, *layer.geometry[:3], False, [0, 0], 1, mask
        )[which]

    for which, fast in enumerate((dx, dw)):
        if own[which]:
            check(layer, fast, lambda cast, which=which: reference(cast, which))


def branch_inputs(dtype, rates, channels):
    x = torch.randn(1, 40, 9, 11).to(dtype).contiguous(memory_format=LAST)
    kernels = [1, *[3] * (len(rates) - 1)]
    weights = [
        torch.randn(k, 40, n, n).to(dtype) * 0.1 for k, n in zip(channels, kernels, strict=True)
    ]
    biases = [torch.randn(k).to(dtype) for k in channels]
    return x, weights, biases, rates, torch.randn(1, 16, 1, 1).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "rates", "channels"),
    [
        (HALF, [1, 2, 4, 6], [32, 32, 32, 32]),
        (BF16, [1, 3], [24, 136]),
        (TF32, [1, 2, 12], [16, 5, 20]),
    ],
    ids=str,
)
def test_branches(dtype, rates, channels, seeded):
    arguments = branch_inputs(dtype, rates, channels)
    (z,) = seeded(lambda ops: [ops.conv_branches(*arguments, 0.0, True)])
    expected = torch.ops.fastseg.conv_branches(*arguments, 0.0, True)
    assert z.stride() == expected.stride()
    tolerance = {HALF: 2e-3, BF16: 2e-2, TF32: 2e-3}[dtype]  # a rounding step of the largest
    torch.testing.assert_close(z, expected, rtol=tolerance, atol=2 * tolerance)


@emulated
def test_branches_that_our_kernels_do_not_serve():
    x, weights, biases, rates, tail = branch_inputs(torch.float32, [1, 2], [8, 4])
    z = torch.ops.fastseg_emulated.conv_branches(x, weights, biases, rates, tail, 0.1)
    expected = torch.ops.fastseg.conv_branches(x, weights, biases, rates, tail, 0.1)
    torch.testing.assert_close(z, expected)


def counted(call):
    with build.emulated_library().counting() as counts:
        call(torch.ops.fastseg_emulated)
    assert counts["bank_conflicts"] == 0
    assert counts["sectors"] <= 1.1 * counts["ideal_sectors"]
    return counts["mma"]


@emulated
def test_instructions_are_those_of_the_taps_inside_the_image():
    # 256 mma to 128 pixels x 128 channels x 32 input channels: a step.
    layer = Layer((2, 32, 16, 16), 128, **dilated(8))  # 512 pixels in 9 classes of whole tiles
    x, weight = layer.tensors()
    mma = counted(lambda ops: ops.conv_act(x, weight, None, None, *layer.geometry, 0.0))
    # Half of the rows and of the columns lose one outer tap: 4 taps under each of 4 tiles.
    assert mma == 4 * 4 * 256
    dy = torch.randn(2, 128, 16, 16).half().contiguous(memory_format=LAST)
    mma = counted(lambda ops: ops.conv_backward(dy, x, weight, *layer.geometry, True, False))
    assert mma == 4 * 4 * 256 // 2 * 4  # 32 input channels: half a tile; 128 of dy: 4 steps a tap
    mma = counted(lambda ops: ops.conv_backward(dy, x, weight, *layer.geometry, False, True))
    # Of 512 pixels a tap reads 1/4 at the corners, 1/2 at the sides, all in the centre.
    steps = (4 * 512 // 4 + 4 * 512 // 2 + 512) // 32
    assert mma == steps * 256 // 2


def test_nothing_but_padding(seeded):
    x = torch.randn(1, 8, 2, 2).half().contiguous(memory_format=LAST)
    weight = torch.randn(8, 8, 1, 1).half()
    (z,) = seeded(lambda ops: [ops.conv_act(x, weight, None, None, [1, 1], [3, 3], [1, 1], 1, 1.0)])
    torch.testing.assert_close(z, F.conv2d(x, weight, padding=3), rtol=2e-3, atol=2e-3)


@emulated
@pytest.mark.parametrize("residual", [False, True])
def test_training_step(residual):
    """Autograd over the emulated kernels against the same step in float64."""
    layer = LAYERS["taps skipped"]
    x, weight = layer.tensors()
    parameters = torch.rand(2, layer.K) + 0.5
    r = torch.randn(2, layer.K, 13, 11).half() if residual else None
    upstream = torch.randn(2, layer.K, 13, 11).half()
    options = {"padding": 6, "dilation": 6, "training": True, "activation": "none"}

    def step(fn, dtype=None):
        leaves = [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
            for t in (x, weight, *parameters, r)
        ]
        z = fn(*leaves[:2], None, *leaves[2:4], None, None, leaves[4], **options)
        return [z, *torch.autograd.grad(z, [t for t in leaves if t is not None], upstream.to(z))]

    plain, exact = step(conv_bn_act_reference), step(conv_bn_act_reference, torch.float64)
    with build.emulated_ops() as emulator, emulator.counting() as counts:
        fast = step(conv_bn_act)
    assert counts["mma"] > 0
    for results in zip(fast, plain, exact, strict=True):
        assert_as_accurate(*results)


@emulated
def test_aspp_runs_as_one_launch(monkeypatch):
    torch.manual_seed(1)
    module = ASPP(16, 24, (2, 4, 6)).half().eval()
    x = torch.randn(2, 16, 8, 9).half().contiguous(memory_format=LAST)
    with torch.no_grad():
        expected = module(x)
        monkeypatch.setattr("fastseg.nn.aspp._in_one_launch", lambda x, branches: True)
        with build.emulated_ops() as emulator, emulator.counting() as counts:
            got = module(x)
    assert counts["mma"] > 0
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
