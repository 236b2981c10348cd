"""The engine's convolutions against torch in float64, for every algorithm and instruction set."""

import pytest
import torch
from torch.library import opcheck

from fastseg.ops.conv_choice import choose_tile
from fastseg.ops.conv_engine import conv_engine, conv_engine_reference, pack_conv, pack_matrix
from tests.conftest import assert_as_accurate

# Largest error over largest output that the accuracy policy allows, unit-variance data.
ALLOWED = {0: 1e-6, 1: 1e-6, 2: 1e-6, 3: 1e-6, 4: 4e-6, 5: 5e-6, 6: 1e-5, 7: 2e-6}


def relative_error(y, exact):
    return ((y - exact).abs().max() / exact.abs().max()).item()


def case(N, C, H, W, K, kernel, **options):
    x = torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(K, C, *kernel)
    bias = torch.randn(K)
    shape = conv_engine_reference(x, weight, **options).shape
    residual = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return x, weight, bias, residual


def exact_result(x, weight, bias, residual, **options):
    double = (t if t is None else t.double() for t in (x, weight, bias, residual))
    return conv_engine_reference(*double, **options)


GEMM_CASES = [  # N, C, H, W, K, kernel, stride, padding, dilation
    (1, 64, 17, 19, 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 48, 9, 11, 40, (1, 1), (2, 2), (0, 0), (1, 1)),
    (1, 3, 29, 31, 21, (7, 7), (2, 2), (3, 3), (1, 1)),
    (2, 20, 13, 7, 50, (3, 3), (2, 1), (1, 0), (1, 2)),
    (1, 17, 8, 9, 1, (1, 5), (1, 1), (0, 2), (1, 1)),
    (1, 512, 2, 3, 96, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 1024, 5, 9, 21, (1, 1), (1, 1), (0, 0), (1, 1)),  # 4 KB from pixel to pixel
    (2, 512, 9, 35, 24, (3, 3), (2, 2), (1, 1), (1, 1)),  # and from one that is read to the next
    (1, 512, 5, 40, 40, (1, 1), (1, 2), (0, 0), (1, 1)),
    (3, 5, 1, 1, 33, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 289, 14, 9, 40, (6, 4), (1, 3), (6, 2), (2, 2)),  # 6936 terms
    (2, 3, 40, 37, 32, (3, 3), (2, 2), (1, 1), (1, 1)),  # several blocks a line
    (1, 7, 3, 33, 33, (5, 3), (1, 1), (9, 4), (2, 3)),  # lines that read padding alone
    (1, 400, 5, 30, 40, (3, 3), (2, 2), (1, 1), (1, 1)),  # runs of pixels that lie apart
    (1, 1100, 3, 40, 36, (1, 3), (1, 1), (0, 1), (1, 1)),
    (1, 600, 3, 30, 36, (1, 3), (1, 1), (0, 2), (1, 2)),
]
WINOGRAD_CASES = [  # N, C, H, W, K, padding, dilation
    (1, 64, 21, 23, 64, (1, 1), (1, 1)),
    (2, 32, 21, 18, 48, (2, 2), (2, 2)),
    (1, 20, 7, 5, 17, (4, 4), (4, 4)),
    (1, 40, 13, 9, 33, (12, 6), (12, 6)),  # a dilation larger than the image
    (3, 16, 4, 4, 16, (1, 1), (1, 1)),
    (1, 19, 30, 3, 70, (0, 3), (3, 1)),
    (1, 512, 17, 17, 32, (2, 2), (2, 2)),
]


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", GEMM_CASES, ids=str)
def test_gemm(shape, activation, cpu_isa):
    N, C, H, W, K, kernel, stride, padding, dilation = shape
    options = {"stride": stride, "padding": padding, "dilation": dilation, "activation": activation}
    tensors = case(N, C, H, W, K, kernel, **options)
    conv = pack_conv(*tensors[1:3], **options, tile=0)
    exact = exact_result(*tensors, **options)
    assert relative_error(conv_engine(tensors[0], conv, tensors[3]), exact) <= ALLOWED[0]


