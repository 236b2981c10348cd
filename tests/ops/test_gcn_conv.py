"""global_conv2d against four convolutions of PyTorch, in float64 where it counts."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

import fastseg
from fastseg.nn import GlobalConv2d
from fastseg.ops import (
    global_conv2d,
    global_conv2d_packed,
    global_conv2d_reference,
    pack_global_conv2d,
)

from ..conftest import assert_as_accurate

NAMES = ("l1", "l1_bias", "l2", "l2_bias", "r1", "r1_bias", "r2", "r2_bias")
SHAPES = [  # N, C, H, W, K, k
    (1, 64, 23, 19, 21, 15),
    (2, 20, 6, 7, 5, 15),  # the kernel reaches over the whole map
    (1, 3, 1, 1, 1, 7),
    (2, 40, 33, 9, 40, 9),
    (3, 5, 4, 3, 2, 1),
    (1, 32, 31, 30, 21, 25),
    (1, 7, 2, 60, 33, 3),
    (1, 300, 16, 16, 21, 13),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def case(shape, dtype=torch.float32, device="cpu"):
    """Input and weights of unit-variance results."""
    N, C, H, W, K, k = shape
    x = torch.randn(N, C, H, W, dtype=dtype, device=device)
    sizes = ((K, C, k, 1), (K,), (K, K, 1, k), (K,), (K, C, 1, k), (K,), (K, K, k, 1), (K,))
    weights = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
    for weight in weights[::2]:
        weight /= weight[0].numel() ** 0.5
    return x, weights


def exact(x, weights):
    return global_conv2d_reference(x.double(), *(w.double() for w in weights))


def flat(case):
    x, weights = case
    return [x, *weights]


def relative_error(y, expected):
    return ((y.double() - expected).abs().max() / expected.abs().max()).item()


@shapes
def test_float32(shape, device, cpu_isa):
    x, weights = case(shape, device=device)
    y = global_conv2d(x, *weights)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, exact(x, weights)) <= 1e-5


@shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(shape, dtype, device):
    x, weights = case(shape, dtype, device)
    y = global_conv2d(x, *weights)
    assert_as_accurate(y, global_conv2d_reference(x, *weights), exact(x, weights))


@shapes
def test_float64(shape, device):
    x, weights = case(shape, torch.float64, device)
    torch.testing.assert_close(global_conv2d(x, *weights), exact(x, weights))


def test_many_channels(device):
    x, weights = case((1, 24, 18, 17, 256, 7), device=device)
    assert relative_error(global_conv2d(x, *weights), exact(x, weights)) <= 1e-5


def test_layouts(device):
    x, weights = case((2, 32, 14, 9, 21, 7), device=device)
    y = global_conv2d(x, *weights)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(global_conv2d(last, *weights), y)
    wide = torch.randn(2, 70, 14, 9, device=device).contiguous(memory_format=torch.channels_last)
    wide[:, 3:35] = x
    assert torch.equal(global_conv2d(wide[:, 3:35], *weights), y)
    turned = [
        w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights
    ]
    assert torch.equal(global_conv2d(x, *turned), y)


@shapes
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "bfloat16 products"],
)
def test_gradients(shape, dtype, narrow, device, monkeypatch):
    monkeypatch.setattr("fastseg.ops.gcn_conv.CHUNK", 20_000)  # several chunks, a ragged last one
    if narrow:  # as on CUDA
        monkeypatch.setattr("fastseg.ops.gcn_conv._served", lambda x: False)
        monkeypatch.setattr("fastseg.ops.gcn_conv._product_dtype", lambda x: x.dtype)
    x, weights = case(shape, dtype, device)
    x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn(shape[0], shape[4], *shape[2:4], device=device).to(dtype)
    results = []
    for op, wide in (
        (global_conv2d, dtype),
        (global_conv2d_reference, dtype),
        (global_conv2d_reference, torch.float64),
    ):
        inputs = [t.to(wide, copy=True).requires_grad_() for t in (x, *weights)]
        results.append(torch.autograd.grad(op(*inputs), inputs, grad.to(wide)))
    for fast, plain, right in zip(*results, strict=True):
        assert fast.shape == plain.shape
        assert fast.dtype == plain.dtype
        if dtype == torch.float32:  # the intermediate maps come from Winograd's algorithm
            assert (fast - right).abs().max() <= 1e-5 * right.abs().max()
        else:
            assert_as_accurate(fast, plain, right)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 2, 3), (1, 2, 3, 2, 3, 7)], ids=str)
def test_gradcheck(shape, device):
    x, weights = case(shape, torch.float64, device)
    assert gradcheck(global_conv2d, [t.requires_grad_() for t in (x, *weights)])


def test_some_gradients(device):
    x, weights = case((1, 6, 7, 5, 3, 5), device=device)
    weights[0].requires_grad_()
    global_conv2d(x, *weights).sum().backward()
    assert weights[0].grad is not None
    assert x.grad is None


@pytest.mark.parametrize("shape", [(0, 4, 5, 6, 7, 3), (2, 4, 0, 6, 7, 3)], ids=str)
def test_empty(shape, device):
    x, weights = case(shape, device=device)
    inputs = [t.requires_grad_() for t in (x, *weights)]
    y = global_conv2d(*inputs)
    assert y.shape == (shape[0], 7, *shape[2:4])
    grads = torch.autograd.grad(y.sum(), inputs)
    assert all((grad == 0).all() for grad in grads)


def test_special_values(device):
    x, weights = case((1, 4, 40, 5, 3, 3), device=device)
    x[0, 0, 3, 2] = float("nan")
    y = global_conv2d(x, *weights)
    assert y[0, :, 2:5, 1:4].isnan().all()
    assert not y[0, :, 20:].isnan().any()


def test_packed(cpu_isa, not_emulated):
    x, weights = case((2, 33, 17, 12, 21, 15))
    packed = pack_global_conv2d(weights)
    assert torch.equal(global_conv2d_packed(x, packed), global_conv2d(x, *weights))
    half = x.bfloat16()
    y = global_conv2d_packed(half, packed)
    assert y.dtype == torch.bfloat16
    assert_as_accurate(y, global_conv2d(half.float(), *weights).bfloat16(), exact(half, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_thread_count(dtype, threads):
    inputs = [t.to(dtype).requires_grad_() for t in flat(case((2, 48, 45, 33, 21, 15)))]
    grad = torch.randn(2, 21, 45, 33).to(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        y = global_conv2d(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, grad)))
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_autocast(device):
    x, weights = case((1, 16, 9, 9, 21, 7), device=device)
    with torch.autocast(device, torch.bfloat16):
        y = global_conv2d(x, *weights)
    assert y.dtype == torch.bfloat16
    half = [t.bfloat16() for t in (x, *weights)]
    assert torch.equal(y, global_conv2d(*half))


def test_operator_registration():
    x, weights = case((2, 5, 6, 7, 3, 5))
    inputs = [t.requires_grad_() for t in (x, *weights)]
    opcheck(torch.ops.fastseg.gcn_conv.default, inputs)
    tests = ("test_schema", "test_faketensor")
    with torch.no_grad():
        _, left, right = torch.ops.fastseg.gcn_conv(*inputs)
        expand = torch.ops.fastseg.gcn_expand.default
        opcheck(expand, (left, right, 5, 3, 11), test_utils=tests)
        backward = (torch.randn_like(left), x, left, right, *weights[::2])
        opcheck(torch.ops.fastseg.gcn_conv_backward.default, backward, test_utils=tests)


def test_packed_registration():
    x, weights = case((2, 5, 6, 7, 3, 5))
    tests = ("test_schema", "test_faketensor")
    opcheck(torch.ops.fastseg.gcn_conv_pack.default, weights, test_utils=tests)
    packed = pack_global_conv2d(weights).packed
    opcheck(torch.ops.fastseg.gcn_conv_packed.default, (x, packed, 3, 5), test_utils=tests)


def test_compiles(device):
    x, weights = case((1, 5, 8, 7, 3, 5), device=device)
    inputs = [t.requires_grad_() for t in (x, *weights)]
    compiled = torch.compile(
        lambda *t: global_conv2d(*t).relu(), backend="aot_eager", fullgraph=True
    )
    y = compiled(*inputs)
    assert torch.equal(y, global_conv2d(*inputs).relu())
    for got, expected in zip(
        torch.autograd.grad(y.sum(), inputs),
        torch.autograd.grad(global_conv2d(*inputs).relu().sum(), inputs),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_layer(device):
    layer = GlobalConv2d(12, 5, 7).to(device)
    assert list(layer.state_dict()) == [
        f"{conv}.{kind}" for conv in ("l1", "l2", "r1", "r2") for kind in ("weight", "bias")
    ]
    x = torch.randn(2, 12, 9, 11, device=device)
    torch.testing.assert_close(layer(x), layer.unfuse()(x), rtol=1e-4, atol=1e-5)
    calls = []
    layer.l2.register_forward_hook(lambda *_: calls.append(1))
    layer(x)
    assert calls == [1]


def test_optimize():
    layer = GlobalConv2d(12, 5, 7).eval()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3), layer, torch.nn.ReLU())
    x = torch.randn(1, 3, 20, 21)
    with torch.inference_mode():
        expected = model(x)
        for accuracy in ("default", "strict"):
            fast = fastseg.optimize(model.eval(), accuracy=accuracy)
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
            fused = "fused large kernel, 12, 5, kernel_size=7" in fastseg.explain(fast)
            assert fused == (accuracy == "default")


def test_errors(device):
    x, weights = case((1, 4, 5, 6, 3, 5), device=device)
    with pytest.raises(ValueError, match="x must be"):
        global_conv2d(x[0], *weights)
    with pytest.raises(ValueError, match=r"r1 must be \(3, 4, 1, 5\), got \(3, 4, 5, 1\)"):
        global_conv2d(x, *weights[:4], weights[4].transpose(2, 3), *weights[5:])
    with pytest.raises(ValueError, match=r"l2_bias must be \(3,\), got \(4,\)"):
        global_conv2d(x, *weights[:3], torch.zeros(4, device=device), *weights[4:])
    with pytest.raises(ValueError, match="l1 must have the dtype of x"):
        global_conv2d(x.double(), *weights)
    with pytest.raises(ValueError, match="must be odd, got 4"):
        global_conv2d(x, *case((1, 4, 5, 6, 3, 4), device=device)[1])
    with pytest.raises(ValueError, match="floating point"):
        global_conv2d(x.int(), *(w.int() for w in weights))
    with pytest.raises(ValueError, match="odd, got 4"):
        GlobalConv2d(3, 3, 4)


def test_packed_errors():
    x, weights = case((1, 4, 5, 6, 3, 5))
    packed = pack_global_conv2d(weights)
    with pytest.raises(ValueError, match=r"x must be \(N, 4, H, W\)"):
        global_conv2d_packed(x[:, :3], packed)
    with pytest.raises(ValueError, match="packed for another layer"):
        torch.ops.fastseg.gcn_conv_packed(x, packed.packed, 64, 5)
    with pytest.raises(ValueError, match="kernel size must be odd"):
        torch.ops.fastseg.gcn_conv_packed(x, packed.packed, 3, 4)
    with pytest.raises(ValueError, match="computes no gradients"):
        global_conv2d_packed(x.requires_grad_(), packed)
