"""Transposed convolutions by phases against torch in float64."""

import pytest
import torch
from torch.library import opcheck

from fastseg.ops.conv_transposed import (
    conv_transposed,
    conv_transposed_reference,
    pack_conv_transposed,
)
from tests.conftest import assert_as_accurate

CASES = [  # N, C, H, W, K, kernel, stride, padding, output_padding
    (1, 64, 9, 11, 32, (2, 2), (2, 2), (0, 0), (0, 0)),  # U-Net
    (2, 40, 8, 15, 24, (4, 4), (2, 2), (1, 1), (0, 0)),  # Linknet
    (1, 32, 7, 20, 16, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 21, 5, 6, 21, (16, 16), (8, 8), (4, 4), (0, 0)),  # FCN
    (1, 20, 9, 30, 33, (2, 2), (2, 2), (0, 0), (1, 1)),  # pixels that no tap reaches
    (1, 16, 17, 16, 16, (3, 3), (1, 1), (0, 0), (0, 0)),
    (1, 16, 17, 16, 5, (2, 2), (2, 2), (1, 1), (0, 0)),  # phases that skip the first pixel
    (1, 24, 6, 7, 40, (5, 2), (3, 1), (4, 0), (2, 0)),
    (3, 16, 1, 1, 8, (3, 4), (2, 3), (0, 1), (0, 1)),
    (1, 3, 12, 40, 64, (3, 3), (2, 2), (0, 0), (1, 0)),
    (2, 16, 9, 17, 48, (4, 4), (4, 4), (0, 1), (0, 2)),  # columns of phases joined, all or three
    (1, 8, 33, 130, 64, (4, 4), (2, 2), (1, 1), (0, 0)),  # past the caches
]


def case(shape, dtype=torch.float32):
    N, C, H, W, K, kernel, stride, padding, output_padding = shape
    options = {"stride": stride, "padding": padding, "output_padding": output_padding}
    x = torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last).to(dtype)
    return x, torch.randn(C, K, *kernel) / 4, torch.randn(K), options


def double(*tensors):
    return (t.double() for t in tensors)


@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_transposed(shape, activation, cpu_isa):
    x, weight, bias, options = case(shape)
    options |= {"activation": activation}
    exact = conv_transposed_reference(*double(x, weight, bias), **options)
    plain = conv_transposed_reference(x, weight, bias, **options)
    y = conv_transposed(x, pack_conv_transposed(weight, bias, **options))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(y, plain, exact, factor=4)  # sums of 64 terms in another order


@pytest.mark.parametrize("residual_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_residual_slices_and_bfloat16(shape, dtype, residual_last, cpu_isa):
    N, C, H, W, K, *_ = shape
    _, weight, bias, options = case(shape)
    options |= {"activation": "relu", "residual_last": residual_last}
    wide = torch.randn(N, C + 3, H + 1, W + 2).contiguous(memory_format=torch.channels_last)
    x = wide.to(dtype)[:, 2:-1, 1:, 1:-1]
    conv = pack_conv_transposed(weight, bias, **options)
    size = conv.output_size(x.shape[2:])
    residual = torch.randn(N, K, *size).to(dtype)
    exact = conv_transposed_reference(*double(x, weight, bias, residual), **options)
    whole = torch.full((N, K + 5, *size), 7.0, dtype=dtype)
    whole = whole.contiguous(memory_format=torch.channels_last)
    y = conv_transposed(x, conv, residual, out=whole[:, 3 : K + 3])
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert (y - exact).abs().max() <= rounding * exact.abs().max()
    assert (whole[:, :3] == 7).all()
    assert (whole[:, K + 3 :] == 7).all()


def test_fuzz():
    generator = torch.Generator().manual_seed(11)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(150):
        stride = (draw(1, 4), draw(1, 4))
        kernel = (draw(stride[0], 7), draw(stride[1], 7))
        padding = tuple(draw(0, k - 1) for k in kernel)
        output_padding = tuple(draw(0, s - 1) for s in stride)
        least = [-(-2 * p // s) + 1 for p, s in zip(padding, stride, strict=True)]
        size = [n + draw(0, 20) for n in least]
        shape = (draw(1, 3), draw(1, 40), *size, draw(1, 40), kernel, stride, padding)
        x, weight, bias, options = case((*shape, output_padding))
        y = conv_transposed(x, pack_conv_transposed(weight, bias, **options))
        exact = conv_transposed_reference(*double(x, weight, bias), **options)
        assert y.shape == exact.shape
        assert (y - exact).abs().max() <= 2e-6 * exact.abs().max(), (shape, output_padding)


def test_layouts_empty_and_threads(threads):
    x, weight, bias, options = case(CASES[1])
    conv = pack_conv_transposed(weight, bias, **options)
    torch.set_num_threads(1)
    y = conv_transposed(x, conv)
    torch.set_num_threads(3)
    assert torch.equal(conv_transposed(x.contiguous(), conv), y)
    assert conv_transposed(x[:0], conv).shape == (0, *y.shape[1:])


def test_operator_registration():
    x, weight, bias, options = case(CASES[0])
    conv = pack_conv_transposed(weight, bias, activation="relu", **options)
    out = conv_transposed(x, conv)
    geometry = (*conv.kernel_size, *conv.stride, *conv.padding, 1, 0.01)
    opcheck(
        torch.ops.fastseg.conv_transposed_out.default,
        (x, conv.packed, None, torch.empty_like(out), *geometry),
    )
    compiled = torch.compile(
        lambda t: conv_transposed(t, conv), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), out)


def test_errors():
    x, weight, bias, options = case(CASES[0])
    with pytest.raises(ValueError, match=r"weight must be \(C, K, R, S\), got \(8, 8, 3\)"):
        pack_conv_transposed(torch.randn(8, 8, 3))
    with pytest.raises(ValueError, match="at least as large as the stride"):
        pack_conv_transposed(weight, stride=(3, 2))
    conv = pack_conv_transposed(weight, bias, **options)
    with pytest.raises(ValueError, match=r"x must be \(N, 64, H, W\)"):
        conv_transposed(x[:, :31], conv)
    with pytest.raises(ValueError, match="out must be"):
        conv_transposed(x, conv, out=torch.empty(1, 32, 3, 3))
    with pytest.raises(ValueError, match="packed for another convolution"):
        torch.ops.fastseg.conv_transposed_out(
            x,
            conv.packed[1:],
            None,
            torch.empty(1, 32, 18, 22).contiguous(memory_format=torch.channels_last),
            2,
            2,
            2,
            2,
            0,
            0,
            0,
            0.0,
        )
