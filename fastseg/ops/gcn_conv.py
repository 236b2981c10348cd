"""The large separable kernel of GCN: k x 1 then 1 x k, plus 1 x k then k x 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_act import channel_sums
from .conv_choice import choose_tile
from .conv_engine import conv_engine, pack_conv, pack_matrix

# Values of the tap form that the backward makes at a time: they stay in the cache of a CPU; four
# times as many in that of a GPU.
CHUNK = 2 * 1024 * 1024


def global_conv2d(
    x: Tensor,
    l1: Tensor,
    l1_bias: Tensor,
    l2: Tensor,
    l2_bias: Tensor,
    r1: Tensor,
    r1_bias: Tensor,
    r2: Tensor,
    r2_bias: Tensor,
) -> Tensor:
    """A dense k x k view of a map at the cost of rows and columns, both branches in one pass.

    Equivalent to ``global_conv2d_reference``. Peng et al. 2017, section 3.1.

    The CPU computes each convolution by Winograd's F(5, 5) along its axis: the error is at most
    1e-5 of the largest output against float64 (see ``fastseg.ops.conv_engine``), the same bits for
    any number of threads. float64 runs as torch's convolutions. On CUDA both first convolutions are
    one matrix product of torch, in TF32 if ``torch.backends.cuda.matmul`` allows it, and the rest
    is one kernel. The CPU's gradients have the same bits for any number of threads, too, but for
    float64; those of CUDA are torch's matrix products, the same bits at every call.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, best in channels-last memory.
        l1: (K, C, k, 1), the first convolution of one branch; k odd, it may exceed H.
        l2: (K, K, 1, k), its second.
        r1: (K, C, 1, k), the first convolution of the other branch.
        r2: (K, K, k, 1), its second.
        l1_bias, l2_bias, r1_bias, r2_bias: (K,). All of the dtype of ``x``.

    Returns:
        (N, K, H, W) in the dtype of ``x``, channels last, sums in float32 (float64 for float64).
        Differentiable in all arguments. Under autocast they are cast to its dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together, or k is even.
    """
    arguments = (x, l1, l1_bias, l2, l2_bias, r1, r1_bias, r2, r2_bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        arguments = tuple(t.to(dtype) for t in arguments)  # type: ignore[assignment]
    _check(*arguments)
    if x.device.type not in ("cpu", "cuda", "meta"):
        return global_conv2d_reference(*arguments).contiguous(memory_format=torch.channels_last)
    return torch.ops.fastseg.gcn_conv(*arguments)[0]


def global_conv2d_reference(
    x: Tensor,
    l1: Tensor,
    l1_bias: Tensor,
    l2: Tensor,
    l2_bias: Tensor,
    r1: Tensor,
    r1_bias: Tensor,
    r2: Tensor,
    r2_bias: Tensor,
) -> Tensor:
    """What global_conv2d means, in plain PyTorch."""
    p = l1.shape[2] // 2
    left = F.conv2d(F.conv2d(x, l1, l1_bias, padding=(p, 0)), l2, l2_bias, padding=(0, p))
    right = F.conv2d(F.conv2d(x, r1, r1_bias, padding=(0, p)), r2, r2_bias, padding=(p, 0))
    return left + right


@dataclass(frozen=True)
class PackedGlobalConv:
    """The weights of ``global_conv2d`` in the form the kernels read. Made by
    ``pack_global_conv2d``."""

    packed: Tensor
    in_channels: int
    out_channels: int
    kernel_size: int


def pack_global_conv2d(weights: Sequence[Tensor]) -> PackedGlobalConv:
    """Prepare the arguments of ``global_conv2d`` behind ``x``, float32 on the CPU, for
    ``global_conv2d_packed``; they take about 1.8 times their memory."""
    K, C, k, _ = weights[0].shape
    with torch.no_grad():
        packed = torch.ops.fastseg.gcn_conv_pack(*(t.detach() for t in weights))
    return PackedGlobalConv(packed, C, K, k)


def global_conv2d_packed(x: Tensor, conv: PackedGlobalConv) -> Tensor:
    """``global_conv2d`` on the CPU with weights packed once, without gradients.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16.
        conv: from ``pack_global_conv2d``.

    Raises:
        ValueError: x has other channels than the layer, or a gradient would be needed.
    """
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        raise ValueError(
            f"global_conv2d_packed: x must be (N, {conv.in_channels}, H, W), got {tuple(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "global_conv2d_packed: computes no gradients, call it under torch.no_grad() "
            "or use global_conv2d"
        )
    return torch.ops.fastseg.gcn_conv_packed(x, conv.packed, conv.out_channels, conv.kernel_size)


def _check(x: Tensor, l1: Tensor, *others: Tensor) -> None:
    if x.dim() != 4 or l1.dim() != 4:
        raise ValueError(
            "global_conv2d: x must be (N, C, H, W) and l1 (K, C, k, 1), "
            f"got {tuple(x.shape)} and {tuple(l1.shape)}"
        )
    K, k, C = l1.shape[0], l1.shape[2], x.shape[1]
    if k % 2 == 0:
        raise ValueError(f"global_conv2d: the kernel size must be odd, got {k}")
    names = ("l1", "l1_bias", "l2", "l2_bias", "r1", "r1_bias", "r2", "r2_bias")
    shapes = ((K, C, k, 1), (K,), (K, K, 1, k), (K,), (K, C, 1, k), (K,), (K, K, k, 1), (K,))
    for name, tensor, shape in zip(names, (l1, *others), shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"global_conv2d: {name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise ValueError(
                f"global_conv2d: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}"
            )
    if not x.dtype.is_floating_point:
        raise ValueError(f"global_conv2d: x must be floating point, got {x.dtype}")


def _product_dtype(x: Tensor) -> torch.dtype:
    """What the matrix products of the backward multiply: on the CPU 16-bit ones are slower."""
    return x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)


def _taps(weight: Tensor) -> Tensor:
    """(K, C, k, 1) or (K, C, 1, k) -> (k * K, C), the rows of the tap form of one direction."""
    return weight.flatten(2).permute(2, 0, 1).flatten(0, 1)


def _untap(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_taps``."""
    K, C = like.shape[:2]
    weight = torch.empty_like(like)
    weight.flatten(2).copy_(rows.view(-1, K, C).permute(1, 2, 0))
    return weight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may have a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _pixels(image: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C)."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_pixels``, without a copy."""
    N, _, H, W = like.shape
    return pixels.view(N, H, W, pixels.shape[1]).permute(0, 3, 1, 2)


