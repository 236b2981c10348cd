"""The CPU's inference convolution: weights packed once, bias, residual and activation fused.

The algorithms, of which ``choose_tile`` chooses: a matrix product over packed pixels (any kernel,
stride, dilation), and for 3x3 kernels of stride 1 Winograd's F(m x m, 3 x 3) (Lavin and Gray 2016)
on the sub-grids of equal phase of a dilated convolution, on which it is not dilated: every dilation
costs the same. A sub-grid is cut into tiles of m and m - 1 outputs, so that none reaches beyond it:
the shorter ones are F(m, 3) without one of its points. Where the dilation is half of the image or
more, a sub-grid of two by two pixels between zero borders takes 3 x 3 multiplications, one pixel
takes one; from a third on, three pixels take F(3, 3) and two the same 3 x 3. Long k x 1 and 1 x k
kernels take F(5, 5) along their axis, in groups of five taps. Depthwise convolutions, and 3-wide
kernels over images of one or three channels, have kernels of their own. Products of many channels
take Strassen's algorithm (1969) in Winograd's form: seven products of halves instead of eight. It
pairs each pixel with one up to 14 further on: rounding then depends on both, and where one of them
is infinite or NaN, both results are NaN.

Accuracy, as the largest error over the largest output against float64 on unit-variance data:

==================  =======  ===================================================
algorithm           error    interpolation points
==================  =======  ===================================================
GEMM                2e-6
GEMM, Strassen      5e-6
bordered, to 2      2e-6     0, +-1 and their like: exact coefficients
bordered, to 3      1e-5     +-1/2, +-5/4, infinity
F(2, 3)             2e-6     0, +-1, infinity
F(4, 3)             1e-5     0, +-3/4, +-3/2, infinity
F(6, 3)             5e-5     0, +-1/2, +-1, +-2, infinity
F(5, 5), one axis   1e-5     +-1/4, +-3/4, +-5/4, +-2, infinity
depthwise           2e-6
==================  =======  ===================================================
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {  # in the order of csrc/conv_engine/conv_engine.h
    "none": lambda y, slope: y,
    "relu": lambda y, slope: F.relu(y),
    "leaky_relu": F.leaky_relu,
    "relu6": lambda y, slope: F.relu6(y),
    "hardswish": lambda y, slope: F.hardswish(y),
    "hardsigmoid": lambda y, slope: F.hardsigmoid(y),
    "silu": lambda y, slope: F.silu(y),
    "sigmoid": lambda y, slope: y.sigmoid(),
}

# Along one axis: outputs and multiplications of a long tile, multiplications of a short one (with
# one output less), and transformed weights of both. 1 and 3 are the bordered tiles.
TILES = {1: (2, 3, 1, 3), 2: (2, 4, 3, 4), 3: (3, 5, 3, 8), 4: (4, 6, 5, 6), 6: (6, 8, 7, 8)}
STRICT = (1, 2)  # those that round no more than torch's own convolution
READ = 20  # multiplications in the time that a weight takes to be read
LINE = 5  # F(5, 5) along the axis of a k x 1 or 1 x k kernel
DEPTHWISE = 7  # one group per channel


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
    memory). F(6, 3) is for dilated convolutions of 2048 channels alone, because of its error.
    ``accuracy="strict"`` leaves out what rounds more than torch's own convolution.
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
    for tile in STRICT if accuracy == "strict" else TILES:
        if tile in (1, 3) and grid > TILES[tile][0]:
            continue
        if tile == 6 and (C < 2048 or min(dilation) == 1):
            continue
        products, weights = winograd_products((Ho, Wo), dilation, tile)
        cost[tile] = products * (C * K + 12.0 * (C + K))
        cost[tile] += READ * weights * C * K
    return min(cost, key=cost.__getitem__)


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
    k, groups = kernel_size[axis], -(-kernel_size[axis] // 5)
    tiles = -(-output[axis] // 5) + groups - 1
    products = 9 * tiles * (C * _round_up(groups * K, 16) + 12 * (C + groups * K))
    return LINE if products < k * output[axis] * C * _round_up(K, 16) else 0


def choose_strassen(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    accuracy: str = "default",
    *,
    tile: int = 0,
    products: torch.dtype = torch.float32,
) -> int:
    """Levels of Strassen's algorithm in the products of ``tile`` for this layer and input size
    (H, W): 0 or 1.

    The sums of the operands cost like some 16 output channels, register tiles of half the length a
    few percent more. Speed over the plain product, one core with AVX-512, 65x65: 128 -> 512
    channels 0.95, 256 -> 128 0.99, 512 -> 128 1.00, 256 -> 256 1.04, 512 -> 256 1.05, 1024 -> 512
    1.08, 1024 -> 2048 1.10; 512 -> 2048 at 7x7 1.08; 2048 -> 256, whose operands leave little of
    L2, lost to oneDNN (0.91). With AVX2 256 -> 256 1.04, 2048 -> 512 1.00.
    ``accuracy="strict"`` leaves it out: it rounds more than torch's own convolution.
    """
    C, K = in_channels, out_channels
    if tile != 0 or products != torch.float32 or accuracy == "strict":
        return 0
    if tuple(kernel_size) != (1, 1) or tuple(padding) != (0, 0) or C % 32 or K % 64:
        return 0
    Ho, Wo = output_size(size, kernel_size, stride, padding, dilation)
    least = 256 if C <= 1024 else 512  # output channels
    return int(C >= 256 and least <= K and Ho * Wo >= 49)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(Ho, Wo) of a convolution of an input (H, W)."""
    Ho, Wo = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return Ho, Wo


