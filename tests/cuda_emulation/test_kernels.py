"""Every code path of the CUDA kernels, emulated on small shapes, against the CPU kernels; with
other orders of the threads, and (slow) under AddressSanitizer, UBSan and ThreadSanitizer.

The tests of the ops run on the emulated kernels as well: ``pytest --emulate tests/ops``.
"""

import os
import subprocess
import sys

import pytest
import torch

from fastseg import _C

from . import build

CPU, LAST = torch.contiguous_format, torch.channels_last


def image(*shape, dtype=torch.float32, layout=CPU):
    """Few distinct values, so that ties are common."""
    x = torch.randint(-4, 5, shape).to(dtype)
    return x.contiguous(memory_format=layout)


def pooling(ops, shape, dtype, layout, window, packed=False):
    """Pool, unpool with both meeting rules, pool by index: all that depends on one geometry."""
    x = image(*shape, dtype=dtype, layout=layout)
    x[0, 1, 2:4, 3] = torch.nan
    size, stride, padding = [[a, a] for a in window]
    y, indices = ops.max_pool2d(x, size, stride, padding, True, packed)
    results = [y, indices]
    for flag in (False, True):
        results += [
            ops.max_unpool2d(y, indices, size, stride, padding, shape[2:], flag),
            ops.max_pool2d_by_index(x, indices, size, stride, padding, flag),
        ]
    return results


def training(ops, channels, layout, dtype, residual, slope=0.0, size=(9, 8)):
    """Forward and backward of the fused pass after a convolution."""
    x = torch.randn(2, 5, *size).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(channels, 5, 1, 1).to(dtype)
    scale, shift = torch.randn(2, channels)
    r = torch.randn(2, channels, *size).to(dtype) if residual else None
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    z, y, mean, var = ops.conv_bn_act(x, weight, None, scale, shift, r, *geometry, 1e-5, slope)
    dz = torch.randn(z.shape).to(dtype)
    grads = ops.bn_act_backward(dz, y, mean, var, scale, shift, r, 1e-5, slope)
    return [z, mean, var, *grads, ops.conv_act(x, weight, scale.to(dtype), r, *geometry, slope)]


def crf(ops, labels, full, dtype=torch.float32, d=5, spread=2.0, batch=1):
    """Two lattices an image, their filter and its adjoint, and updates of the dense CRF, of whose
    terms the last `full` have a matrix."""
    height, width = 6, 11
    lattices = []
    for features, normalization in ((d, 3), (2, 2)):
        f = torch.rand(batch, features, height * width, dtype=dtype) * spread
        lattices += ops.permutohedral_build(f, height, width, normalization)
    unary, counts = torch.rand(batch, labels, height * width, dtype=dtype), [batch, batch]
    vector, matrix = torch.rand(labels, dtype=dtype), torch.rand(labels, labels, dtype=dtype)
    coefficients = [vector] * (2 - full) + [matrix + matrix.T] * full
    return [
        ops.permutohedral_filter(unary, lattices[:batch], False),
        ops.permutohedral_filter(unary, lattices[batch:], True),
        ops.dense_crf(unary, None, lattices, counts, coefficients, height, width, 3, False, False),
        ops.dense_crf(unary, unary, lattices, counts, coefficients, height, width, 1, True, False),
    ]


def halves(ops, dtype, layout, residual, slope):
    """Batch norm and its backward, split where other processes add their statistics."""
    y = torch.randn(2, 6, 5, 7).to(dtype).contiguous(memory_format=layout)
    wide = torch.promote_types(dtype, torch.float32)
    mean, scale, shift = torch.randn(3, 6, dtype=wide)
    norm = [mean, torch.rand(6, dtype=wide) + 0.5, scale, shift]
    r = torch.randn_like(y) if residual else None
    z = ops.bn_act(y, *norm, r, 1e-5, slope)
    sums, g = ops.bn_act_backward_sums(torch.randn_like(y), y, *norm, r, 1e-5, slope)
    dz, count = g if residual else torch.randn_like(y), torch.full((1,), 70.0, dtype=wide)
    return [
        *(z, sums, g),
        ops.bn_act_backward_apply(dz, residual, y, *norm, sums, count, 1e-5, slope),
    ]


