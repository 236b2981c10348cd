"""Which algorithm the convolution engine takes for a layer: ``choose_algorithm``.

A matrix product over packed pixels (any kernel, stride, dilation), and for 3x3 kernels of stride 1
Winograd's F(m x m, 3 x 3) (Lavin and Gray 2016) on the sub-grids of equal phase of a dilated
convolution, on which it is not dilated: every dilation costs the same. A sub-grid is cut into tiles
of m and m - 1 outputs, so that none reaches beyond it: the shorter ones are F(m, 3) without one of
its points. Where the dilation is half of the image or more, a sub-grid of two by two pixels between
zero borders takes 3 x 3 multiplications, one pixel takes one; from a third on, three by three
pixels take 4 x 4 (csrc/conv_engine/winograd.h). Long k x 1 and 1 x k kernels take F(5, 5) along
their axis, in groups of five taps; multiplied in bfloat16, F(3, 3) in groups of three. Groups of
few channels, of which depthwise convolutions have one, and 3-wide kernels over images of one or
three channels have kernels of their own; wider groups are convolved one by one. Products of many
channels take Strassen's algorithm (1969): seven products of halves instead of eight. It pairs each
pixel with one up to 14 further on: rounding then depends on both, and where one of them is infinite
or NaN, both results are NaN.

**float32 images.** Largest error over largest output against float64 on unit-variance data:

==================  =======  ===================================================
algorithm           error    interpolation points
==================  =======  ===================================================
GEMM                1e-6
GEMM, Strassen      2e-6
bordered            1e-6
F(2, 3)             1e-6     0, +-1, infinity
F(4, 3)             4e-6     0, +-3/4, +-3/2, infinity
F(6, 3)             1e-5     0, +-1/2, +-1, +-2, infinity
F(5, 5), one axis   5e-6     +-1/4, +-3/4, +-5/4, +-2, infinity
grouped             2e-6
==================  =======  ===================================================

No more than 128 products go into one sum, which then goes to a total, for Winograd's algorithm 64,
for F(6, 3) 16 or 32: in one sum of all channels each rounding is of the size that the sum has by
then, and the transforms of the result amplify it. With 512 products in a sum F(4, 3) was off by
2.2e-6, root mean square, now by 0.9e-6, and F(6, 3) by 8.5e-6, now by 2.5e-6.

**bfloat16 images.** Two kinds of products compete. Multiplied in float32, every algorithm is as
accurate as the rounding of the result, and the weights keep their float32 values. Processors with
fast dot products of bfloat16 multiply twice as many a cycle, those with AMX sixteen times, but
weights and transformed input are rounded before. The same errors, of data rounded to bfloat16 and
rounded once more at the end, which alone is up to 4e-3 (half a step), as in torch's convolution:

===================  ========  ===========================
algorithm            products  error
===================  ========  ===========================
all                  float32   4e-3
GEMM, grouped        bfloat16  4e-3
GEMM, Strassen       bfloat16  1.1e-2
bordered             bfloat16  1e-2
F(2, 3)              bfloat16  8e-3
F(4, 3)              bfloat16  2.5e-2, points 0, +-sqrt(1/2), +-sqrt(2), infinity
F(3, 3), one axis    bfloat16  1e-2
===================  ========  ===========================

F(6, 3) and F(5, 5) lose too much to be multiplied in bfloat16. Root mean square, Strassen's
algorithm has 4.8e-3 where the plain product has 2.3e-3 (in Winograd's form, which adds up to four
values before it rounds, 6.3e-3), F(4, 3) 1.2e-2; in whole networks the rounding of the activations
is the larger part. Random weights with the statistics of random images, root mean
square error of the logits against float64, relative to that of torch's eager bfloat16 network, for
float32 products and for the three values of ``accuracy`` with bfloat16 products (AMD, Zen 4, three
seeds, images of 256 to 320 pixels; the default before :mod:`fastseg.optimize.rounding` made it
transform fewer layers):

==================  ========  =================  ========  =========  ======
network             autocast  float32 products   "strict"  "default"  "fast"
==================  ========  =================  ========  =========  ======
deeplabv3_resnet50  1.01      0.49               0.69      0.84       0.84
fcn_resnet50        0.94      0.48               0.62      0.79       0.79
pspnet_resnet50     1.03      0.50               0.71      0.88       0.88
segnet_vgg16        1.00      0.87               0.88      0.92       1.24
u2netp              0.85      0.61               0.66      0.81       0.81
gcn_resnet50        0.97      0.63               0.81      0.92       0.92
==================  ========  =================  ========  =========  ======

The layers from which unpooled maxima come are kept from F(4, 3) with bfloat16 products; what SegNet
loses without that is in its "fast".

What is chosen with AMX, computed with avx512_bf16 (one seed, in this order): "strict" and "default"
0.87, 0.87, 0.73, 0.95, "fast" 1.04, 0.89, 0.72, 1.12.

U2-Net-p with its trained weights, on 13 photos: 0.006 to 0.014 of the root mean square logit by
each of these, up to 0.022 where F(4, 3) has bfloat16 products; torch's eager network 0.10 to 0.24,
under autocast 0.17 to 0.39, OpenVINO 0.09 to 0.19. There a large constant was rounded, which
``fastseg.optimize`` keeps float32; with it rounded ours were off by 0.13 to 0.30.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import _C
from ._conv_options import output_size, round_up

# Along one axis: outputs and multiplications of a long tile, multiplications of a short one (with
# one output less), and transformed weights of both. 1 and 3 are the bordered tiles.
TILES = {1: (2, 3, 1, 3), 2: (2, 4, 3, 4), 3: (3, 4, 3, 7), 4: (4, 6, 5, 6), 6: (6, 8, 7, 8)}
STRICT = (1, 2, 3)  # those that round no more than torch's own convolution
# Where a network puts values back to the places of maxima, which an error may move: F(6, 3) did so
# in half of SegNet's images, torch's convolution in a quarter, F(4, 3) in a tenth.
MAXIMA = (1, 2, 3, 4)
READ = 20  # multiplications in the time that a weight takes to be read
LINE = 5  # along the axis of a k x 1 or 1 x k kernel: F(5, 5), of bfloat16 products F(3, 3)
GROUPED = 7  # groups of few channels side by side, depthwise convolutions among them
# The tiles whose products are in bfloat16 where those are fast.
ROUNDED = {
    "strict": (),
    "maxima": (1, 2, 3),
    "default": (1, 2, 3, 4, LINE),
    "fast": (1, 2, 3, 4, LINE),
}
# bfloat16 products in the time of one of float32, where those are fast. AMX multiplies 512 pairs a
# cycle (16 x 16 x 32 in 16 cycles) and AVX-512 32 (two times 16), a rate of 16 of which loads,
# tiles that are not full and sums on their way through memory are predicted to leave 12.
BF16_RATE = {"amx": 12, "avx512_bf16": 2}


class Algorithm(NamedTuple):
    """``tile``, ``products`` and ``strassen`` of ``pack_conv``."""

    tile: int
    products: torch.dtype = torch.float32
    strassen: int = 0


def choose_algorithm(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    accuracy: str = "default",
) -> Algorithm:
    """The algorithm for a layer and input size (H, W); ``PackedConv2d`` remembers it per size.

    All of them are the engine's own. oneDNN, which torch would call, was measured beside each kind
    of layer (benchmarks/README.md). Ahead it is in groups of 24 or 64 channels with stride 2, by up
    to a fifth; but its operators cannot be given the network's buffers, and a copy of its result
    takes most of that.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: of the layer.
        size: (H, W) of the input.
        dtype: of the images, float32 or bfloat16.
        accuracy: how far transforms may round. "default": whole networks stay within the errors of
            the peers' own in this dtype; "strict": no more than torch's own convolution; "fast":
            the default, but with AMX and for bfloat16 networks: those that unpool maxima have 1.2
            times the errors of torch's, of little but 3x3 layers 1.4 to 2.2, others up to 1.2
            (:mod:`fastseg.optimize.rounding`); "maxima": for layers before an unpooled maximum, the
            default without F(6, 3), see ``MAXIMA``, or what bfloat16 products add to F(2, 3).
    """
    C, K = in_channels // groups, out_channels // groups
    layer = (C, K, kernel_size, size, stride, padding, dilation)
    if groups > 1:
        paired = dtype == torch.bfloat16 and fits_vectors(groups, K, C, torch.bfloat16)
        if K < 32 and paired and fast_bfloat16():
            return Algorithm(GROUPED, torch.bfloat16)
        alone = choose_algorithm(*layer, dtype=dtype, accuracy=accuracy)
        few = min(C, K) < 16 or (K < 32 and (alone.tile == 0 or K % 16))
        return Algorithm(GROUPED) if few and fits_vectors(groups, K, C) else alone
    if dtype == torch.bfloat16:
        return _choose_bfloat16(*layer, accuracy)
    tile = choose_tile(*layer, accuracy)
    return Algorithm(tile, strassen=0 if tile else choose_strassen(*layer, accuracy))


def fast_bfloat16() -> bool:
    """Whether products of bfloat16 are the faster ones with the instruction set in use."""
    return _C.bf16_products() and _C.cpu_isa() in BF16_RATE


def fits_vectors(
    groups: int, out_channels: int, in_channels: int, products: torch.dtype = torch.float32
) -> bool:
    """Whether the kernels of ``GROUPED`` compute groups of so many outputs and channels: as in
    csrc/conv_engine/groups.h."""
    per_word = 2 if products == torch.bfloat16 else 1
    if in_channels % per_word:
        return False
    K, C = out_channels, in_channels // per_word
    if K == in_channels == 1:
        return True
    for lanes in (4, 8, 16):
        for k in range(0, min(groups, lanes) * K, lanes):
            spanned = (min(groups * K, k + lanes) - 1) // K - k // K + 1
            if spanned > 2 and (spanned * C > lanes or groups * C < lanes):
                return False
    return True


def choose_tile(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    accuracy: str = "default",
) -> int:
    """The algorithm for this layer and input size (H, W): 0 for the matrix product, a key of
    ``TILES`` or ``LINE``.

    The one with the fewest multiplications wins; a transform counts like 12 more channels on the
    other side (on two cores F(4, 3) overtakes the matrix product between 3 and 16 channels), a
    weight that is read like 20 multiplications (25 at 512 channels, 50 for those that come from
    memory). ``accuracy="strict"`` leaves out what rounds more than torch's own convolution,
    "maxima" F(6, 3) alone.
    """
    C, K = in_channels, out_channels
    Ho, Wo = output_size(size, kernel_size, stride, padding, dilation)
    if tuple(stride) != (1, 1) or min(Ho, Wo, C, K) < 1:
        return 0
    if min(kernel_size) == 1 < max(kernel_size) and tuple(dilation) == (1, 1):
        return _choose_line(C, K, kernel_size, (Ho, Wo), padding, accuracy)
    if tuple(kernel_size) != (3, 3):
        return 0
    grid = max(-(-n // d) for n, d in zip(size, dilation, strict=True))  # pixels of a sub-grid
    if tuple(padding) != tuple(dilation):
        grid = 4
    cost = {0: 9.0 * (Ho * Wo + READ) * C * K}
    for tile in {"strict": STRICT, "maxima": MAXIMA}.get(accuracy, TILES):
        if tile in (1, 3) and grid > TILES[tile][0]:
            continue
        products, weights = winograd_products((Ho, Wo), dilation, tile)
        cost[tile] = products * (C * K + 12.0 * (C + K))
        cost[tile] += READ * weights * C * K
    return _cheapest(cost)


def _cheapest(cost: dict[Any, float]) -> Any:
    """``min(cost, key=cost.__getitem__)``, which torch.compile does not know for symbolic sizes."""
    best = next(iter(cost))
    for name in cost:
        if cost[name] < cost[best]:
            best = name
    return best


def _choose_line(
    C: int,
    K: int,
    kernel_size: Sequence[int],
    output: Sequence[int],
    padding: Sequence[int],
    accuracy: str,
) -> int:
    """The same for k x 1 and 1 x k. Each line transforms ``groups - 1`` tiles more than it has."""
    axis = 0 if kernel_size[1] == 1 else 1
    if accuracy == "strict" or padding[1 - axis] != 0:
        return 0
    direct = kernel_size[axis] * output[axis] * C * round_up(K, 16)
    return LINE if _line_cost(C, K, kernel_size[axis], output[axis], 5) < direct else 0


def _line_cost(C: int, K: int, kernel: int, output: int, tile: int, rate: int = 1) -> float:
    """Of F(tile, tile) along a line, at so many products in the time of one."""
    groups = -(-kernel // tile)
    tiles = -(-output // tile) + groups - 1
    return (2 * tile - 1) * tiles * (C * round_up(groups * K, 16) / rate + 12 * (C + groups * K))


def choose_strassen(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    accuracy: str = "default",
) -> int:
    """Levels of Strassen's algorithm in the float32 matrix product of this layer and input size
    (H, W): 0 or 1.

    The sums of the operands cost like some 16 output channels, register tiles of half the length a
    few percent more. Speed over the plain product, AVX-512, 65x65: 128 -> 512 channels 0.95, 256 ->
    128 and 512 -> 128 0.98, 256 -> 256 1.00, 512 -> 256 1.03, 256 -> 1024 1.07, 1024 -> 512 1.08,
    1024 -> 2048 1.10, 2048 -> 256 on Zen 4 1.10. By the kernel that other instruction sets have
    that one lost to oneDNN (0.91). With AVX2 256 -> 256 1.04, 2048 -> 512 1.00. On Zen 4, weights
    from memory, 2048 -> 512 at 7x7 0.85, at 8x8 1.2.
    ``accuracy="strict"`` leaves it out: it rounds more than torch's own convolution.
    """
    C, K = in_channels, out_channels
    if accuracy == "strict" or C % 32 or K % 64:
        return 0
    if tuple(kernel_size) != (1, 1) or tuple(padding) != (0, 0):
        return 0
    Ho, Wo = output_size(size, kernel_size, stride, padding, dilation)
    wide = _C.cpu_isa().startswith("avx512") or _C.cpu_isa() == "amx"
    least = 256 if C <= 1024 or wide else 512  # output channels
    return int(C >= 256 and least <= K and Ho * Wo >= 64)


def _choose_bfloat16(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    accuracy: str,
) -> Algorithm:
    """The same for bfloat16 images.

    Where bfloat16 dot products are not fast, those of float32 and the tile that float32 images
    get: nothing rounds more than the result itself, so ``accuracy`` makes no difference. Fast they
    are on AMD's processors with avx512_bf16, twice as fast as float32 (on Intel's without AMX they
    are half as fast). There a bfloat16 product costs half of a float32 one, and ``accuracy`` says
    how far transforms may go: "strict" not to bfloat16, "maxima" to F(2, 3), the others to F(4, 3),
    along one axis F(3, 3) and of 1x1 kernels Strassen's algorithm. On Zen 4, 65x65, of oneDNN's
    speed, strict and default: 64 channels at 129x129 1.9 and 2.5, 128 2.0 and 2.7, 256 1.8 and 2.9,
    512 1.9 and 3.2. Strassen's algorithm, of the plain product's speed at 65x65 and 13x17: 256 ->
    256 channels 0.91, 0.99; 512 -> 256 1.00, 0.98; 1024 -> 256 1.03, 0.98; 256 -> 1024 and a
    residual 1.01, 1.03; 512 -> 2048 1.07, 1.06; 2048 -> 256 1.09, 1.06; 2048 -> 512 1.10, 1.09; at
    8x8 all of them 0.74 to 0.94.

    With AMX a product costs a twelfth, which leaves little that a transform can save: float32 ones
    and F(5, 5) never pay, F(2, 3) would take 0.7 of the time of the direct convolution at 512
    channels by this count, but its 12 KB of transforms and products a pixel do not stay in L2, so
    it is left out. Bordered tiles do, and in "fast" alone F(4, 3) from some 128 channels on. The
    counts are predicted from the documented rates, not measured.
    """
    shape = (in_channels, out_channels, kernel_size, size, stride, padding, dilation)
    tile = choose_tile(*shape)
    amx = _C.cpu_isa() == "amx"
    if not fast_bfloat16():
        wide = tile == 0 and in_channels > out_channels  # else no gain: 0.95 to 1.01
        return Algorithm(tile, strassen=choose_strassen(*shape) if wide else 0)
    if tile == 0 or (tile == LINE and amx):
        Ho, Wo = output_size(size, kernel_size, stride, padding, dilation)
        large = in_channels >= 512 and in_channels * out_channels >= 1024 * 256 and Ho * Wo >= 192
        halves = large and not amx and accuracy in ("default", "fast")
        return Algorithm(0, torch.bfloat16, choose_strassen(*shape) if halves else 0)
    rate = BF16_RATE["amx" if amx else "avx512_bf16"]
    rounded = ROUNDED["maxima" if amx and accuracy == "default" else accuracy]
    C, K = in_channels, out_channels
    Ho, Wo = output_size(size, kernel_size, stride, padding, dilation)
    if tile == LINE:
        k, n = (kernel_size[0], Ho) if kernel_size[1] == 1 else (kernel_size[1], Wo)
        cost = {(0, torch.bfloat16): k * n * C * round_up(K, 16) / rate}
        cost[LINE, torch.float32] = _line_cost(C, K, k, n, 5)
        if LINE in rounded:
            cost[LINE, torch.bfloat16] = _line_cost(C, K, k, n, 3, rate)
        return Algorithm(*_cheapest(cost))
    K = round_up(K, 16)
    cost = {(0, torch.bfloat16): Ho * Wo * round_up(9 * C, 32) * K / rate}
    C, whole = round_up(C, 16), round_up(C, 32)  # lines of float32 and of bfloat16
    for m in {tile, 4} - {2} if amx else {tile, 2, 4}:
        products, _ = winograd_products((Ho, Wo), dilation, m)
        cost[m, torch.float32] = products * (C * K + 12 * (C + K))
        if m in rounded:
            cost[m, torch.bfloat16] = products * (whole * K / rate + 12 * (whole + K))
    return Algorithm(*_cheapest(cost))


def winograd_products(output: Sequence[int], dilation: Sequence[int], tile: int) -> tuple[int, int]:
    """Multiplications per pair of channels for an output (H, W), each sub-grid cut on its own, and
    transformed weights that take part."""
    outputs, long_products, short_products, packed = TILES[tile]
    products = weights = 1
    for n, d in zip(output, dilation, strict=True):
        length, longer = n // d, n % d  # torch.compile knows no divmod of symbolic sizes
        long = short = 0  # tiles
        for phases, n_phase in ((longer, length + 1), (d - longer, length)):
            tiles = -(-n_phase // outputs)
            shorter = min(tiles, tiles * outputs - n_phase)
            long += phases * (tiles - shorter)
            short += phases * shorter
        products *= long * long_products + short * short_products
        used = (long > 0) * long_products, (short > 0) * short_products
        weights *= max(used) if packed == long_products else sum(used)
    return products, weights
