"""Strassen's algorithm in the engine's products against torch in float64."""

import pytest
import torch
from torch.library import opcheck

from fastseg import _C
from fastseg.nn.packed import PackedConv2d
from fastseg.ops.conv_choice import choose_algorithm
from fastseg.ops.conv_engine import ACTIVATIONS, conv_engine, conv_engine_reference, pack_conv
from tests.ops.test_conv_engine import case, exact_result, relative_error
from tests.ops.test_conv_engine_bf16 import DELTA, ROUNDING, STRASSEN_GROWTH, allowed, image

ALLOWED = 2e-6  # largest error over largest output that the accuracy policy allows
CASES = [  # N, C, H, W, K, stride
    (1, 256, 17, 19, 128, (1, 1)),
    (1, 64, 1, 1, 64, (1, 1)),  # no lower block
    (2, 32, 3, 9, 192, (1, 1)),  # two blocks of unequal rows on AVX-512
    (3, 96, 11, 5, 64, (1, 1)),  # blocks that reach over two images
    (1, 2080, 6, 7, 64, (1, 1)),
    (2, 64, 9, 12, 128, (2, 3)),
    (2, 64, 25, 24, 128, (2, 3)),  # from here on many pixels and pairs of two panels
    (1, 2080, 11, 13, 256, (1, 1)),
    (5, 96, 7, 9, 384, (1, 1)),
]


def packed(shape, products=torch.float32, **options):
    N, C, H, W, K, stride = shape
    options = {"stride": stride, "activation": "relu", **options}
    tensors = [t.to(products) for t in case(N, C, H, W, K, (1, 1), **options)]
    weight, bias = (t.float() for t in tensors[1:3])
    conv = pack_conv(weight, bias, **options, products=products, strassen=1)
    return tensors, conv, options


PRODUCTS = pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("residual_last", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_products(shape, activation, residual_last, cpu_isa):
    tensors, conv, options = packed(shape, activation=activation, residual_last=residual_last)
    y = conv_engine(tensors[0], conv, tensors[3])
    assert relative_error(y, exact_result(*tensors, **options)) <= ALLOWED
    exact = exact_result(*tensors[:3], None, **options)
    assert relative_error(conv_engine(tensors[0], conv), exact) <= ALLOWED


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, cpu_isa):
    """Whatever follows the sums, these are the same."""
    x, weight, bias, _ = case(1, 256, 17, 19, 128, (1, 1))
    sums = conv_engine(x, pack_conv(weight, bias, strassen=1))
    y = conv_engine(x, pack_conv(weight, bias, activation=activation, strassen=1))
    bound = 1e-6 * sums.abs().max().item()  # the bias may be added first or last
    torch.testing.assert_close(y, ACTIVATIONS[activation](sums, 0.01), rtol=1e-6, atol=bound)


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_bfloat16_images(shape, cpu_isa):
    """Multiplied in float32 and rounded once."""
    (x, weight, bias, residual), conv, options = packed(shape)
    x, residual = x.bfloat16(), residual.bfloat16()
    y, exact = conv_engine(x, conv, residual), exact_result(x, weight, bias, residual, **options)
    assert torch.allclose(y.double(), exact, rtol=2**-8, atol=ALLOWED * exact.abs().max())


