"""The CRF as a recurrent layer (Zheng et al., ICCV 2015, arXiv:1502.03240)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.gaussian_features import bilateral_features, gaussian_lattice
from ..ops.permutohedral import PermutohedralLattice


class CRFRNN(nn.Module):
    """Mean-field inference whose kernel weights and label compatibility are learned matrices.

    Every step computes ``u + M (Ws S(q) + Wb B(q))`` from ``q``, the soft-max of the step before,
    with S and B the Gaussian filters of positions and of positions and colours, divided by their
    row sums. Unlike in :class:`DenseCRF` the matrices need not be symmetric.

    Args:
        num_classes: L.
        iters: steps in evaluation.
        train_iters: steps in training; more do not help there (the paper's section 6.1).
        gaussian: width of S in pixels.
        bilateral: widths of B, in pixels and in units of the image's colours, 0..255.
        weights: diagonals that Ws and Wb start from. M starts from the identity.

    Shapes: scores (N, L, H, W) and image (N, C, H, W), any dtype -> scores (N, L, H, W), whose
    soft-max are the beliefs. Differentiable in the scores, in the three (L, L) matrices and, on the
    CPU, in an image that requires a gradient.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        iters: int = 10,
        train_iters: int = 5,
        gaussian: float = 3.0,
        bilateral: tuple[float, float] = (160.0, 3.0),
        weights: tuple[float, float] = (3.0, 5.0),
    ) -> None:
        super().__init__()
        if min(iters, train_iters) < 0:
            raise ValueError(
                f"CRFRNN: iters and train_iters must be 0 or more, got {iters} and {train_iters}"
            )
        self.iters, self.train_iters = iters, train_iters
        self.gaussian, self.bilateral = gaussian, bilateral
        self.spatial_weight = nn.Parameter(weights[0] * torch.eye(num_classes))
        self.bilateral_weight = nn.Parameter(weights[1] * torch.eye(num_classes))
        self.compatibility = nn.Parameter(torch.eye(num_classes))

    def forward(self, scores: Tensor, image: Tensor) -> Tensor:
        L, size = scores.shape[1], scores.shape[2:]
        if len(self.compatibility) != L:
            raise ValueError(f"CRFRNN: scores must have {len(self.compatibility)} classes, got {L}")
        if image.shape[0] != scores.shape[0] or image.shape[2:] != size:
            raise ValueError(
                "CRFRNN: image must have the batch and size of the scores "
                f"{tuple(scores.shape)}, got {tuple(image.shape)}"
            )
        if scores.is_meta:  # the lattice's size depends on the image; the result's does not
            return torch.empty_like(scores)
        u = scores.flatten(2)  # (N, L, H * W)
        u = u if u.dtype == torch.float64 else u.float()
        features = bilateral_features(image.to(u), *self.bilateral)
        kernels = (
            gaussian_lattice(size, self.gaussian, "after", dtype=u.dtype, device=u.device),
            PermutohedralLattice(features, "after"),
        )
        matrices = [
            (self.compatibility @ w).to(u) for w in (self.spatial_weight, self.bilateral_weight)
        ]
        out = u
        for _ in range(self.train_iters if self.training else self.iters):
            q = out.softmax(1)
            out = u + sum(m @ k.filter(q) for m, k in zip(matrices, kernels, strict=True))
        return out.unflatten(2, size).to(scores.dtype)

    def extra_repr(self) -> str:
        return (
            f"{len(self.compatibility)}, iters={self.iters}, train_iters={self.train_iters}, "
            f"gaussian={self.gaussian}, bilateral={self.bilateral}"
        )
