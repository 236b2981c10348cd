"""The dense CRF as a layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dense_crf import PairwiseTerm, dense_crf, kl_divergence
from ..ops.gaussian_features import bilateral_features, gaussian_features, gaussian_lattice
from ..ops.permutohedral import NORMALIZATIONS

Width = float | Sequence[float]
KERNELS = ("const", "diag", "full")

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
    # Yu and Koltun 2016 name no widths for the CRF after their dilated network: those of its
    # authors' example.
    "dilated": {"iters": 10, "gaussian": (3, 3.0), "bilateral": (80, 13, 10.0)},
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
        tolerance: if positive, an image stops after the first update that changed all of its
            beliefs by less than this; ``iters`` is then the most updates.
        kernel: ``"const"``, or kernels with parameters, which ``trainable`` learns: ``"diag"``
            holds a scale per feature (a width is then sigma / scale) and ``"full"`` a matrix.
        rank, channels: spatial axes and image channels that the kernel parameters are for.
        trainable: whether weights, compatibility and kernel parameters receive gradients.

    Shape:
        x: (N, L, \\*spatial) logits or probabilities, or (N, \\*spatial) labels; spatial is (H, W),
        (W,) or (D, H, W). image: (N, C, \\*spatial), any dtype, 0..255. mask: (1 or N,
        \\*spatial), true at valid pixels; the others take no part and keep the unary's
        probabilities. Returns probabilities (N, L, \\*spatial), differentiable in x, in the
        parameters and on the CPU in image.
    """

    gaussian_kernel: Tensor | None
    bilateral_kernel: Tensor | None

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
        tolerance: float = 0.0,
        kernel: str = "const",
        rank: int = 2,
        channels: int = 3,
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
        if not tolerance >= 0:
            raise ValueError(f"DenseCRF: tolerance must be 0 or more, got {tolerance}")
        if kernel not in KERNELS:
            raise ValueError(f"DenseCRF: kernel must be one of {KERNELS}, got {kernel!r}")
        self.iters, self.unary, self.normalization = iters, unary, normalization
        self.tolerance, self.kernel = tolerance, kernel
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
        for name, count, features in (
            ("gaussian_kernel", len(gaussians), rank),
            ("bilateral_kernel", len(bilaterals), rank + channels),
        ):
            identity = torch.ones(features) if kernel == "diag" else torch.eye(features)
            parameter = nn.Parameter(identity.repeat(count, *[1] * identity.dim()), trainable)
            self.register_parameter(name, None if kernel == "const" else parameter)
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
            text = Path(name).read_text()
            try:
                return cls(**{**json.loads(text), **overrides})
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"DenseCRF.from_preset: {name} must hold arguments of DenseCRF ({error})"
                ) from error
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
        for k, (sigma, weight) in enumerate(
            zip(self.gaussian_widths, self.gaussian_weight, strict=True)
        ):
            where: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
            compatibility = self._compatibility(weight)
            if self.gaussian_kernel is None:
                lattice = gaussian_lattice(spatial, sigma, self.normalization, **where)
                terms.append(PairwiseTerm(lattice, compatibility))
            else:
                features = gaussian_features(spatial, sigma, **where)
                kernel = self.gaussian_kernel[k]
                terms.append(PairwiseTerm(features, compatibility, self.normalization, kernel))
        for k, ((xy, rgb), weight) in enumerate(
            zip(self.bilateral_widths, self.bilateral_weight, strict=True)
        ):
            if image is None:
                raise ValueError("DenseCRF: the bilateral term needs the image, got None")
            features = bilateral_features(image, xy, rgb).to(like)
            term = PairwiseTerm(features, self._compatibility(weight), self.normalization)
            if self.bilateral_kernel is not None:
                term.kernel = self.bilateral_kernel[k]
            terms.append(term)
        return terms

    def _compatibility(self, weight: Tensor) -> Tensor:
        return weight if self.compatibility is None else weight * self.compatibility

    def forward(self, x: Tensor, image: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        unary, terms, start = self._problem(x, image)
        return dense_crf(
            unary,
            terms,
            iterations=self.iters,
            start=start,
            mask=mask,
            tolerance=self.tolerance,
            logits=self.unary == "logits",
        )

    def steps(
        self, x: Tensor, image: Tensor | None = None, mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The beliefs before the first update and after each, without an end."""
        unary, terms, start = self._problem(x, image)
        logits = self.unary == "logits"
        if mask is None:
            terms = [replace(term, features=term.lattice(), kernel=None) for term in terms]
        q = dense_crf(unary, terms, iterations=0, start=start, mask=mask, logits=logits)
        while True:
            yield q
            q = dense_crf(unary, terms, iterations=1, start=q, mask=mask, logits=logits)

    def kl_divergence(
        self, q: Tensor, x: Tensor, image: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """What the updates lower, for beliefs ``q``: (N) float64, see
        :func:`fastseg.ops.kl_divergence`."""
        _, terms, _ = self._problem(x, image)
        return kl_divergence(q, self.energies(x), terms, mask=mask)

    def _problem(
        self, x: Tensor, image: Tensor | None
    ) -> tuple[Tensor, list[PairwiseTerm], Tensor | None]:
        """Unary energies, or the logits of which they are the negatives up to a constant of each
        point, pairwise terms and the beliefs to start from, None for the usual ones."""
        logits = self.unary == "logits"
        unary = _as_float(x) if logits else self.energies(x)
        spatial = unary.shape[2:]
        if image is not None and (
            image.dim() != unary.dim()
            or image.shape[0] != unary.shape[0]
            or image.shape[2:] != spatial
        ):
            raise ValueError(
                f"DenseCRF: image must have shape ({unary.shape[0]}, C, "
                f"{', '.join(map(str, spatial))}) to match x, got {tuple(image.shape)}"
            )
        start = None
        if self.start == "hard":
            best = unary.argmax(1, keepdim=True) if logits else unary.argmin(1, keepdim=True)
            start = torch.zeros_like(unary).scatter_(1, best, 1.0)
        return unary, self.terms(image, spatial, unary), start

    def extra_repr(self) -> str:
        return (
            f"iters={self.iters}, gaussian={self.gaussian_widths}, "
            f"bilateral={self.bilateral_widths}, unary={self.unary!r}, "
            f"normalization={self.normalization!r}, kernel={self.kernel!r}"
        )


def _as_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _terms(name: str, value: Sequence[Any] | None, length: int) -> list[tuple[Any, ...]]:
    """One tuple or a list of them -> a list of checked tuples."""
    if value is None or (isinstance(value, Sequence) and not value):
        return []
    several = isinstance(value, list) and isinstance(value[0], (list, tuple))
    terms = value if several else [value]
    for term in terms:
        if not isinstance(term, Sequence) or len(term) != length:
            parts = "(sigma_xy, weight)" if length == 2 else "(sigma_xy, sigma_rgb, weight)"
            raise ValueError(f"DenseCRF: {name} must be {parts} or a list of those, got {term}")
    return [tuple(term) for term in terms]
