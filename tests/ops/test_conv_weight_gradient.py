"""The CPU's gradient of a convolution's weights against torch in float64."""

import pytest
import torch
from torch.library import opcheck

import fastseg
from fastseg.nn import ConvBNReLU2d
from fastseg.ops.conv_act import channel_sums

pytestmark = pytest.mark.usefixtures("not_emulated")

LAST = torch.channels_last
CASES = [  # N, C, H, W, K, kernel, stride, padding, dilation
    (2, 5, 9, 8, 37, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 70, 13, 11, 33, (3, 3), (1, 1), (4, 2), (4, 3)),  # more input than output channels
    (2, 3, 31, 30, 40, (7, 7), (2, 2), (3, 3), (1, 1)),
    (1, 40, 20, 21, 4, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 8, 17, 16, 9, (1, 5), (1, 3), (0, 6), (1, 2)),  # kernel wholly in the padding at the ends
    (1, 300, 40, 30, 64, (1, 1), (1, 1), (0, 0), (1, 1)),  # several chunks
    (3, 1, 1, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 330, 7, 8, 600, (3, 3), (1, 1), (2, 2), (2, 2)),  # parts of rows and of panels
    (2, 530, 6, 5, 290, (3, 3), (2, 1), (3, 1), (3, 1)),
]
WINOGRAD = [  # N, C, H, W, K, padding, dilation
    (2, 33, 14, 13, 40, (1, 1), (1, 1)),
    (1, 64, 37, 35, 32, (4, 4), (4, 4)),
    (2, 40, 30, 26, 33, (0, 2), (1, 2)),
    (1, 36, 33, 40, 35, (2, 6), (1, 3)),
    (4, 128, 48, 48, 64, (2, 2), (2, 2)),  # several chunks
    (1, 1, 3, 3, 1, (0, 0), (1, 1)),
    (1, 330, 14, 13, 170, (1, 1), (1, 1)),  # channels that no vector divides
]


def exact(dy, x, weight, stride, padding, dilation):
    double = (t.double() for t in (dy, x, weight))
    options = (list(stride), list(padding), list(dilation), False, [0, 0], 1)
    grads = torch.ops.aten.convolution_backward(*double, None, *options, [False, True, False])
    return grads[1]


def case(N, C, H, W, K, kernel, stride, padding, dilation, dtype=torch.float32):
    x, weight = torch.randn(N, C, H, W, dtype=dtype), torch.randn(K, C, *kernel, dtype=dtype)
    y = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    dy = torch.randn(y.shape, dtype=dtype)
    return dy, x, weight, list(stride), list(padding), list(dilation)


def gradient(*arguments):
    return torch.ops.fastseg.conv_weight_gradient(*arguments)


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_direct(shape, dtype, cpu_isa):
    arguments = [*case(*shape, dtype=dtype)]
    right = exact(*arguments)
    # Sums in float32 (of float64 in float64) of at most 1200 products, rounded to dtype.
    wide = torch.promote_types(dtype, torch.float32)
    allowed = 16 * torch.finfo(wide).eps + (torch.finfo(dtype).eps if dtype != wide else 0)
    grad = gradient(*arguments)
    assert grad.dtype == dtype
    assert (grad.double() - right).abs().max() <= allowed * right.abs().max()
    arguments[2] = arguments[2].contiguous(memory_format=LAST)
    grad = gradient(*arguments)
    assert grad.stride() == arguments[2].stride()
    assert (grad.double() - right).abs().max() <= allowed * right.abs().max()


@pytest.mark.parametrize("shape", WINOGRAD, ids=str)
def test_winograd(shape, cpu_isa):
    N, C, H, W, K, padding, dilation = shape
    arguments = case(N, C, H, W, K, (3, 3), (1, 1), padding, dilation)
    right = exact(*arguments)
    assert (gradient(*arguments, True) - right).abs().max() <= 1e-5 * right.abs().max()


def test_layouts():
    dy, x, weight, *options = case(*CASES[1])
    expected = gradient(dy, x, weight, *options)
    turned = gradient(dy, x, weight.contiguous(memory_format=LAST), *options)
    assert turned.is_contiguous(memory_format=LAST)
    wide = torch.full((1, 90, 13, 22), torch.nan).contiguous(memory_format=LAST)
    wide[:, 7:77, :, ::2] = x
    views = gradient(dy.contiguous(memory_format=LAST), wide[:, 7:77, :, ::2], weight, *options)
    for other in (turned, views):
        assert torch.equal(other, expected)


@pytest.mark.parametrize("winograd", [False, True])
def test_empty(winograd):
    for N, C, K in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        dy, x = torch.randn(N, K, 5, 6), torch.randn(N, C, 5, 6)
        grad = gradient(dy, x, torch.randn(K, C, 3, 3), [1, 1], [1, 1], [1, 1], winograd)
        assert torch.equal(grad, torch.zeros(K, C, 3, 3))


def test_special_values():
    dy, x, weight, *options = case(1, 33, 12, 12, 33, (3, 3), (1, 1), (1, 1), (1, 1))
    x[0, 4, 5, 6] = torch.inf
    for winograd in (False, True):
        grad = gradient(dy, x, weight, *options, winograd)
        assert not grad[:, 4].isfinite().all()
        assert grad[:, :4].isfinite().all()
        assert grad[:, 5:].isfinite().all()


def test_channel_sums():
    dy = torch.randn(3, 70, 11, 13)
    with torch.no_grad():
        sums = channel_sums(dy)
    assert sums.shape == (70,)
    torch.testing.assert_close(sums.double(), dy.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("winograd", [False, True])
def test_same_bits_with_any_thread_count(winograd, dtype, threads):
    if winograd and dtype != torch.float32:
        pytest.skip("Winograd is for float32")
    arguments = case(2, 40, 33, 31, 70, (3, 3), (1, 1), (1, 1), (2, 1), dtype=dtype)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append((gradient(*arguments, winograd), channel_sums(arguments[0])))
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_counts():
    layer = ConvBNReLU2d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 40, 40).contiguous(memory_format=LAST)
    for accuracy, name in (("default", "winograd"), ("strict", "direct")):
        layer.accuracy = accuracy
        fastseg._C.reset_kernel_counts()
        layer(x).sum().backward()
        assert fastseg._C.kernel_counts()[f"conv_weight_gradient.{name}"] == 1


def test_operator_registration():
    dy, x, weight, *options = case(*CASES[0])
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.fastseg.conv_weight_gradient.default
    opcheck(op, (dy, x, weight, *options, False), test_utils=tests)
    opcheck(op, (dy, x, weight.contiguous(memory_format=LAST), *options, True), test_utils=tests)


def test_errors():
    dy, x, weight, *options = case(*CASES[0])
    with pytest.raises(ValueError, match="of one dtype"):
        gradient(dy, x.double(), weight, *options)
    with pytest.raises(ValueError, match="do not belong to one convolution"):
        gradient(dy, x[:, :4], weight, *options)
    with pytest.raises(ValueError, match="must be positive, got 0 and 1"):
        gradient(dy, x, weight, [0, 1], *options[1:])
    with pytest.raises(ValueError, match="Winograd needs float32"):
        gradient(dy, x, weight, [2, 2], *options[1:], True)