@pytest.mark.parametrize("shape", GEMM_CASES, ids=str)
def test_gemm_of_slices(shape, cpu_isa):
    """Images whose pixels or lines lie apart in memory."""
    N, C, H, W, K, kernel, stride, padding, dilation = shape
    options = {"stride": stride, "padding": padding, "dilation": dilation, "activation": "relu"}
    _, weight, bias, _ = case(N, C, H, W, K, kernel, **options)
    x = torch.randn(N, C + 3, H + 1, W + 2).contiguous(memory_format=torch.channels_last)
    conv = pack_conv(weight, bias, **options, tile=0)
    for view in (x[:, 2:-1, 1:, 1:-1], x[:, 1:-2, :-1, :-2]):
        exact = exact_result(view, weight, bias, None, **options)
        assert relative_error(conv_engine(view, conv), exact) <= ALLOWED[0]


BORDERED_CASES = [
    (1, 24, 10, 13, 40, (8, 9), (8, 9)),
    (2, 16, 5, 4, 17, (5, 2), (5, 2)),
    (1, 20, 1, 1, 16, (1, 1), (1, 1)),
]
TRIPLE_CASES = [  # sub-grids of up to three pixels
    (1, 24, 10, 13, 40, (4, 5), (4, 5)),
    (2, 16, 9, 4, 17, (3, 3), (3, 3)),
    (1, 20, 7, 20, 16, (6, 7), (6, 7)),
    (3, 17, 1, 2, 33, (1, 1), (1, 1)),
]
# More channels than are summed at once.
PIECES_CASES = [(1, 1040, 9, 8, 40, (3, 3), (3, 3)), (1, 1030, 3, 2, 8, (2, 2), (2, 2))]


@pytest.mark.parametrize("tile", [2, 4, 6])
@pytest.mark.parametrize("shape", [*WINOGRAD_CASES, *PIECES_CASES], ids=str)
def test_winograd(shape, tile, cpu_isa):
    check_tile(shape, tile)


@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("tile", [2, 4, 6])
def test_winograd_of_slices(tile, dilation, cpu_isa):
    """Tiles inside and at the border of images whose pixels and lines lie apart in memory."""
    options = {"padding": dilation, "dilation": dilation, "activation": "relu"}
    tensors = case(3, 37, 27, 25, 48, (3, 3), **options)
    conv = pack_conv(*tensors[1:3], **options, tile=tile)

    def between_nan(t):
        N, C, H, W = t.shape
        wide = torch.full((N, C + 9, H + 2, W + 3), torch.nan)
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 5:-4, 1:-1, 2:-1] = t
        return wide, wide[:, 5:-4, 1:-1, 2:-1]

    (_, x), (_, residual), (wide, y) = map(between_nan, (tensors[0], tensors[3], tensors[3]))
    conv_engine(x, conv, residual, out=y)
    assert relative_error(y, exact_result(*tensors, **options)) <= ALLOWED[tile]
    y[:] = torch.nan
    assert wide.isnan().all()


@pytest.mark.parametrize("shape", [*BORDERED_CASES, PIECES_CASES[1]], ids=str)
def test_bordered(shape, cpu_isa):
    check_tile(shape, 1)
    check_tile(shape, 3)


@pytest.mark.parametrize("shape", TRIPLE_CASES, ids=str)
def test_bordered_triple(shape, cpu_isa):
    check_tile(shape, 3)


@pytest.mark.parametrize("tile", [2, 4, 6])
def test_every_length_of_a_sub_grid(tile):
    """Every way to cut one: only long tiles, both, only short ones, one that reaches over."""
    for length in range(1, 15):
        check_tile((1, 32, length, 15 - length, 32, (1, 1), (1, 1)), tile)
        check_tile((2, 16, 2 * length, 2 * length + 1, 32, (2, 2), (2, 2)), tile)