def winograd_products(output: Sequence[int], dilation: Sequence[int], tile: int) -> tuple[int, int]:
    """Multiplications per pair of channels for an output (H, W), each sub-grid cut on its own, and
    transformed weights that take part."""
    outputs, long_products, short_products, packed = TILES[tile]
    products = weights = 1
    for n, d in zip(output, dilation, strict=True):
        length, longer = divmod(n, d)
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


@dataclass(frozen=True)
class PackedConv:
    """A convolution with its weights in the form the kernels read. Made by ``pack_conv``."""

    packed: Tensor
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    tile: int
    activation: str
    negative_slope: float
    residual_last: bool = False
    strassen: int = 0

    def options(self) -> tuple:
        """What the ops are told beside the tensors, in the order of their schemas."""
        return (
            *self.kernel_size,
            *self.stride,
            *self.padding,
            *self.dilation,
            self.tile,
            list(ACTIVATIONS).index(self.activation),
            self.negative_slope,
            self.residual_last,
            self.strassen,
        )


def pack_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    negative_slope: float = 0.01,
    tile: int = 0,
    products: torch.dtype = torch.float32,
    residual_last: bool = False,
    strassen: int = 0,
) -> PackedConv:
    """Prepare a convolution for ``conv_engine``.

    Args:
        weight: (K, C, R, S) float32 on the CPU; one group, or with ``tile=DEPTHWISE`` (K, 1, R, S)
            for images of K channels. Fold a batch norm in before.
        bias: (K) float32, or None.
        stride, padding, dilation: (vertical, horizontal), in pixels.
        activation: a key of ``ACTIVATIONS``; "leaky_relu" with ``negative_slope``.
        tile: the algorithm, from ``choose_tile``; 0 is the matrix product.
        products: what the packed weights and the (transformed) input are rounded to before they
            are multiplied: float32, for images of either dtype, or for bfloat16 images bfloat16;
            see ``choose_algorithm``. Sums are float32.
        residual_last: a residual is added behind the activation instead of before.
        strassen: levels of Strassen's algorithm in the products, from ``choose_strassen``.

    Returns:
        The packed form: ``TILES[tile][3] ** 2 / 9`` times the memory of a 3x3 weight (4 times for
        F(4, 3)), for the matrix product that of the weight; channels are padded to 16 and 32. A
        level of Strassen's algorithm takes 7/4 of that.

    Raises:
        ValueError: an argument has the wrong shape, dtype or name.
    """
    if weight.dim() != 4 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            "pack_conv: weight must be (K, C, R, S) float32 on the CPU, got "
            f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"pack_conv: bias must have {weight.shape[0]} elements, got {tuple(bias.shape)}"
        )
    if products not in (torch.float32, torch.bfloat16):
        raise ValueError(f"pack_conv: products must be float32 or bfloat16, got {products}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"pack_conv: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}"
        )
    K, C, R, S = weight.shape
    with torch.no_grad():
        bias = bias.detach().float().contiguous() if bias is not None else None
        packed = torch.ops.fastseg.conv_engine_pack(
            weight.detach().contiguous(), bias, tile, products == torch.bfloat16, strassen
        )
    return PackedConv(
        packed,
        K if tile == DEPTHWISE else C,
        K,
        (R, S),
        stride,
        padding,
        dilation,
        tile,
        activation,
        negative_slope,
        residual_last,
        strassen,
    )


