"""``pydensecrf.utils``: unary energies and pairwise features from NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from logging import warning
from numbers import Number
from typing import Any

import numpy as np


def unary_from_labels(
    labels: np.ndarray, n_labels: int, gt_prob: float, zero_unsure: bool = True
) -> np.ndarray:
    """Energies (n_labels, labels.size) of labels that are right with probability ``gt_prob``.

    With ``zero_unsure``, label 0 means unknown: all energies alike, and label k becomes row k - 1.
    """
    assert 0 < gt_prob < 1, "`gt_prob must be in (0,1)."
    flat = labels.flatten()
    energy = np.full(
        (n_labels, len(flat)), -np.log((1.0 - gt_prob) / (n_labels - 1)), dtype="float32"
    )
    energy[flat - 1 if zero_unsure else flat, np.arange(len(flat))] = -np.log(gt_prob)
    if zero_unsure:
        energy[:, flat == 0] = -np.log(1.0 / n_labels)
    return energy


def compute_unary(labels: np.ndarray, M: int, GT_PROB: float = 0.5) -> np.ndarray:
    """Deprecated name of :func:`unary_from_labels`."""
    warning("pydensecrf.compute_unary is deprecated, use unary_from_labels instead.")
    return unary_from_labels(labels, M, GT_PROB)


def unary_from_softmax(
    sm: np.ndarray, scale: float | None = None, clip: float | None = 1e-5
) -> np.ndarray:
    """Energies (C, points) of class probabilities (C, ...).

    ``scale`` in (0, 1] mixes them with the uniform distribution: scale * sm + (1 - scale) / C.
    ``clip`` is the smallest probability allowed, since the energy of 0 is infinite.
    """
    classes = sm.shape[0]
    if scale is not None:
        assert 0 < scale <= 1, "`scale` needs to be in (0,1]"
        sm = scale * sm + (1 - scale) * (np.ones(sm.shape) / classes)
    if clip is not None:
        sm = np.clip(sm, clip, 1.0)
    return -np.log(sm).reshape([classes, -1]).astype(np.float32)


def softmax_to_unary(sm: np.ndarray, GT_PROB: float = 1) -> np.ndarray:
    """Deprecated name of :func:`unary_from_softmax`, which does not clip."""
    warning("pydensecrf.softmax_to_unary is deprecated, use unary_from_softmax instead.")
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def _scaled_grid(sdims: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    grid = np.array(np.meshgrid(*map(range, shape), indexing="ij"), dtype=np.float32)
    for axis, sigma in enumerate(sdims):
        grid[axis] /= sigma
    return grid


def create_pairwise_gaussian(sdims: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """Features (len(shape), points): positions, first axis first, divided by ``sdims``."""
    return _scaled_grid(sdims, shape).reshape([len(sdims), -1])


def create_pairwise_bilateral(
    sdims: Sequence[float], schan: Any, img: np.ndarray, chdim: int = -1
) -> np.ndarray:
    """Features (rank + channels, points): scaled positions, then scaled channels of ``img``.

    ``chdim`` is the axis of the channels, -1 for an image without one; ``schan`` is one number or
    one per channel.
    """
    channels = (img[np.newaxis] if chdim == -1 else np.rollaxis(img, chdim)).astype(np.float32)
    if isinstance(schan, Number):
        channels /= float(schan)  # type: ignore[arg-type]
    else:
        for channel, sigma in enumerate(schan):
            channels[channel] /= sigma
    features = np.concatenate([_scaled_grid(sdims, channels.shape[1:]), channels])
    return features.reshape([features.shape[0], -1])


def _create_pairwise_gaussian_2d(sx: float, sy: float, shape: Sequence[int]) -> np.ndarray:
    return create_pairwise_gaussian((sx, sy), shape)


def _create_pairwise_bilateral_2d(
    sx: float, sy: float, sr: float, sg: float, sb: float, img: np.ndarray
) -> np.ndarray:
    return create_pairwise_bilateral((sx, sy), (sr, sg, sb), img, chdim=2)
