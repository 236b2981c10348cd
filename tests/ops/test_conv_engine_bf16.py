"""The engine's convolutions of bfloat16 images against torch in float64."""

import os
import random

import pytest
import torch
from torch.library import opcheck

from fastseg import _C
from fastseg.ops.conv_choice import BF16_RATE, GROUPED, choose_algorithm
from fastseg.ops.conv_engine import conv_engine, conv_engine_reference, pack_conv
from tests.conftest import assert_as_accurate
from tests.ops.test_conv_engine import (
    BORDERED_CASES,
    GEMM_CASES,
    LINE_CASES,
    PIECES_CASES,
    TRIPLE_CASES,
    WINOGRAD_CASES,
)

BF16 = torch.bfloat16
# Largest error over largest output that the accuracy policy allows, by tile, for products in
# bfloat16; those in float32 have the one of the result's rounding.
#
# A value rounded to bfloat16 is off by DELTA of itself, root mean square (uniformly by up to half a
# step; its mantissa log-uniform). Both operands of a product are, independently, so an output of
# y = A ((G w) * (B d)), for w and d of unit variance, is off by DELTA * sqrt(2) * GROWTH of the
# deviation of outputs, where along an axis, for output t and n taps that see the input,
#   GROWTH_t ** 2 = sum_p A[p, t] ** 2 |G[p]| ** 2 |B[p]| ** 2 / n.
# In large maps the largest error and the largest output are about the same number of deviations, so
# that is also their quotient; 1.3 times as much is allowed, to F(2, 3) as much. Bordered tiles, in
# which two of three taps see a pixel, grow more than F(2, 3): 4e-3 + 1.3 * 2.35e-3 * 2 = 1e-2.
ROUNDING = 4e-3  # half a step of the largest output's neighbours is 2e-3 to 4e-3 of it
ALLOWED = {0: ROUNDING, 1: 1e-2, 2: 8e-3, 3: 1e-2, 4: 2.5e-2, 5: 9.8e-3, 7: ROUNDING}
DELTA = 2**-7 * (0.541 / 12) ** 0.5  # 0.541: the mean of m ** -2 over mantissas m in [1, 2)
GROWTH = {1: 2.0, 2: 1.667, 4: 5.021, 5: 1.690}  # root mean square over a tile
WORST_GROWTH = {1: 2.0, 2: 1.667, 3: 2.0, 4: 7.125, 5: 1.917}  # at its worst output, see above


# Of Strassen's algorithm, sqrt(2) included: of the four blocks of a result two are sums of four
# products, whose operands are sums of one or two blocks.
STRASSEN_GROWTH = 10**0.5


def allowed(tile, products, strassen=0):
    if products != BF16:
        return ROUNDING
    return ROUNDING + 1.3 * DELTA * STRASSEN_GROWTH if strassen else ALLOWED[tile]


def largest_of_many(exact, weight, tile, products, slope=1.0):
    """The bound for any map of unit-variance data, also one of a few outputs that may all be small:
    the largest of a thousand million errors is six deviations. Sums of few channels have longer
    tails than the normal distribution; a negative slope beyond 1 makes errors larger too."""
    rounding = ROUNDING * exact.abs().max().item()
    response = max(1.0, abs(slope)) * weight[0].numel() ** 0.5
    if products == torch.float32 or tile in (0, GROUPED):
        return max(rounding, ROUNDING * response)
    deviations = 6 if weight.shape[1] >= 16 else 9
    return rounding + deviations * 2**0.5 * DELTA * WORST_GROWTH[tile] * response


def image(*shape):
    return torch.randn(shape).to(BF16, memory_format=torch.channels_last)


def case(N, C, H, W, K, kernel, **options):
    """Everything that is rounded for torch is rounded for the exact result as well."""
    x, weight, bias = image(N, C, H, W), torch.randn(K, C, *kernel).to(BF16), torch.randn(K)
    bias = bias.to(BF16).float()
    residual = image(*conv_engine_reference(x.float(), weight.float(), **options).shape)
    return x, weight.float(), bias, residual


def exact_result(x, weight, bias, residual, **options):
    double = (t if t is None else t.double() for t in (x, weight, bias, residual))
    return conv_engine_reference(*double, **options)


def check(tensors, tile, products, bound=None, **options):
    conv = pack_conv(*tensors[1:3], **options, tile=tile, products=products)
    y = conv_engine(tensors[0], conv, tensors[3])
    assert y.dtype == BF16
    exact = exact_result(*tensors, **options)
    if bound is None:
        largest = max(exact.abs().max().item(), tensors[1][0].numel() ** 0.5)  # few may be small
        bound = allowed(tile, products) * largest
    else:
        bound = bound(exact, tensors[1], tile, products)
    assert (y - exact).abs().max().item() <= bound


