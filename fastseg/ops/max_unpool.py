"""Max pooling with compact indices, and the unpooling that undoes it.

PyTorch keeps an int64 position in the whole image for every maximum. Here an index is its position
in the window: one byte, or two bits for 2x2 windows. It does not depend on the size of the image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import empty_image

IntOrPair = int | Sequence[int]


def max_pool2d(
    x: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Maximum of every window, and where in the window it lies.

    The values are those of ``torch.nn.functional.max_pool2d``, the indices those of
    ``max_pool2d_reference``: the first maximum in row-major order, or the last NaN. Padding never
    wins.

    Args:
        x: (N, C, H, W) or (C, H, W), NCHW or channels last; float32, float64, float16 or bfloat16.
        kernel_size: height and width of the windows in pixels, at most 256 positions (16 x 16).
        stride: step between windows, ``kernel_size`` by default.
        padding: pixels added on each side, at most half the window.
        ceil_mode: keep the windows that hang over the lower and right edge.
        packed: store the indices in 2 bits instead of 8; for 2x2 windows, stride 2, no padding.

    Returns:
        The maxima, (N, C, h, w) with the dtype and layout of ``x``, differentiable twice; and their
        indices ``row * kernel_width + column``, uint8 (N, C, h, w). Packed, the indices are
        (N, ceil(C / 4), h, w), with channel ``c`` in bits ``2 * (c % 4)`` of byte ``c // 4``.

    Raises:
        ValueError: a dtype or option outside these, or a window larger than the padded image.
    """
    kernel, step, pad = _windows(kernel_size, stride, padding)
    y, indices = torch.ops.fastseg.max_pool2d(
        _batched("max_pool2d", "x", x), kernel, step, pad, ceil_mode, packed
    )
    return (y, indices) if x.dim() == 4 else (y.squeeze(0), indices.squeeze(0))


