"""Which kernels a training step on the CPU takes: each of a convolution and its two gradients by
the convolution engine or by torch, whichever is faster. The engine packs the weights in every call;
what it computes has the same bits for any number of threads."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from ._conv_options import output_size
from .conv_choice import TILES, winograd_products

TORCH = -1  # instead of a tile
DIRECT = 13.0  # time of a direct convolution, multiplications per pixel and pair of channels
PACK = 190.0  # that a transformed weight takes to be made and read, in multiplications
MOST_PACKED = 4 << 20  # transformed weights beside small images: more, and memory is above torch's
LEAST_TURNED = 32  # channels from which on NCHW images are turned into pixels
LARGE = 500_000  # weights from which on the engine's matrix product waits for them


# Multiplications of a convolution, or values of a batch norm around torch's convolution, below
# which a step takes less time in torch's operators: behind other layers, which leave its code and
# objects out of the caches, an autograd function written in Python takes some 0.1 ms each way.
SMALLEST_FUSED = 4_000_000
SMALLEST_NORM = 300_000


class TrainingKernels(NamedTuple):
    """What computes the convolution and its gradients: 0 for the engine's matrix product, the tile
    of Winograd's algorithm, or ``TORCH``."""

    forward: int
    input_gradient: int
    weight_gradient: int


UNFUSED = TrainingKernels(-2, -2, -2)  # convolution, batch norm and activation by torch


def training_kernels(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    accuracy: str,
) -> TrainingKernels | None:
    """The kernels of a training step, None for devices other than the CPU.

    Measured on two cores of Emerald Rapids, channels last (benchmarks/README.md): Winograd's
    algorithm is ahead of torch from some 700 pixels on with F(4, 3), from 400 with F(2, 3), which
    alone is allowed for ``accuracy="strict"``; below that its weights take longer to be
    transformed. The matrix product is on a par with torch's, until there are half a million weights
    (0.8 to 0.95 of its speed). The weights' gradient is by F(3, 4) where its sums stay in cache,
    else by direct sums, in any dtype. NCHW images are converted only for Winograd's algorithm, from
    32 channels on. Transformed weights take no more memory than the images, or 16 MiB: with more
    the peak of a step was above torch's. Of bfloat16 the engine multiplies in float32, which is
    twice as fast where bfloat16 dot products are not (``fastseg._C.bf16_products()``). torch trains
    in other dtypes and in groups, and small float32 layers altogether (``UNFUSED``).

    ``torch.use_deterministic_algorithms(True)`` takes the engine wherever it can compute.
    """
    if x.device.type != "cpu":
        return None
    choose = _choose if torch.compiler.is_compiling() else _choose_once
    return choose(
        tuple(x.shape),
        tuple(weight.shape),
        (tuple(stride), tuple(padding), tuple(dilation)),
        groups,
        x.dtype,
        conv_format(x, weight) == torch.channels_last,
        accuracy == "strict",
        torch.are_deterministic_algorithms_enabled(),
    )


def _choose(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    strict: bool,
    deterministic: bool,
) -> TrainingKernels:
    kernels = _choose_parts(
        x, weight, geometry, groups, dtype, channels_last, strict, deterministic
    )
    if dtype != torch.float32 or deterministic:
        return kernels
    Ho, Wo = output_size(x[2:], weight[2:], *geometry)
    values = x[0] * weight[0] * Ho * Wo
    by_torch = kernels == (TORCH, TORCH, TORCH)
    if values * weight[1] * weight[2] * weight[3] < SMALLEST_FUSED:
        return UNFUSED
    return UNFUSED if by_torch and values < SMALLEST_NORM else kernels