@pytest.fixture(params=[torch.float32, BF16], ids=["float32", "bfloat16"])
def products(request):
    return request.param


@pytest.fixture
def fast_products():
    """Sets whether bfloat16 products count as fast."""
    before = _C.bf16_products()
    yield _C.set_bf16_products
    _C.set_bf16_products(before)


@pytest.mark.parametrize(
    "shape", [*GEMM_CASES, (1, 96, 9, 11, 64, *[(1, 1)] * 2, (0, 0), (1, 1))], ids=str
)
def test_gemm(shape, products, cpu_isa):
    N, C, H, W, K, kernel, stride, padding, dilation = shape
    for activation in ("none", "relu", "leaky_relu"):
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        options["activation"] = activation
        check(case(N, C, H, W, K, kernel, **options), 0, products, **options)


@pytest.mark.parametrize("tile", [2, 4, 6])
@pytest.mark.parametrize("shape", [*WINOGRAD_CASES, *PIECES_CASES], ids=str)
def test_winograd(shape, tile, products, cpu_isa):
    if tile == 6 and products == BF16:
        pytest.skip("has no products in bfloat16")
    check_square(shape, tile, products)


@pytest.mark.parametrize("shape", [*BORDERED_CASES, PIECES_CASES[1]], ids=str)
def test_bordered(shape, products, cpu_isa):
    check_square(shape, 1, products)


@pytest.mark.parametrize("shape", TRIPLE_CASES, ids=str)
def test_bordered_triple(shape, products, cpu_isa):
    check_square(shape, 3, products)


def check_square(shape, tile, products):
    N, C, H, W, K, padding, dilation = shape
    options = {"padding": padding, "dilation": dilation, "activation": "relu"}
    check(case(N, C, H, W, K, (3, 3), **options), tile, products, **options)


@pytest.mark.parametrize("vertical", [True, False])
@pytest.mark.parametrize("shape", LINE_CASES, ids=str)
def test_line(shape, vertical, products, cpu_isa):
    N, C, H, W, K, taps, padding = shape
    if not vertical:
        H, W = W, H
    kernel = (taps, 1) if vertical else (1, taps)
    options = {"padding": (padding, 0) if vertical else (0, padding), "activation": "leaky_relu"}
    check(case(N, C, H, W, K, kernel, **options), 5, products, **options)


@pytest.mark.parametrize("tile", GROWTH)
def test_rounded_products_have_the_error_of_their_rounding(tile, cpu_isa):
    """The derivation above, by the root mean square error, whose value does not scatter."""
    d = (12, 12) if tile == 1 else (1, 1)
    options = {"padding": d, "dilation": d} if tile != 5 else {}
    kernel, height = ((3, 3), 24) if tile != 5 else ((15, 1), 38)  # 24 outputs that see all taps
    x, weight = image(1, 128, height, 24), torch.randn(96, 128, *kernel)
    conv = pack_conv(weight, None, **options, tile=tile, products=BF16)
    exact = exact_result(x, weight, None, None, **options)
    error = (conv_engine(x, conv) - exact).square().mean().sqrt()
    rounding = (exact.to(BF16) - exact).square().mean()
    grown = 2 * (DELTA * GROWTH[tile]) ** 2 * exact.square().mean()
    assert 0.93 < error / (rounding + grown).sqrt() < 1.07
    assert ALLOWED[tile] <= ROUNDING + 1.3 * 2**0.5 * DELTA * WORST_GROWTH[tile]