@pytest.mark.parametrize("residual_last", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_bfloat16_products(shape, activation, residual_last, cpu_isa):
    """Sums of operands are rounded, too."""
    options = {"activation": activation, "residual_last": residual_last}
    (x, weight, bias, residual), conv, options = packed(shape, torch.bfloat16, **options)
    for added in residual, None:
        y = conv_engine(x, conv, added)
        assert y.dtype == torch.bfloat16
        exact = exact_result(x, weight, bias, added, **options)
        # Small maps may have small outputs alone: six deviations of their error.
        response = x.shape[1] ** 0.5
        bound = ROUNDING * exact.abs().max() + 6 * DELTA * STRASSEN_GROWTH * response
        assert (y.double() - exact).abs().max() <= bound


def test_error_of_bfloat16_products():
    (x, weight, bias, _), conv, options = packed((1, 1024, 33, 33, 256, (1, 1)), torch.bfloat16)
    exact = exact_result(x, weight, bias, None, **options)
    assert relative_error(conv_engine(x, conv), exact) <= allowed(0, torch.bfloat16, strassen=1)


@PRODUCTS
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_slices(shape, products):
    """Images whose pixels or lines lie apart in memory; the result between channels of another."""
    (x, _, _, residual), conv, _ = packed(shape, products)
    expected = conv_engine(x, conv, residual)
    N, C, H, W = x.shape
    wide = image(N, C + 8, H + 1, W + 2).to(products)
    wide[:, 5:-3, 1:, 1:-1] = x
    K = residual.shape[1]
    out = image(N, K + 7, *residual.shape[2:]).to(products)
    before = out.clone(memory_format=torch.preserve_format)
    conv_engine(wide[:, 5:-3, 1:, 1:-1], conv, residual, out=out[:, 4:-3])
    assert torch.equal(out[:, 4:-3], expected)
    assert torch.equal(out[:, :4], before[:, :4])
    assert torch.equal(out[:, -3:], before[:, -3:])
    assert torch.equal(conv_engine(x.contiguous(), conv, residual.contiguous()), expected)
    _, _, Ho, Wo = residual.shape
    out = image(N, K, Ho + 1, Wo + 2).to(products)
    conv_engine(x, conv, residual, out=out[:, :, 1:, 1:-1])
    assert torch.equal(out[:, :, 1:, 1:-1], expected)


@PRODUCTS
def test_written_over_the_residual(products):
    shape = (1, 64, 130, 131, 128, (1, 1))  # large enough to stream
    (x, _, _, residual), conv, _ = packed(shape, products)
    expected = conv_engine(x, conv, residual)
    out = residual.clone(memory_format=torch.preserve_format)
    assert torch.equal(conv_engine(x, conv, out, out=out), expected)


@PRODUCTS
@pytest.mark.parametrize("shape", [(1, 64, 65, 65, 128, (1, 1)), (1, 512, 9, 9, 1024, (1, 1))])
def test_same_bits_with_any_thread_count(shape, products, threads):
    (x, _, _, residual), conv, _ = packed(shape, products)
    threads(2)
    two = conv_engine(x, conv, residual)
    assert torch.equal(conv_engine(x, conv, residual), two)
    threads(1)
    assert torch.equal(conv_engine(x, conv, residual), two)


def test_empty_batch():
    (x, _, _, _), conv, _ = packed((1, 64, 5, 5, 64, (1, 1)))
    assert conv_engine(x[:0], conv).shape == (0, 64, 5, 5)


@PRODUCTS
def test_integers_are_exact(products, cpu_isa):
    """Products and sums of small integers do not round, so every one of the seven must be right."""
    x = torch.randint(-8, 9, (1, 128, 13, 15)).float().contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-8, 9, (192, 128, 1, 1)).float()
    expected = conv_engine_reference(x, weight).to(products)
    conv = pack_conv(weight, products=products, strassen=1)
    assert torch.equal(conv_engine(x.to(products), conv), expected)