def max_unpool2d(
    x: Tensor,
    indices: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Put each pooled value back where its maximum came from; all other pixels are 0.

    Equal to ``torch.nn.functional.max_unpool2d`` with ``to_torch_indices`` where ``output_size`` is
    the size that was pooled. For another size each value keeps its row and column (PyTorch's flat
    positions would shift), and what falls outside is dropped. Where windows name one pixel, the
    last one in row-major order wins and alone gets the gradient (PyTorch promises no order and
    gives it to all). SegNet, Badrinarayanan et al. 2017, section 3.

    Args:
        x: (N, C, h, w) or (C, h, w), NCHW or channels last; float32, float64, float16 or bfloat16.
        indices: uint8 indices of ``max_pool2d``, packed or not.
        kernel_size, stride, padding: those of the pooling.
        output_size: (H, W) of the result, or a shape that ends in it; less than one stride from
            the default ``(h - 1) * stride - 2 * padding + kernel_size``.

    Returns:
        (N, C, H, W) with the dtype and layout of ``x``. Differentiable twice in ``x``.

    Raises:
        ValueError: shapes, dtypes or sizes that do not belong together.
    """
    kernel, step, pad = _windows(kernel_size, stride, padding)
    y = torch.ops.fastseg.max_unpool2d(
        _batched("max_unpool2d", "x", x),
        _batched("max_unpool2d", "indices", indices),
        kernel,
        step,
        pad,
        _output_size(x, output_size, kernel, step, pad),
        False,
    )
    return y if x.dim() == 4 else y.squeeze(0)


def to_torch_indices(
    indices: Tensor,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    channels: int | None = None,
) -> Tensor:
    """The int64 indices that PyTorch's ``max_pool2d(..., return_indices=True)`` would have given.

    Args:
        indices: uint8 indices of ``max_pool2d``, (..., C, h, w).
        input_size: (H, W) of the pooled image, or a shape that ends in it.
        kernel_size, stride, padding: those of the pooling.
        channels: C of the pooled image; needed if the indices are packed.

    Returns:
        int64 (..., C, h, w): ``row * W + column`` in the pooled image.
    """
    if channels is not None and channels != indices.size(-3):
        indices = _unpack(indices, channels)
    rows, cols = _positions(indices, *_windows(kernel_size, stride, padding))
    return rows * input_size[-1] + cols


def from_torch_indices(
    indices: Tensor,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    packed: bool = False,
) -> Tensor:
    """Compact indices from PyTorch's int64 ones; the inverse of ``to_torch_indices``.

    Args:
        indices: int64 (..., C, h, w), ``row * W + column`` in the pooled image.
        input_size: (H, W) of the pooled image, or a shape that ends in it.
        kernel_size, stride, padding: those of the pooling.
        packed: return 2-bit indices; for 2x2 windows, stride 2, no padding.

    Returns:
        uint8 (..., C, h, w), or packed (..., ceil(C / 4), h, w).

    Raises:
        ValueError: a position lies outside its window: other options were used for the pooling.
    """
    (kh, kw), step, pad = _windows(kernel_size, stride, padding)
    if packed and ((kh, kw), step, pad) != ((2, 2), (2, 2), (0, 0)):
        raise ValueError(
            "from_torch_indices: packed indices need kernel_size 2, stride 2 and padding 0, "
            f"got {(kh, kw)}, {step} and {pad}"
        )
    corner_row, corner_col = _corners(indices, step, pad)
    row = indices // input_size[-1] - corner_row
    col = indices % input_size[-1] - corner_col
    inside = (row >= 0) & (row < kh) & (col >= 0) & (col < kw)
    if not torch.compiler.is_compiling() and not inside.all():
        raise ValueError(
            "from_torch_indices: every position must lie in its window, got others for "
            f"kernel_size {(kh, kw)}, stride {step}, padding {pad}"
        )
    codes = (row * kw + col).to(torch.uint8)
    return _pack(codes) if packed else codes


def max_pool2d_reference(x, kernel_size, stride=None, padding=0, ceil_mode=False, packed=False):
    """What max_pool2d means, in plain PyTorch."""
    if x.is_cuda:  # torch's channels-last kernel there has index 0 for every window of -inf alone
        x = x.contiguous()
    y, flat = F.max_pool2d(
        x, kernel_size, stride, padding, ceil_mode=ceil_mode, return_indices=True
    )
    return y, from_torch_indices(flat, x.shape, kernel_size, stride, padding, packed)


def max_unpool2d_reference(x, indices, kernel_size, stride=None, padding=0, output_size=None):
    """What max_unpool2d means, in plain PyTorch, one window after the other. x is (N, C, h, w)."""
    kernel, step, pad = _windows(kernel_size, stride, padding)
    H, W = _output_size(x, output_size, kernel, step, pad)
    codes = indices if indices.size(1) == x.size(1) else _unpack(indices, x.size(1))
    row, col = _positions(codes, kernel, step, pad)
    inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
    at = torch.where(inside, row * W + col, H * W).flatten(2)  # H * W: dropped
    out = x.new_zeros(*x.shape[:2], H * W + 1)
    for i in range(at.size(2)):
        out = out.scatter(2, at[..., i : i + 1], x.flatten(2)[..., i : i + 1])
    return out[..., :-1].unflatten(2, (H, W))


def _pair(value: IntOrPair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _windows(
    kernel_size: IntOrPair, stride: IntOrPair | None, padding: IntOrPair
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return _pair(kernel_size), _pair(kernel_size if stride is None else stride), _pair(padding)


def _output_size(x: Tensor, output_size: Sequence[int] | None, *windows: tuple[int, int]) -> list:
    """(H, W) of the unpooled image; by default what the windows span."""
    if output_size is not None:
        return list(output_size[-2:])
    sides = zip(x.shape[-2:], *windows, strict=True)
    return [(n - 1) * stride - 2 * padding + kernel for n, kernel, stride, padding in sides]


def _batched(op: str, name: str, x: Tensor) -> Tensor:
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{op}: {name} must be (N, C, H, W) or (C, H, W), got shape {tuple(x.shape)}"
        )
    return x if x.dim() == 4 else x.unsqueeze(0)


def _corners(
    indices: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Row (h, 1) and column (w,) of each window's first pixel; negative in the padding."""
    h, w = indices.shape[-2:]
    rows = torch.arange(h, device=indices.device)[:, None] * stride[0] - padding[0]
    cols = torch.arange(w, device=indices.device) * stride[1] - padding[1]
    return rows, cols


def _positions(
    codes: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Row and column in the image that unpacked indices name, int64."""
    rows, cols = _corners(codes, stride, padding)
    return rows + codes // kernel[1], cols + codes % kernel[1]


def _pack(codes: Tensor) -> Tensor:
    fours = F.pad(codes, (0, 0, 0, 0, 0, -codes.size(-3) % 4)).unflatten(-3, (-1, 4))
    a, b, c, d = fours.unbind(-3)
    return a | b << 2 | c << 4 | d << 6


def _unpack(indices: Tensor, channels: int) -> Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=indices.device)[:, None, None]
    codes = indices.unsqueeze(-3) >> shifts & 3
    return codes.flatten(-4, -3)[..., :channels, :, :]


# ---- registration: shapes for torch.compile, and gradients --------------------------------------
# Backward of pooling is unpooling that adds up; backward of unpooling is pooling by index.


@torch.library.register_fake("fastseg::max_pool2d")
def _(x, kernel_size, stride, padding, ceil_mode, packed):
    def windows(size, k, s, p):
        count = (size + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
        return count - 1 if ceil_mode and (count - 1) * s >= size + p else count

    N, C, *size = x.shape
    h, w = map(windows, size, kernel_size, stride, padding)
    channels = (C + 3) // 4 if packed else C
    return empty_image(x, (N, C, h, w)), empty_image(x, (N, channels, h, w), torch.uint8)


@torch.library.register_fake("fastseg::max_unpool2d")
def _(x, indices, kernel_size, stride, padding, output_size, accumulate):
    return empty_image(x, (*x.shape[:2], *output_size))


@torch.library.register_fake("fastseg::max_pool2d_by_index")
def _(x, indices, kernel_size, stride, padding, last_only):
    return empty_image(x, (*x.shape[:2], *indices.shape[2:]))


def _save_pool(ctx, inputs, output):
    x, *ctx.windows, _ceil_mode, _packed = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(output[1])


def _pool_backward(ctx, grad_y, _grad_indices):
    (indices,) = ctx.saved_tensors
    grad_x = torch.ops.fastseg.max_unpool2d(grad_y, indices, *ctx.windows, ctx.size, True)
    return grad_x, None, None, None, None, None


def _save_unpool(ctx, inputs, output):
    _x, indices, *ctx.windows, _size, ctx.accumulate = inputs
    ctx.save_for_backward(indices)


def _unpool_backward(ctx, grad_y):
    (indices,) = ctx.saved_tensors
    grad_x = torch.ops.fastseg.max_pool2d_by_index(
        grad_y, indices, *ctx.windows, not ctx.accumulate
    )
    return grad_x, None, None, None, None, None, None


def _save_by_index(ctx, inputs, output):
    x, indices, *ctx.windows, ctx.last_only = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(indices)


def _by_index_backward(ctx, grad_y):
    (indices,) = ctx.saved_tensors
    grad_x = torch.ops.fastseg.max_unpool2d(
        grad_y, indices, *ctx.windows, ctx.size, not ctx.last_only
    )
    return grad_x, None, None, None, None, None


torch.library.register_autograd("fastseg::max_pool2d", _pool_backward, setup_context=_save_pool)
torch.library.register_autograd(
    "fastseg::max_unpool2d", _unpool_backward, setup_context=_save_unpool
)
torch.library.register_autograd(
    "fastseg::max_pool2d_by_index", _by_index_backward, setup_context=_save_by_index
)