LINE_CASES = [  # N, C, H, W, K, taps, padding
    (1, 64, 23, 19, 21, 15, 7),
    (2, 20, 16, 17, 21, 7, 3),
    (1, 24, 9, 31, 40, 9, 0),
    (3, 16, 5, 4, 3, 15, 7),
    (1, 256, 30, 15, 21, 11, 5),
    (1, 17, 40, 2, 33, 3, 1),
]


@pytest.mark.parametrize("vertical", [True, False])
@pytest.mark.parametrize("shape", LINE_CASES, ids=str)
def test_line(shape, vertical, cpu_isa):
    N, C, H, W, K, taps, padding = shape
    if not vertical:
        H, W = W, H
    kernel = (taps, 1) if vertical else (1, taps)
    options = {"padding": (padding, 0) if vertical else (0, padding), "activation": "leaky_relu"}
    tensors = case(N, C, H, W, K, kernel, **options)
    conv = pack_conv(*tensors[1:3], **options, tile=5)
    exact = exact_result(*tensors, **options)
    assert relative_error(conv_engine(tensors[0], conv, tensors[3]), exact) <= ALLOWED[5]


@pytest.mark.parametrize(("rate", "tile"), [(6, 6), (12, 6), (18, 4), (24, 3), (36, 1)])
def test_branch_of_aspp(rate, tile, threads):
    """The algorithm that is chosen for 2048 channels, on several tasks with tiles of all shapes."""
    options = {"padding": (rate, rate), "dilation": (rate, rate), "activation": "relu"}
    tensors = case(1, 2048, 65, 65, 32, (3, 3), **options)
    assert tile == choose_tile(2048, 256, (3, 3), (65, 65), (1, 1), *[(rate, rate)] * 2)
    conv = pack_conv(*tensors[1:3], **options, tile=tile)
    threads(2)
    y = conv_engine(tensors[0], conv, tensors[3])
    assert relative_error(y, exact_result(*tensors, **options)) <= ALLOWED[tile]
    threads(1)
    assert torch.equal(conv_engine(tensors[0], conv, tensors[3]), y)


@pytest.mark.slow
def test_pieces_of_many_tasks():
    check_tile((1, 2048, 161, 163, 32, (1, 1), (1, 1)), 4)


