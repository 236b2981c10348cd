"""Sums of two 1x1 convolutions by the engine against torch in float64."""

import pytest
import torch
from torch.library import opcheck

from fastseg.ops.conv_sum import conv_sum, conv_sum_reference, pack_conv_sum
from tests.ops.test_conv_engine import relative_error

ALLOWED = {0: 1e-6, 1: 2e-6}  # by levels of Strassen's algorithm, largest error over largest output
CASES = [  # N, C, C2, Ho, Wo, K, stride, stride of the second
    (1, 64, 64, 17, 19, 256, (1, 1), (1, 1)),
    (2, 64, 96, 9, 31, 64, (1, 1), (2, 2)),  # blocks reach over lines of both images
    (1, 32, 64, 1, 1, 64, (1, 1), (1, 1)),
    (3, 96, 32, 3, 5, 128, (2, 1), (1, 3)),
    (2, 512, 64, 5, 4, 64, (1, 1), (1, 1)),  # pieces: one, and a shorter one
    (1, 1056, 640, 4, 9, 64, (1, 1), (2, 2)),  # several of each
    (1, 1056, 640, 12, 9, 128, (1, 1), (2, 2)),  # pairs of two panels
    (2, 64, 32, 6, 15, 256, (1, 1), (1, 1)),
    (2, 512, 32, 4, 17, 64, (2, 2), (1, 1)),  # pixels that are read lie 4 KB apart
]
ODD_CASES = [  # no whole lines of channels
    (1, 17, 3, 7, 30, 40, (1, 1), (2, 1)),
    (2, 1, 50, 5, 5, 33, (1, 2), (1, 1)),
    (2, 3, 1, 9, 1, 5, (1, 1), (3, 2)),  # few outputs
    (1, 513, 2, 1, 40, 70, (1, 1), (1, 1)),
]


