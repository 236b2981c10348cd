"""1x1 convolutions of maps whose channels are scaled against torch in float64."""

import pytest
import torch
from torch.library import opcheck

from fastseg.ops.conv_engine import conv_engine, conv_engine_reference, pack_conv
from tests.ops.test_conv_engine import relative_error

BF16 = torch.bfloat16
KINDS = {"f32": (torch.float32, torch.float32), "bf16": (BF16, torch.float32), "dot": (BF16, BF16)}
CASES = [  # N, C, H, W, K
    (2, 64, 17, 19, 96),  # blocks reach over the end of an image
    (1, 72, 9, 31, 40),
    (3, 17, 3, 5, 21),
    (1, 960, 8, 8, 160),
    (2, 5, 4, 4, 3),  # few outputs
    (1, 1, 6, 1, 33),
    (1, 1024, 5, 6, 16),  # pixels a multiple of 4 KB apart
]


def case(N, C, H, W, K, dtype=torch.float32, products=torch.float32):
    x = torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last).to(dtype)
    weight = (torch.randn(K, C, 1, 1) / C**0.5).to(products).float()
    return x, torch.rand(N, C, 1, 1).to(dtype), weight, torch.randn(K)


def exact_result(x, scale, weight, bias, residual=None, **options):
    if residual is not None:
        residual = residual.double()
    x = x.double() * scale.double()
    return conv_engine_reference(x, weight.double(), bias.double(), residual, **options)


@pytest.mark.parametrize("activation", ["none", "relu6", "hardswish"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_scale(shape, kind, activation, cpu_isa):
    dtype, products = KINDS[kind]
    x, scale, weight, bias = case(*shape, dtype, products)
    conv = pack_conv(weight, bias, activation=activation, products=products)
    for residual in (None, torch.randn(conv_engine(x, conv).shape).to(dtype)):
        y = conv_engine(x, conv, residual, scale=scale)
        # Products of bfloat16 round the scaled channels as well.
        scaled = (x * scale, torch.ones_like(scale)) if kind == "dot" else (x, scale)
        exact = exact_result(*scaled, weight, bias, residual, activation=activation)
        assert y.dtype == dtype
        assert relative_error(y, exact) <= (1e-6 if kind == "f32" else 2.0**-8)


def test_layouts():
    """Planes, slices of channels and of pixels, a scale between others, results among others."""
    x, scale, weight, bias = case(2, 48, 9, 12, 32)
    conv = pack_conv(weight, bias)
    y = conv_engine(x, conv, scale=scale)
    wide = torch.randn(2, 50, 10, 13).contiguous(memory_format=torch.channels_last)
    image = wide[:, 1:49, 1:, :-1].copy_(x)
    scales = torch.randn(2, 60, 1, 1)
    part = scales[:, 3:51].copy_(scale)
    out = torch.randn(2, 40, 9, 12).contiguous(memory_format=torch.channels_last)
    for source in (x.contiguous(), image):
        for factor in (part, scale.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(conv_engine(source, conv, scale=factor), y)
            assert torch.equal(conv_engine(source, conv, None, out[:, 5:37].zero_(), factor), y)


def test_empty_batch_and_threads(threads):
    x, scale, weight, bias = case(2, 96, 40, 41, 64)
    conv = pack_conv(weight, bias)
    assert conv_engine(x[:0], conv, scale=scale[:0]).shape == (0, 64, 40, 41)
    threads(1)
    y = conv_engine(x, conv, scale=scale)
    threads(3)
    assert torch.equal(conv_engine(x, conv, scale=scale), y)


def test_registration():
    x, scale, weight, bias = case(1, 24, 6, 7, 16)
    conv = pack_conv(weight, bias)
    tests = ("test_schema", "test_faketensor")
    arguments = (x, conv.packed, None, 16, *conv.options(), scale)
    opcheck(torch.ops.fastseg.conv_engine.default, arguments, test_utils=tests)


def test_mistakes():
    x, scale, weight, bias = case(2, 64, 6, 7, 64)
    conv = pack_conv(weight, bias)
    with pytest.raises(ValueError, match=r"scale must be \(2, 64, 1, 1\)"):
        conv_engine(x, conv, scale=scale[:1])
    with pytest.raises(ValueError, match="scale must be"):
        conv_engine(x, conv, scale=scale.to(BF16))
    for options in ({"stride": (2, 2)}, {"padding": (1, 1)}, {"strassen": 1}):
        with pytest.raises(ValueError, match="only a 1x1 kernel of one group"):
            conv_engine(x, pack_conv(weight, bias, **options), scale=scale)
