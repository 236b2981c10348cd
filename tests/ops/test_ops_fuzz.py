"""Random shapes, layouts and options of the ops beside the convolution engine, against float64.
FASTSEG_FUZZ_CASES=10000 runs more of them than the default."""

import os
import random

import pytest
import torch
import torch.nn.functional as F

from fastseg import _C
from fastseg.ops import (
    conv_bn_act,
    conv_bn_act_reference,
    global_conv2d,
    global_conv2d_reference,
    max_pool2d,
    max_unpool2d,
    to_torch_indices,
    upsample_argmax,
    upsample_softmax,
)
from fastseg.ops.max_unpool import max_pool2d_reference, max_unpool2d_reference
from fastseg.ops.upsample import upsample_softmax_reference
from tests.ops.test_conv_engine_fuzz import geometry, layout, odds

pytestmark = pytest.mark.usefixtures("smallest_fused")

CASES = int(os.environ.get("FASTSEG_FUZZ_CASES", "100"))
BLOCKS = 4
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.channels_last, torch.contiguous_format]

blocks = pytest.mark.parametrize("block", range(BLOCKS))


def seeds(block):
    return range(block * CASES // BLOCKS, (block + 1) * CASES // BLOCKS)


@pytest.fixture
def case(threads):
    """The generator of a seed's case; instruction set and threads are random as well."""
    isa = _C.cpu_isa()

    def start(seed):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        _C.set_cpu_isa(rng.choice(_C.supported_cpu_isas()))
        threads(rng.choice([1, 2]))
        return rng

    yield start
    _C.set_cpu_isa(isa)


def extent(rng, most=40):
    return rng.choice([1, 2, rng.randint(1, most), rng.randint(1, most)])


def image(rng, N, C, H, W, dtype):
    return layout(rng, torch.randn(N, C, H, W).to(dtype))


def assert_near(got, plain, exact, allowed, message, terms=0.0):
    """At most ``allowed`` of the largest value (or of what it is the sum of) from the exact result,
    or twice as far as torch, whose gradients in bfloat16 can be NaN where the result is not."""
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype), message
    if exact.numel() == 0:
        return
    largest = max(exact.abs().max().item(), 3 * exact.square().mean().sqrt().item(), terms)
    theirs = (plain.double() - exact).abs().nan_to_num(0.0).max().item()
    allowed = allowed * largest + 2 * theirs
    error = (got.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.2e} > {allowed:.2e}, {message}"


def results(op, inputs, grad, wide=None):
    """The op's result and its gradients, computed in another dtype if told so. ``grad`` is rounded
    to the dtype of ``inputs`` in any case."""
    grad = grad.to(inputs[0].dtype)
    inputs = [None if t is None else t.detach() for t in inputs]
    inputs = [None if t is None else t.to(wide or t.dtype).requires_grad_() for t in inputs]
    y = op(*inputs)
    grads = torch.autograd.grad(y, [t for t in inputs if t is not None], grad.to(y.dtype))
    return [y.detach(), *grads]


@blocks
def test_conv_bn_act(block, case):
    """In training and not, with the gradients of everything."""
    for seed in seeds(block):
        conv_bn_act_case(case(seed), f"seed {seed}")


