"""The training step on the CPU, by the engine and by torch, against float64."""

import pytest
import torch
from torch.library import opcheck

import fastseg
from fastseg.nn import ConvBNReLU2d
from fastseg.ops import conv_bn_act, conv_bn_act_reference
from fastseg.ops.conv_train import TORCH, fits_in_place, training_kernels

pytestmark = pytest.mark.usefixtures("not_emulated", "smallest_fused")

LAST = torch.channels_last
ONE = (1, 1)


def train_conv(x, weight, bias, geometry, tile):
    """The convolution and a function of dy that gives its gradients in x and weight."""
    geometry = [list(pair) for pair in geometry]
    y = torch.ops.fastseg.train_conv(x, weight, bias, *geometry, 1, tile)

    def gradients(dy):
        return torch.ops.fastseg.train_conv_backward(
            dy, x, weight, *geometry, 1, tile, tile, True, True
        )

    return y, gradients


def exact_conv(x, weight, bias, geometry, dy):
    """The convolution and its gradients in x and weight, in float64."""
    double = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = torch.nn.functional.conv2d(*double, *geometry)
    return y, *torch.autograd.grad(y, double[:2], dy.double())


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
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
def test_convolution_and_gradients(shape, tile, layout, cpu_isa):
    x, weight, options = case(*shape)
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    geometry, bias = (ONE, *options.values()), torch.randn(weight.shape[0])
    y, gradients = train_conv(x, weight, bias, geometry, tile)
    dy = torch.randn_like(y)
    assert y.is_contiguous(memory_format=layout)
    right = exact_conv(x, weight, bias, geometry, dy)
    for got, exact in zip((y, *gradients(dy)), right, strict=True):
        assert got.shape == exact.shape
        assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", [(2, 40, 33, 30, (2, 2)), (3, 33, 7, 19, (9, 3))], ids=str)
def test_gradient_in_place(shape, tile, dtype, cpu_isa):
    """The same bits as in memory of its own, also of pixels that lie apart."""
    N, C, H, W, dilation = shape
    x, weight, _ = case(N, C, H, W, C, dilation, dilation)
    x, weight = x.to(dtype), weight.to(dtype)
    geometry = ([1, 1], list(dilation), list(dilation))
    whole = torch.randn(N, C + 3, H, W).to(memory_format=LAST, dtype=dtype)
    dy = whole[:, 1:-2]
    tiles = (tile, 0, True)
    right = torch.ops.fastseg.train_conv_backward(dy, x, weight, *geometry, 1, tile, 0, True, True)
    around = whole[:, -2:].clone()
    got = torch.ops.fastseg.train_conv_backward_in_place(dy, x, weight, *geometry, *tiles)
    assert torch.equal(dy, right[0])
    assert torch.equal(got, right[1])
    assert torch.equal(whole[:, -2:], around)


def test_a_step_in_place(threads):
    """A layer takes one image less where sub-grids make good tasks; bits stay, and what a caller
    can see of the graph is left alone."""
    threads(1)
    torch.manual_seed(0)
    layer = ConvBNReLU2d(64, 64, 3, padding=2, dilation=2)
    x = torch.randn(1, 64, 34, 36).contiguous(memory_format=LAST).requires_grad_()
    inputs = (x, *layer.parameters())
    grad = torch.randn(1, 64, 34, 36).contiguous(memory_format=LAST)
    before = grad.clone()
    results = []
    for retain in (True, False):
        for count, in_place in ((1, 1), (2, 0)):
            z = layer(x)
            threads(count)
            fastseg._C.reset_kernel_counts()
            results.append(torch.autograd.grad(z, inputs, grad, retain_graph=retain))
            assert fastseg._C.kernel_counts().get("conv_train.in_place", 0) == in_place
            if retain:
                results.append(torch.autograd.grad(z, inputs, grad))
            threads(1)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)
    assert torch.equal(grad, before)


