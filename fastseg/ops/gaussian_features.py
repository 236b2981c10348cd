"""Features whose Gaussian is that of positions, or of positions and colours, in an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._kept import may_keep
from .permutohedral import PermutohedralLattice


def gaussian_features(
    spatial: Sequence[int],
    sigma: float | Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Positions divided by their standard deviations, (1, rank, \\*spatial), last axis first.

    Args:
        spatial: (W,), (H, W) or (D, H, W).
        sigma: in pixels; one number, or one per axis in the order x, y, z.
    """
    sigmas = _positive("gaussian_features", "sigma", sigma, len(spatial))
    axes = [
        torch.arange(n, dtype=dtype, device=device) / s
        for n, s in zip(reversed(spatial), sigmas, strict=True)
    ]
    return torch.stack(torch.meshgrid(*reversed(axes), indexing="ij")[::-1]).unsqueeze(0)


def bilateral_features(
    image: Tensor, sigma_xy: float | Sequence[float], sigma_rgb: float | Sequence[float]
) -> Tensor:
    """Positions and colours divided by their standard deviations, (B, rank + C, \\*spatial).

    Args:
        image: (B, C, \\*spatial), any dtype, on its own scale (0..255 for photographs).
        sigma_xy: in pixels; one number, or one per axis in the order x, y, z.
        sigma_rgb: in units of the image; one number, or one per channel.

    Differentiable in ``image`` where that is floating point.
    """
    if image.dim() < 3:
        raise ValueError(
            f"bilateral_features: image must have shape (B, C, *spatial), got {tuple(image.shape)}"
        )
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    sigmas = _positive("bilateral_features", "sigma_rgb", sigma_rgb, image.shape[1])
    # Filled where it is: a copy from the host could not be captured in a CUDA graph.
    colour = torch.cat([torch.full((1,), s, dtype=dtype, device=image.device) for s in sigmas])
    rank = image.dim() - 2
    features = torch.empty(
        (image.shape[0], rank + image.shape[1], *image.shape[2:]), dtype=dtype, device=image.device
    )
    features[:, :rank] = gaussian_features(
        image.shape[2:], sigma_xy, dtype=dtype, device=image.device
    )
    features[:, rank:] = image
    features[:, rank:] /= colour.view(-1, *[1] * rank)
    return features


def gaussian_lattice(
    spatial: Sequence[int],
    sigma: float | Sequence[float],
    normalization: str = "symmetric",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PermutohedralLattice:
    """The lattice of :func:`gaussian_features`; the latest few are kept, since they depend on the
    shape alone."""
    device = torch.device(device)
    if torch.compiler.is_compiling():
        features = gaussian_features(spatial, sigma, dtype=dtype, device=device)
        return PermutohedralLattice(features, normalization)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    width = tuple(map(float, sigma)) if isinstance(sigma, Sequence) else float(sigma)
    key = (tuple(map(int, spatial)), width, normalization, dtype, device)
    lattice = _LATTICES.get(key)
    if lattice is None:
        with torch.inference_mode(False):
            features = gaussian_features(spatial, sigma, dtype=dtype, device=device)
            lattice = PermutohedralLattice(features, normalization)
        if may_keep(features):
            for old in list(_LATTICES)[: 1 - KEPT]:
                _LATTICES.pop(old, None)
            _LATTICES[key] = lattice
    return lattice


KEPT = 8  # lattices
_LATTICES: dict[tuple, PermutohedralLattice] = {}  # oldest first


def _positive(op: str, name: str, sigma: float | Sequence[float], count: int) -> list[float]:
    values = [float(s) for s in sigma] if isinstance(sigma, Sequence) else [float(sigma)] * count
    if len(values) != count or not all(s > 0 and math.isfinite(s) for s in values):
        raise ValueError(
            f"{op}: {name} must be one positive number or {count} of them, got {sigma}"
        )
    return values
