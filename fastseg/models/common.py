"""What several networks share: the base class, resizing, padding and upsampling layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import upsample_argmax

Size = Sequence[int]
Upsample = Literal["bilinear", "grouped", "dense"]


class SegmentationModel(nn.Module):
    """Images (N, in_channels, H, W) in, ``{"out": logits (N, classes, H, W)}`` out, for any H, W.

    A network implements :meth:`scores`, its logits at the resolution it computes them in;
    :meth:`forward` resizes them to the input. One that upsamples by layers of its own overrides
    :meth:`forward` instead.

    Attributes:
        align_corners: how :meth:`forward` resizes, as in ``torch.nn.functional.interpolate``.
    """

    align_corners: bool = False
    _bn_frozen: bool = False

    def scores(self, x: Tensor) -> dict[str, Tensor]:
        """Logits before the last resize: ``"out"``, and ``"aux"`` where there is such a head."""
        raise NotImplementedError(f"{type(self).__name__} must implement scores() or forward()")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        return {name: resize(y, size, self.align_corners) for name, y in self.scores(x).items()}

    def labels(self, x: Tensor) -> Tensor:
        """The best class of each pixel, (N, H, W), uint8 or beyond 256 classes int16.

        The same as ``self(x)["out"].argmax(1)``; a network that ends in a resize never makes its
        logits at full size.
        """
        if type(self).forward is SegmentationModel.forward:
            logits, align_corners = self.scores(x)["out"], self.align_corners
        else:
            logits, align_corners = self(x)["out"], False
        labels: Any = upsample_argmax(logits, (x.shape[-2], x.shape[-1]), align_corners)
        return labels

    def freeze_bn(self, frozen: bool = True) -> SegmentationModel:
        """Keep every batch norm at its stored statistics and fixed scale and shift, also after
        ``.train()``. DeepLab v2, RefineNet and the second stage of DeepLab v3 train this way."""
        self._bn_frozen = frozen
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.requires_grad_(not frozen)
                module.bias.requires_grad_(not frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> SegmentationModel:
        super().train(mode)
        if self._bn_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


class Backbone(nn.Module):
    """A feature extractor: images in, a list of maps out, finest first.

    Attributes:
        channels: channels of each map.
    """

    channels: list[int]


class SimpleSegmentationModel(SegmentationModel):
    """A trunk, a classifier on its last map and, in ``"aux"``, another on the map before.

    Args:
        backbone: returns feature maps, finest first.
        classifier: maps the last one to class scores.
        aux_classifier: maps the one before to class scores, for an auxiliary loss; or None.
        align_corners: of the resizing to the input.
    """

    def __init__(
        self,
        backbone: Backbone,
        classifier: nn.Module,
        aux_classifier: nn.Module | None = None,
        *,
        align_corners: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.align_corners = align_corners

    def scores(self, x: Tensor) -> dict[str, Tensor]:
        *_, c4, c5 = self.backbone(x)
        scores = {"out": self.classifier(c5)}
        if self.aux_classifier is not None:
            scores["aux"] = self.aux_classifier(c4)
        return scores


def resize(x: Tensor, size: Size, align_corners: bool) -> Tensor:
    """x (N, C, h, w) -> (N, C, *size), bilinear."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def window(x: Tensor, offset: int, size: Size) -> Tensor:
    """The part of x (N, C, h, w) of this size whose corner is (offset, offset): Caffe's Crop."""
    return x[..., offset : offset + size[0], offset : offset + size[1]]


def reflect_pad(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Pad x (N, C, H, W) by mirroring at its border pixels, which are not repeated.

    Unlike ``torch.nn.functional.pad`` the padding may exceed the image: the mirror goes on.
    """
    for axis, before, after in ((-2, top, bottom), (-1, left, right)):
        n = x.shape[axis]
        period = max(2 * (n - 1), 1)
        at = torch.arange(-before, n + after, device=x.device) % period
        x = x.index_select(axis, torch.minimum(at, period - at) if n > 1 else at)
    return x


class BilinearUpsample2d(nn.Module):
    """FCN's bilinear "deconvolution": kernel 2 * stride, no padding.

    x (N, C, h, w) -> (N, C, (h + 1) * stride, (w + 1) * stride). Outside of x there are zeros, so
    the outer ``stride`` pixels fade out; callers crop the result with :func:`window`.

    Args:
        channels: C.
        stride: upsampling factor, even.
        mode: "bilinear" has no parameters; "grouped" learns one kernel per channel; "dense" learns
            a C x C transposed convolution. The learned ones start bilinear.
        bias: give the learned ones a bias.
    """

    def __init__(self, channels: int, stride: int, mode: Upsample = "bilinear", bias: bool = False):
        super().__init__()
        if mode not in ("bilinear", "grouped", "dense"):
            raise ValueError(f"upsample must be bilinear, grouped or dense, got {mode!r}")
        self.stride = stride
        self.deconv = None
        if mode != "bilinear":
            groups = channels if mode == "grouped" else 1
            self.deconv = nn.ConvTranspose2d(
                channels, channels, 2 * stride, stride, groups=groups, bias=bias
            )
            bilinear_init_(self.deconv)

    def forward(self, x: Tensor) -> Tensor:
        if self.deconv is not None:
            return self.deconv(x)
        # Half-pixel interpolation of the zero-bordered map is the same function without the
        # multiplications by zero.
        s = self.stride
        y = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=s, mode="bilinear")
        return y[..., s // 2 : -(s // 2), s // 2 : -(s // 2)]


def bilinear_init_(deconv: nn.ConvTranspose2d) -> None:
    """Make a transposed convolution interpolate each channel bilinearly; the bias becomes 0."""
    k, s = deconv.kernel_size[0], deconv.stride[0]
    ramp = 1 - (torch.arange(k) - (k - 1) / 2).abs() / s
    kernel = torch.outer(ramp, ramp).to(deconv.weight)
    with torch.no_grad():
        deconv.weight.zero_()
        diagonal = torch.arange(deconv.in_channels)
        deconv.weight[diagonal, diagonal if deconv.groups == 1 else 0] = kernel
        if deconv.bias is not None:
            deconv.bias.zero_()


def init_conv(module: nn.Module, std: float | None = None) -> None:
    """Convolutions of ``module``: weights Gaussian with ``std`` (None: He, fan-out), bias 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            if std is None:
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
