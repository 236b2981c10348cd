"""Training with Winograd's convolution on the CPU, against float64."""

import pytest
import torch
from torch.library import opcheck

import fastseg
from fastseg.nn import ConvBNReLU2d
from fastseg.ops import conv_bn_act, conv_bn_act_reference
from fastseg.ops.winograd_conv import training_tile, winograd_conv2d

LAST = torch.channels_last


def case(N, C, H, W, K, padding, dilation):
    torch.manual_seed(0)
    x = torch.randn(N, C, H, W).contiguous(memory_format=LAST)
    weight = torch.randn(K, C, 3, 3) / (9 * C) ** 0.5
    return x, weight, {"padding": padding, "dilation": dilation}


CASES = [  # N, C, H, W, K, padding, dilation
    (2, 32, 33, 31, 48, (1, 1), (1, 1)),
    (1, 64, 37, 35, 32, (4, 4), (4, 4)),
    (2, 40, 30, 26, 33, (0, 2), (1, 2)),
    (1, 36, 33, 40, 35, (2, 6), (1, 3)),  # more padding than keeps the size
    (1, 128, 32, 32, 64, (0, 0), (3, 1)),
]
cases = pytest.mark.parametrize("shape", CASES, ids=str)


@cases
def test_convolution_and_gradients(shape, cpu_isa):
    x, weight, options = case(*shape)
    tile = training_tile(x, weight, (1, 1), *options.values(), 1, "default")
    assert tile in (2, 3, 4)
    bias = torch.randn(weight.shape[0])
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = winograd_conv2d(*inputs, *options.values(), tile)
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.nn.functional.conv2d(*double, **options)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, grad)
    exact_grads = torch.autograd.grad(exact, double, grad.double())
    assert y.is_contiguous(memory_format=LAST)
    for got, right in zip((y, *grads), (exact, *exact_grads), strict=True):
        assert got.shape == right.shape
        assert (got - right).abs().max() <= 1e-5 * right.abs().max()


@cases
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
def test_training_step(shape, activation):
    x, weight, options = case(*shape)
    C = weight.shape[0]
    exact_y = torch.nn.functional.conv2d(x.double(), weight.double(), **options)
    residual = torch.randn(exact_y.shape).contiguous(memory_format=LAST)
    # Pre-activations far from 0: a sign that rounding decides would be no error of the gradient.
    scale, shift = torch.full((C,), 0.2), torch.where(torch.arange(C) % 2 == 0, 4.0, -4.0)
    inputs = [t.requires_grad_() for t in (x, weight, scale, shift, residual * 0.2)]
    options |= {"training": True, "activation": activation, "negative_slope": 0.1}
    results = []
    for op, wide in ((conv_bn_act, torch.float32), (conv_bn_act_reference, torch.float64)):
        x, weight, scale, shift, r = (t.detach().to(wide).requires_grad_() for t in inputs)
        running = torch.zeros(C, dtype=wide), torch.ones(C, dtype=wide)
        fastseg._C.reset_kernel_counts()
        z = op(x, weight, None, scale, shift, *running, r, **options)
        counted = fastseg._C.kernel_counts().get("conv_engine.winograd", 0)
        assert counted == (1 if op is conv_bn_act else 0)
        torch.manual_seed(1)
        grad = torch.randn(z.shape).to(wide)
        grads = torch.autograd.grad(z, (x, weight, scale, shift, r), grad)
        results.append((z, *grads, *running))
    for got, right in zip(*results, strict=True):
        assert (got - right).abs().max() <= 1e-5 * right.abs().max()


def test_choice():
    x, weight, _ = case(1, 64, 40, 40, 64, (1, 1), (1, 1))

    def tile(x=x, weight=weight, stride=(1, 1), padding=(1, 1), groups=1, accuracy="default"):
        return training_tile(x, weight, stride, padding, (1, 1), groups, accuracy)

    assert tile() == 4
    assert tile(accuracy="strict") == 0
    assert tile(x=x.contiguous()) == 0
    assert tile(x=x.double()) == 0
    assert tile(x=x.bfloat16()) == 0
    assert tile(x=x[..., :8, :8]) == 0  # transforming the weights would take longer
    assert tile(weight=weight[:16]) == 0
    assert tile(weight=weight[..., :1, :1]) == 0
    assert tile(stride=(2, 2)) == 0
    assert tile(padding=(3, 1)) == 0
    assert tile(groups=2) == 0


def test_strict_is_torch():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 40, 40).contiguous(memory_format=LAST)
    layer = ConvBNReLU2d(32, 32, 3, padding=1, accuracy="strict")
    fastseg._C.reset_kernel_counts()
    layer(x).sum().backward()
    assert fastseg._C.kernel_counts().get("conv_engine.winograd", 0) == 0
    layer.accuracy = "best"
    with pytest.raises(ValueError, match='accuracy must be "default" or "strict", got \'best\''):
        layer(x)


def test_some_gradients():
    x, weight, options = case(1, 32, 33, 32, 32, (1, 1), (1, 1))
    y = winograd_conv2d(x, weight.requires_grad_(), None, *options.values(), 4)
    y.sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_same_bits_with_any_thread_count(threads):
    x, weight, options = case(2, 64, 33, 32, 64, (2, 2), (2, 2))
    results = []
    for count in (1, 2):
        threads(count)
        x = x.detach().requires_grad_()
        y = winograd_conv2d(x, weight, None, *options.values(), 4)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_operator_registration():
    x, weight, _ = case(1, 32, 9, 8, 33, (1, 1), (1, 1))
    inputs = [t.requires_grad_() for t in (x, weight, torch.randn(33))]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*inputs, [1, 1], [1, 1], 4)
    opcheck(torch.ops.fastseg.winograd_conv.default, arguments, test_utils=tests)
    y = torch.randn(2, 33, 5, 6).contiguous(memory_format=LAST).requires_grad_()
    scale = torch.randn(33, requires_grad=True)
    opcheck(torch.ops.fastseg.bn_act_stats.default, (y, scale, None, None, 1e-5, 0.0))


def test_compiles():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 40, 40).contiguous(memory_format=LAST).requires_grad_()
    layer = ConvBNReLU2d(32, 32, 3, padding=1)
    grad = torch.randn(1, 32, 40, 40)
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        results.append(torch.autograd.grad(function(x), (x, *layer.parameters()), grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