def test_fits_in_place():
    def fits(N, C, H, W, tile=4, padding=(2, 2), dilation=(2, 2), K=None, layout=LAST):
        x = torch.empty(N, C, H, W).contiguous(memory_format=layout)
        dy = torch.empty(N, K or C, H, W).contiguous(memory_format=layout)
        return fits_in_place(dy, x, tile, padding, dilation)

    assert fits(4, 256, 65, 65)
    assert not fits(4, 256, 65, 65, tile=0)
    assert not fits(4, 256, 65, 65, K=128)
    assert not fits(4, 256, 65, 65, padding=(1, 2))
    assert not fits(4, 256, 65, 65, layout=torch.contiguous_format)
    assert not fits(1, 256, 65, 65, padding=(1, 1), dilation=(1, 1))  # one sub-grid alone
    assert not fits(4, 256, 33, 33)  # sub-grids that are small beside the weights
    assert not fits(16, 64, 200, 200, padding=(1, 1), dilation=(1, 1))  # large ones


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
        counted = fastseg._C.kernel_counts().get("conv_train.winograd", 0)
        assert counted == (1 if op is conv_bn_act else 0)
        torch.manual_seed(1)
        grad = torch.randn(z.shape).to(wide)
        grads = torch.autograd.grad(z, (x, weight, scale, shift, r), grad)
        results.append((z, *grads, *running))
    for got, right in zip(*results, strict=True):
        assert (got - right).abs().max() <= 1e-5 * right.abs().max()


def test_choice():
    x, weight, _ = case(1, 64, 40, 40, 64, (1, 1), (1, 1))
    wide = torch.randn(1024, 64, 3, 3)
    pointwise = torch.randn(64, 64, 1, 1)

    def chosen(x=x, weight=weight, stride=1, padding=1, groups=1, accuracy="default"):
        geometry = ((stride, stride), (padding, padding), (1, 1))
        return training_kernels(x, weight, *geometry, groups, accuracy)

    torch_alone = (TORCH, TORCH, TORCH)
    assert chosen() == (4, 4, 4)
    assert chosen(x=x.contiguous()) == (4, 4, 4)
    assert chosen(accuracy="strict") == (2, 2, 0)
    assert chosen(weight=pointwise, padding=0) == (0, 0, 0)
    assert chosen(weight=pointwise, padding=0, x=x.contiguous()) == torch_alone
    assert chosen(weight=weight[:8]) == (0, 0, 0)
    assert chosen(x=x[..., :8, :8]) == (0, 0, 0)  # transforming the weights would take longer
    assert chosen(stride=2) == (0, 0, 0)
    assert chosen(padding=3) == (0, 0, 4)
    assert chosen(weight=wide, stride=2) == (TORCH, TORCH, 0)
    assert chosen(x=x.double()) == torch_alone
    assert chosen(x=x.half()) == torch_alone
    assert chosen(weight=weight[:, :32], groups=2) == torch_alone
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(weight=pointwise, padding=0, x=x.contiguous()) == (0, 0, 0)
        assert chosen(weight=wide, stride=2) == (0, 0, 0)
        assert chosen(x=x.bfloat16())[:2] == (4, 4)
        assert chosen(x=x.double()) == (TORCH, TORCH, 0)
    finally:
        torch.use_deterministic_algorithms(False)


def test_strict():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 40, 40).contiguous(memory_format=LAST)
    layer = ConvBNReLU2d(32, 32, 3, padding=1, accuracy="strict")
    fastseg._C.reset_kernel_counts()
    layer(x).sum().backward()
    assert fastseg._C.kernel_counts()["conv_weight_gradient.direct"] == 1
    layer.accuracy = "best"
    with pytest.raises(ValueError, match='accuracy must be "default" or "strict", got \'best\''):
        layer(x)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("tile", [0, 2, 4])