def conv_bn_act_case(rng, message):
    kernel, stride, padding, dilation = geometry(rng)
    dtype = rng.choice(DTYPES)
    groups = rng.choice([1, 1, 1, 1, 2, 3])
    # torch's convolutions in groups and in 16 bits crash where a kernel lies in the padding alone.
    if groups > 1 or dtype.itemsize == 2:
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(min(p, n) for p, n in zip(padding, reach, strict=True))
    C, K = (groups * rng.choice([rng.randint(1, 20), rng.randint(1, 70)]) for _ in "CK")
    N, training = rng.choice([0, 1, 1, 2, 3]), odds(rng, 0.6)
    size = [
        max(extent(rng), d * (k - 1) + 1 - 2 * p)
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x = image(rng, N, C, *size, dtype)
    weight = torch.randn(K, C // groups, *kernel) / (C // groups * kernel[0] * kernel[1]) ** 0.5
    weight = weight.to(dtype, memory_format=rng.choice(FORMATS))
    out = F.conv2d(x.double(), weight.double(), None, **options).shape
    count = out[0] * out[2] * out[3]
    if training and count == 1:
        return
    wide = torch.promote_types(dtype, torch.float32)
    # Pre-activations far from 0: a sign that rounding decides would be no error of a gradient.
    sign = torch.where(torch.arange(K) % 2 == 0, 1.0, -1.0)
    scale, shift = torch.rand(K, dtype=wide) * 0.1 + 0.1, (sign * 8).to(wide)
    mean, var = torch.randn(K, dtype=wide) * 0.1, torch.rand(K, dtype=wide) + 0.5
    residual = image(rng, *out, dtype) * 0.25 if odds(rng, 0.4) else None
    inputs = [x, weight, torch.randn(K).to(dtype) * 0.1 if odds(rng, 0.5) else None]
    inputs += [scale, shift, residual]
    options |= {
        "training": training,
        "eps": rng.choice([1e-5, 1e-2]),
        "activation": rng.choice(["relu", "leaky_relu", "none"]),
        "negative_slope": rng.choice([0.01, 0.3]),
    }
    own = {"accuracy": rng.choice(["default", "strict"])}
    dz = torch.randn(out, dtype=torch.float64)

    message += f": {tuple(x.shape)} {x.stride()} {tuple(weight.shape)} {weight.stride()} "
    message += f"{options} {own} {dtype} {_C.cpu_isa()}"

    def compute(op, wide=None, **own):
        stats = [t.to(wide or t.dtype, copy=True) for t in (mean, var)]

        def layer(x, weight, bias, scale, shift, residual):
            return op(x, weight, bias, scale, shift, *stats, residual, **options, **own)

        return [*results(layer, inputs, dz, wide), *stats]

    if training and count == 0:
        z = conv_bn_act(x, weight, None, scale, shift, mean, var, **options, **own)
        assert z.shape == out, message
        return
    got = compute(conv_bn_act, **own)
    plain = compute(conv_bn_act_reference)
    exact = compute(conv_bn_act_reference, torch.float64)
    # Winograd's 1e-5; float16 and bfloat16 round the weights that the batch norm is folded into and
    # their gradients, of which that of the scale is a sum.
    allowed = {torch.float32: 2e-5, torch.float64: 1e-12}.get(dtype, 16 * torch.finfo(dtype).eps)
    # The backward of the batch norm takes differences; of few, nearly equal values nothing is left.
    y = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups)
    terms = [0.0] * len(got)
    if training:
        deviation = (y.var((0, 2, 3), correction=0) + options["eps"]).sqrt().min().item()
        largest = scale.max().item() * dz.abs().max().item() / deviation
        terms[1] = largest
        terms[2] = largest * x.double().abs().max().item() * count**0.5
        if inputs[2] is not None:
            terms[3] = largest * count**0.5  # the bias, whose gradient is 0
        terms[3 + (inputs[2] is not None)] = dz.abs().max().item() * count**0.5  # the scale
    for i, parts in enumerate(zip(got, plain, exact, strict=True)):
        assert_near(*parts, allowed, f"result {i}, {message}", terms[i])
    last = F.conv2d(x, weight, None, stride, padding, dilation).stride(1) == 1 if groups == 1 else 0
    if training and dtype == torch.float32 and last:
        torch.set_num_threads(3 - torch.get_num_threads())
        for one, other in zip(got, compute(conv_bn_act, **own), strict=True):
            assert torch.equal(one, other), f"other bits, {message}"


@blocks
def test_global_conv2d(block, case):
    for seed in seeds(block):
        global_conv2d_case(case(seed), f"seed {seed}")


def global_conv2d_case(rng, message):
    dtype = rng.choice(DTYPES)
    k = rng.choice([1, 3, 5, 7, 9, 11, 13, 15, 25])
    N, C, K = rng.choice([0, 1, 1, 2, 3]), rng.choice([1, rng.randint(1, 70), 300]), extent(rng)
    x = image(rng, N, C, extent(rng), extent(rng), dtype)
    sizes = ((K, C, k, 1), (K,), (K, K, 1, k), (K,), (K, C, 1, k), (K,), (K, K, k, 1), (K,))
    inputs = [x]
    for size in sizes:
        weight = torch.randn(size) / (1 if len(size) == 1 else (size[1] * k) ** 0.5)
        inputs.append(weight.to(dtype))
    dy = torch.randn(N, K, *x.shape[2:], dtype=torch.float64)
    got, plain, exact = (
        results(op, inputs, dy, wide)
        for op, wide in (
            (global_conv2d, None),
            (global_conv2d_reference, None),
            (global_conv2d_reference, torch.float64),
        )
    )
    message += f": {tuple(x.shape)} {x.stride()} {K} {k} {dtype} {_C.cpu_isa()}"
    # Of two stages by Winograd, each 1e-5, and the weights' gradients.
    allowed = {torch.float32: 3e-5, torch.float64: 1e-12}.get(dtype, 4 * torch.finfo(dtype).eps)
    for i, parts in enumerate(zip(got, plain, exact, strict=True)):
        assert_near(*parts, allowed, f"result {i}, {message}")
    if dtype != torch.float64:
        torch.set_num_threads(3 - torch.get_num_threads())
        for one, other in zip(got, results(global_conv2d, inputs, dy), strict=True):
            assert torch.equal(one, other), f"other bits, {message}"


@blocks
def test_pooling(block, case):
    """Exactly what torch gives, ties and NaN included; unpooling is exact too."""
    for seed in seeds(block):
        pooling_case(case(seed), f"seed {seed}")


def pooling_case(rng, message):
    kernel = rng.choice([(2, 2), (2, 2), (3, 3), (rng.randint(1, 5), rng.randint(1, 5))])
    stride = rng.choice([kernel, kernel, (rng.randint(1, 5), rng.randint(1, 5))])
    padding = tuple(rng.randint(0, n // 2) for n in kernel) if odds(rng, 0.4) else (0, 0)
    ceil_mode = odds(rng, 0.4)
    packed = kernel == stride == (2, 2) and padding == (0, 0) and odds(rng, 0.5)
    size = [max(extent(rng), n - 2 * p) for n, p in zip(kernel, padding, strict=True)]
    x = torch.randn(rng.choice([0, 1, 2, 3]), extent(rng, 70), *size)
    if odds(rng, 0.5):
        x = x.round()  # ties
    if odds(rng, 0.2):
        x[torch.rand_like(x) < 0.05] = torch.nan
    x = layout(rng, x.to(rng.choice(DTYPES)))
    options = (kernel, stride, padding)
    message += f": {tuple(x.shape)} {x.stride()} {options} {ceil_mode} {packed} {x.dtype} "
    message += _C.cpu_isa()
    y, indices = max_pool2d(x, *options, ceil_mode, packed)
    right_y, right = max_pool2d_reference(x, *options, ceil_mode, packed)
    assert torch.equal(y.nan_to_num(9), right_y.nan_to_num(9)), message
    assert torch.equal(indices, right), message
    if x.numel():
        torch_y = F.max_pool2d(x, *options, ceil_mode=ceil_mode)
        assert torch.equal(y.nan_to_num(9), torch_y.nan_to_num(9)), message
    values = layout(rng, torch.randn(y.shape).to(x.dtype)).requires_grad_()
    z = max_unpool2d(values, indices, *options, size)
    wanted = max_unpool2d_reference(values.detach(), indices, *options, size)
    assert torch.equal(z, wanted), message
    if z.numel() and values.numel():
        # Of the windows that name one pixel the last gets its gradient.
        grad = torch.randn(z.shape).to(x.dtype)
        where = to_torch_indices(indices, size, *options, channels=x.shape[1]).flatten(2)
        order = torch.arange(where.shape[2]).expand_as(where)
        winner = torch.zeros(grad.flatten(2).shape, dtype=torch.int64)
        winner.scatter_reduce_(2, where, order, "amax")
        expected = grad.flatten(2).gather(2, where) * (winner.gather(2, where) == order)
        got = torch.autograd.grad(z, values, grad)[0]
        assert torch.equal(got, expected.view_as(got)), message


@blocks
def test_upsampling(block, case):
    for seed in seeds(block):
        upsampling_case(case(seed), f"seed {seed}")


def upsampling_case(rng, message):
    N, C = rng.choice([0, 1, 2]), extent(rng, 70)
    x = image(rng, N, C, extent(rng), extent(rng), rng.choice(DTYPES))
    size, corners = (extent(rng, 90), extent(rng, 90)), odds(rng, 0.5)
    message += f": {tuple(x.shape)} {x.stride()} {size} {corners} {x.dtype} {_C.cpu_isa()}"
    dy = torch.randn(*x.shape[:2], *size, dtype=torch.float64)
    got, plain, exact = (
        results(lambda t, op=op: op(t, size, corners), [x], dy, wide)
        for op, wide in (
            (upsample_softmax, None),
            (upsample_softmax_reference, None),
            (upsample_softmax_reference, torch.float64),
        )
    )
    for parts in zip(got, plain, exact, strict=True):
        # In float64 nothing is exact: logits up to 5 round, exponentials multiply that.
        allowed = 1e-14 if x.dtype == torch.float64 else 4 * torch.finfo(x.dtype).eps
        assert_near(*parts, allowed, message)
    labels, prob = upsample_argmax(x, size, corners, return_prob=True)
    assert torch.equal(labels, upsample_argmax(x, size, corners)), message
    logits = F.interpolate(x.double(), size, mode="bilinear", align_corners=corners)
    if logits.numel():  # differences of logits decide, so their rounding is what is allowed
        step = 8 * torch.finfo(prob.dtype).eps * x.double().abs().max().item()
        chosen = labels[:, None].long()
        assert (logits.amax(1) - logits.gather(1, chosen)[:, 0]).max() <= step, message
        error = (prob - logits.softmax(1).gather(1, chosen)[:, 0]).abs().max().item()
        assert error <= 2 * step + 8 * torch.finfo(prob.dtype).eps, message
