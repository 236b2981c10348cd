"""Training with the convolution engine on the CPU, against float64."""

import pytest
import torch
from torch.library import opcheck

import fastseg
from fastseg.nn import ConvBNReLU2d
from fastseg.ops import conv_bn_act, conv_bn_act_reference
from fastseg.ops.conv_train import train_conv2d, training_tile

pytestmark = pytest.mark.usefixtures("not_emulated")

LAST = torch.channels_last
ONE = (1, 1)


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
    y = train_conv2d(*inputs, ONE, *options.values(), tile)
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
    assert tile(x=x.contiguous(), accuracy="strict") is None
    assert tile(x=x.contiguous()) == 4
    assert tile(x=x.double()) is None
    assert tile(x=x.bfloat16()) is None
    assert tile(groups=2) is None
    assert tile(x=x[..., :8, :8]) == 0  # transforming the weights would take longer
    assert tile(weight=weight[:16]) == 0
    assert tile(weight=weight[..., :1, :1]) == 0
    assert tile(stride=(2, 2)) == 0
    assert tile(padding=(3, 1)) == 0


def test_strict():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 40, 40).contiguous(memory_format=LAST)
    layer = ConvBNReLU2d(32, 32, 3, padding=1, accuracy="strict")
    fastseg._C.reset_kernel_counts()
    layer(x).sum().backward()
    counts = fastseg._C.kernel_counts()
    assert not any(count for name, count in counts.items() if "winograd" in name)
    layer.accuracy = "best"
    with pytest.raises(ValueError, match='accuracy must be "default" or "strict", got \'best\''):
        layer(x)


PRODUCTS = [  # C, K, size, kernel, stride, padding, dilation
    (5, 37, (9, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 16, (31, 30), (7, 7), (2, 2), (3, 3), (1, 1)),
    (40, 4, (20, 21), (1, 1), (2, 3), (0, 0), (1, 1)),  # input pixels that meet no tap
    (8, 9, (17, 16), (1, 5), (1, 3), (0, 6), (1, 2)),
    (6, 7, (23, 25), (3, 4), (4, 6), (2, 3), (6, 4)),  # stride and dilation with a common factor
    (2, 3, (6, 5), (2, 3), (1, 1), (5, 7), (1, 1)),  # more padding than the kernel can use
    (12, 20, (14, 15), (1, 1), (1, 1), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_matrix_product(shape, layout):
    C, K, size, kernel, *geometry = shape
    x = torch.randn(2, C, *size).contiguous(memory_format=layout)
    weight = torch.randn(K, C, *kernel) / (C * kernel[0] * kernel[1]) ** 0.5
    inputs = [t.requires_grad_() for t in (x, weight, torch.randn(K))]
    tile = training_tile(x, weight, *geometry, 1, "default")
    assert tile == (0 if layout == LAST else None)
    y = train_conv2d(*inputs, *geometry, 0)
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.nn.functional.conv2d(*double, *geometry)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, grad)
    exact_grads = torch.autograd.grad(exact, double, grad.double())
    plain = torch.nn.functional.conv2d(*inputs, *geometry)
    assert y.stride() == plain.stride()
    for got, right in zip((y, *grads), (exact, *exact_grads), strict=True):
        assert got.shape == right.shape
        assert (got - right).abs().max() <= 2e-6 * right.abs().max()


def test_some_gradients():
    x, weight, options = case(1, 32, 33, 32, 32, (1, 1), (1, 1))
    y = train_conv2d(x, weight.requires_grad_(), None, ONE, *options.values(), 4)
    y.sum().backward()
    assert weight.grad is not None
    assert x.grad is None


@pytest.mark.parametrize(
    ("kernel", "stride", "layout", "tile"),
    [
        (3, 1, torch.contiguous_format, 4),
        (3, 1, LAST, 4),
        (3, 2, LAST, 0),
        (1, 1, LAST, 0),
        (5, 1, LAST, 0),
    ],
    ids=str,
)
def test_same_bits_with_any_thread_count(kernel, stride, layout, tile, threads):
    """Of everything that a step of a layer computes."""
    layer = ConvBNReLU2d(40, 36, kernel, stride=stride, padding=kernel // 2, bias=True)
    x = torch.randn(2, 40, 33, 32).contiguous(memory_format=layout).requires_grad_()
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1))
    assert training_tile(x, layer.conv.weight, *geometry, 1, "default") == tile
    residual = torch.randn_like(layer(x)).requires_grad_()
    inputs = [x, residual, *layer.parameters()]
    results = []
    for count in (1, 2, 3):
        threads(count)
        layer.bn.reset_running_stats()
        z = layer(x, residual)
        grads = torch.autograd.grad(z.square().sum(), inputs)
        results.append((z, *grads, layer.bn.running_mean, layer.bn.running_var.clone()))
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_operator_registration():
    x, weight, _ = case(1, 32, 9, 8, 33, (1, 1), (1, 1))
    inputs = [t.requires_grad_() for t in (x, weight, torch.randn(33))]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*inputs, [1, 1], [1, 1], [1, 1], 4)
    opcheck(torch.ops.fastseg.train_conv.default, arguments, test_utils=tests)
    strided = (torch.randn(1, 33, 5, 4), *inputs[:2], [2, 2], [1, 1], [1, 1], 0)
    gradient = torch.ops.fastseg.train_conv_input_gradient.default
    opcheck(gradient, strided, test_utils=("test_schema", "test_faketensor"))
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
