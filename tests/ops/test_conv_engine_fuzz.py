"""The engine's convolutions of random shapes, layouts, algorithms and instruction sets, against
torch in float64. FASTSEG_FUZZ_CASES=10000 runs more of them than the default."""

import os
import random

import pytest
import torch
from torch import nn

from fastseg import _C
from fastseg.nn.packed import PackedConv2d, unsupported
from fastseg.ops._conv_options import output_size
from fastseg.ops.conv_choice import choose_algorithm
from fastseg.ops.conv_engine import activate, conv_engine, pack_conv
from fastseg.ops.conv_sum import conv_sum, conv_sum_reference, pack_conv_sum
from tests.ops import test_conv_engine, test_conv_engine_bf16

CASES = int(os.environ.get("FASTSEG_FUZZ_CASES", "400"))
BLOCKS = 8
BF16 = torch.bfloat16

blocks = pytest.mark.parametrize("block", range(BLOCKS))


def seeds(block):
    return range(block * CASES // BLOCKS, (block + 1) * CASES // BLOCKS)


@pytest.fixture
def restored(threads):
    """What the cases switch: the instruction set, the kind of bfloat16 products, the threads."""
    isa, fast = _C.cpu_isa(), _C.bf16_products()
    yield
    _C.set_cpu_isa(isa)
    _C.set_bf16_products(fast)


def odds(rng, p):
    return rng.random() < p


def channels(rng):
    return rng.choice([rng.randint(1, 70), rng.randint(1, 70), rng.randint(100, 600)])


def geometry(rng):
    """Kernel, stride, padding and dilation, mostly of the kinds that have their own algorithm."""
    kind = rng.choice(["square", "square", "bordered", "line", "any"])
    one = (1, 1)
    if kind == "square":
        dilation = rng.choice([one, (2, 2), (rng.randint(1, 9), rng.randint(1, 9))])
        padding = rng.choice([dilation, (rng.randint(0, 9), rng.randint(0, 9))])
        return (3, 3), one, padding, dilation
    if kind == "bordered":
        dilation = (rng.randint(1, 9), rng.randint(1, 9))
        return (3, 3), one, dilation, dilation
    if kind == "line":
        k, pad = rng.randint(2, 17), rng.randint(0, 9)
        kernel, padding = rng.choice([((k, 1), (pad, 0)), ((1, k), (0, pad))])
        return kernel, one, padding, one
    pairs = [(rng.randint(low, n), rng.randint(low, n)) for low, n in ((1, 7), (1, 4), (0, 8))]
    return *pairs, (rng.randint(1, 4), rng.randint(1, 4))


def layout(rng, t):
    """The same values in memory of another order, or as part of something larger."""
    N, C, H, W = t.shape
    kind = rng.choice(["last", "last", "first", "channels", "pixels", "turned", "expanded"])
    if kind == "channels":
        before, behind = rng.randint(0, 20), rng.randint(0, 20)
        wide = torch.full((N, H, W, before + C + behind), torch.nan, dtype=t.dtype)
        view = wide.permute(0, 3, 1, 2)[:, before : before + C]
    elif kind == "pixels":
        wide = torch.full((N + 1, 2 * H + 1, 3 * W, C), torch.nan, dtype=t.dtype)
        view = wide.permute(0, 3, 1, 2)[1:, :, 1::2, ::3]
    elif kind == "turned":
        return t.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    elif kind == "expanded" and N > 1:
        return t[:1].contiguous(memory_format=torch.channels_last).expand(N, -1, -1, -1)
    else:
        return t.contiguous(memory_format=torch.channels_last) if kind == "last" else t.contiguous()
    return view.copy_(t)


def fitting_tiles(kernel, stride, padding, dilation, size):
    """The algorithms that compute a convolution, chosen for it or not."""
    if stride != (1, 1):
        return [0]
    if 1 in kernel and dilation == (1, 1) and padding[0 if kernel[0] == 1 else 1] == 0:
        return [0, 5]
    if kernel != (3, 3):
        return [0]
    grid = max(-(-n // d) for n, d in zip(size, dilation, strict=True))  # pixels of a sub-grid
    bordered = [tile for tile, most in ((1, 2), (3, 3)) if padding == dilation and grid <= most]
    return [0, 2, 4, 6, *bordered]


def random_case(seed):
    """Tensors x, weight, bias and residual, options, tile and dtype of products."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kernel, stride, padding, dilation = geometry(rng)
    N, C, K = rng.choice([0, 1, 1, 1, 2, 3, 5]), channels(rng), channels(rng)
    # Few pixels where there are many channels: the cases should differ in shape, not in patience.
    most = max(3, int((2e6 / (max(N, 1) * C * K * kernel[0] * kernel[1])) ** 0.5))
    size = tuple(
        max(rng.randint(1, min(most, 40)), d * (k - 1) + 1 - 2 * p)
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    if (kernel, padding) == ((3, 3), dilation) and odds(rng, 0.5):  # few pixels per sub-grid
        size = tuple(rng.randint(1, 3 * d) for d in dilation)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    tile = rng.choice(fitting_tiles(kernel, *options.values(), size))
    dtype = rng.choice([torch.float32, BF16])
    products = torch.float32
    if odds(rng, 0.3):
        accuracy = rng.choice(["default", "strict"])
        if dtype == BF16:
            _C.set_bf16_products(odds(rng, 0.5))
        tile, products, _ = choose_algorithm(
            C, K, kernel, size, **options, dtype=dtype, accuracy=accuracy
        )
    elif dtype == BF16 and tile < 6 and odds(rng, 0.5):
        products = BF16
    x = torch.randn(N, C, *size).to(dtype)
    if N > 1 and odds(rng, 0.1):
        x = x[:1].expand(N, -1, -1, -1)
    # Rounded beforehand, so that only what the engine itself rounds is an error.
    weight, bias = torch.randn(K, C, *kernel).to(dtype).float(), torch.randn(K).to(dtype).float()
    residual = torch.randn(N, K, *output_size(size, kernel, *options.values())).to(dtype)
    options["activation"] = rng.choice(["none", "relu", "leaky_relu"])
    options["negative_slope"] = rng.choice([0.01, 0.2, -0.5, 2.0])
    tensors = (
        layout(rng, x),
        weight if odds(rng, 0.7) else weight.contiguous(memory_format=torch.channels_last),
        bias if odds(rng, 0.7) else None,
        layout(rng, residual) if odds(rng, 0.5) else None,
    )
    return rng, tensors, options, tile, products


def destination(rng, like):
    """A place for the result among others of a concatenation, and all of it."""
    N, K, H, W = like.shape
    before, behind = rng.choice([(0, 0), (32, 32), (rng.randint(0, 40), rng.randint(0, 40))])
    whole = torch.randn(N, H, W, before + K + behind).to(like.dtype).permute(0, 3, 1, 2)
    return whole[:, before : before + K], whole


@blocks
def test_convolutions(block, restored, threads):
    for seed in seeds(block):
        rng, tensors, options, tile, products = random_case(seed)
        x, weight, bias, residual = tensors
        _C.set_cpu_isa(rng.choice(_C.supported_cpu_isas()))
        threads(rng.choice([1, 2]))
        conv = pack_conv(weight, bias, **options, tile=tile, products=products)
        y = conv_engine(x, conv, residual)
        exact = test_conv_engine.exact_result(*tensors, **options)
        message = f"seed {seed}, tile {tile} {products} {_C.cpu_isa()}: {tuple(x.shape)} {options}"
        assert (y.shape, y.dtype) == (exact.shape, x.dtype), message
        if y.numel():
            # Of a thousand outputs that see the whole kernel one is above three deviations; in maps
            # of a few pixels all may be small, but errors are those of whole tiles.
            largest = max(exact.abs().max().item(), 3 * weight[0].numel() ** 0.5)
            allowed = test_conv_engine.ALLOWED[tile] * largest
            if x.dtype == BF16:
                leaky = options["activation"] == "leaky_relu"
                slope = options["negative_slope"] if leaky else 1.0
                allowed = test_conv_engine_bf16.largest_of_many(
                    exact, weight, tile, products, slope
                )
            error = (y - exact).abs().max().item()
            assert error <= allowed, f"error {error:.2e} > {allowed:.2e}, {message}"
        place, whole = destination(rng, y)
        place.zero_()
        before = whole.clone()
        threads(3 - torch.get_num_threads())
        assert conv_engine(x, conv, residual, out=place) is place
        assert torch.equal(place, y), f"other bits, {message}"
        place.zero_()
        assert torch.equal(whole, before), f"wrote beside its output, {message}"


@blocks
def test_sums_of_two(block, restored, threads):
    """1x1 convolutions of two images in one product, of any sizes, strides and layouts."""
    for seed in seeds(block):
        rng = random.Random(2 * CASES + seed)
        torch.manual_seed(seed)
        dtype = rng.choice([torch.float32, BF16])
        products, strassen = rng.choice([torch.float32, dtype]), int(odds(rng, 0.4))
        step = 32 if strassen or products == BF16 else 1
        C, C2 = (step * -(-channels(rng) // step) for _ in range(2))
        K = 64 * rng.randint(1, 4) if strassen else channels(rng)
        N = rng.choice([0, 1, 1, 2, 3])
        most = max(2, int((2e6 / (max(N, 1) * (C + C2) * K)) ** 0.5))
        size = [rng.randint(1, min(most, 40)) for _ in "HW"]
        strides = [rng.choice([(1, 1), (1, 1), (2, 2), (rng.randint(1, 3), 1)]) for _ in "xy"]
        images = [
            layout(
                rng,
                torch.randn(N, c, *(n * s for n, s in zip(size, stride, strict=True))).to(dtype),
            )
            for c, stride in zip((C, C2), strides, strict=True)
        ]
        weights = [torch.randn(K, c, 1, 1).to(dtype).float() for c in (C, C2)]
        bias = torch.randn(K) if odds(rng, 0.7) else None
        options = {
            "stride": strides[0],
            "other_stride": strides[1],
            "activation": rng.choice(["none", "relu", "leaky_relu", "hardswish"]),
        }
        _C.set_cpu_isa(rng.choice(_C.supported_cpu_isas()))
        threads(rng.choice([1, 2]))
        packed = pack_conv_sum(*weights, bias, **options, products=products, strassen=strassen)
        y = conv_sum(*images, packed)
        tensors = (t if t is None else t.double() for t in (*images, *weights, bias))
        exact = conv_sum_reference(*tensors, **options)
        shapes = [tuple(t.shape) for t in images]
        message = f"seed {seed}: {shapes} {K} {options} {products} {strassen} {_C.cpu_isa()}"
        assert (y.shape, y.dtype) == (exact.shape, dtype), message
        if y.numel():
            largest = max(exact.abs().max().item(), 3 * (C + C2) ** 0.5)
            allowed = (5e-6 if strassen else 2e-6) * largest
            if dtype == BF16:
                allowed += test_conv_engine_bf16.ROUNDING * largest
            if strassen and products == BF16:
                growth = test_conv_engine_bf16.DELTA * test_conv_engine_bf16.STRASSEN_GROWTH
                allowed += 6 * growth * (C + C2) ** 0.5
            error = (y - exact).abs().max().item()
            assert error <= allowed, f"error {error:.2e} > {allowed:.2e}, {message}"
        place, whole = destination(rng, y)
        place.zero_()
        before = whole.clone()
        threads(3 - torch.get_num_threads())
        assert conv_sum(*images, packed, place) is place
        assert torch.equal(place, y), f"other bits, {message}"
        place.zero_()
        assert torch.equal(whole, before), f"wrote beside its output, {message}"


@blocks
def test_layers(block, restored, threads):
    """Layers of torch.nn with every option: packed they give torch's result, or refuse."""
    refused = 0
    for seed in seeds(block):
        rng = random.Random(-1 - seed)
        torch.manual_seed(seed)
        kernel, stride, padding, dilation = geometry(rng)
        groups = rng.choice([1, 1, 1, 2, 3, 5, 8, 16])
        if odds(rng, 0.2):
            padding, stride = rng.choice(["same", "valid"]), (1, 1)
        C, K = (groups * rng.randint(1, 70 // groups) for _ in range(2))
        conv = nn.Conv2d(
            C,
            K,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            bias=odds(rng, 0.5),
            padding_mode=rng.choice(["zeros"] * 9 + ["reflect"]),
        )
        bn = nn.BatchNorm2d(K, affine=odds(rng, 0.8)) if odds(rng, 0.6) else None
        if bn is not None:
            nn.init.normal_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.1, 2)
            bn.train(odds(rng, 0.05))
        if reason := unsupported(conv, bn):
            refused += 1
            with pytest.raises(ValueError, match=r"^PackedConv2d: ") as error:
                PackedConv2d(conv, bn)
            assert str(error.value) == f"PackedConv2d: {reason}"
            assert "\n" not in reason
            continue
        options = {
            "activation": rng.choice(["none", "relu", "leaky_relu"]),
            "negative_slope": 0.1,
            "accuracy": rng.choice(["default", "strict"]),
            "dtype": rng.choice([torch.float32, BF16]),
        }
        _C.set_bf16_products(odds(rng, 0.5))
        _C.set_cpu_isa(rng.choice(_C.supported_cpu_isas()))
        threads(rng.choice([1, 2]))
        packed = PackedConv2d(conv, bn, **options)
        least = 1 + max(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        for _ in range(2):  # inputs of two sizes, of which each may take another algorithm
            x = torch.randn(rng.randint(0, 3), C, *(least + rng.randint(0, 20) for _ in "HW"))
            x = layout(rng, x.to(options["dtype"]))
            with torch.no_grad():
                layers = nn.Sequential(conv, *([] if bn is None else [bn]))
                plain = activate(layers(x.float()), options["activation"], 0.1)
                layers.double()
                exact = activate(layers(x.double()), options["activation"], 0.1)
                layers.float()
                y = packed(x)
            message = f"seed {seed}: {conv}, {bn}, {tuple(x.shape)} {options} {_C.cpu_isa()}"
            assert (y.shape, y.dtype) == (exact.shape, options["dtype"]), message
            if y.numel():
                tile, products, strassen = packed.algorithm(x)
                allowed = max(test_conv_engine.ALLOWED[tile], 5e-6 * strassen)
                if x.dtype == BF16:
                    allowed = test_conv_engine_bf16.allowed(tile, products, strassen)
                    if products == BF16:  # the folded weights are rounded, too
                        allowed += 2 * test_conv_engine_bf16.ROUNDING
                largest = max(exact.abs().max().item(), 3 * exact.square().mean().sqrt().item())
                # Batch norm and activation may make the largest output smaller than its error.
                allowed = max(1.5 * allowed * largest, 2 * (plain - exact).abs().max().item())
                error = (y - exact).abs().max().item()
                assert error <= allowed, f"error {error:.2e} > {allowed:.2e}, {message}"
    assert refused < len(seeds(block)) * 3 // 4
