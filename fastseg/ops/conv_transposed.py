"""The CPU's inference form of transposed convolutions: one ordinary convolution per phase.

Output pixels whose row and column leave the same remainders by the stride take the same taps, every
stride-th of the kernel. Each of these ``stride_h * stride_w`` phases is a convolution of stride 1
and runs as a matrix product of the convolution engine that writes to its own pixels: nothing is
multiplied by zeros, and no sum is scattered. Where the output channels do not fill the panels of
that product, neighbouring columns of phases that read the same input pixels are one convolution to
the channels of all of them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layout import channels_last
from .conv_engine import ACTIVATIONS, activate, pack_conv


@dataclass(frozen=True)
class PackedConvTransposed:
    """Weights of all phases in the form that the kernels read. Made by ``pack_conv_transposed``."""

    packed: Tensor
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    activation: str
    negative_slope: float
    residual_last: bool
    joined: bool  # columns of phases

    def output_size(self, size: tuple[int, int] | torch.Size) -> tuple[int, int]:
        """(Ho, Wo) for an input (H, W)."""
        geometry = (size, self.kernel_size, self.stride, self.padding, self.output_padding)
        h, w = ((n - 1) * s - 2 * p + k + o for n, k, s, p, o in zip(*geometry, strict=True))
        return h, w


def pack_conv_transposed(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    output_padding: tuple[int, int] = (0, 0),
    activation: str = "none",
    negative_slope: float = 0.01,
    products: torch.dtype = torch.float32,
    residual_last: bool = False,
) -> PackedConvTransposed:
    """Prepare a transposed convolution for ``conv_transposed``.

    Args:
        weight: (C, K, R, S) float32 on the CPU; one group, no dilation, the kernel at least as
            large as the stride.
        bias, activation, negative_slope, products, residual_last: as for ``pack_conv``.
        stride, padding, output_padding: as for ``F.conv_transpose2d``, (vertical, horizontal).

    Raises:
        ValueError: an argument has the wrong shape, dtype or name.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"pack_conv_transposed: weight must be (C, K, R, S), got {tuple(weight.shape)}"
        )
    C, K, *kernel = weight.shape
    if any(k < s for k, s in zip(kernel, stride, strict=True)):
        raise ValueError(
            f"pack_conv_transposed: the kernel must be at least as large as the stride, got "
            f"{tuple(kernel)} and {stride}"
        )
    columns = [[b] for b in range(stride[1])]
    # Panels of 32 channels; each phase must have as many output pixels as the next.
    if K % 32 and (kernel[1] - 2 * padding[1] + output_padding[1]) % stride[1] == 0:
        columns = _columns(kernel[1], stride[1], padding[1])
    phases = []
    for a in range(stride[0]):
        for run in columns:
            taps = []
            for b in run:
                first = [(n + p) % s for n, p, s in zip((a, b), padding, stride, strict=True)]
                taps.append(weight.detach()[:, :, first[0] :: stride[0], first[1] :: stride[1]])
            conv = pack_conv(
                torch.cat(taps, 1).flip(2, 3).transpose(0, 1),
                None if bias is None else bias.detach().repeat(len(run)),
                activation=activation,
                products=products,
            )
            phases.append(conv.packed)
    with torch.no_grad():
        packed = torch.cat(phases)
    return PackedConvTransposed(
        packed,
        C,
        K,
        (kernel[0], kernel[1]),
        stride,
        padding,
        output_padding,
        activation,
        negative_slope,
        residual_last,
        len(columns) < stride[1],
    )


def _columns(kernel: int, stride: int, padding: int) -> list[list[int]]:
    """The columns of phases, those side by side that read the same pixels together."""
    runs: dict[tuple[int, int], list[int]] = {}
    for b in range(stride):
        tap = (b + padding) % stride
        taps = -(-(kernel - tap) // stride)
        runs.setdefault(((b + padding) // stride, taps), []).append(b)
    return list(runs.values())


def conv_transposed(
    x: Tensor,
    conv: PackedConvTransposed,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``activation(conv_transpose2d(x, weight, bias) + residual)`` with packed weights, without
    gradients; the residual behind the activation if packed with ``residual_last``.

    Args, Returns, Raises: as for ``conv_engine``.
    """
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        raise ValueError(
            f"conv_transposed: x must be (N, {conv.in_channels}, H, W), got {tuple(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("conv_transposed: computes no gradients, call it under torch.no_grad()")
    shape = (x.shape[0], conv.out_channels, *conv.output_size(x.shape[2:]))
    if min(shape[2:]) < 1:
        raise ValueError(f"conv_transposed: the padding leaves no pixels of {tuple(x.shape)}")
    if out is None:
        out = x.new_empty((shape[0], *shape[2:], shape[1])).permute(0, 3, 1, 2)
    elif out.shape != shape:
        raise ValueError(f"conv_transposed: out must be {shape}, got {tuple(out.shape)}")
    y = out
    residual = channels_last(residual) if residual is not None else None
    if conv.joined:  # writes and adds pixels side by side
        last = torch.channels_last
        y = y if _dense(y) else torch.empty_like(y, memory_format=last)
        if residual is not None and not _dense(residual):
            residual = torch.empty_like(residual, memory_format=last).copy_(residual)
    torch.ops.fastseg.conv_transposed_out(
        channels_last(x),
        conv.packed,
        residual,
        y,
        *conv.kernel_size,
        *conv.stride,
        *conv.padding,
        list(ACTIVATIONS).index(conv.activation),
        conv.negative_slope,
        conv.residual_last,
        conv.joined,
    )
    return out if y is out else out.copy_(y)


def _dense(x: Tensor) -> bool:
    return x.stride(3) == x.shape[1]


def conv_transposed_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    output_padding: tuple[int, int] = (0, 0),
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """What ``conv_transposed(x, pack_conv_transposed(weight, ...), residual)`` means, in plain
    PyTorch."""
    y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    if residual is not None and not residual_last:
        y = y + residual
    y = activate(y, activation, negative_slope)
    return y + residual if residual is not None and residual_last else y


@torch.library.register_fake("fastseg::conv_transposed_out")
def _(
    x, packed, residual, out, R, S, stride_h, stride_w, pad_h, pad_w, activation, slope,
    residual_last=False, joined=False,
):  # fmt: skip
    return None