def _choose_parts(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    strict: bool,
    deterministic: bool,
) -> TrainingKernels:
    """The same for a step that is fused."""
    K, C = weight[:2]
    slow_bfloat16 = dtype == torch.bfloat16 and not _C.bf16_products()
    if groups != 1 or min(x[1:]) == 0 or K == 0:
        return TrainingKernels(TORCH, TORCH, TORCH)
    if (
        dtype != torch.float32
        and not slow_bfloat16
        and not (deterministic and dtype == torch.bfloat16)
    ):
        return TrainingKernels(TORCH, TORCH, 0 if deterministic else TORCH)
    size = output_size(x[2:], weight[2:], *geometry)
    forward = _convolution_kernel(x[0], C, K, weight[2:], x[2:], size, geometry, strict)
    back = _convolution_kernel(x[0], K, C, weight[2:], size, x[2:], geometry, strict)
    if deterministic:
        forward, back = max(forward, 0), max(back, 0)
    elif not channels_last and (min(C, K) < LEAST_TURNED or (forward <= 0 and back <= 0)):
        return TrainingKernels(TORCH, TORCH, TORCH)
    return TrainingKernels(
        forward, back, _gradient_kernel(x[0], C, K, weight[2:], size, geometry, dtype, strict)
    )


def _convolution_kernel(
    N: int,
    C: int,
    K: int,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    output: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
    strict: bool,
) -> int:
    """The kernel of a convolution of C to K channels: the one with the fewest multiplications."""
    stride, padding, dilation = geometry
    taps = kernel[0] * kernel[1]
    direct = 0 if taps * C * K < LARGE else TORCH
    if kernel != (3, 3) or stride != (1, 1) or min(C, K) < 16:
        return direct
    if any(p > 2 * d for p, d in zip(padding, dilation, strict=True)):
        return direct
    images = N * (C * size[0] * size[1] + K * output[0] * output[1])
    inside = 1.0  # share of the taps, of which torch leaves out some
    for n, d in zip(output, dilation, strict=True):
        inside *= (n + 2 * max(n - d, 0)) / (3 * n)
    cost = {direct: DIRECT * N * output[0] * output[1] * max(inside, 0.8)}
    for tile in (2,) if strict else (2, 4):
        if TILES[tile][3] ** 2 * C * K > max(MOST_PACKED, images):
            continue
        products, _ = winograd_products(output, dilation, tile)
        cost[tile] = N * products * (1 + 12 / C + 12 / K) + PACK * TILES[tile][3] ** 2
    return min(cost, key=cost.__getitem__)


def _gradient_kernel(
    N: int,
    C: int,
    K: int,
    kernel: tuple[int, ...],
    output: tuple[int, ...],
    geometry: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    strict: bool,
) -> int:
    """0 or 4 for the gradient of the weights."""
    stride, _, dilation = geometry
    if strict or dtype != torch.float32 or kernel != (3, 3) or stride != (1, 1) or min(C, K) < 16:
        return 0
    tiles = N
    for n, d in zip(output, dilation, strict=True):
        tiles *= n % d * -(-(n // d + 1) // 4) + (d - n % d) * -(-(n // d) // 4)
    in_cache = 36 * 4 * C * K < 32 << 20  # the sums
    winograd = 36 * (3.8 * tiles + (90 if in_cache else 350))
    return 4 if winograd < 15 * N * output[0] * output[1] else 0


_choose_once = lru_cache(4096)(_choose)


MOST_SCRATCH = 4 << 20  # of transformed tiles, bytes per thread


def fits_in_place(
    dy: Tensor, x: Tensor, tile: int, padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether the gradient of x can be written over ``dy``, the convolution's: one image less. By
    Winograd's algorithm, a whole sub-grid of a dilated convolution at a time; those have to be
    small enough for the scratch memory and large enough for the weights that each of them reads."""
    if tile < 2 or dy.shape != x.shape or tuple(padding) != tuple(dilation):
        return False
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (dy, x)):
        return False
    N, C, H, W = x.shape
    tiles = -(-H // (dilation[0] * tile)) * -(-W // (dilation[1] * tile))
    sub_grids = N * min(H, dilation[0]) * min(W, dilation[1])
    scratch = 4 * ((tile + 2) ** 2 + 1) * tiles * (C + 16)
    enough = sub_grids >= 4 * torch.get_num_threads() and tiles >= C / 4
    return C > 1 and enough and scratch <= MOST_SCRATCH


def conv_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """conv2d gives channels last if the input or the weight is."""
    for t in (x, weight):
        if t.shape[1] > 1 and t.stride(1) == 1 and t.stride(3) >= t.shape[1]:
            return torch.channels_last
    return torch.contiguous_format
