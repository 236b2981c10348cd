"""Fit a foreign state dict to one of our networks and load it."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.common import bilinear_init_
from .files import read, unwrap
from .layout import IMAGE_CONVS, IMAGENET_MEAN, IMAGENET_STD, Converted
from .layouts import LAYOUTS, detect

FC = re.compile(r"(head|branches\.\d+)\.(fc[67])\.(weight|bias)")


@dataclass(frozen=True)
class Loaded:
    """What :func:`load` did.

    Attributes:
        layout: name of the source's layout; "fastseg" is our own.
        loaded: names in the network that have new values.
        kept: names in the network that kept their values.
        unused: names in the source that were not needed.
        mean: what to subtract from an RGB image of 0 .. 255 ...
        std: ... and to divide it by, as the released weights of this layout want it.
    """

    layout: str
    loaded: list[str]
    kept: list[str]
    unused: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __str__(self) -> str:
        text = f"{self.layout}: {len(self.loaded)} tensors loaded"
        if self.kept:
            text += f"; kept as they were: {', '.join(self.kept)}"
        return text + (f"; not needed: {', '.join(self.unused)}" if self.unused else "")


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    model: nn.Module,
    *,
    layout: str | None = None,
    bgr: bool | None = None,
    skip: Sequence[str] = (),
) -> Loaded:
    """Load a checkpoint of another library, or our own, into one of our networks.

    The layout is found by its names. Beyond renaming: the first convolution is fitted to the
    network's image channels (one channel takes the sum over RGB, more repeat them, scaled to keep
    the sum); VGG16's fc6 and fc7 become convolutions and are thinned out where the network has
    fewer taps or channels; upsampling kernels that are bilinear are dropped where the network has
    none; an auxiliary head is dropped where the network has none. ImageNet classifiers fill the
    trunk and leave the rest of the network as it is.

    Args:
        source: a file (:func:`fastseg.convert.read`) or a state dict.
        model: the network; changed in place, and only if everything fits.
        layout: one of ``fastseg.convert.LAYOUTS``; None finds it.
        bgr: the source takes BGR images: turn its first convolution to take RGB. None: as the
            released weights of this layout.
        skip: shell patterns of our names that keep their values, such as ``"head.score.*"`` where
            the number of classes differs.

    Raises:
        ValueError: the layout is unknown or does not fit; every missing, unexpected or misshapen
            tensor is named.
    """
    state = read(source) if isinstance(source, str | os.PathLike) else unwrap(source)
    target = model.state_dict()
    if layout is None and ours(state, target):
        title, trunk, mean, std = "fastseg", False, IMAGENET_MEAN, IMAGENET_STD
        converted = Converted(dict(state), {k: k for k in state})
    else:
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(f"convert: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        found = LAYOUTS[layout] if layout is not None else detect(state)
        title, trunk, mean, std = found.name, found.trunk, found.mean, found.std
        converted = found.convert(state, bgr)

    skipped = {k for k in target if any(fnmatch.fnmatchcase(k, pattern) for pattern in skip)}
    tensors = fit(converted.tensors, target, trunk)
    problems = []
    missing = [k for k in target if k not in tensors and k not in skipped and _needed(k, trunk)]
    if missing:
        problems.append(f"missing from the source: {', '.join(missing)}")
    extra = [k for k in tensors if k not in target]
    if extra:
        names = [f"{k} ({converted.sources.get(k, k)})" for k in extra if k not in skipped]
        problems.append(f"not in the network: {', '.join(names)}")
    shapes = [
        f"{k} {tuple(tensors[k].shape)} in the source, {tuple(target[k].shape)} in the network"
        for k in tensors
        if k in target and k not in skipped and tensors[k].shape != target[k].shape
    ]
    if shapes:
        problems.append(f"of another shape: {', '.join(shapes)}")
    if problems:
        raise ValueError(
            f"convert: the source ({title}) must fit {type(model).__name__}; " + "; ".join(problems)
        )
    loaded = [k for k in target if k in tensors and k not in skipped]
    model.load_state_dict({k: tensors[k] for k in loaded}, strict=False)
    used = {converted.sources.get(k, k) for k in loaded}
    return Loaded(
        title,
        loaded,
        [k for k in target if k not in tensors or k in skipped],
        [k for k in state if k not in used],
        mean,
        std,
    )


def ours(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has our own names: most of those that it has are in the network."""
    return sum(k in target for k in state) > len(state) / 2


def _needed(name: str, trunk: bool) -> bool:
    """Whether a tensor of the network must be in the source."""
    if name.endswith("num_batches_tracked"):  # older checkpoints lack it; it changes no result
        return False
    return not trunk or name.startswith("backbone.")


def fit(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], trunk: bool
) -> dict[str, Tensor]:
    """Adapt converted tensors to a network's own shapes; what cannot be adapted stays as it is."""
    fitted = dict(tensors)
    if trunk:
        fitted = {k: v for k, v in tensors.items() if k in target or not k.startswith("head.")}
        for name, like in target.items():
            if (fc := FC.fullmatch(name)) and (source := f"head.{fc[2]}.{fc[3]}") in tensors:
                fitted[name] = thin(tensors[source], like.shape)
    has_aux = any(k.startswith("aux") for k in target)
    for name, tensor in list(fitted.items()):
        if name not in target:
            no_layer_for_it = name.startswith("aux") and not has_aux
            if no_layer_for_it or (".deconv." in name and is_bilinear(tensor)):
                del fitted[name]
        elif IMAGE_CONVS.fullmatch(name):
            fitted[name] = fit_channels(tensor, target[name].shape[1])
        elif ".deconv." in name and tensor.dim() == 4 and target[name].shape[1] < tensor.shape[1]:
            diagonal = tensor.diagonal().permute(2, 0, 1)[:, None]
            if tensor.count_nonzero() == diagonal.count_nonzero():
                fitted[name] = diagonal
    return fitted


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution (O, 3, k, k) for images of another number of channels: a gray image
    gives what it gave as three equal channels; n channels repeat RGB, scaled by 3 / n."""
    have = weight.shape[1]
    if have == channels:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(channels) % have] * (have / channels)


def thin(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """VGG16's fc6 or fc7 with fewer channels and taps: every n-th of them, as DeepLab does."""
    for axis, n in enumerate(shape):
        have = tensor.shape[axis]
        if axis >= 2 and 1 < n < have:  # taps: the outer ones stay
            at = torch.linspace(0, have - 1, n).round().long()
        elif axis < 2 and n < have and have % n == 0:
            at = torch.arange(0, have, have // n)
        else:
            continue
        tensor = tensor.index_select(axis, at)
    return tensor


def is_bilinear(tensor: Tensor) -> bool:
    """Whether an upsampling kernel, or its bias, is the fixed one."""
    if tensor.dim() != 4:
        return not tensor.any()
    ins, outs, k, _ = tensor.shape
    groups = ins if outs == 1 else 1
    deconv = nn.ConvTranspose2d(ins, outs * groups, k, k // 2, groups=groups, bias=False)
    bilinear_init_(deconv)
    return torch.allclose(deconv.weight, tensor.float(), atol=1e-5)