def random_case(rng):
    """A convolution of random shape, and an algorithm that computes it."""
    N, C, K = rng.randint(1, 3), rng.choice([1, 3, 16, 31, 32, 33, 64, 96]), rng.randint(1, 70)
    H, W = rng.randint(1, 25), rng.randint(1, 25)
    products = rng.choice([torch.float32, BF16])
    options = {"activation": rng.choice(["none", "relu", "leaky_relu"]), "negative_slope": 0.2}
    if rng.random() < 0.5:
        tile = rng.choice([1, 2, 3, 4] if products == BF16 else [1, 2, 3, 4, 6])
        C = max(C, 16) if products == BF16 else C  # the bounds are those of sums of many terms
        kernel, stride = (3, 3), (1, 1)
        dilation = rng.randint(1, 9), rng.randint(1, 9)
        if tile in (1, 3):
            padding, most = dilation, max(tile, 2)
            H, W = min(H, most * dilation[0]), min(W, most * dilation[1])
        else:
            padding = rng.randint(0, 9), rng.randint(0, 9)
    elif rng.random() < 0.3:
        tile, k = 5, rng.randint(2, 16)
        C = max(C, 16) if products == BF16 else C
        kernel = rng.choice([(k, 1), (1, k)])
        stride = dilation = (1, 1)
        pad = rng.randint(0, k)
        padding = (pad, 0) if kernel[1] == 1 else (0, pad)
    else:
        tile = 0
        kernel, stride = (rng.randint(1, 7), rng.randint(1, 7)), (rng.randint(1, 3),) * 2
        padding, dilation = (rng.randint(0, 4), rng.randint(0, 4)), (rng.randint(1, 3),) * 2
    H = max(H, dilation[0] * (kernel[0] - 1) + 1 - 2 * padding[0])
    W = max(W, dilation[1] * (kernel[1] - 1) + 1 - 2 * padding[1])
    options |= {"stride": stride, "padding": padding, "dilation": dilation}
    return (N, C, H, W, K, kernel), tile, products, options


@pytest.mark.parametrize("seed", range(int(os.environ.get("FASTSEG_FUZZ_CASES", "60"))))
def test_random_shapes(seed):
    shape, tile, products, options = random_case(random.Random(seed))
    tensors = case(*shape, **options)
    if seed % 3 == 0:
        tensors = (tensors[0].contiguous(), *tensors[1:])
    check(tensors, tile, products, largest_of_many, **options)


