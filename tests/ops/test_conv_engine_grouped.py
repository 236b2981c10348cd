"""The engine's convolutions in groups, depthwise ones above all, and its activations, against torch
in float64."""

import pytest
import torch
from torch.library import opcheck

from fastseg import _C
from fastseg.ops.conv_choice import BF16_RATE, GROUPED, choose_algorithm, fits_vectors
from fastseg.ops.conv_engine import ACTIVATIONS, conv_engine, conv_engine_reference, pack_conv
from tests.conftest import assert_as_accurate

DEPTHWISE = [  # N, C, H, W, kernel, stride, padding, dilation
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
    (1, 56, 11, 31, (5, 5), (1, 1), (2, 2), (1, 1)),  # blocks of two vectors, and one behind them
    (2, 56, 9, 47, (5, 5), (2, 2), (2, 2), (1, 1)),
    (1, 56, 9, 47, (7, 7), (1, 1), (3, 3), (1, 1)),
    (1, 35, 7, 40, (7, 7), (1, 1), (6, 6), (2, 2)),
    (1, 35, 12, 40, (7, 7), (2, 2), (3, 3), (1, 1)),
    (1, 48, 151, 150, (3, 3), (1, 1), (1, 1), (1, 1)),  # results that pass the caches by
]
GROUPS = [  # and channels in, channels out of how many groups
    (1, 4, 4, 32, 17, 27, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 8, 8, 5, 10, 29, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 8, 8, 32, 9, 12, (3, 3), (1, 1), (2, 2), (2, 2)),
    (1, 16, 16, 3, 9, 31, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 24, 24, 4, 7, 14, (3, 3), (2, 1), (1, 1), (1, 2)),
    (1, 24, 24, 3, 8, 26, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 48, 48, 2, 6, 13, (5, 3), (1, 1), (2, 1), (1, 1)),
    (2, 1, 2, 21, 9, 15, (3, 3), (1, 1), (1, 1), (1, 1)),  # a depth multiplier
    (1, 1, 3, 17, 9, 15, (5, 5), (2, 2), (2, 2), (1, 1)),
    (1, 1, 40, 3, 9, 15, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 2, 2, 3, 5, 3, (3, 3), (1, 1), (3, 4), (1, 1)),  # fewer channels than lanes, than taps
    (1, 2, 4, 11, 8, 7, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 12, 12, 4, 6, 9, (2, 4), (2, 3), (1, 1), (2, 1)),
    (1, 40, 16, 3, 6, 20, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 70, 8, 2, 5, 6, (3, 3), (2, 2), (0, 1), (1, 1)),
    (1, 4, 4, 12, 151, 150, (3, 3), (1, 1), (1, 1), (1, 1)),  # results that pass the caches by
]
CASES = [(N, 1, 1, C, *rest) for N, C, *rest in DEPTHWISE] + GROUPS
BF16 = torch.bfloat16
PAIRED = [  # those whose pairs of channels fit, which bfloat16 products take
    *(shape for shape in GROUPS if fits_vectors(shape[3], shape[2], shape[1], BF16)),
    (1, 6, 6, 11, 9, 21, (3, 3), (1, 1), (1, 1), (1, 1)),  # vectors of three and four groups
    (1, 2, 2, 40, 9, 30, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 8, 4, 9, 7, 26, (5, 5), (1, 1), (2, 2), (1, 1)),
    (1, 32, 8, 4, 6, 15, (3, 3), (1, 1), (1, 1), (1, 1)),
]


def case(shape, dtype=torch.float32):
    N, C, K, groups, H, W, kernel, stride, padding, dilation = shape
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x = torch.randn(N, C * groups, H, W).contiguous(memory_format=torch.channels_last).to(dtype)
    weight, bias = torch.randn(K * groups, C, *kernel) / C**0.5, torch.randn(K * groups)
    return x, weight, bias, options


def fitting_tile(shape, products=torch.float32):
    _, C, K, groups, *_ = shape
    return GROUPED if fits_vectors(groups, K, C, products) else 0


