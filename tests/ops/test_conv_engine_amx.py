"""The engine's kernels for AMX, on a stand-in for its instructions (tests/amx_stand_in.h), against
torch in float64. On a CPU with AMX test_conv_engine_bf16.py runs the instructions themselves."""

import ctypes
import os
import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from fastseg import _C
from fastseg.ops.conv_engine import ACTIVATIONS, pack_conv
from fastseg.ops.conv_sum import conv_sum_reference, pack_conv_sum
from tests.ops.test_conv_engine import (
    BORDERED_CASES,
    GEMM_CASES,
    LINE_CASES,
    PIECES_CASES,
    TRIPLE_CASES,
    WINOGRAD_CASES,
)
from tests.ops.test_conv_engine_bf16 import (
    BF16,
    allowed,
    case,
    exact_result,
    image,
    largest_of_many,
    random_case,
)

TESTS = Path(__file__).resolve().parents[1]
CXX = shutil.which(os.environ.get("CXX", "g++"))
NAN = float("nan")


def cpu_flags():
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if CXX is None or platform.system() != "Linux" or "avx512" not in _C.supported_cpu_isas():
        pytest.skip("needs a C++ compiler, Linux and AVX-512")
    target = tmp_path_factory.mktemp("amx") / "amx.so"
    command = [CXX, "-std=c++20", "-O1", "-mfma", "-fPIC", "-shared", "-w"]
    command += [f"-I{TESTS.parent / 'csrc'}", f"-I{TESTS}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command += [str(TESTS / "conv_engine_amx.cpp"), "-o", str(target)]
    for path in cpp_extension.library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
    library = ctypes.CDLL(str(target))
    library.run.restype = ctypes.c_int64
    return library


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def distances(tensor):
    return (0, 0, 0) if tensor is None else (tensor.stride(0), tensor.stride(2), tensor.stride(3))


def extent(tensor):
    """Elements from the first to the last."""
    if tensor is None:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def run(
    library, x, conv, residual, out, tasks=3, panels_first=False, stream=False,
    other=None, other_stride=(1, 1),
):  # fmt: skip
    """conv_engine(x, conv, residual, out), or of two images to be summed; how many tasks there
    were."""
    N, C, H, W = x.shape
    geometry = (*conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation)
    numbers = [N, C, H, W, conv.out_channels, *out.shape[2:], *geometry]
    numbers += [*distances(x), *distances(out), *distances(residual)]
    numbers += [0 if other is None else other.shape[1], *other_stride, *distances(other)]
    numbers += [list(ACTIVATIONS).index(conv.activation), conv.residual_last, stream]
    numbers += [conv.tile, tasks, panels_first]
    bias = conv.packed[-2 * (-(-conv.out_channels // 32) * 32) :]
    tasks = library.run(
        (ctypes.c_int64 * len(numbers))(*map(int, numbers)),
        ctypes.c_float(conv.negative_slope),
        *(address(x), ctypes.c_int64(extent(x)), address(other), ctypes.c_int64(extent(other))),
        *(address(conv.packed), address(bias), address(residual), address(out)),
    )
    assert tasks > 0  # -1: tiles were left open
    return tasks


def result(library, tensors, tile, activation="none", residual_last=False, how=(), **options):
    """The convolution of `tensors` by the kernels for AMX, and the exact one."""
    x, weight, bias, residual = tensors
    fused = {"activation": activation, "residual_last": residual_last}
    conv = pack_conv(weight, bias, **options, **fused, tile=tile, products=BF16)
    last = residual_last and residual is not None
    exact = exact_result(x, weight, bias, None if last else residual, **options)
    exact = ACTIVATIONS[activation](exact, conv.negative_slope)
    if last:
        exact = exact + residual
    y = torch.full(exact.shape, NAN, dtype=BF16).contiguous(memory_format=torch.channels_last)
    run(library, x, conv, residual, y, **dict(how))
    return y, exact


def assert_rounded_once(y, exact):
    """Operands are exact, sums are float32: what is left is the rounding of the result."""
    step = 2**-8 * exact.abs() + 1e-5 * exact.abs().max()
    assert ((y - exact).abs() <= step).all()


def test_detection():
    """Where there are no tiles they are never in use, and to ask for them is one clear error."""
    there = {"amx_tile", "amx_bf16", "avx512_bf16"} <= cpu_flags()
    assert ("amx" in _C.supported_cpu_isas()) == there
    if not there:
        assert _C.cpu_isa() != "amx"
        with pytest.raises(ValueError, match=r"must be one of this CPU's instruction sets .* amx$"):
            _C.set_cpu_isa("amx")


def multiply(library, a, b, c):
    """c += a @ b of 16 x 32, 32 x 16."""
    pairs = b.view(16, 2, 16).transpose(1, 2).contiguous()
    total = c.clone()
    library.multiply(address(a.contiguous()), address(pairs), address(total))
    return total


def test_stand_in(library):
    """What the manual says of TDPBF16PS."""
    a, b, c = torch.randn(16, 32).to(BF16), torch.randn(32, 16).to(BF16), torch.randn(16, 16)
    exact = c.double() + a.double() @ b.double()
    assert (multiply(library, a, b, c) - exact).abs().max() < 1e-5
    # Even and odd terms are summed from zero, then together, and last with what was there.
    a, b, c = torch.zeros(16, 32).to(BF16), torch.ones(32, 16).to(BF16), torch.full((16, 16), 2**24)
    a[0, :2] = 1  # 2 ** 24 + 1 + 1 is 2 ** 24 in float32
    a[1, 0] = 1  # the same by rounding to even
    a[2, 5] = 3  # 2 ** 24 + 3 is 2 ** 24 + 4
    total = multiply(library, a, b, c.float())
    assert total[:3, 0].tolist() == [2**24 + 2, 2**24, 2**24 + 4]
    # Denormals count as zero, and become zero.
    a.zero_()
    a[0, 0], b[0] = 2.0**-130, 2.0**30
    a[1, 1], b[1] = 2.0**-70, 2.0**-60
    assert not multiply(library, a, b, torch.zeros(16, 16)).any()
    assert not multiply(library, a, b, torch.full((16, 16), 2.0**-127)).any()
    a[2, 3], a[3, 4] = NAN, float("inf")
    total = multiply(library, a, b, torch.zeros(16, 16))
    assert total[2].isnan().all()
    assert total[3].isposinf().all()


AMX_CASES = [  # whole lines of the reduction, read where they lie
    (1, 64, 5, 65, 96, (3, 3), (1, 1), (1, 1), (1, 1)),  # three blocks a line
    (2, 32, 4, 33, 40, (3, 3), (1, 1), (2, 2), (2, 2)),  # 16 and 17 rows
    (1, 96, 9, 19, 64, (3, 3), (2, 2), (1, 1), (1, 1)),  # too narrow for lines: gathered
    (1, 32, 7, 47, 16, (5, 3), (1, 2), (2, 1), (1, 1)),  # one tile of columns
    (2, 160, 5, 9, 33, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 128, 3, 1, 64, (1, 1), (1, 1), (0, 0), (1, 1)),  # three pixels
    (1, 64, 1, 1, 64, (1, 1), (1, 1), (0, 0), (1, 1)),  # one
    (1, 16, 6, 40, 48, (3, 4), (1, 1), (1, 2), (1, 1)),  # runs of two lines of two taps each
    (1, 2048, 4, 6, 32, (3, 3), (1, 1), (1, 1), (1, 1)),  # 18432 terms in one sum
]


@pytest.mark.parametrize("panels_first", [False, True])
@pytest.mark.parametrize("shape", [*GEMM_CASES, *AMX_CASES], ids=str)
def test_gemm(library, shape, panels_first):
    N, C, H, W, K, kernel, stride, padding, dilation = shape
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    tensors = case(N, C, H, W, K, kernel, **options)
    how = {"panels_first": panels_first}
    assert_rounded_once(*result(library, tensors, 0, how=how, **options))
    assert_rounded_once(*result(library, tensors, 0, "leaky_relu", how=how, **options))
    assert_rounded_once(*result(library, tensors, 0, "relu", True, how=how, **options))
    assert_rounded_once(*result(library, (*tensors[:3], None), 0, "silu", how=how, **options))


@pytest.mark.parametrize("panels_first", [False, True])
@pytest.mark.parametrize("size", [(5, 65), (7, 9), (1, 1)])
@pytest.mark.parametrize("strides", [((1, 1), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (1, 2))])
def test_sums_of_two(library, size, strides, panels_first):
    images = [
        image(2, C, *((n - 1) * s + 1 for n, s in zip(size, stride, strict=True)))
        for C, stride in zip((64, 96), strides, strict=True)
    ]
    weights = [torch.randn(40, C, 1, 1).to(BF16).float() for C in (64, 96)]
    options = {"stride": strides[0], "other_stride": strides[1], "activation": "relu"}
    bias = torch.randn(40)
    packed = pack_conv_sum(*weights, bias, **options, products=BF16)
    y = torch.full((2, 40, *size), NAN, dtype=BF16).contiguous(memory_format=torch.channels_last)
    how = {"panels_first": panels_first, "other_stride": strides[1], "other": images[1]}
    run(library, images[0], packed.conv, None, y, **how)
    exact = conv_sum_reference(*(t.double() for t in (*images, *weights, bias)), **options)
    assert_rounded_once(y, exact)


@pytest.mark.parametrize("C", [64, 40])
def test_slices(library, C):
    """Images that are channels of larger ones: what lies between is neither read nor written."""
    options = {"padding": (1, 1), "activation": "relu"}
    x, weight, bias, residual = case(2, C, 9, 35, 64, (3, 3), padding=(1, 1))
    conv = pack_conv(weight, bias, **options, tile=0, products=BF16)
    wide = torch.full((2, C + 7, 9, 35), NAN, dtype=BF16)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, 3:-4] = x
    out = image(2, 80, 9, 35)
    before = out.clone(memory_format=torch.preserve_format)
    run(library, wide[:, 3:-4], conv, residual, out[:, 5:69])
    exact = exact_result(x, weight, bias, residual, padding=(1, 1)).relu()
    assert_rounded_once(out[:, 5:69], exact)
    assert torch.equal(out[:, :5], before[:, :5])
    assert torch.equal(out[:, 69:], before[:, 69:])


def test_streamed_output(library):
    tensors = case(1, 64, 6, 40, 64, (1, 1))
    assert_rounded_once(*result(library, tensors, 0, "relu", how={"stream": True}))
    tensors = case(1, 32, 12, 14, 64, (3, 3), padding=(1, 1))
    y, exact = result(library, tensors, 4, "relu", how={"stream": True}, padding=(1, 1))
    assert (y - exact).abs().max() <= allowed(4, BF16) * exact.abs().max()


def check_winograd(library, shape, tile):
    N, C, H, W, K, padding, dilation = shape
    options = {"padding": padding, "dilation": dilation}
    tensors = case(N, C, H, W, K, (3, 3), **options)
    for tasks in (1, 5):
        y, exact = result(library, tensors, tile, "relu", how={"tasks": tasks}, **options)
        largest = max(exact.abs().max().item(), tensors[1][0].numel() ** 0.5)
        assert (y - exact).abs().max() <= allowed(tile, BF16) * largest


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", [*WINOGRAD_CASES, *PIECES_CASES], ids=str)
def test_winograd(library, shape, tile):
    check_winograd(library, shape, tile)


@pytest.mark.parametrize("shape", [*BORDERED_CASES, PIECES_CASES[1]], ids=str)
def test_bordered(library, shape):
    check_winograd(library, shape, 1)


@pytest.mark.parametrize("shape", TRIPLE_CASES, ids=str)
def test_bordered_triple(library, shape):
    check_winograd(library, shape, 3)


@pytest.mark.parametrize("vertical", [True, False])
@pytest.mark.parametrize("shape", LINE_CASES, ids=str)
def test_line(library, shape, vertical):
    N, C, H, W, K, taps, padding = shape
    kernel, options = (1, taps), {"padding": (0, padding)}
    if vertical:
        kernel, options, H, W = (taps, 1), {"padding": (padding, 0)}, W, H
    tensors = case(N, C, H, W, K, kernel, **options)
    for tasks in (1, 5):
        y, exact = result(library, tensors, 5, "relu", how={"tasks": tasks}, **options)
        largest = max(exact.abs().max().item(), tensors[1][0].numel() ** 0.5)
        assert (y - exact).abs().max() <= allowed(5, BF16) * largest


@pytest.mark.parametrize("seed", range(int(os.environ.get("FASTSEG_FUZZ_CASES", "60"))))
def test_random_shapes(library, seed):
    rng = random.Random(f"amx {seed}")
    products = None
    while products != BF16:
        shape, tile, products, options = random_case(rng)
    if rng.random() < 0.5:  # channels that are read where they lie
        shape = (shape[0], rng.choice([32, 64, 96]), *shape[2:])
    options.pop("negative_slope")
    tensors = case(*shape, **{k: v for k, v in options.items() if k != "activation"})
    how = {"tasks": rng.randint(1, 4), "panels_first": rng.random() < 0.5}
    y, exact = result(library, tensors, tile, how=how, **options)
    if tile == 0:
        assert_rounded_once(y, exact)
    else:
        assert (y - exact).abs().max() <= largest_of_many(exact, tensors[1], tile, BF16)


@pytest.mark.parametrize("tile", [0, 4])
def test_special_values(library, tile):
    """NaN reaches the pixels that see it and no others, however tiles overlap."""
    x, weight, bias, _ = case(1, 64, 12, 33, 48, (3, 3), padding=(1, 1))
    x[0, 5, 6, 16] = NAN
    y, exact = result(library, (x, weight, bias, None), tile, padding=(1, 1))
    if tile == 0:
        assert torch.equal(y.isnan(), exact.isnan())
    else:  # or share a tile with such a pixel
        assert y.isnan()[exact.isnan()].all()
        assert not y[:, :, :, :8].isnan().any()


def test_same_bits_with_any_tasks(library):
    tensors = case(1, 64, 9, 65, 96, (3, 3), padding=(1, 1))
    for tile in (0, 2):
        one, _ = result(library, tensors, tile, how={"tasks": 1}, padding=(1, 1))
        for how in ({"tasks": 2}, {"tasks": 7}, {"tasks": 3, "panels_first": True}):
            assert torch.equal(result(library, tensors, tile, how=how, padding=(1, 1))[0], one)


def test_tiles_are_opened_once_per_task(library):
    x, weight, _, _ = case(1, 64, 9, 40, 64, (3, 3), padding=(1, 1))
    conv = pack_conv(weight, padding=(1, 1), products=BF16)
    y = image(1, 64, 9, 40)
    assert run(library, x, conv, None, y, tasks=1) == 1
    assert run(library, x, conv, None, y, tasks=2) == 4  # by two parts of the panels