def test_bfloat16(tile, layout):
    """The engine's products are in float32: one rounding of the result."""
    torch.manual_seed(0)
    geometry = (ONE, ONE, ONE) if tile else ((2, 2), ONE, ONE)
    x = torch.randn(2, 40, 21, 19).contiguous(memory_format=layout).bfloat16()
    weight = (torch.randn(36, 40, 3, 3) / 19).bfloat16()
    bias = torch.randn(36).bfloat16()
    y, _ = train_conv(x, weight, bias, geometry, tile)
    dy = torch.randn_like(y)
    right = exact_conv(x, weight, bias, geometry, dy)
    geometry = [list(pair) for pair in geometry]
    grads = torch.ops.fastseg.train_conv_backward(dy, x, weight, *geometry, 1, tile, 0, True, True)
    for got, exact in zip((y, *grads), right, strict=True):
        assert got.dtype == torch.bfloat16
        allowed = (torch.finfo(torch.bfloat16).eps / 2 + 1e-5) * exact.abs().max()
        assert (got.double() - exact).abs().max() <= allowed


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
def test_matrix_product(shape, layout, cpu_isa):
    C, K, size, kernel, *geometry = shape
    x = torch.randn(2, C, *size).contiguous(memory_format=layout)
    weight = torch.randn(K, C, *kernel) / (C * kernel[0] * kernel[1]) ** 0.5
    bias = torch.randn(K)
    plain = torch.nn.functional.conv2d(x, weight, bias, *geometry)
    dy = torch.randn_like(plain)
    right = exact_conv(x, weight, bias, geometry, dy)
    for weight_layout in (LAST, torch.contiguous_format):
        laid = weight.contiguous(memory_format=weight_layout)
        y, gradients = train_conv(x, laid, bias, geometry, 0)
        if laid.stride() == weight.stride():
            assert y.stride() == plain.stride()
        for got, exact in zip((y, *gradients(dy)), right, strict=True):
            assert got.shape == exact.shape
            assert (got - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("tile", [TORCH, 0, 4])
def test_empty(tile):
    x, weight = torch.randn(0, 3, 5, 6), torch.randn(4, 3, 3, 3)
    y, gradients = train_conv(x, weight, None, (ONE, ONE, ONE), tile)
    assert y.shape == (0, 4, 5, 6)
    for grad, of in zip(gradients(y), (x, weight), strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


def test_some_gradients():
    x, weight, options = case(1, 32, 33, 32, 32, (1, 1), (1, 1))
    norm = (None,) * 4
    z = conv_bn_act(x, weight.requires_grad_(), None, *norm, training=True, **options)
    z.square().sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    z = conv_bn_act(x.requires_grad_(), weight.detach(), None, *norm, training=True, **options)
    z.square().sum().backward()
    assert x.grad is not None


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
    kernels = training_kernels(x, layer.conv.weight, *geometry, 1, "default")
    assert kernels.forward == tile
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
    tests = ("test_schema", "test_faketensor")
    for layout in (LAST, torch.contiguous_format):
        x = x.contiguous(memory_format=layout)
        for tile in (TORCH, 0, 4):
            geometry = ([1, 1], [1, 1], [1, 1], 1)
            arguments = (x, weight, torch.randn(33), *geometry, tile)
            opcheck(torch.ops.fastseg.train_conv.default, arguments, test_utils=tests)
            tiles = (tile, tile, True, tile != 0)
            arguments = (torch.randn(1, 33, 9, 8), x, weight, *geometry, *tiles)
            opcheck(torch.ops.fastseg.train_conv_backward.default, arguments, test_utils=tests)
            if tile == 4:
                dy = torch.randn(1, 32, 9, 8).contiguous(memory_format=LAST)
                arguments = (dy, x, weight[:32], *geometry[:3], tile, 0, True)
                opcheck(
                    torch.ops.fastseg.train_conv_backward_in_place.default,
                    arguments,
                    test_utils=tests,
                )
            norm = (torch.randn(33), None, torch.randn(1, 33, 9, 8))
            running = (torch.randn(33), torch.rand(33), 0.1)
            options = (*geometry, 1e-5, 0.0)
            arguments = (x, weight, None, *norm, *running, *options, tile)
            opcheck(torch.ops.fastseg.train_step.default, arguments, test_utils=tests)


def test_errors():
    x, weight, options = case(*CASES[0])
    with pytest.raises(ValueError, match=r"tile must be -1 \(torch\), 0, 2 or 4, got 6"):
        train_conv(x, weight, None, (ONE, *options.values()), 6)
    with pytest.raises(ValueError, match="Winograd needs a 3x3 kernel, stride 1"):
        train_conv(x, weight, None, ((2, 2), *options.values()), 4)
    with pytest.raises(ValueError, match="the engine takes x"):
        train_conv(x.double(), weight.double(), None, (ONE, *options.values()), 0)
    in_place = torch.ops.fastseg.train_conv_backward_in_place
    geometry = ([1, 1], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="in place the input's gradient needs Winograd's"):
        in_place(x.clone(), x, weight[:32], *geometry, 0, 0, False)
    with pytest.raises(ValueError, match="in place dy must have the shape of x"):
        in_place(
            torch.randn(2, 48, 33, 31).to(memory_format=LAST), x, weight, *geometry, 4, 0, False
        )
    _, gradients = train_conv(x, weight, None, (ONE, *options.values()), 4)
    with pytest.raises(ValueError, match="dy must have the output's size, 33 along axis 2, got 9"):
        gradients(torch.randn(2, 48, 9, 31))


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