def exact_result(x, weight, bias, residual=None, **options):
    double = (t if t is None else t.double() for t in (x, weight, bias, residual))
    return conv_engine_reference(*double, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_grouped(shape, activation, cpu_isa):
    x, weight, bias, options = case(shape)
    options |= {"activation": activation, "negative_slope": 0.2}
    exact = exact_result(x, weight, bias, **options)
    plain = conv_engine_reference(x, weight, bias, **options)
    y = conv_engine(x, pack_conv(weight, bias, tile=fitting_tile(shape), **options))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(y, plain, exact)


@pytest.mark.parametrize("residual_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_residual_slices_and_bfloat16(shape, dtype, residual_last, cpu_isa):
    N, C, _, groups, H, W, *_ = shape
    C *= groups
    tile = fitting_tile(shape)
    _, weight, bias, options = case(shape)
    options |= {"activation": "hardswish", "residual_last": residual_last}
    wide = torch.randn(N, C + 3, H + 1, W + 2).contiguous(memory_format=torch.channels_last)
    x = wide.to(dtype)[:, 2:-1, 1:, 1:-1]
    conv = pack_conv(weight, bias, tile=tile, **options)
    shape = exact_result(x, weight, bias, **options).shape
    residual = torch.randn(shape).to(dtype)
    exact = exact_result(x, weight, bias, residual, **options)
    K = shape[1]
    whole = torch.full((N, K + 5, *shape[2:]), 7.0, dtype=dtype)
    whole = whole.contiguous(memory_format=torch.channels_last)
    y = conv_engine(x, conv, residual, out=whole[:, 3 : K + 3])
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert (y - exact).abs().max() <= rounding * exact.abs().max()
    assert (whole[:, :3] == 7).all()  # nothing else is written
    assert (whole[:, K + 3 :] == 7).all()


@pytest.mark.parametrize("shape", PAIRED, ids=str)
def test_bfloat16_products(shape, cpu_isa):
    x, weight, bias, options = case(shape, BF16)
    weight = weight.to(BF16).float()
    options |= {"activation": "relu"}
    residual = torch.randn(exact_result(x, weight, bias, **options).shape).to(BF16)
    exact = exact_result(x, weight, bias, residual, **options)
    y = conv_engine(x, pack_conv(weight, bias, tile=GROUPED, products=BF16, **options), residual)
    assert (y - exact).abs().max() <= 2.0**-8 * exact.abs().max()


@pytest.mark.parametrize("products", [torch.float32, BF16])
@pytest.mark.parametrize("channels", [(4, 4, 12), (6, 6, 11), (24, 24, 3), (2, 2, 3)])
def test_groups_do_not_mix(channels, products, cpu_isa):
    """What is not a number in a group stays in it."""
    C, K, groups = channels
    shape = (1, *channels, 7, 25, (3, 3), (1, 1), (1, 1), (1, 1))
    x, weight, bias, options = case(shape, BF16)
    conv = pack_conv(weight, bias, tile=fitting_tile(shape, products), products=products, **options)
    clean = conv_engine(x, conv)
    for group in range(groups):
        broken = x.clone()
        broken[:, group * C : (group + 1) * C] = torch.nan
        y = conv_engine(broken, conv)
        expected = clean.clone()
        expected[:, group * K : (group + 1) * K] = torch.nan
        assert torch.equal(y.nan_to_num(7e3), expected.nan_to_num(7e3))


@pytest.mark.parametrize("tile", [0, 2, 4, GROUPED])
def test_other_algorithms_in_groups(tile, cpu_isa):
    """All that is computed group by group, with a residual over which the result is written."""
    for C, K, groups in ((16, 16, 4), (5, 3, 3), (20, 40, 2), (32, 64, 3)):
        if tile == GROUPED and not fits_vectors(groups, K, C):
            continue
        x, weight, bias, options = case((2, C, K, groups, 13, 19, (3, 3), (1, 1), (1, 1), (1, 1)))
        y = torch.randn(2, K * groups, 13, 19).contiguous(memory_format=torch.channels_last)
        exact = exact_result(x, weight, bias, y, **options)
        conv_engine(x, pack_conv(weight, bias, tile=tile, **options), y, out=y)
        assert (y - exact).abs().max() <= 1e-5 * exact.abs().max(), (C, K, groups)


def test_lines_in_groups(cpu_isa):
    x, weight, bias, options = case((1, 16, 16, 3, 9, 21, (1, 9), (1, 1), (0, 4), (1, 1)))
    y = conv_engine(x, pack_conv(weight, bias, tile=5, **options))
    exact = exact_result(x, weight, bias, **options)
    assert (y - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_fuzz(cpu_isa):
    generator = torch.Generator().manual_seed(7)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for i in range(600):  # half of them in float32
        kernel, stride = (draw(1, 7), draw(1, 7)), (draw(1, 3), draw(1, 3))
        dilation, padding = (draw(1, 4), draw(1, 4)), (draw(0, 6), draw(0, 6))
        axes = zip(dilation, kernel, padding, strict=True)
        least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in axes]
        size = [n + draw(0, 20) for n in least]
        channels = (1, 1, draw(1, 70))
        if i % 2:
            width = 2 ** draw(0, 5)
            channels = draw(1, 40), draw(1, 40), draw(1, 9)
            if draw(0, 1):
                channels = width, width, draw(1, 20)
        shape = (draw(1, 3), *channels, *size, kernel, stride, padding, dilation)
        products = (torch.float32, BF16)[draw(0, 1)]
        x, weight, bias, options = case(shape, products)
        weight = weight.to(products).float()
        tile = fitting_tile(shape, products)
        conv = pack_conv(weight, bias, tile=tile, products=products, **options)
        exact = exact_result(x, weight, bias, **options)
        largest = max(exact.abs().max(), 3 * weight[0].square().sum().sqrt())
        rounding = {torch.float32: 2e-6, BF16: 2.0**-8}[products]
        assert (conv_engine(x, conv) - exact).abs().max() <= rounding * largest, (shape, products)


@pytest.mark.parametrize("tile", [GROUPED, 0, 4])
@pytest.mark.parametrize("channels", [(1, 1, 200), (16, 16, 8), (64, 48, 2)])
def test_threads_agree(threads, channels, tile):
    x, weight, bias, options = case((2, *channels, 40, 30, (3, 3), (1, 1), (1, 1), (1, 1)))
    conv = pack_conv(weight, bias, tile=tile, **options)
    torch.set_num_threads(1)
    one = conv_engine(x, conv)
    torch.set_num_threads(3)
    assert torch.equal(conv_engine(x, conv), one)


def test_layouts_and_empty():
    x, weight, bias, options = case(CASES[0])
    conv = pack_conv(weight, bias, tile=GROUPED, **options)
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
    conv = pack_conv(torch.ones(16, 1, 1, 1), tile=GROUPED, groups=16, activation=activation)
    assert_as_accurate(
        conv_engine(x, conv),
        ACTIVATIONS[activation](x, 0.0),
        ACTIVATIONS[activation](x.double(), 0.0),
    )
    assert conv_engine(torch.full_like(x, torch.nan), conv).isnan().all()


def test_operator_registration():
    x, weight, bias, options = case(CASES[0])
    for tile in (0, 2, 4, GROUPED):
        pack = torch.ops.fastseg.conv_engine_pack.default
        opcheck(pack, (weight, bias, tile, False, 0, 32))
        for rounded in (False, True):
            opcheck(pack, (torch.randn(32, 4, 3, 3), bias, tile, rounded, 0, 8))
    conv = pack_conv(weight, bias, tile=GROUPED, activation="silu", **options)
    opcheck(torch.ops.fastseg.conv_engine.default, (x, conv.packed, None, 32, *conv.options()))
    compiled = torch.compile(lambda t: conv_engine(t, conv), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), conv_engine(x, conv))


def test_choice():
    def tile(groups, C, kernel=(3, 3), stride=(1, 1), **options):
        layer = (groups * C, groups * C, kernel, (40, 40), stride, (kernel[0] // 2,) * 2)
        return choose_algorithm(*layer, groups=groups, **options).tile

    assert tile(64, 1) == tile(32, 4) == tile(32, 8) == GROUPED
    assert tile(8, 32) == 6
    assert tile(8, 32, accuracy="strict") == 2
    assert tile(8, 16, stride=(2, 2)) == tile(8, 16, kernel=(5, 5)) == tile(8, 24) == GROUPED
    assert tile(8, 32, stride=(2, 2)) == tile(8, 32, kernel=(5, 5)) == 0
    assert tile(8, 6, kernel=(5, 5)) == 0  # vectors of three groups, 18 channels


@pytest.mark.parametrize("isa", BF16_RATE)
def test_choice_of_bfloat16_products(isa, monkeypatch):
    def choice(C, K, stride=(1, 1)):
        layer = (16 * C, 16 * K, (3, 3), (40, 40), stride, (1, 1))
        return choose_algorithm(*layer, groups=16, dtype=BF16)

    monkeypatch.setattr(_C, "cpu_isa", lambda: isa)
    monkeypatch.setattr(_C, "bf16_products", lambda: True)
    for C, K in ((4, 4), (6, 6), (16, 16), (24, 24), (64, 8)):
        assert choice(C, K) == choice(C, K, (2, 2)) == (GROUPED, BF16, 0)
    for C, K in ((1, 1), (1, 2), (3, 16)):
        assert choice(C, K) == (GROUPED, torch.float32, 0)
    assert choice(32, 32, (2, 2)) == (0, BF16, 0)
    monkeypatch.setattr(_C, "bf16_products", lambda: False)
    assert choice(24, 24) == (GROUPED, torch.float32, 0)


def test_errors():
    x, weight, bias, options = case(CASES[0])
    conv = pack_conv(weight, bias, tile=GROUPED, **options)
    with pytest.raises(ValueError, match=r"x must be \(N, 32, H, W\)"):
        conv_engine(x[:, :31], conv)
    with pytest.raises(ValueError, match="pairs, got 1 outputs and 1 channels in each of 32"):
        pack_conv(weight, tile=GROUPED, groups=32, products=BF16)
    with pytest.raises(ValueError, match="groups must divide the output channels, got 5 and 32"):
        pack_conv(weight, groups=5)
    with pytest.raises(ValueError, match="6 outputs and 6 channels in each of 4 groups"):
        pack_conv(torch.randn(24, 6, 3, 3), tile=GROUPED, groups=4)
    with pytest.raises(ValueError, match="groups must divide the channels, got 32 and 31"):
        torch.ops.fastseg.conv_engine(x[:, :31], conv.packed, None, 32, *conv.options())
    with pytest.raises(ValueError, match="packed for another convolution"):
        torch.ops.fastseg.conv_engine(x, conv.packed[:-1], None, 32, *conv.options())
