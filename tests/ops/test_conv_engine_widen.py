"""float32 results of bfloat16 images: made by the convolution, and of what something else made."""

import pytest
import torch
from torch.library import opcheck

from fastseg.ops.conv_engine import can_widen, conv_engine, pack_conv
from tests.ops.test_conv_engine_bf16 import BF16, case

CASES = [  # N, C, H, W, K, kernel, stride, dilation, tile, levels of Strassen's algorithm
    (2, 64, 9, 13, 96, (1, 1), 1, 1, 0, 0),
    (1, 256, 11, 12, 128, (1, 1), 1, 1, 0, 0),  # by the wide tile, with rows left over
    (1, 64, 7, 9, 128, (1, 1), 1, 1, 0, 1),
    (1, 20, 9, 10, 37, (3, 3), 2, 1, 0, 0),
    (1, 96, 80, 150, 96, (1, 1), 1, 1, 0, 0),  # written past the caches
    (1, 3, 20, 33, 40, (3, 3), 1, 1, 0, 0),  # few channels
    (1, 32, 6, 7, 3, (3, 3), 1, 1, 0, 0),  # few outputs
    (2, 40, 13, 9, 48, (3, 3), 1, 2, 2, 0),
    (1, 64, 80, 150, 96, (3, 3), 1, 1, 4, 0),
    (1, 17, 13, 9, 21, (3, 3), 1, 1, 4, 0),
    (1, 24, 10, 13, 40, (3, 3), 1, 5, 3, 0),
    (1, 24, 10, 9, 40, (3, 3), 1, 5, 1, 0),
    (0, 32, 4, 4, 32, (1, 1), 1, 1, 0, 0),
]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_conv(shape, activation, cpu_isa):
    """What the bfloat16 result is rounded from, also with a residual."""
    N, C, H, W, K, kernel, stride, dilation, tile, strassen = shape
    options = {"stride": (stride,) * 2, "dilation": (dilation,) * 2, "activation": activation}
    options["padding"] = (kernel[0] // 2 * dilation,) * 2
    x, weight, bias, residual = case(N, C, H, W, K, kernel, **options)
    conv = pack_conv(weight, bias, **options, tile=tile, products=BF16, strassen=strassen)
    assert can_widen(conv)
    for added in (None, residual):
        y = conv_engine(x, conv, added, widen=True)
        assert y.dtype == torch.float32
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y.to(BF16), conv_engine(x, conv, added))
    assert N == 0 or not torch.equal(y, y.to(BF16).float())  # it is not rounded
    _, _, Ho, Wo = y.shape
    wide = torch.full((N, K + 9, Ho + 2, Wo + 3), torch.nan)
    wide = wide.contiguous(memory_format=torch.channels_last)
    out = wide[:, 5:-4, 1:-1, 2:-1]
    assert torch.equal(conv_engine(x, conv, residual, out=out), y)
    out[:] = torch.nan
    assert wide.isnan().all()


def test_operator():
    x, weight, bias, residual = case(1, 32, 6, 7, 32, (3, 3), padding=(1, 1))
    for tile in (0, 2):
        conv = pack_conv(weight, bias, padding=(1, 1), tile=tile, products=BF16)
        args = (x, conv.packed, residual, 32, *conv.options(), None, True)
        opcheck(torch.ops.fastseg.conv_engine, args)
        compiled = torch.compile(lambda x: conv_engine(x, conv, widen=True), fullgraph=True)  # noqa: B023
        assert torch.equal(compiled(x), conv_engine(x, conv, widen=True))


def test_what_is_not_widened():
    weight = torch.randn(32, 16, 1, 15)
    line = pack_conv(weight, padding=(0, 7), tile=5, products=BF16)
    grouped = pack_conv(torch.randn(32, 16, 3, 3), products=BF16, groups=2)
    x = torch.randn(1, 16, 20, 20).to(BF16)
    for conv, image in ((line, x), (grouped, torch.cat([x, x], 1))):
        assert not can_widen(conv)
        with pytest.raises(ValueError, match="a float32 result of a bfloat16 image needs"):
            conv_engine(image, conv, widen=True)
    floats = pack_conv(weight, padding=(0, 7))
    assert not can_widen(floats)
    with pytest.raises(ValueError, match="out must be a bfloat16 image, for weights packed for"):
        conv_engine(x, floats, widen=True)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 21, 260, 300), (1, 1, 1, 1), (0, 3, 4, 4)])
def test_widen(shape):
    """In both layouts, and of what is dense in none; large ones are written past the caches."""
    x = torch.randn(shape).to(BF16)
    for image in (x, x.contiguous(memory_format=torch.channels_last), x[..., ::2], x[:, ::2]):
        y = torch.ops.fastseg.widen(image)
        assert torch.equal(y, image.float())
        opcheck(torch.ops.fastseg.widen, (image,))
    with pytest.raises(ValueError, match="widen: x must be a bfloat16 image"):
        torch.ops.fastseg.widen(x.float())
