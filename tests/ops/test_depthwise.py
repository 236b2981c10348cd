"""The engine's depthwise convolutions, and its activations, against torch in float64."""

import pytest
import torch
from torch.library import opcheck

from fastseg.ops.conv_choice import DEPTHWISE
from fastseg.ops.conv_engine import ACTIVATIONS, conv_engine, conv_engine_reference, pack_conv
from tests.conftest import assert_as_accurate

CASES = [  # N, C, H, W, kernel, stride, padding, dilation
    (1, 32, 17, 19, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 48, 30, 29, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 17, 9, 40, (5, 5), (1, 1), (2, 2), (1, 1)),
    (1, 100, 12, 13, (5, 5), (2, 2), (2, 2), (1, 1)),
    (1, 64, 11, 13, (3, 3), (1, 1), (12, 12), (12, 12)),  # taps that no pixel has
    (2, 3, 5, 4, (3, 3), (1, 1), (6, 7), (3, 2)),  # lines that read padding alone
    (1, 1, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 33, 7, 30, (1, 7), (1, 3), (0, 5), (1, 2)),
    (1, 20, 8, 9, (2, 4), (3, 1), (0, 0), (1, 1)),
    (1, 40, 6, 5, (1, 1), (2, 2), (0, 0), (1, 1)),
    (1, 16, 3, 30, (3, 9), (1, 1), (1, 4), (1, 1)),
]


def case(shape, dtype=torch.float32):
    N, C, H, W, kernel, stride, padding, dilation = shape
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    x = torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last).to(dtype)
    weight, bias = torch.randn(C, 1, *kernel), torch.randn(C)
    return x, weight, bias, options


def exact_result(x, weight, bias, residual=None, **options):
    double = (t if t is None else t.double() for t in (x, weight, bias, residual))
    return conv_engine_reference(*double, groups=x.shape[1], **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_depthwise(shape, activation, cpu_isa):
    x, weight, bias, options = case(shape)
    options |= {"activation": activation, "negative_slope": 0.2}
    exact = exact_result(x, weight, bias, **options)
    plain = conv_engine_reference(x, weight, bias, groups=x.shape[1], **options)
    y = conv_engine(x, pack_conv(weight, bias, tile=DEPTHWISE, **options))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(y, plain, exact)


@pytest.mark.parametrize("residual_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_residual_slices_and_bfloat16(shape, dtype, residual_last, cpu_isa):
    N, C, H, W, *_ = shape
    _, weight, bias, options = case(shape)
    options |= {"activation": "hardswish", "residual_last": residual_last}
    wide = torch.randn(N, C + 3, H + 1, W + 2).contiguous(memory_format=torch.channels_last)
    x = wide.to(dtype)[:, 2:-1, 1:, 1:-1]
    conv = pack_conv(weight, bias, tile=DEPTHWISE, **options)
    shape = exact_result(x, weight, bias, **options).shape
    residual = torch.randn(shape).to(dtype)
    exact = exact_result(x, weight, bias, residual, **options)
    whole = torch.full((N, C + 5, *shape[2:]), 7.0, dtype=dtype)
    whole = whole.contiguous(memory_format=torch.channels_last)
    y = conv_engine(x, conv, residual, out=whole[:, 3 : C + 3])
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert (y - exact).abs().max() <= rounding * exact.abs().max()
    assert (whole[:, :3] == 7).all()  # nothing else is written
    assert (whole[:, C + 3 :] == 7).all()


def test_fuzz(cpu_isa):
    generator = torch.Generator().manual_seed(7)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(150):
        kernel, stride = (draw(1, 5), draw(1, 5)), (draw(1, 3), draw(1, 3))
        dilation, padding = (draw(1, 4), draw(1, 4)), (draw(0, 6), draw(0, 6))
        axes = zip(dilation, kernel, padding, strict=True)
        least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in axes]
        size = [n + draw(0, 20) for n in least]
        x, weight, bias, options = case(
            (draw(1, 3), draw(1, 70), *size, kernel, stride, padding, dilation)
        )
        y = conv_engine(x, pack_conv(weight, bias, tile=DEPTHWISE, **options))
        exact = exact_result(x, weight, bias, **options)
        assert (y - exact).abs().max() <= 1e-6 * exact.abs().max(), (x.shape, options)


def test_threads_agree(threads):
    x, weight, bias, options = case((2, 200, 40, 30, (3, 3), (1, 1), (1, 1), (1, 1)))
    conv = pack_conv(weight, bias, tile=DEPTHWISE, **options)
    torch.set_num_threads(1)
    one = conv_engine(x, conv)
    torch.set_num_threads(3)
    assert torch.equal(conv_engine(x, conv), one)


def test_layouts_and_empty():
    x, weight, bias, options = case(CASES[0])
    conv = pack_conv(weight, bias, tile=DEPTHWISE, **options)
    assert torch.equal(conv_engine(x.contiguous(), conv), conv_engine(x, conv))
    assert conv_engine(x[:0], conv).shape == (0, *x.shape[1:])


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[3:])
@pytest.mark.parametrize("tile", [0, 4])
@pytest.mark.parametrize("channels", [(16, 64), (16, 40), (40, 3)])  # the last: no register tile
def test_activations_of_other_algorithms(channels, tile, activation, cpu_isa):
    C, K = channels
    x = torch.randn(1, C, 15, 17).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(K, C, 3, 3) / 3, torch.randn(K)
    options = {"padding": (1, 1), "activation": activation}
    y = conv_engine(x, pack_conv(weight, bias, tile=tile, **options))
    exact = conv_engine_reference(x.double(), weight.double(), bias.double(), **options)
    assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[3:])
def test_activations_at_the_ends(activation, cpu_isa):
    values = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([0.0, -3.0, 3.0, 6.0, 1e30])])
    x = values.view(-1, 1, 1, 1).expand(-1, 16, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    conv = pack_conv(torch.ones(16, 1, 1, 1), tile=DEPTHWISE, activation=activation)
    assert_as_accurate(
        conv_engine(x, conv),
        ACTIVATIONS[activation](x, 0.0),
        ACTIVATIONS[activation](x.double(), 0.0),
    )
    assert conv_engine(torch.full_like(x, torch.nan), conv).isnan().all()


def test_operator_registration():
    x, weight, bias, options = case(CASES[0])
    opcheck(torch.ops.fastseg.conv_engine_pack.default, (weight, bias, DEPTHWISE))
    conv = pack_conv(weight, bias, tile=DEPTHWISE, activation="silu", **options)
    opcheck(torch.ops.fastseg.conv_engine.default, (x, conv.packed, None, 32, *conv.options()))
    compiled = torch.compile(lambda t: conv_engine(t, conv), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), conv_engine(x, conv))


def test_errors():
    x, weight, bias, options = case(CASES[0])
    with pytest.raises(ValueError, match="depthwise weights have one channel, got 2"):
        pack_conv(torch.randn(8, 2, 3, 3), tile=DEPTHWISE)
    conv = pack_conv(weight, bias, tile=DEPTHWISE, **options)
    with pytest.raises(ValueError, match=r"x must be \(N, 32, H, W\)"):
        conv_engine(x[:, :31], conv)
    with pytest.raises(ValueError, match="tile 7 has float32 products alone"):
        pack_conv(weight, tile=DEPTHWISE, products=torch.bfloat16)
    with pytest.raises(ValueError, match="as many outputs as channels, got 32 and 31"):
        torch.ops.fastseg.conv_engine(x[:, :31], conv.packed, None, 32, *conv.options())