def test_choice(monkeypatch):
    def choice(C, K, kernel=(1, 1), size=(65, 65), **options):
        return choose_algorithm(C, K, kernel, size, **options).strassen

    assert choice(256, 256) == choice(2048, 512) == choice(512, 2048, size=(8, 8)) == 1
    assert choice(256, 512, stride=(2, 2)) == 1
    assert choice(128, 512) == choice(512, 128) == 0  # the sums cost as much as they save
    assert choice(512, 2048, size=(7, 7)) == 0  # slower
    assert choice(512, 2048, size=(1, 1)) == 0  # no lower block
    for isa, levels in (("avx2", 0), ("avx512", 1), ("avx512_bf16", 1), ("amx", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(_C, "cpu_isa", lambda isa=isa: isa)
            assert choice(2048, 256) == levels  # without the wide tile little of L2 is left
            assert choice(1024, 256) == 1
    assert choice(1000, 256) == choice(256, 272) == 0  # no whole halves
    assert choice(256, 256, padding=(1, 1)) == choice(256, 256, kernel=(3, 3)) == 0
    assert choice(256, 256, accuracy="strict") == choice(256, 256, dtype=torch.bfloat16) == 0
    monkeypatch.setattr(_C, "bf16_products", lambda: False)
    assert choice(1024, 256, dtype=torch.bfloat16) == 1
    monkeypatch.setattr(_C, "bf16_products", lambda: True)
    for isa, levels in (("avx512_bf16", 1), ("amx", 0)):
        monkeypatch.setattr(_C, "cpu_isa", lambda isa=isa: isa)
        assert choice(1024, 256, dtype=torch.bfloat16) == levels
    monkeypatch.setattr(_C, "cpu_isa", lambda: "avx512_bf16")
    for accuracy, levels in (("fast", 1), ("strict", 0), ("maxima", 0)):
        assert choice(2048, 512, dtype=torch.bfloat16, accuracy=accuracy) == levels
    assert choice(512, 256, dtype=torch.bfloat16) == choice(256, 1024, dtype=torch.bfloat16) == 0
    assert choice(2048, 512, size=(13, 14), dtype=torch.bfloat16) == 0


@pytest.mark.parametrize("accuracy", ["default", "strict"])
def test_chosen_by_the_layer(accuracy):
    layer = PackedConv2d(torch.nn.Conv2d(256, 256, 1), accuracy=accuracy)
    x = torch.randn(1, 256, 9, 11).contiguous(memory_format=torch.channels_last)
    assert layer.prepare(x)[0].strassen == (accuracy == "default")
    exact = conv_engine_reference(x.double(), layer.weight.double(), layer.bias.double())
    assert relative_error(layer(x), exact) <= ALLOWED
    assert layer.prepare(x[:, :, :5, :5])[0].strassen == 0


def test_not_a_number_reaches_the_partner_alone():
    """Pixels are paired in blocks of at most 28: those further away do not see it."""
    x = torch.randn(1, 256, 20, 20).contiguous(memory_format=torch.channels_last)
    conv = pack_conv(torch.randn(256, 256, 1, 1), strassen=1)
    expected = conv_engine(x, conv)
    x[0, 7, 10, 10] = float("nan")
    y = conv_engine(x, conv)
    changed = (y != expected).any(1).flatten().nonzero().flatten()
    assert 210 in changed.tolist()
    assert len(changed) <= 2


def test_operator_registration():
    (x, weight, bias, _), conv, _ = packed((1, 64, 6, 7, 64, (1, 1)))
    tests = ("test_schema", "test_faketensor")
    opcheck(
        torch.ops.fastseg.conv_engine_pack.default,
        (weight, bias, 0, False, 1),
        test_utils=tests,
    )
    opcheck(
        torch.ops.fastseg.conv_engine.default,
        (x, conv.packed, None, 64, *conv.options()),
        test_utils=tests,
    )
    opcheck(
        torch.ops.fastseg.conv_engine_out.default,
        (x, conv.packed, None, torch.empty_like(x), *conv.options()),
        test_utils=tests,
    )
    compiled = torch.compile(
        lambda t: conv_engine(t, conv) + 1, backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(x), conv_engine(x, conv) + 1)


def test_errors():
    with pytest.raises(ValueError, match="multiples of 32 and output channels of 64"):
        pack_conv(torch.randn(64, 48, 1, 1), strassen=1)
    with pytest.raises(ValueError, match="multiples of 32 and output channels of 64"):
        pack_conv(torch.randn(96, 64, 1, 1), strassen=1)
    with pytest.raises(ValueError, match="strassen needs a 1x1 kernel"):
        pack_conv(torch.randn(64, 64, 3, 3), strassen=1)
    with pytest.raises(ValueError, match="strassen must be 0 or 1 level, got 2"):
        pack_conv(torch.randn(64, 64, 1, 1), strassen=2)
    conv = pack_conv(torch.randn(64, 64, 1, 1), padding=(1, 0), strassen=1)
    with pytest.raises(ValueError, match="strassen needs padding 0, got 1 and 0"):
        conv_engine(torch.randn(1, 64, 5, 5), conv)