def check_tile(shape, tile):
    N, C, H, W, K, padding, dilation = shape
    options = {"padding": padding, "dilation": dilation, "activation": "relu"}
    tensors = case(N, C, H, W, K, (3, 3), **options)
    conv = pack_conv(*tensors[1:3], **options, tile=tile)
    exact = exact_result(*tensors, **options)
    assert relative_error(conv_engine(tensors[0], conv, tensors[3]), exact) <= ALLOWED[tile]


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 8)])
def test_strict_is_as_accurate_as_torch(kernel, dilation, cpu_isa):
    padding = (kernel // 2 * dilation,) * 2
    options = {"padding": padding, "dilation": (dilation,) * 2}
    tile = choose_tile(96, 64, (kernel,) * 2, (24, 23), **options, accuracy="strict")
    assert tile == {(1, 1): 0, (3, 1): 2, (3, 8): 3}[kernel, dilation]
    options["activation"] = "none"
    x, weight, bias, residual = case(1, 96, 24, 23, 64, (kernel,) * 2, **options)
    conv = pack_conv(weight, bias, **options, tile=tile)
    plain = conv_engine_reference(x, weight, bias, residual, **options)
    exact = exact_result(x, weight, bias, residual, **options)
    assert_as_accurate(conv_engine(x, conv, residual), plain, exact, factor=1.0)


@pytest.mark.parametrize("tile", [0, 4])
def test_layouts(tile):
    options = {"padding": (1, 1), "activation": "relu"}
    x, weight, bias, residual = case(2, 32, 9, 10, 64, (3, 3), **options)
    conv = pack_conv(weight, bias, **options, tile=tile)
    y = conv_engine(x, conv, residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv_engine(x.contiguous(), conv, residual.contiguous()), y)
    wide = torch.randn(2, 70, 9, 10).contiguous(memory_format=torch.channels_last)
    before = wide.clone()
    wide[:, 3:35] = x  # a slice of channels as input, another as output
    assert torch.equal(conv_engine(wide[:, 3:35], conv, residual), y)
    out = before.clone(memory_format=torch.preserve_format)
    assert conv_engine(x, conv, residual, out=out[:, 5:69]).data_ptr() == out[:, 5:69].data_ptr()
    assert torch.equal(out[:, 5:69], y)
    assert torch.equal(out[:, :5], before[:, :5])
    assert torch.equal(out[:, 69:], before[:, 69:])


@pytest.mark.parametrize("tile", [0, 4])
def test_streamed_output(tile):
    """Outputs of several MB take another kind of store."""
    options = {"padding": (1, 1), "activation": "relu"}
    x, weight, bias, _ = case(1, 16, 150, 151, 64, (3, 3), **options)
    y = conv_engine(x, pack_conv(weight, bias, **options, tile=tile))
    assert relative_error(y, exact_result(x, weight, bias, None, **options)) <= ALLOWED[tile]


@pytest.mark.parametrize("tile", [0, 2, 4, 6])
def test_same_bits_with_any_thread_count(tile, threads):
    options = {"padding": (2, 2), "dilation": (2, 2)}
    x, weight, bias, residual = case(1, 64, 33, 31, 96, (3, 3), **options)
    conv = pack_conv(weight, bias, **options, tile=tile)
    threads(2)
    two = conv_engine(x, conv, residual)
    assert torch.equal(conv_engine(x, conv, residual), two)
    threads(1)
    assert torch.equal(conv_engine(x, conv, residual), two)


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "tile"),
    [(24, 128, (4, 5), 4), (24, 121, (9, 5), 2), (16, 64, (6, 3), 3), (512, 192, (13, 17), 6)],
)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_threads_that_share_the_weights(channels, outputs, size, tile, count, cpu_isa, threads):
    """Too few tiles for the registers of each, or more weights than stay in the caches."""
    options = {"padding": (2, 2), "dilation": (2, 2), "activation": "relu"}
    x, weight, bias, residual = case(1, channels, *size, outputs, (3, 3), **options)
    conv = pack_conv(weight, bias, **options, tile=tile)
    threads(1)
    one = conv_engine(x, conv, residual)
    assert relative_error(one, exact_result(x, weight, bias, residual, **options)) <= ALLOWED[tile]
    threads(count)
    assert torch.equal(conv_engine(x, conv, residual), one)


@pytest.mark.parametrize("tile", [0, 4])
def test_empty_batch_and_special_values(tile):
    conv = pack_conv(torch.ones(16, 16, 3, 3), padding=(1, 1), activation="relu", tile=tile)
    assert conv_engine(torch.randn(0, 16, 5, 5), conv).shape == (0, 16, 5, 5)
    y = conv_engine(torch.full((1, 16, 5, 5), float("nan")), conv)
    assert y.isnan().all()


def test_relu_of_minus_infinity_is_zero():
    conv = pack_conv(torch.ones(16, 16, 1, 1), activation="relu")
    x = torch.full((1, 16, 3, 3), float("-inf"))
    assert (conv_engine(x, conv) == 0).all()


