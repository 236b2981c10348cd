"""max_pool2d, max_unpool2d and their index conversions, against PyTorch and the references."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastseg
from fastseg.ops import from_torch_indices, max_pool2d, max_unpool2d, to_torch_indices
from fastseg.ops.max_unpool import max_pool2d_reference, max_unpool2d_reference

from ..conftest import assert_as_accurate

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
WINDOWS = {  # kernel_size, stride, padding, ceil_mode
    "2x2": (2, 2, 0, False),
    "2x2 ceil": (2, 2, 0, True),
    "2x2 padded": (2, 2, 1, False),
    "3x3 stride 2": (3, 2, 1, False),
    "3x3 stride 2 ceil": (3, 2, 1, True),
    "3x3 gaps": (3, 4, 0, False),
    "uneven": ((5, 2), (1, 3), (2, 1), True),
    "16x16": (16, 8, 8, True),
}
windows = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def image(shape, device="cpu", dtype=torch.float32, layout=torch.contiguous_format):
    """Few distinct values, so that ties are common."""
    x = torch.randint(-4, 4, shape, device=device).to(dtype)
    return x.contiguous(memory_format=layout)


def distinct(shape, device="cpu", dtype=torch.float64, layout=torch.contiguous_format):
    """Values that stay apart under gradcheck's steps, so that no maximum changes its place."""
    x = torch.randperm(torch.Size(shape).numel(), device=device).to(dtype).view(shape)
    return x.contiguous(memory_format=layout)


@windows
@dtypes
@layouts
def test_equals_torch(layout, dtype, window, device, cpu_isa):
    for shape in [(1, 1, 16, 17), (2, 3, 19, 23), (1, 70, 33, 17)]:
        x = image(shape, device, dtype, layout)
        y, indices = max_pool2d(x, *window)
        plain, flat = F.max_pool2d(x, *window[:3], ceil_mode=window[3], return_indices=True)
        assert torch.equal(y, plain)
        assert y.is_contiguous(memory_format=layout)
        assert indices.is_contiguous(memory_format=layout)
        assert indices.dtype == torch.uint8
        assert torch.equal(to_torch_indices(indices, shape, *window[:3]), flat)
        assert torch.equal(from_torch_indices(flat, shape, *window[:3]), indices)

        # Windows that share a pixel share its value here, so PyTorch's order does not matter.
        out = max_unpool2d(y, indices, *window[:3], output_size=shape)
        plain = F.max_unpool2d(y, flat, *window[:3], output_size=shape[2:])
        assert torch.equal(out, plain)
        assert out.is_contiguous(memory_format=layout)


@windows
@layouts
def test_unpool_where_windows_meet(layout, window, device, cpu_isa):
    x = image((2, 5, 19, 23), device, layout=layout)
    y, indices = max_pool2d(x, *window)
    other = torch.randn_like(y)  # what a network makes of y: shared pixels get different values
    for size in [(19, 23), None]:
        out = max_unpool2d(other, indices, *window[:3], output_size=size)
        reference = max_unpool2d_reference(other, indices, *window[:3], output_size=size)
        assert torch.equal(out, reference)


@windows
@dtypes
@layouts
def test_gradients_equal_torch(layout, dtype, window, device, cpu_isa):
    x = distinct((2, 6, 19, 23), device, torch.float64, layout).to(dtype).requires_grad_()
    y, _ = max_pool2d(x, *window)
    plain = F.max_pool2d(x, *window[:3], ceil_mode=window[3])
    exact_x = x.detach().double().requires_grad_()
    exact = F.max_pool2d(exact_x, *window[:3], ceil_mode=window[3])
    grad = torch.randn_like(y)
    assert_as_accurate(
        torch.autograd.grad(y, x, grad)[0],
        torch.autograd.grad(plain, x, grad)[0],
        torch.autograd.grad(exact, exact_x, grad.double())[0],
    )


@windows
@layouts
def test_gradcheck(layout, window, device):
    x = distinct((1, 2, 5, 7), device, layout=layout).requires_grad_()

    def values(t):
        return max_pool2d(t, *window)[0]

    assert gradcheck(values, x)
    assert gradgradcheck(values, x)

    y, indices = max_pool2d(x.detach(), *window)
    size = x.shape[2:]

    def unpool(t):
        return max_unpool2d(t, indices, *window[:3], output_size=size)

    assert gradcheck(unpool, y.requires_grad_())
    assert gradgradcheck(unpool, y)


