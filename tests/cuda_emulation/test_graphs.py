"""CUDA graphs: what is captured once gives, replayed on other inputs, the bits of a fresh call.

In the emulation a replay runs the launches of the capture again, on the memory that they had. What
torch does in between is not part of that, so inputs are in the layouts that kernels take.
"""

import contextlib

import pytest
import torch

from fastseg import _C
from fastseg.nn import ASPP, ConvBNReLU2d, DenseCRF

from . import build
from .test_conv import BF16, HALF, LAST, Layer, dilated
from .test_dense_crf import SYMMETRIC, photograph

STREAM_K = Layer((1, 8, 65, 3), 304, BF16, **dilated(2))  # more tiles than blocks: parts of tiles
TAPS = Layer((2, 64, 13, 11), 128, HALF, **dilated(6))
GRID = (9, 14)


def forward(layer):
    """x changes, the rest stays."""
    _, weight = layer.tensors()
    bias = torch.randn(layer.K).to(layer.dtype)
    x = [layer.tensors()[0] for _ in range(3)]
    residual = torch.randn(layer.x[0], layer.K, *layer.x[2:]).to(layer.dtype)
    residual = residual.contiguous(memory_format=LAST)
    return [[t] for t in x], [weight, bias, residual]


def conv_act(layer):
    def call(ops, x, weight, bias, residual):
        return [ops.conv_act(x, weight, bias, residual, *layer.geometry, 0.1, True)]

    return call, *forward(layer)


def training(layer):
    def call(ops, x, weight, bias, residual):
        y, mean, var = ops.conv_stats(x, weight, bias, *layer.geometry, True)
        z = ops.bn_act(y, mean, var, None, None, residual, 1e-5, 0.0)
        dy, dweight, dbias, g = ops.bn_act_backward(
            residual, y, mean, var, None, None, residual, 1e-5, 0.0
        )
        dx, dw = ops.conv_backward(dy, x, weight, *layer.geometry, True, True, True)
        return [y, mean, var, z, dy, dweight, dbias, g, dx, dw]

    changing, (weight, bias, residual) = forward(layer)
    return call, changing, [weight.contiguous(memory_format=LAST), bias, residual]


def branches():
    def call(ops, x, *rest):
        return [ops.conv_branches(x, rest[:3], rest[3:], [1, 3, 6], None, 0.0, True)]

    x = [[torch.randn(2, 32, 13, 11).half().contiguous(memory_format=LAST)] for _ in range(3)]
    weights = [torch.randn(40, 32, n, n).half() / (6 * n) for n in (1, 3, 3)]
    weights = [w.contiguous(memory_format=LAST) for w in weights]
    return call, x, [*weights, *torch.randn(3, 40).half()]


def pooling():
    def call(ops, x):
        y, indices = ops.max_pool2d(x, [2, 2], [2, 2], [0, 0], False, True)
        geometry = [[2, 2], [2, 2], [0, 0]]
        return [
            *(y, indices, ops.max_unpool2d(y, indices, *geometry, [6, 8], False)),
            ops.max_pool2d_by_index(x, indices, *geometry, False),
        ]

    return call, [[torch.randn(2, 16, 6, 8).contiguous(memory_format=LAST)] for _ in range(3)], []


def upsampling():
    def call(ops, x):
        return [*ops.upsample_argmax(x, 9, 13, False, True), ops.upsample_softmax(x, 9, 13, False)]

    return call, [[torch.randn(2, 5, 4, 6)] for _ in range(3)], []


def expansion():
    def call(ops, vertical, horizontal):
        return [ops.gcn_expand(vertical, horizontal, 5, 1, 11)]

    maps = torch.randn(3, 2, 2, 6, 6, 7)
    return call, [[m.contiguous(memory_format=LAST) for m in pair] for pair in maps], []