def atrous(ops, size, channels, dilation, dtype, residual=True, slope=0.0, kernel=3, stride=1):
    """A layer most of whose taps read padding: the direct convolution."""
    C, K = channels
    x = torch.randn(2, C, *size).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(K, C, kernel, kernel).to(dtype) * 0.1
    padding = dilation * (kernel - 1) // 2
    out = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size]
    r = torch.randn(2, K, *out).to(dtype).contiguous(memory_format=LAST) if residual else None
    pairs = [[v, v] for v in (stride, padding, dilation)]
    return [ops.conv_act(x, weight, torch.randn(K).to(dtype), r, *pairs, 1, slope)]


def upsample(ops, shape, size, dtype, layout, align_corners=False):
    """Probabilities of labels rather than labels, which may differ where two logits are equal."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    labels, prob = ops.upsample_argmax(x, *size, align_corners, True)
    probs = ops.upsample_softmax(x, *size, align_corners)
    assert labels.shape == prob.shape == probs[:, 0].shape
    return [prob, probs, probs.float().gather(1, labels.long()[:, None])]


def global_conv(ops, shape, dtype, layout=LAST):
    """The maps of GCN to 16-bit precision: the CPU uses Winograd's algorithm, the tap form of a
    16-bit type is rounded. And the expansion of some rows of two of them."""
    N, C, H, W, K, k = shape
    x = torch.randn(N, C, H, W, dtype=dtype).contiguous(memory_format=layout)
    sizes = ((K, C, k, 1), (K,), (K, K, 1, k), (K,), (K, C, 1, k), (K,), (K, K, k, 1), (K,))
    weights = [(torch.randn(size) / (size[0] * k) ** 0.5).to(dtype) for size in sizes]
    maps = ops.gcn_conv(x, *weights)
    rounded = dtype if dtype != torch.float32 else torch.float16
    vertical, horizontal = torch.randn(2, *maps[0].shape, dtype=dtype)
    return [
        *(m.to(rounded) for m in maps),
        ops.gcn_expand(vertical, horizontal, k, 1, N * H - 1),
    ]


CASES = {
    "gcn": lambda ops: global_conv(ops, (2, 12, 11, 9, 21, 7), torch.float16),
    "gcn bfloat16": lambda ops: global_conv(ops, (1, 7, 10, 19, 40, 5), torch.bfloat16, CPU),
    "gcn float32": lambda ops: global_conv(ops, (1, 5, 9, 12, 37, 27), torch.float32),
    "gcn float64": lambda ops: global_conv(ops, (2, 3, 3, 17, 18, 9), torch.float64),
    "upsample nchw": lambda ops: upsample(ops, (2, 5, 4, 6), (9, 13), torch.float32, CPU),
    "upsample nhwc": lambda ops: upsample(ops, (1, 7, 5, 3), (4, 8), torch.float16, LAST, True),
    "upsample many": lambda ops: upsample(ops, (1, 300, 2, 3), (3, 5), torch.float64, CPU),
    "direct conv": lambda ops: atrous(ops, (13, 11), (64, 136), 6, torch.float16),
    "direct conv ragged": lambda ops: atrous(ops, (9, 7), (40, 8), 5, torch.bfloat16, False, 0.1),
    "direct conv strided": lambda ops: atrous(
        ops, (15, 16), (8, 24), 9, torch.float16, True, 1.0, 3, 2
    ),
    "pool 2x2 nhwc": lambda ops: pooling(ops, (2, 16, 6, 8), torch.float16, LAST, (2, 2, 0)),
    "pool 2x2 nhwc packed": lambda ops: pooling(
        ops, (2, 16, 7, 5), torch.bfloat16, LAST, (2, 2, 0), True
    ),
    "pool 2x2 nhwc ragged": lambda ops: pooling(
        ops, (1, 13, 7, 5), torch.float32, LAST, (2, 2, 0), True
    ),
    "pool 2x2 nchw": lambda ops: pooling(ops, (2, 3, 6, 16), torch.float16, CPU, (2, 2, 0)),
    "pool 2x2 nchw packed": lambda ops: pooling(
        ops, (1, 6, 4, 16), torch.float32, CPU, (2, 2, 0), True
    ),
    "pool 2x2 nchw ragged": lambda ops: pooling(
        ops, (1, 6, 5, 11), torch.float64, CPU, (2, 2, 0), True
    ),
    "pool 3x3 nhwc": lambda ops: pooling(ops, (2, 8, 9, 7), torch.float16, LAST, (3, 2, 1)),
    "pool 3x3 nchw": lambda ops: pooling(ops, (2, 3, 9, 7), torch.bfloat16, CPU, (3, 2, 1)),
    "pool 5x5 nhwc": lambda ops: pooling(ops, (1, 9, 8, 9), torch.float32, LAST, (5, 3, 2)),
    "crf": lambda ops: crf(ops, 5, 0),
    "crf, batch": lambda ops: crf(ops, 7, 1, batch=3),
    "crf, full matrix": lambda ops: crf(ops, 21, 1),
    "crf, two matrices": lambda ops: crf(ops, 21, 2),
    "crf, heavy vertices": lambda ops: crf(ops, 2, 1, d=3, spread=0.01),
    "crf, many labels": lambda ops: crf(ops, 150, 0, torch.float64),
    "crf, wide keys": lambda ops: crf(ops, 3, 0, d=16, spread=60.0),
    "batch norm halves nhwc": lambda ops: halves(ops, torch.float32, LAST, True, 0.0),
    "batch norm halves nchw": lambda ops: halves(ops, torch.float64, CPU, False, 0.1),
    "batch norm nhwc": lambda ops: training(ops, 16, LAST, torch.float32, True),
    "batch norm nhwc ragged": lambda ops: training(ops, 11, LAST, torch.float16, False, 0.1),
    "batch norm nchw": lambda ops: training(ops, 3, CPU, torch.bfloat16, True, 0.1),
    "batch norm nhwc, slices": lambda ops: training(
        ops, 64, LAST, torch.float32, True, size=(23, 19)
    ),
    "batch norm nchw, slices": lambda ops: training(
        ops, 2, CPU, torch.float32, False, size=(128, 97)
    ),
    "batch norm nchw double": lambda ops: training(ops, 4, CPU, torch.float64, False, 1.0),
}


emulated = pytest.mark.skipif(build.cxx() is None, reason="no C++ compiler")


def assert_same(got, expected):
    """Equal; floating-point values to within rounding, 16-bit ones to two rounding steps, because
    PyTorch rounds between a convolution and what follows it."""
    if expected.dtype in (torch.float16, torch.bfloat16) and expected.numel() > 0:
        step = torch.finfo(expected.dtype).eps
        atol = 2 * step * expected.abs().nan_to_num().max().item()
        torch.testing.assert_close(got, expected, rtol=2 * step, atol=atol, equal_nan=True)
    else:
        torch.testing.assert_close(got, expected, equal_nan=True)


@emulated
@pytest.mark.parametrize("case", CASES)
def test_emulated_equals_cpu(case):
    torch.set_num_threads(1)  # under a sanitizer, torch's own threads would be reported
    emulator = build.emulated_library()
    for seed in range(3):
        emulator.seed(seed)
        results = []
        for ops in (torch.ops.fastseg, torch.ops.fastseg_emulated):
            torch.manual_seed(seed)
            results.append(CASES[case](ops))
        emulator.seed(0)
        for expected, got in zip(*results, strict=True):
            assert got.stride() == expected.stride()
            assert_same(got, expected)


class OnCuda:
    """The ops, on copies of their tensor arguments on the GPU."""

    def __getattr__(self, name: str):
        op = getattr(torch.ops.fastseg, name)

        def move(x):
            return x.cuda() if isinstance(x, torch.Tensor) else x

        return lambda *arguments: op(*torch.utils._pytree.tree_map(move, arguments))


@pytest.mark.parametrize("case", CASES)
def test_on_cuda_equals_cpu(case, monkeypatch):
    if not torch.cuda.is_available() or not _C.build_info()["cuda_archs"]:
        pytest.skip("needs a CUDA device and fastseg built for it")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        results = []
        for ops in (torch.ops.fastseg, OnCuda()):
            torch.manual_seed(0)
            results.append(CASES[case](ops))
    finally:
        torch.use_deterministic_algorithms(False)
    for expected, got in zip(*results, strict=True):
        assert got.is_cuda
        assert_same(got.cpu(), expected)


@emulated
@pytest.mark.slow
@pytest.mark.skipif("FASTSEG_SANITIZE" in os.environ, reason="runs inside itself")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer_finds_nothing(sanitizer):
    environment = {**os.environ, **build.preload(sanitizer), "FASTSEG_SANITIZE": sanitizer}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    command += [__file__ + "::test_emulated_equals_cpu", str(build.HERE / "test_conv.py")]
    command += [str(build.HERE / "test_conv_wgmma.py")]
    command += ["-k", "emulated"]
    done = subprocess.run(
        command, cwd=build.ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