@torch.library.register_fake("fastseg::gcn_conv")
def _(x, l1, l1_bias, l2, l2_bias, r1, r1_bias, r2, r2_bias):
    size = (x.shape[0], l1.shape[0], *x.shape[2:])
    wide = torch.promote_types(x.dtype, torch.float32)

    def image(dtype):
        return x.new_empty(size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    return image(x.dtype), image(wide), image(wide)


@torch.library.register_fake("fastseg::gcn_conv_pack")
def _(l1, l1_bias, l2, l2_bias, r1, r1_bias, r2, r2_bias):
    K, C, k = l1.shape[:3]

    def up(n, to):
        return -(-n // to) * to

    columns = up(-(-k // 5) * K, 32) * 9
    size = 2 * columns * (up(C, 16) + up(K, 16)) + 4 * up(K, 32)
    return l1.new_empty(size, dtype=torch.float32)


@torch.library.register_fake("fastseg::gcn_conv_packed")
def _(x, packed, out_channels, kernel_size):
    y = x.new_empty(x.shape[0], out_channels, *x.shape[2:])
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("fastseg::gcn_expand")
def _(vertical, horizontal, kernel_size, begin, end):
    K, W = vertical.shape[1], vertical.shape[3]
    return vertical.new_empty((end - begin) * W, 2 * kernel_size * K)


@torch.library.custom_op("fastseg::gcn_conv_backward", mutates_args=())
def _gcn_conv_backward(
    dy: Tensor, x: Tensor, left: Tensor, right: Tensor,
    l1: Tensor, l2: Tensor, r1: Tensor, r2: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, l1, l2, r1 and r2, then of the biases of l1, l2 (and r2) and r1."""
    backward = _engine_backward if _served(x) and x.numel() > 0 else _product_backward
    return backward(dy, x, left, right, l1, l2, r1, r2)


def _served(x: Tensor) -> bool:
    """Whether the kernels of the CPU compute the gradients."""
    return x.device.type == "cpu" and x.dtype != torch.float64


def _engine_backward(
    dy: Tensor, x: Tensor, left: Tensor, right: Tensor,
    l1: Tensor, l2: Tensor, r1: Tensor, r2: Tensor,
) -> list[Tensor]:  # fmt: skip
    """By the convolution engine, in float32; the same bits for any number of threads.

    The second stage is turned round by Winograd's algorithm like any convolution. To the many
    channels of x its transforms would cost more than they save: there the gradients are expanded,
    some rows of the image at a time, so that both branches are one product and dx is written once.
    """
    N, C, H, W = x.shape
    K, k = l1.shape[0], l1.shape[2]
    dy, x_wide = (t.float().contiguous(memory_format=torch.channels_last) for t in (dy, x))

    def turned(weight: Tensor) -> Tensor:
        kernel = weight.shape[2:]
        tile = choose_tile(K, K, kernel, (H, W), padding=[n // 2 for n in kernel])
        back = weight.float().flip(2, 3).transpose(0, 1)
        return conv_engine(dy, pack_conv(back, padding=(kernel[0] // 2, kernel[1] // 2), tile=tile))

    def gradient(of: Tensor, source: Tensor, weight: Tensor) -> Tensor:
        padding = [n // 2 for n in weight.shape[2:]]
        wide = torch.ops.fastseg.conv_weight_gradient(
            of, source, weight.float(), [1, 1], padding, [1, 1]
        )
        return wide.to(weight.dtype)

    dleft, dright = turned(l2), turned(r2)
    dx = x_wide.new_empty(N * H * W, C)
    first = torch.cat([_taps(l1), _taps(r1)]).float()
    columns = first.shape[0]
    product = pack_matrix(first)
    rows = max(1, CHUNK // max(1, W * columns))
    for begin in range(0, N * H, rows):
        end = min(begin + rows, N * H)
        expanded = torch.ops.fastseg.gcn_expand(dleft, dright, k, begin, end)
        pixels = expanded.view(1, 1, -1, columns).permute(0, 3, 1, 2)
        conv_engine(pixels, product, out=_image(dx[begin * W : end * W], pixels))
    return [
        _image(dx, x).to(x.dtype),
        gradient(dleft, x_wide, l1),
        gradient(dy, left, l2),
        gradient(dright, x_wide, r1),
        gradient(dy, right, r2),
        *(channel_sums(t).to(x.dtype) for t in (dleft, dy, dright)),
    ]


def _product_backward(
    dy: Tensor, x: Tensor, left: Tensor, right: Tensor,
    l1: Tensor, l2: Tensor, r1: Tensor, r2: Tensor,
) -> list[Tensor]:  # fmt: skip
    """By matrix products of torch.

    A stage in tap form is ``P = X W`` and a sum of shifted columns of P, so dP is an expansion of
    the gradient, dX = dP W^T and dW = X^T dP. Expanded are some rows of the image at a time.
    """
    N, C, H, W = x.shape
    K, k = l1.shape[0], l1.shape[2]
    half = k * K
    wide, dtype = left.dtype, _product_dtype(x)  # of sums, of what is multiplied
    first = torch.cat([_taps(l1), _taps(r1)]).to(dtype)
    second_l, second_r = _taps(l2).to(dtype), _taps(r2).to(dtype)
    rows = max(1, CHUNK * (4 if x.is_cuda else 1) // max(1, W * 2 * half))
    chunks = [(begin, min(begin + rows, N * H)) for begin in range(0, N * H, rows)]

    dy = dy.to(dtype).contiguous(memory_format=torch.channels_last)
    left_pixels, right_pixels = _pixels(left).to(dtype), _pixels(right).to(dtype)
    dleft, dright = torch.empty_like(left_pixels), torch.empty_like(right_pixels)
    dl2, dr2 = (torch.zeros_like(w, dtype=wide) for w in (second_l, second_r))
    for begin, end in chunks:
        pixels = slice(begin * W, end * W)
        expanded = torch.ops.fastseg.gcn_expand(dy, dy, k, begin, end)
        vertical, horizontal = expanded[:, :half], expanded[:, half:]
        torch.mm(vertical, second_r, out=dright[pixels])
        torch.mm(horizontal, second_l, out=dleft[pixels])
        _add_product(dr2, vertical.T, right_pixels[pixels])
        _add_product(dl2, horizontal.T, left_pixels[pixels])

    dx = x.new_empty(N * H * W, C, dtype=dtype)
    dfirst = torch.zeros_like(first, dtype=wide)
    x_pixels = _pixels(x)
    dleft_image, dright_image = _image(dleft, dy), _image(dright, dy)
    for begin, end in chunks:
        pixels = slice(begin * W, end * W)
        expanded = torch.ops.fastseg.gcn_expand(dleft_image, dright_image, k, begin, end)
        torch.mm(expanded, first, out=dx[pixels])
        _add_product(dfirst, expanded.T, x_pixels[pixels].to(dtype))
    sums = [t.sum(0, dtype=wide) for t in (dleft, _pixels(dy), dright)]
    return [
        _image(dx, x).to(x.dtype),
        _untap(dfirst[:half], l1),
        _untap(dl2, l2),
        _untap(dfirst[half:], r1),
        _untap(dr2, r2),
        *(t.to(x.dtype) for t in sums),
    ]


@_gcn_conv_backward.register_fake
def _(dy, x, left, right, l1, l2, r1, r2):
    N, C, H, W = x.shape
    dx = x.new_empty(N, H, W, C).permute(0, 3, 1, 2)
    biases = [x.new_empty(l1.shape[0]) for _ in range(3)]
    return [dx, *(torch.empty_like(w) for w in (l1, l2, r1, r2)), *biases]


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    x, l1, _, l2, _, r1, _, r2, _ = inputs
    _, left, right = output
    ctx.mark_non_differentiable(left, right)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, left, right, l1, l2, r1, r2)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    grads = torch.ops.fastseg.gcn_conv_backward(dy, *ctx.saved_tensors)
    dx, dl1, dl2, dr1, dr2, dl1_bias, dy_sum, dr1_bias = grads
    return dx, dl1, dl1_bias, dl2, dy_sum, dr1, dr1_bias, dr2, dy_sum


torch.library.register_autograd("fastseg::gcn_conv", _backward, setup_context=_setup_context)