def test_choice():
    def choice(C, K, kernel=(3, 3), size=(65, 65), **options):
        return choose_tile(C, K, kernel, size, **options)

    assert choice(64, 64, padding=(1, 1)) == 6
    assert choice(512, 512, padding=(4, 4), dilation=(4, 4)) == 6
    assert choice(64, 64, padding=(1, 1), accuracy="strict") == 2
    assert choice(64, 64, padding=(1, 1), accuracy="maxima") == 4
    assert choice(64, 64, stride=(2, 2)) == 0
    assert choice(64, 64, kernel=(1, 1)) == 0
    assert choice(3, 64) == 0
    assert choice(2048, 256, padding=(1, 1)) == 6
    assert choice(2048, 256, padding=(6, 6), dilation=(6, 6)) == 6
    assert choice(512, 256, padding=(6, 6), dilation=(6, 6)) == 6
    assert choice(512, 512, padding=(1, 1), size=(28, 28)) == 4  # weights count as well
    assert choice(2048, 256, padding=(12, 12), dilation=(12, 12), size=(33, 33)) == 3
    # Sub-grids smaller than a tile of four, which would be mostly waste.
    assert choice(2048, 256, padding=(36, 36), dilation=(36, 36)) == 1
    assert choice(2048, 256, padding=(24, 24), dilation=(24, 24)) == 3
    assert choice(2048, 256, padding=(20, 20), dilation=(20, 20)) == 4
    assert choice(2048, 256, padding=(18, 18), dilation=(18, 18)) == 4
    assert choice(2048, 256, padding=(12, 12), dilation=(12, 12)) == 6
    assert choice(2048, 256, padding=(0, 0), dilation=(36, 36), size=(73, 73)) == 0
    assert choice(64, 64, size=(2, 2)) == 0  # too small for the kernel
    assert choice(256, 21, kernel=(15, 1), padding=(7, 0)) == 5
    assert choice(256, 21, kernel=(1, 7), padding=(0, 3)) == 5
    assert choice(256, 21, kernel=(1, 7), padding=(1, 3)) == 0
    assert choice(256, 21, kernel=(15, 1), padding=(7, 0), accuracy="strict") == 0


def test_operator_registration():
    x = torch.randn(1, 16, 6, 7).contiguous(memory_format=torch.channels_last)
    conv = pack_conv(torch.randn(8, 16, 3, 3), padding=(1, 1), tile=4)
    options = (3, 3, 1, 1, 1, 1, 1, 1, conv.tile, 0, 0.0)
    tests = ("test_schema", "test_faketensor")  # an inference op: no gradient to test
    opcheck(
        torch.ops.fastseg.conv_engine.default, (x, conv.packed, None, 8, *options), test_utils=tests
    )
    out = torch.empty_like(x[:, :8]).contiguous(memory_format=torch.channels_last)
    opcheck(
        torch.ops.fastseg.conv_engine_out.default,
        (x, conv.packed, None, out, *options),
        test_utils=tests,
    )
    for tile, kernel in ((0, (3, 3)), (4, (3, 3)), (1, (3, 3)), (3, (3, 3)), (5, (7, 1))):
        weight = torch.randn(8, 17, *kernel)
        opcheck(torch.ops.fastseg.conv_engine_pack.default, (weight, None, tile), test_utils=tests)


def test_compiles():
    conv = pack_conv(torch.randn(24, 16, 3, 3), padding=(1, 1), activation="relu", tile=4)
    x = torch.randn(1, 16, 9, 9)
    compiled = torch.compile(
        lambda t: conv_engine(t, conv) + 1, backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(x), conv_engine(x, conv) + 1)