def case(N, C, C2, Ho, Wo, K, stride, other_stride, dtype=torch.float32):
    def image(channels, strides):
        sizes = [n * s - (s - 1) // 2 for n, s in zip((Ho, Wo), strides, strict=True)]
        x = torch.randn(N, channels, *sizes).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    weights = (torch.randn(K, channels, 1, 1).to(dtype).float() for channels in (C, C2))
    return image(C, stride), image(C2, other_stride), *weights, torch.randn(K)


def exact_result(tensors, **options):
    return conv_sum_reference(*(t.double() for t in tensors), **options)


def both(tensors, shape, **options):
    """Our result and the exact one."""
    strides = {"stride": shape[6], "other_stride": shape[7]}
    activation = {n: options[n] for n in options if n in ("activation", "negative_slope")}
    packed = pack_conv_sum(*tensors[2:], **strides, **options)
    exact = exact_result(tensors, **strides, **activation)
    return conv_sum(*tensors[:2], packed), exact, packed


@pytest.mark.parametrize("strassen", [0, 1])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_sums(shape, activation, strassen, cpu_isa):
    y, exact, _ = both(case(*shape), shape, activation=activation, strassen=strassen)
    assert y.shape == exact.shape
    assert relative_error(y, exact) <= ALLOWED[strassen]


@pytest.mark.parametrize("shape", ODD_CASES, ids=str)
def test_odd_channels(shape, cpu_isa):
    y, exact, _ = both(case(*shape), shape, activation="leaky_relu", negative_slope=0.2)
    assert relative_error(y, exact) <= ALLOWED[0]


@pytest.mark.parametrize("strassen", [0, 1])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_bfloat16_images(shape, strassen, cpu_isa):
    """Multiplied in float32 and rounded once."""
    tensors = case(*shape, torch.bfloat16)
    y, exact, _ = both(tensors, shape, activation="relu", strassen=strassen)
    assert y.dtype == torch.bfloat16
    bound = ALLOWED[strassen] * exact.abs().max()
    assert torch.allclose(y.double(), exact, rtol=2**-8, atol=bound)


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_bfloat16_products(shape, cpu_isa):
    """Operands that are bfloat16 already: only the result is rounded."""
    tensors = case(*shape, torch.bfloat16)
    y, exact, _ = both(tensors, shape, products=torch.bfloat16)
    bound = ALLOWED[0] * exact.abs().max()
    assert torch.allclose(y.double(), exact, rtol=2**-8, atol=bound)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strassen", [0, 1])
def test_integers_are_exact(strassen, products, cpu_isa):
    """Small integers do not round, so that every product must be right."""
    tensors = [t.mul(4).round() for t in case(2, 64, 96, 9, 20, 64, (1, 1), (2, 2))]
    tensors[:2] = (image.to(products) for image in tensors[:2])
    options = {"products": products, "strassen": strassen}
    y, exact, _ = both(tensors, (*[None] * 6, (1, 1), (2, 2)), **options)
    assert torch.equal(y, exact.to(products))


@pytest.mark.parametrize("strassen", [0, 1])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_slices(shape, strassen):
    """Images whose pixels or lines lie apart in memory; the result between channels of another."""
    tensors = case(*shape)
    expected, _, packed = both(tensors, shape, strassen=strassen)
    views = []
    for x in tensors[:2]:
        N, C, H, W = x.shape
        wide = torch.randn(N, C + 8, H + 1, W + 2).contiguous(memory_format=torch.channels_last)
        views.append(wide[:, 5:-3, 1:, 1:-1].copy_(x))
    N, K, H, W = expected.shape
    out = torch.randn(N, K + 7, H, W).contiguous(memory_format=torch.channels_last)
    before = out.clone(memory_format=torch.preserve_format)
    for x, other in (views, tensors[:2], [t.contiguous() for t in tensors[:2]]):
        part = out[:, 4:-3].zero_()
        assert conv_sum(x, other, packed, part) is part
        assert torch.equal(part, expected)
    assert torch.equal(out[:, :4], before[:, :4])
    assert torch.equal(out[:, -3:], before[:, -3:])


@pytest.mark.parametrize("strassen", [0, 1])
def test_same_bits_with_any_thread_count(strassen, threads):
    shape = (1, 64, 96, 65, 65, 128, (1, 1), (2, 2))
    tensors = case(*shape)
    threads(2)
    two, _, packed = both(tensors, shape, strassen=strassen)
    threads(1)
    assert torch.equal(conv_sum(*tensors[:2], packed), two)


def test_empty_batch():
    shape = (0, 64, 64, 5, 5, 64, (1, 1), (2, 2))
    assert both(case(*shape), shape)[0].shape == (0, 64, 5, 5)


def test_operator_registration():
    shape = (1, 64, 32, 6, 7, 64, (1, 1), (2, 2))
    tensors = case(*shape)
    y, _, packed = both(tensors, shape)
    opcheck(
        torch.ops.fastseg.conv_engine_sum.default,
        (*tensors[:2], 2, 2, packed.conv.packed, torch.empty_like(y), *packed.conv.options()[:-1]),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda x, other: conv_sum(x, other, packed) + 1, backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(*tensors[:2]), y + 1)


def test_errors():
    x, other, weight, other_weight, bias = case(1, 64, 48, 5, 5, 64, (1, 1), (2, 2))
    with pytest.raises(ValueError, match=r"weights must be .* got \(64, 64, 1, 1\) and \(32, 48,"):
        pack_conv_sum(weight, other_weight[:32])
    with pytest.raises(ValueError, match="weights must be"):
        pack_conv_sum(weight.expand(-1, -1, 3, 3), other_weight)
    with pytest.raises(ValueError, match="multiples of 32"):
        pack_conv_sum(weight, other_weight, strassen=1)
    packed = pack_conv_sum(weight, other_weight, bias, other_stride=(2, 2))
    with pytest.raises(ValueError, match=r"other must be \(N, 48, H, W\), got \(1, 64"):
        conv_sum(x, x, packed)
    with pytest.raises(ValueError, match="x must be"):
        conv_sum(x[0], other, packed)
    with pytest.raises(ValueError, match="does not have the size of the output"):
        conv_sum(x, other[:, :, :5], packed)
    with pytest.raises(ValueError, match="float32"):
        conv_sum(x, other.bfloat16(), packed)
    with pytest.raises(ValueError, match="no gradients"):
        conv_sum(x, other.requires_grad_(), packed)
    halves = pack_conv_sum(weight[:, :33], other_weight[:, :31], products=torch.bfloat16)
    images = x[:, :33].bfloat16(), other.detach()[:, :31, :5, :5].bfloat16()
    with pytest.raises(ValueError, match="multiples of 32 channels"):
        conv_sum(*images, halves)
    third = pack_conv_sum(weight[:, :48], other_weight[:, :16], strassen=1)
    with pytest.raises(ValueError, match="summands of multiples of 32 channels, got 48 and 16"):
        conv_sum(x[:, :48], other.detach()[:, :16, :5, :5], third)