def crf(storage):
    """Lattices, too, are built anew by every replay."""

    def call(ops, features, unary, coefficients):
        lattices = ops.permutohedral_build(features, *GRID, SYMMETRIC + storage)
        filtered = ops.permutohedral_filter(unary, lattices, True)
        counts = [len(lattices)]
        updated = ops.dense_crf(
            unary, None, lattices, counts, [coefficients], *GRID, 3, False, False
        )
        return [filtered, updated]

    changing = [[photograph(2, *GRID), torch.rand(2, 6, GRID[0] * GRID[1])] for _ in range(3)]
    return call, changing, [torch.full((6,), 4.0)]


# name -> the case, and whose convolution it is to run
CASES = {
    "convolution, taps": (lambda: conv_act(TAPS), "mma"),
    "convolution, stream-K": (lambda: conv_act(STREAM_K), "mma"),
    "convolution, wgmma": (lambda: conv_act(TAPS), "wgmma"),
    "convolution, wgmma, stream-K": (lambda: conv_act(STREAM_K), "wgmma"),
    "training": (lambda: training(TAPS), "mma"),
    "training, wgmma": (lambda: training(TAPS), "wgmma"),
    "branches": (branches, "mma"),
    "branches, wgmma": (branches, "wgmma"),
    "pooling": (pooling, "mma"),
    "upsampling": (upsampling, "mma"),
    "expansion": (expansion, "mma"),
    "crf": (lambda: crf(0), "mma"),
    "crf, 16 bits": (lambda: crf(4), "mma"),
}


class Emulated:
    def __init__(self, convolution):
        if build.cxx() is None:
            pytest.skip("no C++ compiler")
        torch.set_num_threads(1)
        self.emulator, self.ops = build.emulated_library(), torch.ops.fastseg_emulated
        major = 9 if convolution == "wgmma" else 8
        self.device, self.context = "cpu", self.emulator.compute_capability(major)

    def capture(self, call):
        with self.emulator.capturing() as replay:
            return call(), replay


class OnCuda:
    def __init__(self, convolution):
        if not torch.cuda.is_available() or not _C.build_info()["cuda_archs"]:
            pytest.skip("needs a CUDA device and fastseg built for it")
        if convolution == "wgmma" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        self.ops, self.device, self.context = (
            *(torch.ops.fastseg, "cuda"),
            contextlib.nullcontext(),
        )

    def capture(self, call):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return results, graph.replay


@pytest.mark.parametrize("layer", ["crf", "aspp", "convolution"])
def test_layers_on_cuda(layer):
    """Whole layers, with what torch does in them."""
    on = OnCuda("own")
    module, inputs = {
        "crf": (DenseCRF(iters=3), [(2, 5, 20, 24), (2, 3, 20, 24)]),
        "aspp": (ASPP(16, 8, (2, 4)).half(), [(2, 16, 13, 11)]),
        "convolution": (ConvBNReLU2d(16, 8, 3, padding=2, dilation=2).half(), [(2, 16, 13, 11)]),
    }[layer]
    module = module.cuda().eval().requires_grad_(False)
    dtype = torch.float32 if layer == "crf" else torch.float16
    first, second = ([torch.rand(shape, device="cuda").to(dtype) for shape in inputs] for _ in "ab")
    result, replay = on.capture(lambda: module(*first))
    for place, t in zip(first, second, strict=True):
        place.copy_(t)
    replay()
    torch.testing.assert_close(result, module(*second), rtol=0, atol=0)


@pytest.mark.parametrize("machine", [Emulated, OnCuda], ids=["emulated", "on_cuda"])
@pytest.mark.parametrize("name", CASES)
def test_replay_gives_what_a_fresh_call_gives(name, machine, monkeypatch):
    case, convolution = CASES[name]
    monkeypatch.setenv("FASTSEG_CONV", convolution)
    on = machine(convolution)
    call, changing, fixed = case()
    changing = [[t.to(on.device) for t in tensors] for tensors in changing]
    fixed = [t.to(on.device) for t in fixed]
    static = [torch.empty_like(t).copy_(t) for t in changing[0]]
    with on.context:
        results, replay = on.capture(lambda: call(on.ops, *static, *fixed))
        for tensors in [*changing[1:], changing[1]]:
            for place, t in zip(static, tensors, strict=True):
                place.copy_(t)
            replay()
            got = [t.clone() for t in results]
            expected = call(on.ops, *tensors, *fixed)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
