"""1x1 convolutions of few input channels and whole pairs of panels against torch in float64."""

import pytest
import torch

from fastseg import _C
from fastseg.ops.conv_engine import conv_engine, pack_conv
from fastseg.ops.conv_sum import conv_sum, pack_conv_sum
from tests.ops.test_conv_engine import ALLOWED, case, exact_result, relative_error

CASES = [  # N, C, H, W, K
    (1, 64, 17, 19, 256),  # blocks of four tiles, and a tile of five rows
    (2, 40, 5, 7, 192),  # no whole group of channels, blocks that reach over two images
    (1, 8, 5, 5, 64),
    (3, 512, 3, 3, 128),
    (1, 128, 1, 41, 64),
    (4, 64, 7, 1, 128),
    (27, 16, 1, 1, 64),
]


def packed(shape, **options):
    N, C, H, W, K = shape
    tensors = case(N, C, H, W, K, (1, 1), **options)
    return tensors, pack_conv(*tensors[1:3], **options)


@pytest.mark.skipif("avx512" not in _C.supported_cpu_isas(), reason="the tile is AVX-512's")
@pytest.mark.parametrize(
    ("shape", "strassen"), [*((shape, 0) for shape in CASES), ((1, 256, 12, 12, 256), 1)], ids=str
)
def test_which_tile(shape, strassen):
    x, weight, bias, residual = case(*shape, (1, 1))
    conv = pack_conv(weight, bias, strassen=strassen)
    _C.reset_kernel_counts()
    conv_engine(x, conv, residual)
    assert _C.kernel_counts()["conv_engine.wide_strassen" if strassen else "conv_engine.wide"] == 1


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_products(shape, activation, cpu_isa):
    tensors, conv = packed(shape, activation=activation)
    exact = exact_result(*tensors, activation=activation)
    assert relative_error(conv_engine(tensors[0], conv, tensors[3]), exact) <= ALLOWED[0]
    exact = exact_result(*tensors[:3], None, activation=activation)
    assert relative_error(conv_engine(tensors[0], conv), exact) <= ALLOWED[0]


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_slices(shape):
    """The result between channels of another image, and images whose lines lie apart: same bits."""
    (x, _, _, residual), conv = packed(shape, activation="relu")
    expected = conv_engine(x, conv, residual)
    N, K, H, W = residual.shape
    out = torch.randn(N, K + 7, H, W).contiguous(memory_format=torch.channels_last)
    before = out.clone(memory_format=torch.preserve_format)
    conv_engine(x, conv, residual, out=out[:, 4:-3])
    assert torch.equal(out[:, 4:-3], expected)
    assert torch.equal(out[:, :4], before[:, :4])
    assert torch.equal(out[:, -3:], before[:, -3:])

    def padded(t):
        wide = torch.randn(N, t.shape[1], H + 1, W + 2).contiguous(
            memory_format=torch.channels_last
        )
        wide[:, :, 1:, 1:-1] = t
        return wide[:, :, 1:, 1:-1]

    assert torch.equal(conv_engine(padded(x), conv, residual), expected)
    assert torch.equal(conv_engine(x, conv, padded(residual)), expected)
    out = padded(residual)
    assert torch.equal(conv_engine(x, conv, out, out=out), expected)


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_written_over_the_residual(shape, threads):
    (x, _, _, residual), conv = packed(shape, activation="relu")
    expected = conv_engine(x, conv, residual)
    for count in (1, 2):
        threads(count)
        out = residual.clone(memory_format=torch.preserve_format)
        assert torch.equal(conv_engine(x, conv, out, out=out), expected)


def test_added_behind_the_activation():
    tensors, conv = packed(CASES[0], activation="relu", residual_last=True)
    exact = exact_result(*tensors, activation="relu", residual_last=True)
    assert relative_error(conv_engine(tensors[0], conv, tensors[3]), exact) <= ALLOWED[0]


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_infinite_and_nan(activation):
    """Each pixel has its own: they reach no other, and an activation keeps NaN."""
    (x, weight, bias, residual), conv = packed(CASES[0], activation=activation)
    for i, value in enumerate((float("inf"), -float("inf"), float("nan"))):
        residual[0, :, i, 3 * i] = value
    y = conv_engine(x, conv, residual)
    exact = exact_result(x, weight, bias, residual, activation=activation)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_two_images_and_one_after_the_other():
    """A sum of two convolutions is one whose residual is the other."""
    x, weight, bias, _ = case(2, 64, 9, 11, 128, (1, 1))
    other, other_weight, _, _ = case(2, 24, 9, 11, 128, (1, 1))
    y = conv_sum(x, other, pack_conv_sum(weight, other_weight, bias, activation="relu"))
    first = exact_result(x, weight, bias, None)
    exact = exact_result(other, other_weight, None, first, activation="relu")
    assert relative_error(y, exact) <= ALLOWED[0]