def test_errors():
    weight = torch.randn(8, 16, 3, 3)
    with pytest.raises(ValueError, match=r"weight must be \(K, C, R, S\) float32"):
        pack_conv(weight.double())
    with pytest.raises(ValueError, match="bias must have 8 elements"):
        pack_conv(weight, torch.zeros(9))
    with pytest.raises(ValueError, match="activation must be one of"):
        pack_conv(weight, activation="swish")
    with pytest.raises(ValueError, match="Winograd tiles need a 3x3 kernel"):
        pack_conv(torch.randn(8, 16, 1, 1), tile=4)
    with pytest.raises(ValueError, match="tile must be 0"):
        pack_conv(weight, tile=9)
    with pytest.raises(ValueError, match="tile 5 needs a k x 1 or 1 x k kernel"):
        pack_conv(weight, tile=5)
    conv = pack_conv(torch.randn(8, 16, 7, 1), padding=(3, 1), tile=5)
    with pytest.raises(ValueError, match="padding along the kernel alone"):
        conv_engine(torch.randn(1, 16, 5, 5), conv)
    bordered = pack_conv(weight, padding=(2, 2), dilation=(2, 2), tile=1)
    with pytest.raises(ValueError, match="sub-grids of at most 2 pixels, got 5x5 at dilation 2x2"):
        conv_engine(torch.randn(1, 16, 5, 5), bordered)
    conv = pack_conv(weight)
    with pytest.raises(ValueError, match=r"x must be \(N, 16, H, W\)"):
        conv_engine(torch.randn(1, 8, 5, 5), conv)
    with pytest.raises(ValueError, match="computes no gradients"):
        conv_engine(torch.randn(1, 16, 5, 5, requires_grad=True), conv)
    with pytest.raises(ValueError, match="the padded input has only 2"):
        conv_engine(torch.randn(1, 16, 2, 5), conv)
    with pytest.raises(ValueError, match="residual must have the shape of the output"):
        conv_engine(torch.randn(1, 16, 5, 5), conv, torch.randn(1, 8, 5, 5))
    with pytest.raises(ValueError, match="must be a float32 image"):
        conv_engine(torch.randn(1, 16, 5, 5).double(), conv)
    with pytest.raises(ValueError, match="out does not have the size"):
        conv_engine(torch.randn(1, 16, 5, 5), conv, out=torch.empty(1, 5, 5, 8).permute(0, 3, 1, 2))


@pytest.mark.parametrize("tile", [0, 2, 4, 6])
@pytest.mark.parametrize("K", [1, 5, 21, 64])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_residual_behind_the_activation(tile, K, activation, cpu_isa):
    options = {"padding": (1, 1), "activation": activation, "residual_last": True}
    tensors = case(2, 32, 13, 11, K, (3, 3), **options)
    exact = exact_result(*tensors, **options)
    y = conv_engine(tensors[0], pack_conv(*tensors[1:3], **options, tile=tile), tensors[3])
    assert relative_error(y, exact) <= ALLOWED[tile]
    without = conv_engine(tensors[0], pack_conv(*tensors[1:3], **options, tile=tile))
    plain = exact_result(*tensors[:3], None, **options)
    assert relative_error(without, plain) <= ALLOWED[tile]


NARROW_CASES = [  # N, C, H, W, K, kernel, stride, padding, dilation
    (1, 64, 20, 23, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 19, 9, 7, 8, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 2048, 5, 6, 3, (3, 3), (2, 1), (6, 6), (6, 6)),
    (3, 16, 8, 9, 5, (5, 2), (1, 2), (2, 0), (1, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", NARROW_CASES, ids=str)
def test_few_output_channels(shape, dtype, cpu_isa, threads):
    N, C, H, W, K, kernel, stride, padding, dilation = shape
    options = {"stride": stride, "padding": padding, "dilation": dilation, "activation": "relu"}
    x, weight, bias, residual = case(N, C, H, W, K, kernel, **options)
    x, residual = x.to(dtype), residual.to(dtype)
    conv = pack_conv(weight, bias, **options)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(conv_engine(x, conv, residual))
    assert torch.equal(*results)
    exact = exact_result(x, weight, bias, residual, **options)
    if dtype == torch.bfloat16:  # rounded once
        assert torch.allclose(results[0].double(), exact, rtol=2**-8, atol=1e-5 * exact.abs().max())
    else:
        assert relative_error(results[0], exact) <= ALLOWED[0]


def test_pack_matrix():
    for C, K in ((5, 40), (16, 64), (33, 7)):
        matrix = torch.randn(C, K)
        assert torch.equal(pack_matrix(matrix).packed, pack_conv(matrix.T[..., None, None]).packed)
