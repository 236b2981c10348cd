"""Convolutions that pool their result or unpool their input against their parts."""

import pytest
import torch
from torch.library import opcheck

from fastseg.ops import max_pool2d, max_unpool2d
from fastseg.ops.conv_engine import conv_engine, pack_conv
from fastseg.ops.conv_pool import conv_pool2d, conv_unpool2d

SHAPES = [  # N, C, H, W, K
    (1, 64, 12, 16, 64),
    (2, 20, 13, 11, 33),
    (1, 16, 2, 3, 5),
    (3, 32, 9, 6, 48),
    (1, 32, 18, 20, 32),  # every length of tile inside the image
]
DTYPES = [torch.float32, torch.bfloat16]


def image(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def layer(C, K, tile, **options):
    options = {"activation": "relu", "padding": (1, 1), **options}
    return pack_conv(torch.randn(K, C, 3, 3), torch.randn(K), tile=tile, **options)


@pytest.mark.parametrize("residual_last", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("tile", [0, 2, 4, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(shape, tile, ceil_mode, residual_last, dtype, cpu_isa):
    N, C, H, W, K = shape
    x, residual = image(N, C, H, W, dtype=dtype), image(N, K, H, W, dtype=dtype)
    conv = layer(C, K, tile, residual_last=residual_last)
    got = conv_pool2d(x, conv, residual, ceil_mode=ceil_mode, indices=True)
    y = conv_engine(x, conv, residual)
    if tile == 0 or (H % tile == 0 and W % tile == 0):
        assert torch.equal(got[0], y)
    else:  # whole windows need other tiles
        scale = y.abs().max().item()
        tolerance = 2**-7 if dtype == torch.bfloat16 else 5e-5  # neighbours in bfloat16
        torch.testing.assert_close(got[0], y, rtol=tolerance, atol=5e-5 * scale)
    maxima, codes = max_pool2d(got[0], 2, ceil_mode=ceil_mode)
    assert torch.equal(got[1], maxima)
    assert torch.equal(got[2], codes)
    alone = conv_pool2d(x, conv, residual, ceil_mode=ceil_mode, keep=False)
    assert alone[0] is None
    assert torch.equal(alone[1], maxima)
    assert alone[2] is None


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("tile", [0, 2, 4, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpool(shape, tile, ceil_mode, dtype, cpu_isa):
    N, C, H, W, K = shape
    x, codes = max_pool2d(image(N, C, H, W, dtype=dtype), 2, ceil_mode=ceil_mode)
    conv = layer(C, K, tile)
    residual = image(N, K, H, W, dtype=dtype)
    y = conv_engine(max_unpool2d(x, codes, 2, output_size=(H, W)), conv, residual)
    assert torch.equal(conv_unpool2d(x, codes, (H, W), conv, residual), y)


def test_ties_and_nan(cpu_isa):
    """The first maximum of a window counts, or its last NaN."""
    x = torch.zeros(1, 16, 4, 8).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 5] = x[0, 0, 1, 4] = 2.0
    weight = torch.eye(16)[:, :, None, None] * torch.tensor([[0.0] * 3, [0, 1, 0], [0.0] * 3])
    conv = pack_conv(weight, padding=(1, 1), tile=2)
    _, maxima, codes = conv_pool2d(x, conv, keep=False, indices=True)
    expected = max_pool2d(conv_engine(x, conv), 2)
    assert torch.equal(maxima, expected[0])
    assert torch.equal(codes, expected[1])
    bias = torch.full((16,), float("nan"))
    _, maxima, codes = conv_pool2d(x, pack_conv(weight, bias, padding=(1, 1), tile=2), indices=True)
    assert maxima.isnan().all()
    assert (codes == 3).all()


@pytest.mark.parametrize("tile", [0, 2, 4])
def test_same_bits_with_two_threads(tile, threads):
    x, conv, back = image(2, 32, 30, 34), layer(32, 48, tile), layer(48, 24, tile)
    results = []
    for count in (1, 2):
        threads(count)
        y, maxima, codes = conv_pool2d(x, conv, indices=True)
        results.append((y, maxima, codes, conv_unpool2d(maxima, codes, (30, 34), back)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_slices_and_empty_batch():
    """Results among the channels of a larger image, and nothing for no images."""
    x, conv = image(1, 32, 8, 12), layer(32, 48, 4)
    whole = torch.full((1, 80, 8, 12), 7.0).contiguous(memory_format=torch.channels_last)
    y, maxima, _ = conv_pool2d(x, conv, out=whole[:, 16:64])
    assert torch.equal(whole[:, 16:64], conv_engine(x, conv))
    assert torch.equal(maxima, max_pool2d(y, 2)[0])
    assert (whole[:, :16] == 7).all()
    assert (whole[:, 64:] == 7).all()
    y, maxima, codes = conv_pool2d(x[:0], conv, indices=True)
    assert y.shape == (0, 48, 8, 12)
    assert maxima.shape == codes.shape == (0, 48, 4, 6)


def test_operator_registration():
    x, conv = image(1, 16, 6, 7), layer(16, 8, 4)
    out, pooled = image(1, 8, 6, 7), image(1, 8, 3, 4)
    codes = pooled.to(torch.uint8)
    opcheck(
        torch.ops.fastseg.conv_engine_pool.default,
        (x, None, 6, 7, conv.packed, None, out, pooled, codes, 8, *conv.options()),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_errors():
    x, conv = image(1, 16, 6, 8), layer(16, 8, 4)
    run = torch.ops.fastseg.conv_engine_pool
    with pytest.raises(ValueError, match="nothing to write to"):
        run(x, None, 6, 8, conv.packed, None, None, None, None, 8, *conv.options())
    wrong = image(1, 8, 2, 4)
    with pytest.raises(ValueError, match="size of the pooled output"):
        run(x, None, 6, 8, conv.packed, None, None, wrong, None, 8, *conv.options())
    with pytest.raises(ValueError, match="codes must be uint8"):
        run(x, x, 12, 16, conv.packed, None, image(1, 8, 12, 16), None, None, 8, *conv.options())
    codes = torch.zeros_like(x, dtype=torch.uint8)
    with pytest.raises(ValueError, match="size of a pooled image"):
        run(x, codes, 6, 8, conv.packed, None, image(1, 8, 6, 8), None, None, 8, *conv.options())
    odd, pooled = layer(16, 8, 3), image(1, 8, 3, 4)
    with pytest.raises(ValueError, match="even Winograd tiles"):
        run(x, None, 6, 8, odd.packed, None, None, pooled, None, 8, *odd.options())
    with pytest.raises(ValueError, match="x must be"):
        conv_pool2d(image(1, 8, 6, 8), conv)