@layouts
@pytest.mark.parametrize("channels", [1, 4, 6, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_unpacked(dtype, channels, layout, device, cpu_isa):
    shape = (2, channels, 17, 22)
    x = image(shape, device, dtype, layout).requires_grad_()
    for ceil_mode in [False, True]:
        y, indices = max_pool2d(x, 2, ceil_mode=ceil_mode)
        packed_y, packed = max_pool2d(x, 2, ceil_mode=ceil_mode, packed=True)
        assert torch.equal(packed_y, y)
        assert packed.shape == (2, -(-channels // 4), *y.shape[2:])
        assert packed.is_contiguous(memory_format=layout)
        flat = to_torch_indices(indices, shape, 2)
        assert torch.equal(to_torch_indices(packed, shape, 2, channels=channels), flat)
        assert torch.equal(from_torch_indices(flat, shape, 2, packed=True), packed)

        out = max_unpool2d(y, indices, 2, output_size=shape)
        packed_out = max_unpool2d(packed_y, packed, 2, output_size=shape)
        assert torch.equal(packed_out, out)
        grad = torch.randn_like(out)
        assert torch.equal(
            torch.autograd.grad(packed_out, x, grad)[0], torch.autograd.grad(out, x, grad)[0]
        )


@dtypes
@layouts
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (5, 3, 2)], ids=str)
def test_nan_infinity_and_signed_zero(window, layout, dtype, device, cpu_isa):
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0])
    choice = torch.randint(7, (2, 40, 17, 18))
    x = special[choice].to(device, dtype).contiguous(memory_format=layout)
    y, indices = max_pool2d(x, *window)
    plain, reference = max_pool2d_reference(x, *window)
    assert torch.equal(indices, reference)
    torch.testing.assert_close(y, plain, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(y[y == 0]), torch.signbit(plain[plain == 0]))


