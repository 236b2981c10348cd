"""3-wide kernels over images of one or three channels against torch in float64."""

import pytest
import torch

from fastseg import _C
from fastseg.ops.conv_engine import conv_engine, conv_engine_reference, pack_conv

BF16 = torch.bfloat16
KINDS = {"f32": (torch.float32, torch.float32), "bf16": (BF16, torch.float32), "dot": (BF16, BF16)}
CASES = [  # N, C, H, W, K, rows of the kernel, stride, padding
    (1, 3, 30, 40, 64, 3, 1, (1, 1)),
    (2, 3, 31, 29, 32, 3, 2, (1, 1)),
    (1, 3, 5, 14, 16, 3, 1, (1, 1)),  # one block, beyond both ends of the line
    (1, 3, 1, 60, 48, 3, 1, (1, 1)),  # taps above and below the image
    (1, 3, 2, 33, 80, 3, 2, (2, 3)),
    (3, 1, 9, 47, 64, 3, 1, (0, 0)),
    (1, 1, 20, 45, 16, 3, 2, (1, 1)),
    (2, 3, 8, 20, 32, 1, 1, (0, 1)),
    (1, 3, 6, 31, 32, 2, 1, (4, 1)),  # lines that read padding alone
]


def case(shape, dtype=torch.float32):
    N, C, H, W, K, R, stride, padding = shape
    x = torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last).to(dtype)
    options = {"stride": (stride, stride), "padding": padding}
    return x, torch.randn(K, C, R, 3), torch.randn(K), options


def calls():
    return _C.kernel_counts().get("conv_engine.few_channels", 0)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "hardswish"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_few_channels(shape, kind, activation, cpu_isa):
    dtype, products = KINDS[kind]
    x, weight, bias, options = case(shape, dtype)
    weight = weight.to(products).float()
    options |= {"activation": activation}
    exact = conv_engine_reference(x.double(), weight.double(), bias.double(), **options)
    before = calls()
    y = conv_engine(x, pack_conv(weight, bias, **options, products=products))
    whole = kind != "dot" or (weight.size(2) == 3 and cpu_isa != "amx")
    assert calls() == before + whole
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert (y - exact).abs().max() <= rounding * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_reads_nothing_beside_the_window(kind, cpu_isa):
    """Infinities right outside of a window leave its result alone."""
    dtype, products = KINDS[kind]
    for C, row in ((1, 5), (3, 4)):
        x, weight, _, options = case((1, C, 9, 40, 16, 3, 1, (1, 1)), dtype)
        whole = conv_engine(x, pack_conv(weight, None, **options, products=products))
        x[:, :, row + 2] = x[:, :, :, 21] = torch.inf
        y = conv_engine(x, pack_conv(weight, None, **options, products=products))
        far = torch.ones(9, 40, dtype=torch.bool)
        far[row + 1 : row + 4] = far[:, 20:23] = False
        assert torch.equal(y[..., far], whole[..., far])
        assert not y[..., ~far].isfinite().any()


def test_others_are_matrix_products():
    """A slice of channels, narrow images, residuals."""
    x, weight, bias, options = case(CASES[0])
    conv = pack_conv(weight, bias, **options)
    wide = torch.randn(1, 6, 30, 40).contiguous(memory_format=torch.channels_last)
    before = calls()
    for image, residual in ((wide[:, 2:5], None), (x[..., :13], None), (x, conv_engine(x, conv))):
        y = conv_engine(image, conv, residual)
        double = (t if t is None else t.double() for t in (image, weight, bias, residual))
        exact = conv_engine_reference(*double, **options)
        assert (y - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert calls() == before + 1  # that which made the residual


def test_streamed_and_threads(threads):
    """More than 4 MB of results, into rows with a gap, on several threads."""
    x, weight, bias, options = case((1, 3, 150, 130, 64, 3, 1, (1, 1)))
    conv = pack_conv(weight, bias, **options)
    torch.set_num_threads(1)
    y = conv_engine(x, conv)
    exact = conv_engine_reference(x.double(), weight.double(), bias.double(), **options)
    assert (y - exact).abs().max() <= 1e-6 * exact.abs().max()
    torch.set_num_threads(3)
    whole = torch.full((1, 80, 150, 130), 7.0).contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv_engine(x, conv, out=whole[:, 16:]), y)
    assert (whole[:, :16] == 7).all()