@pytest.mark.parametrize(
    ("C", "K", "kernel", "stride"),
    [(2048, 128, 1, 1), (64, 128, 1, 1), (3, 48, 7, 2), (1, 32, 5, 1), (6, 32, 5, 1)],
)
def test_how_pixels_are_read(C, K, kernel, stride, products, cpu_isa):
    """Pixels 4 KB apart, by the wide tile, and kernel rows of less than a line of channels."""
    options = {"padding": (kernel // 2,) * 2, "stride": (stride,) * 2, "activation": "relu"}
    tensors = case(2, C, 11, 23, K, (kernel, kernel), **options)
    before = _C.kernel_counts().get("conv_engine.wide", 0)
    check(tensors, 0, products, **options)
    wide = _C.kernel_counts().get("conv_engine.wide", 0) > before
    assert wide == (C == 64 and products == BF16 and cpu_isa == "avx512_bf16")


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("fast", [False, True])
def test_strict_is_as_accurate_as_torch(kernel, fast, fast_products, cpu_isa):
    fast_products(fast)
    options = {"padding": (kernel[0] // 2,) * 2}
    x, weight, bias, _ = case(1, 96, 24, 23, 64, kernel, **options)
    chosen = choose_algorithm(96, 64, kernel, (24, 23), **options, dtype=BF16, accuracy="strict")
    direct = kernel == (1, 1) or cpu_isa == "amx"
    rounded = fast and direct and cpu_isa in BF16_RATE
    assert chosen.products == (BF16 if rounded else torch.float32)
    y = conv_engine(x, pack_conv(weight, bias, **options, **chosen._asdict()))
    plain = conv_engine_reference(x, weight.to(BF16), bias.to(BF16), **options)
    exact = exact_result(x, weight, bias, None, **options)
    # Both round the exact sums but for some 1e-6 of them, so they may differ by as much.
    error = (y.double() - exact).abs().max()
    assert error <= (plain.double() - exact).abs().max() + 1e-5 * exact.abs().max()


def test_float32_weights_are_not_rounded():
    """The result is nearer to that of the float32 weights than torch's with rounded ones."""
    x, weight = image(1, 256, 20, 20), torch.randn(64, 256, 3, 3)
    options = {"padding": (1, 1)}
    exact = exact_result(x, weight, None, None, **options)
    y = conv_engine(x, pack_conv(weight, **options, tile=4))
    plain = conv_engine_reference(x, weight.to(BF16), **options)
    assert_as_accurate(y, plain, exact, factor=1.0)
    ours, theirs = (((t.double() - exact) ** 2).mean().item() for t in (y, plain))
    assert ours < 0.6 * theirs  # the result is rounded in both, the weights in one


@pytest.mark.parametrize("tile", [0, 4])
def test_layouts(tile, products):
    options = {"padding": (1, 1), "activation": "relu"}
    x, weight, bias, residual = case(2, 32, 9, 10, 64, (3, 3), **options)
    conv = pack_conv(weight, bias, **options, tile=tile, products=products)
    y = conv_engine(x, conv, residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv_engine(x.contiguous(), conv, residual.contiguous()), y)
    wide = image(2, 70, 9, 10)
    before = wide.clone()
    wide[:, 3:35] = x  # a slice of channels as input, another as output
    assert torch.equal(conv_engine(wide[:, 3:35], conv, residual), y)
    out = before.clone(memory_format=torch.preserve_format)
    assert conv_engine(x, conv, residual, out=out[:, 5:69]).data_ptr() == out[:, 5:69].data_ptr()
    assert torch.equal(out[:, 5:69], y)
    assert torch.equal(out[:, :5], before[:, :5])
    assert torch.equal(out[:, 69:], before[:, 69:])


@pytest.mark.parametrize("tile", [0, 4])
def test_streamed_output(tile, products, cpu_isa):
    """Outputs of several MB take another kind of store."""
    options = {"padding": (1, 1), "activation": "relu"}
    x, weight, bias, _ = case(1, 16, 190, 191, 64, (3, 3), **options)
    check((x, weight, bias, None), tile, products, **options)


@pytest.mark.parametrize("tile", [0, 4])
def test_same_bits_with_any_thread_count(tile, products, threads):
    options = {"padding": (2, 2), "dilation": (2, 2)}
    x, weight, bias, residual = case(1, 64, 33, 31, 96, (3, 3), **options)
    conv = pack_conv(weight, bias, **options, tile=tile, products=products)
    threads(2)
    two = conv_engine(x, conv, residual)
    assert torch.equal(conv_engine(x, conv, residual), two)
    threads(1)
    assert torch.equal(conv_engine(x, conv, residual), two)


@pytest.mark.parametrize("tile", [0, 4])
def test_empty_batch_and_special_values(tile, products, cpu_isa):
    conv = pack_conv(
        torch.ones(40, 16, 3, 3), padding=(1, 1), activation="relu", tile=tile, products=products
    )
    assert conv_engine(torch.randn(0, 16, 5, 5).to(BF16), conv).shape == (0, 40, 5, 5)
    assert conv_engine(torch.full((1, 16, 5, 5), float("nan"), dtype=BF16), conv).isnan().all()


def test_infinities_and_rounding(cpu_isa):
    """One input channel, one tap: the result is the input, and sums round to nearest even."""
    inf = float("inf")
    values = [inf, -inf, 1.0, -0.0, 3.3895e38, 2.0**-130, -2.0]
    x = torch.tensor(values).to(BF16).view(1, 1, 1, -1)
    assert torch.equal(conv_engine(x, pack_conv(torch.ones(1, 1, 1, 1))), x)
    relu = conv_engine(x, pack_conv(torch.ones(1, 1, 1, 1), activation="relu"))
    assert torch.equal(relu, x.relu())
    # 16 columns take the vector's way to memory, one that of single values.
    bias = torch.tensor([2.0**-8, 3 * 2.0**-8, 2.0**-8 + 2.0**-20, 3.4e38] * 4 + [2.0**-8])
    one = torch.ones(1, 1, 1, 1, dtype=BF16)
    y = conv_engine(one, pack_conv(torch.ones(17, 1, 1, 1), bias))
    assert torch.equal(y.flatten(), (1 + bias).to(BF16))


def test_choice(fast_products, monkeypatch):
    def choice(C, K, kernel=(3, 3), size=(65, 65), **options):
        tile, products, _ = choose_algorithm(C, K, kernel, size, **options, dtype=BF16)
        return tile, "bfloat16" if products == BF16 else "float32"

    monkeypatch.setattr(_C, "cpu_isa", lambda: "avx512_bf16")
    same = {"padding": (1, 1)}
    large = {"padding": (12, 12), "dilation": (12, 12)}
    line = {"kernel": (15, 1), "padding": (7, 0)}
    fast_products(False)
    assert choice(512, 512, **same) == choice(512, 512, **same, accuracy="strict")
    assert choice(512, 512, **same) == (6, "float32")
    assert choice(2048, 256, **large) == (6, "float32")
    assert choice(64, 64, (1, 1)) == (0, "float32")
    assert choice(256, 21, **line) == (5, "float32")
    fast_products(True)
    for accuracy in ("default", "fast"):
        assert choice(512, 512, **same, accuracy=accuracy) == (4, "bfloat16")
        assert choice(64, 64, **same, accuracy=accuracy) == (4, "bfloat16")
        assert choice(256, 21, **line, accuracy=accuracy) == (5, "bfloat16")
    for accuracy in ("strict", "maxima"):
        assert choice(512, 512, **same, accuracy=accuracy) == (6, "float32")
        assert choice(256, 21, **line, accuracy=accuracy) == (5, "float32")
        assert choice(64, 64, (3, 1), padding=(1, 0), accuracy=accuracy) == (0, "bfloat16")
    assert choice(512, 512, size=(8, 8), **same, accuracy="maxima") == (2, "bfloat16")
    assert choice(64, 64, (1, 1)) == (0, "bfloat16")
    assert choice(64, 64, (1, 1), accuracy="strict") == (0, "bfloat16")
    assert choice(21, 21, **line) == (5, "float32")
    assert choice(3, 32, **same, size=(257, 257)) == (0, "bfloat16")
    assert choice(3, 64, **same, size=(257, 257)) == (0, "bfloat16")
    assert choice(24, 16, **same) == (0, "bfloat16")
    assert choice(24, 32, **same) == (4, "bfloat16")
    assert choice(16, 64, **same) == (6, "float32")
    assert choice(2048, 256, padding=(36, 36), dilation=(36, 36)) == (1, "bfloat16")
    # With AMX nearly all are direct: as accurate as torch's own.
    monkeypatch.setattr(_C, "cpu_isa", lambda: "amx")
    for accuracy in ("default", "strict"):
        assert choice(64, 64, (1, 1), accuracy=accuracy) == (0, "bfloat16")
        assert choice(512, 512, **same, accuracy=accuracy) == (0, "bfloat16")
        assert choice(64, 64, size=(8, 8), **same, accuracy=accuracy) == (0, "bfloat16")
        assert choice(2048, 256, **large, accuracy=accuracy) == (0, "bfloat16")
        assert choice(256, 21, **line, accuracy=accuracy) == (0, "bfloat16")
    large = {"padding": (36, 36), "dilation": (36, 36)}
    assert choice(2048, 256, **large) == (1, "bfloat16")
    assert choice(2048, 256, **large, accuracy="strict") == (0, "bfloat16")
    assert choice(64, 64, **same, accuracy="fast") == (0, "bfloat16")
    assert choice(512, 512, **same, accuracy="fast") == (4, "bfloat16")
    fast_products(False)
    assert choice(512, 512, **same) == (6, "float32")


def test_registration_of_packed_lines(products):
    opcheck(
        torch.ops.fastseg.conv_engine_pack.default,
        (torch.randn(21, 40, 13, 1), None, 5, products == BF16),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("tile", [0, 4])
def test_operator_registration(tile, products):
    tests = ("test_schema", "test_faketensor")  # an inference op: no gradient to test
    weight, dots = torch.randn(8, 17, 3, 3), products == BF16
    opcheck(
        torch.ops.fastseg.conv_engine_pack.default, (weight, None, tile, dots), test_utils=tests
    )
    x, conv = image(1, 17, 6, 7), pack_conv(weight, padding=(1, 1), tile=tile, products=products)
    options = (3, 3, 1, 1, 1, 1, 1, 1, tile, 0, 0.0)
    opcheck(
        torch.ops.fastseg.conv_engine.default, (x, conv.packed, None, 8, *options), test_utils=tests
    )
    out = image(1, 8, 6, 7)
    opcheck(
        torch.ops.fastseg.conv_engine_out.default,
        (x, conv.packed, None, out, *options),
        test_utils=tests,
    )


def test_compiles(products):
    conv = pack_conv(torch.randn(24, 16, 3, 3), padding=(1, 1), tile=4, products=products)
    x = torch.randn(1, 16, 9, 9).to(BF16)
    compiled = torch.compile(
        lambda t: conv_engine(t, conv) + 1, backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(x), conv_engine(x, conv) + 1)


def test_errors():
    weight, x = torch.randn(8, 16, 3, 3), image(1, 16, 5, 5)
    with pytest.raises(ValueError, match="products must be float32 or bfloat16"):
        pack_conv(weight, products=torch.float16)
    with pytest.raises(ValueError, match="6 not of bfloat16 products, got 6"):
        pack_conv(weight, tile=6, products=BF16)
    with pytest.raises(ValueError, match="1 outputs and 1 channels in each of 16 groups"):
        pack_conv(torch.randn(16, 1, 3, 3), tile=7, products=BF16, groups=16)
    with pytest.raises(ValueError, match="bfloat16 products need a bfloat16 image"):
        conv_engine(x.float(), pack_conv(weight, products=BF16))
    with pytest.raises(ValueError, match="residual must be a bfloat16 image"):
        conv_engine(x, pack_conv(weight), torch.randn(1, 8, 3, 3))
    with pytest.raises(ValueError, match="out must be a bfloat16 image"):
        conv_engine(x, pack_conv(weight), out=torch.empty(1, 3, 3, 8).permute(0, 3, 1, 2))
