"""The dense CRF as a layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dense_crf import (
    PairwiseTerm,
    bilateral_features,
    dense_crf,
    gaussian_lattice,
)
from ..ops.permutohedral import NORMALIZATIONS

Width = float | Sequence[float]

PRESETS: dict[str, dict[str, Any]] = {
    # What this layer does without arguments.
    "default": {"iters": 5, "gaussian": (3, 3.0), "bilateral": (50, 5, 10.0)},
    # Road scenes (CamVid): weak and narrow, so that poles and signs survive.
    "street": {"iters": 5, "gaussian": (1, 1.0), "bilateral": (10, 5, 3.0)},
    # Krähenbühl and Koltun's released code and example, 2011.
    "krahenbuhl": {"iters": 10, "gaussian": (3, 3.0), "bilateral": (80, 13, 10.0)},
    # Chen et al. 2015, VGG-16 LargeFOV as released.
    "deeplab_v1": {"iters": 10, "gaussian": (3, 3.0), "bilateral": (49, 5, 4.0)},
    # Chen et al. 2017, VGG-16 as released, and the ResNet-101 setting in common use.
    "deeplab_v2_vgg16": {"iters": 10, "gaussian": (2, 2.0), "bilateral": (65, 3, 4.0)},
    "deeplab_v2": {"iters": 10, "gaussian": (1, 3.0), "bilateral": (67, 3, 4.0)},
    # Zheng et al. 2015; 5 iterations in training.
    "crfrnn": {
        "iters": 10,
        "gaussian": (3, 3.0),
        "bilateral": (160, 3, 5.0),
        "normalization": "after",
    },
}


class DenseCRF(nn.Module):
    """Refine a segmentation with a fully connected CRF: smooth, and aligned with image edges.

    Equivalent to mean-field inference with ``pydensecrf`` at the same parameters, batched and
    differentiable. Krähenbühl and Koltun, NIPS 2011.

    Args:
        iters: mean-field updates.
        gaussian: (sigma_xy, weight) of the smoothness term, a list of such pairs, or None.
            sigma_xy is in pixels, one number or one per axis in the order x, y, z.
        bilateral: (sigma_xy, sigma_rgb, weight) of the appearance term, a list, or None. sigma_rgb
            is on the image's own scale (0..255), one number or one per channel.
        unary: what ``forward`` receives: ``"logits"``, ``"probs"`` or integer ``"labels"``.
        normalization: of the kernels, ``"symmetric"`` (the authors' code), ``"after"`` (the 2011
            paper), ``"before"`` or ``"none"``.
        compatibility: (L, L) energies of label pairs that replace the Potts model; each term scales
            them by its weight. ``1 - torch.eye(L)`` is the Potts model again.
        start: ``"soft"`` starts from the unary's probabilities, ``"hard"`` from its best label.
        clip: smallest probability that ``unary="probs"`` is clamped to.
        num_classes, label_confidence: for ``unary="labels"``: number of labels, and probability
            that a given label is right. A negative label means unknown, all labels alike.
        trainable: whether the weights and the compatibility receive gradients.

    Shape:
        x: (N, L, \\*spatial) logits or probabilities, or (N, \\*spatial) labels; spatial is (H, W),
        (W,) or (D, H, W). image: (N, C, \\*spatial), any dtype, 0..255. Returns probabilities
        (N, L, \\*spatial), differentiable in x and in the parameters.
    """

    def __init__(
        self,
        iters: int = 5,
        gaussian: Sequence[Any] | None = (3, 3.0),
        bilateral: Sequence[Any] | None = (50, 5, 10.0),
        unary: str = "logits",
        *,
        normalization: str = "symmetric",
        compatibility: Tensor | None = None,
        start: str = "soft",
        clip: float = 1e-5,
        num_classes: int | None = None,
        label_confidence: float = 0.7,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        if iters < 0:
            raise ValueError(f"DenseCRF: iters must be 0 or more, got {iters}")
        if unary not in ("logits", "probs", "labels"):
            raise ValueError(f"DenseCRF: unary must be logits, probs or labels, got {unary!r}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"DenseCRF: normalization must be one of {NORMALIZATIONS}, got {normalization!r}"
            )
        if start not in ("soft", "hard"):
            raise ValueError(f"DenseCRF: start must be soft or hard, got {start!r}")
        if unary == "labels" and (num_classes is None or num_classes < 2):
            raise ValueError(
                f"DenseCRF: unary='labels' needs num_classes of at least 2, got {num_classes}"
            )
        if not 0 < label_confidence < 1:
            raise ValueError(
                f"DenseCRF: label_confidence must be between 0 and 1, got {label_confidence}"
            )
        self.iters, self.unary, self.normalization = iters, unary, normalization
        self.start, self.clip = start, clip
        self.num_classes, self.label_confidence = num_classes, label_confidence
        gaussians = _terms("gaussian", gaussian, 2)
        bilaterals = _terms("bilateral", bilateral, 3)
        self.gaussian_widths = [sigma for sigma, _ in gaussians]
        self.bilateral_widths = [(xy, rgb) for xy, rgb, _ in bilaterals]
        self.gaussian_weight = nn.Parameter(
            torch.tensor([float(w) for *_, w in gaussians]), requires_grad=trainable
        )
        self.bilateral_weight = nn.Parameter(
            torch.tensor([float(w) for *_, w in bilaterals]), requires_grad=trainable
        )
        self.compatibility = (
            None
            if compatibility is None
            else nn.Parameter(compatibility.detach().clone().float(), requires_grad=trainable)
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> DenseCRF:
        """The parameters of a paper, see ``PRESETS``, or of a ``.json`` file that
        ``fastseg crf tune`` wrote; keyword arguments replace single ones."""
        if name.endswith(".json"):
            return cls(**{**json.loads(Path(name).read_text()), **overrides})
        if name not in PRESETS:
            raise ValueError(
                f"DenseCRF.from_preset: name must be one of {sorted(PRESETS)}, got {name!r}"
            )
        return cls(**{**PRESETS[name], **overrides})

    def energies(self, x: Tensor) -> Tensor:
        """The unary energies of ``x``: negative log-probabilities, (N, L, \\*spatial)."""
        if self.unary == "logits":
            return -torch.log_softmax(_as_float(x), 1)
        if self.unary == "probs":
            return -_as_float(x).clamp_min(self.clip).log()
        if torch.is_floating_point(x) or torch.is_complex(x):
            raise ValueError(f"DenseCRF: labels must be integers, got {x.dtype}")
        classes = self.num_classes
        assert classes is not None
        if x.numel() and int(x.max()) >= classes:
            raise ValueError(
                f"DenseCRF: labels must be below num_classes = {classes}, got {int(x.max())}"
            )
        p = torch.full(
            (classes, classes + 1),
            (1 - self.label_confidence) / (classes - 1),
            device=x.device,
        )
        p.fill_diagonal_(self.label_confidence)
        p[:, classes] = 1 / classes  # unknown
        index = torch.where(x < 0, classes, x).long()
        return -p.log()[:, index].movedim(0, 1).contiguous()

    def terms(
        self, image: Tensor | None, spatial: Sequence[int], like: Tensor
    ) -> list[PairwiseTerm]:
        """The pairwise terms for images of this shape, with the dtype and device of ``like``."""
        terms = []
        for sigma, weight in zip(self.gaussian_widths, self.gaussian_weight, strict=True):
            lattice = gaussian_lattice(
                spatial, sigma, self.normalization, dtype=like.dtype, device=like.device
            )
            terms.append(PairwiseTerm(lattice, self._compatibility(weight)))
        for (xy, rgb), weight in zip(self.bilateral_widths, self.bilateral_weight, strict=True):
            if image is None:
                raise ValueError("DenseCRF: the bilateral term needs the image, got None")
            features = bilateral_features(image, xy, rgb).to(like)
            terms.append(PairwiseTerm(features, self._compatibility(weight), self.normalization))
        return terms

    def _compatibility(self, weight: Tensor) -> Tensor:
        return weight if self.compatibility is None else weight * self.compatibility

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        # Soft-max ignores what log_softmax would add to each point.
        energy = -_as_float(x) if self.unary == "logits" else self.energies(x)
        spatial = energy.shape[2:]
        if image is not None and (
            image.dim() != energy.dim()
            or image.shape[0] != energy.shape[0]
            or image.shape[2:] != spatial
        ):
            raise ValueError(
                f"DenseCRF: image must have shape ({energy.shape[0]}, C, "
                f"{', '.join(map(str, spatial))}) to match x, got {tuple(image.shape)}"
            )
        start = None
        if self.start == "hard":
            best = energy.argmin(1, keepdim=True)
            start = torch.zeros_like(energy).scatter_(1, best, 1.0)
        return dense_crf(
            energy, self.terms(image, spatial, energy), iterations=self.iters, start=start
        )

    def extra_repr(self) -> str:
        return (
            f"iters={self.iters}, gaussian={self.gaussian_widths}, "
            f"bilateral={self.bilateral_widths}, unary={self.unary!r}, "
            f"normalization={self.normalization!r}"
        )


def _as_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _terms(name: str, value: Sequence[Any] | None, length: int) -> list[tuple[Any, ...]]:
    """One tuple or a list of them -> a list of checked tuples."""
    if value is None or len(value) == 0:
        return []
    several = isinstance(value, list) and isinstance(value[0], (list, tuple))
    terms = [tuple(v) for v in value] if several else [tuple(value)]
    for term in terms:
        if len(term) != length:
            parts = "(sigma_xy, weight)" if length == 2 else "(sigma_xy, sigma_rgb, weight)"
            raise ValueError(f"DenseCRF: {name} must be {parts} or a list of those, got {term}")
    return terms