def pack_matrix(matrix: Tensor) -> PackedConv:
    """``pack_conv(matrix.T[..., None, None])``, a product of pixels and (C, K) float32, without a
    transposed copy."""
    C, K = matrix.shape
    depth, columns = _round_up(C, 16), _round_up(K, 32)
    packed = matrix.new_zeros((depth + 1) * columns)  # the bias behind the weights
    panels = packed[: depth * columns].view(-1, depth, 32)
    whole = K - K % 32
    panels[: whole // 32, :C].copy_(matrix[:, :whole].view(C, whole // 32, 32).transpose(0, 1))
    if whole < K:
        panels[-1, :C, : K - whole].copy_(matrix[:, whole:])
    return PackedConv(packed, C, K, (1, 1), (1, 1), (0, 0), (1, 1), 0, "none", 0.0)


def conv_engine(
    x: Tensor, conv: PackedConv, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``activation(conv2d(x, weight, bias) + residual)`` with packed weights, without gradients;
    ``activation(conv2d(x, weight, bias)) + residual`` if packed with ``residual_last``.

    Args:
        x: (N, C, H, W) float32 or bfloat16 on the CPU, best in channels-last memory (else it is
            copied). Of bfloat16 the result is rounded once, to nearest even.
        conv: from ``pack_conv``.
        residual: (N, K, Ho, Wo), dtype of ``x``, to add, or None.
        out: (N, K, Ho, Wo), dtype of ``x``, to write to, with channel stride 1: a slice of channels
            of a larger channels-last tensor makes a concatenation free.

    Returns:
        (N, K, Ho, Wo), dtype of ``x``, channels last; ``out`` if it was given.

    Raises:
        ValueError: shapes or dtypes do not match, or a gradient would be needed.
    """
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        raise ValueError(
            f"conv_engine: x must be (N, {conv.in_channels}, H, W), got {tuple(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "conv_engine: computes no gradients, call it under torch.no_grad() or use conv_bn_act"
        )
    x = channels_last(x)
    residual = channels_last(residual) if residual is not None else None
    if out is None:
        return torch.ops.fastseg.conv_engine(
            x, conv.packed, residual, conv.out_channels, *conv.options()
        )
    torch.ops.fastseg.conv_engine_out(x, conv.packed, residual, out, *conv.options())
    return out


def conv_engine_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    groups: int = 1,
) -> Tensor:
    """What ``conv_engine(x, pack_conv(weight, bias, ...), residual)`` means, in plain PyTorch."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is None:
        return activate(y, activation, negative_slope)
    if residual_last:
        return activate(y, activation, negative_slope) + residual
    return activate(y + residual, activation, negative_slope)


def activate(y: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation of that name, in plain PyTorch."""
    return ACTIVATIONS[activation](y, negative_slope)


def channels_last(x: Tensor) -> Tensor:
    """x with channel stride 1: itself where it has that, be it a slice of something larger."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("fastseg::conv_engine_pack")
def _(
    weight: Tensor, bias: Tensor | None, tile: int, bfloat16: bool = False, strassen: int = 0
) -> Tensor:
    K, C, R, S = weight.shape
    per_word = 2 if bfloat16 else 1
    columns, depth = K, _round_up(C, 16 * per_word)
    if tile == 0:
        depth = _round_up(C * R * S, 16 * per_word)
    elif tile == DEPTHWISE:
        depth = R * S
    elif tile == LINE:
        columns, depth = -(-R * S // 5) * K, 9 * depth
    else:
        depth = TILES[tile][3] ** 2 * depth
    size = _round_up(columns, 32) * depth
    if strassen:
        size = size // 4 * 7
    size += _round_up(K, 32) * per_word
    return weight.new_empty(size, dtype=torch.bfloat16 if bfloat16 else torch.float32)


@torch.library.register_fake("fastseg::conv_engine")
def _(
    x, packed, residual, out_channels, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h,
    dilation_w, tile, activation, slope, residual_last=False, strassen=0,
):  # fmt: skip
    geometry = ((R, S), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
    Ho, Wo = output_size(x.shape[2:], *geometry)
    return x.new_empty(x.shape[0], Ho, Wo, out_channels).permute(0, 3, 1, 2)


@torch.library.register_fake("fastseg::conv_engine_out")
def _(
    x, packed, residual, out, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, tile,
    activation, slope, residual_last=False, strassen=0,
):  # fmt: skip
    return None