@layouts
def test_all_minus_infinity_takes_the_first_pixel_inside(layout, device):
    x = torch.full((1, 2, 5, 5), float("-inf"), device=device).contiguous(memory_format=layout)
    y, indices = max_pool2d(x, 3, 2, 1)
    assert torch.equal(y, x[..., :3, :3])
    assert indices[0, 0].tolist() == [[4, 3, 3], [1, 0, 0], [1, 0, 0]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_options(data):
    """Pooling equals PyTorch's, and unpooling the reference, for whatever PyTorch accepts."""
    pair = st.tuples
    kernel = data.draw(pair(st.integers(1, 16), st.integers(1, 16)), "kernel")
    stride = data.draw(pair(st.integers(1, 5), st.integers(1, 5)), "stride")
    padding = data.draw(pair(*(st.integers(0, k // 2) for k in kernel)), "padding")
    low = [max(1, k - 2 * p) for k, p in zip(kernel, padding, strict=True)]
    size = data.draw(pair(*(st.integers(a, a + 12) for a in low)), "size")
    batch = data.draw(st.sampled_from([(0, 3), (1, 1), (2, 5), (1, 17)]), "N, C")
    ceil_mode = data.draw(st.booleans(), "ceil_mode")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")

    x = image((*batch, *size), dtype=dtype, layout=layout)
    y, indices = max_pool2d(x, kernel, stride, padding, ceil_mode)
    plain, reference = max_pool2d_reference(x, kernel, stride, padding, ceil_mode)
    assert torch.equal(y, plain)
    assert torch.equal(indices, reference)

    spans = [
        (n - 1) * s - 2 * p + k
        for n, s, p, k in zip(y.shape[2:], stride, padding, kernel, strict=True)
    ]
    output_size = [
        data.draw(st.integers(max(1, span - s + 1), max(1, span + s - 1)), "output size")
        for span, s in zip(spans, stride, strict=True)
    ]
    other = torch.randn(y.shape).to(dtype).contiguous(memory_format=layout)
    out = max_unpool2d(other, indices, kernel, stride, padding, output_size)
    assert torch.equal(
        out, max_unpool2d_reference(other, indices, kernel, stride, padding, output_size)
    )


@layouts
def test_other_inputs(layout, device):
    x = image((2, 8, 12, 14), device, layout=layout)
    y, indices = max_pool2d(x, 2)
    out = max_unpool2d(y, indices, 2)

    # 3-D input
    y3, indices3 = max_pool2d(x[0], 2)
    assert torch.equal(y3, y[0])
    assert torch.equal(max_unpool2d(y3, indices3, 2), out[0])
    # Slices: not dense, with odd strides and offsets
    wide = F.pad(x, (3, 2, 1, 0, 1, 4))
    part = wide[:, 1:9, 1:, 3:17]
    assert not part.is_contiguous()
    assert torch.equal(max_pool2d(part, 2)[0], y)
    assert torch.equal(max_unpool2d(y.expand(2, 2, 8, 6, 7)[1], indices, 2), out)
    # Indices in another layout than the values
    other = LAYOUTS[layout == torch.contiguous_format]
    assert torch.equal(max_unpool2d(y, indices.contiguous(memory_format=other), 2), out)
    # Empty batch
    assert max_pool2d(x[:0], 2)[1].shape == (0, 8, 6, 7)
    assert max_unpool2d(y[:0], indices[:0], 2).shape == (0, 8, 12, 14)


def test_a_slice_of_channels_last_stays_channels_last(device):
    x = image((2, 8, 12, 14), device, layout=torch.channels_last)[:, :, 2:]
    assert max_pool2d(x, 2)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_result_does_not_depend_on_threads(count, threads):
    x = image((1, 5, 200, 210))
    y, indices = max_pool2d(x, 3, 2, 1)
    out = max_unpool2d(torch.arange(y.numel()).view_as(y).float(), indices, 3, 2, 1)
    threads(count)
    y2, indices2 = max_pool2d(x, 3, 2, 1)
    assert torch.equal(y, y2)
    assert torch.equal(indices, indices2)
    assert torch.equal(
        out, max_unpool2d(torch.arange(y.numel()).view_as(y).float(), indices, 3, 2, 1)
    )


@layouts
@pytest.mark.parametrize("packed", [False, True])
def test_operator_registration(packed, layout, device):
    ops = torch.ops.fastseg
    x = distinct((2, 6, 8, 9), device, torch.float32, layout).requires_grad_()
    pair = [2, 2], [2, 2], [0, 0]
    opcheck(ops.max_pool2d.default, (x, *pair, True, packed))
    y, indices = max_pool2d(x.detach(), 2, ceil_mode=True, packed=packed)
    opcheck(ops.max_unpool2d.default, (y.requires_grad_(), indices, *pair, [8, 9], False))
    opcheck(ops.max_pool2d_by_index.default, (x, indices, *pair, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    pool = fastseg.nn.MaxPool2d(2, return_indices=True)
    unpool = fastseg.nn.MaxUnpool2d(2)

    def there_and_back(x):
        y, indices = pool(x.relu())
        return unpool(y * 2, indices, x.shape)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(1, 4, 9, 12), (2, 4, 10, 15)]:
        x = distinct(shape, device).requires_grad_()
        out, plain = compiled(x), there_and_back(x)
        assert torch.equal(out, plain)
        assert torch.equal(*(torch.autograd.grad(o.sum(), x)[0] for o in (out, plain)))


def test_layers_replace_those_of_torch(device):
    x = image((2, 6, 13, 15), device)
    for args in [(2,), (3, 2, 1), ((3, 2), (2, 1), (1, 0))]:
        ours, theirs = fastseg.nn.MaxPool2d(*args), torch.nn.MaxPool2d(*args)
        assert torch.equal(ours(x), theirs(x))
        assert repr(ours) == repr(theirs)
        ours.return_indices = theirs.return_indices = True
        out = fastseg.nn.MaxUnpool2d(*args)(*ours(x), output_size=x.shape)
        assert torch.equal(out, torch.nn.MaxUnpool2d(*args)(*theirs(x), output_size=x.shape))
    y, packed = fastseg.nn.MaxPool2d(2, return_indices=True, packed=True)(x)
    assert packed.shape[1] == 2
    assert fastseg.nn.MaxUnpool2d(2)(y, packed).shape == (2, 6, 12, 14)


def test_more_than_2_31_elements_by_arithmetic():
    """Shapes only: the fake kernels must count in 64 bits."""
    with torch.device("meta"):
        x = torch.empty(3, 2**16, 128, 128)
        y, indices = max_pool2d(x, 2, packed=True)
    assert y.numel() == x.numel() // 4 == 3 * 2**28
    assert indices.shape == (3, 2**14, 64, 64)
    assert max_unpool2d(y, indices, 2).shape == x.shape


def test_error_messages():
    x = torch.zeros(1, 4, 6, 6)
    y, indices = max_pool2d(x, 2)
    for message, call in {
        r"x must be \(N, C, H, W\) or \(C, H, W\), got shape \(6, 6\)": lambda: max_pool2d(
            x[0, 0], 2
        ),
        "1 to 256 positions.*got 17x16": lambda: max_pool2d(x, (17, 16)),
        "stride must be positive, got 0": lambda: max_pool2d(x, 2, 0),
        "padding must be 0 to half the kernel size 2, got 2": lambda: max_pool2d(x, 2, 2, 2),
        "must fit the padded image, got kernel size 7 for 6": lambda: max_pool2d(x, 7),
        "packed indices need kernel_size 2": lambda: max_pool2d(x, 3, packed=True),
        "max_pool2d: dtype must be float32": lambda: max_pool2d(x.int(), 2),
        "convert PyTorch's with from_torch_indices": lambda: max_unpool2d(y, indices.long(), 2),
        "a fourth of them if packed.*got 2 for 4": lambda: max_unpool2d(y, indices[:, :2], 2),
        "one height and width, got 3x3 and 2x3": lambda: max_unpool2d(
            y, indices[:, :, :2], 2, output_size=(4, 6)
        ),
        "3 windows belong to an image of 5 to 7 pixels, got 8": lambda: max_unpool2d(
            y, indices, 2, output_size=(8, 6)
        ),
        "the N of x, 1, got 4 dimensions and N = 0": lambda: max_unpool2d(y, indices[:0], 2),
        "every position must lie in its window": lambda: from_torch_indices(
            torch.full((1, 1, 3, 3), 35), x.shape, 2
        ),
        "dilation must be 1, got 2": lambda: fastseg.nn.MaxPool2d(2, dilation=2),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
