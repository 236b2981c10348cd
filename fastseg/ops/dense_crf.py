"""Mean-field inference in a fully connected CRF with Gaussian pairwise terms.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
NIPS 2011, and "Parameter Learning and Convergent Inference for Dense Random Fields", ICML 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .mean_field import Model, mean_field
from .permutohedral import PermutohedralLattice, grid_shape


@dataclass
class PairwiseTerm:
    """One pairwise term: a Gaussian kernel on features, and how labels interact through it.

    Args:
        features: (d, N), (1 or B, d, N) or (1 or B, d, \\*spatial), divided by the standard
            deviations; or a :class:`PermutohedralLattice`, which brings its own normalisation and
            has its kernel applied.
        compatibility: a number w is the Potts model: similar points with one label lower the
            energy by w. A vector (L) v and a matrix (L, L) W are energies that are *added* where
            similar points carry the labels, so the number w means the vector -w and the matrix
            -w I. A matrix is symmetrised.
        normalization: ``"symmetric"`` (default), ``"after"``, ``"before"`` or ``"none"``.
        kernel: what the features are multiplied by before use: None (the authors' CONST kernel), a
            vector (d) of scales (DIAG) or a matrix (d, d) (FULL). It may require a gradient.
    """

    features: Tensor | PermutohedralLattice
    compatibility: float | Tensor = 1.0
    normalization: str = "symmetric"
    kernel: Tensor | None = None

    def lattice(self) -> PermutohedralLattice:
        f, kernel = self.features, self.kernel
        if isinstance(f, PermutohedralLattice):
            if kernel is not None:
                raise ValueError("dense_crf: a kernel needs the term's features, got their lattice")
            return f
        if kernel is not None:
            f = f.unsqueeze(0) if f.dim() == 2 else f
            d = f.shape[1]
            if kernel.shape not in ((d,), (d, d)):
                raise ValueError(
                    f"dense_crf: kernel must be ({d},) or ({d}, {d}) for {d} features, "
                    f"got {tuple(kernel.shape)}"
                )
            matrix, flat = kernel.to(f), f.flatten(2)
            flat = matrix[:, None] * flat if matrix.dim() == 1 else matrix @ flat
            f = flat.reshape(f.shape)
        return PermutohedralLattice(f, self.normalization)

    def at_points(self, points: Tensor, image: int | None = None) -> PairwiseTerm:
        """The term for some of the points (their indices), of one image or of all."""
        given, normalization = self.features, self.normalization
        f = given.features if isinstance(given, PermutohedralLattice) else given
        if isinstance(given, PermutohedralLattice):
            normalization = given.normalization
        f = f.unsqueeze(0) if f.dim() == 2 else f.flatten(2)
        if image is not None and len(f) > 1:
            f = f[image : image + 1]
        return replace(self, features=f[..., points], normalization=normalization)

    def coefficients(self, unary: Tensor) -> Tensor:
        """Factors of the filtered beliefs in the message: (L), or a symmetric (L, L)."""
        labels, c = unary.shape[1], self.compatibility
        if not isinstance(c, Tensor):
            return unary.new_full((labels,), c)
        c = c.to(unary)
        if c.dim() == 0:
            return c.expand(labels)
        if c.dim() > 2 or set(c.shape) != {labels}:
            raise ValueError(
                f"dense_crf: compatibility must be a number, ({labels},) or ({labels}, {labels}) "
                f"for {labels} labels, got {tuple(c.shape)}"
            )
        return -c if c.dim() == 1 else -(c + c.T) / 2


def dense_crf(
    unary: Tensor,
    terms: Sequence[PairwiseTerm],
    *,
    iterations: int = 5,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    tolerance: float = 0.0,
    logits: bool = False,
) -> Tensor:
    """Beliefs after mean-field updates; ``dense_crf_reference`` states the exact ones.

    Every update filters the beliefs with each term's kernel on the permutohedral lattice, adds the
    messages to the negative energies and takes the soft-max, all points in parallel. A point's
    message to itself is kept, as in the authors' code.

    Args:
        unary: energies (negative log-probabilities), (B, L, \\*spatial) or (B, L, N), float32 or
            float64; float16 and bfloat16 are computed in float32. +inf forbids a label.
        terms: the pairwise terms; their features have the spatial shape of ``unary``.
        iterations: number of updates; 0 returns softmax(-unary).
        start: beliefs of the shape of ``unary`` to start from instead of softmax(-unary).
        mask: (1 or B, \\*spatial), true at valid points. The others neither send nor receive, as
            if they did not exist, and their features may be anything; they get softmax(-unary).
        tolerance: if positive, an image stops after the first update that changed all of its
            beliefs by less than this, and after ``iterations`` at the latest.
        logits: ``unary`` holds logits, the negatives of energies: the same beliefs without the
            time and memory of a negated copy.

    Returns:
        Probabilities of the shape and dtype of ``unary``, the same bits for any number of threads.
        Differentiable in ``unary``, ``start`` and the compatibilities, and on the CPU in features
        and kernels.

    Raises:
        ValueError: shapes do not match, NaN or -inf in ``unary``, features that a lattice cannot
            hold, or more memory needed than is available, see :func:`estimate_memory`. Where the
            vertices of all labels at once would not fit, labels are filtered in groups.
    """
    if unary.dim() < 3:
        raise ValueError(
            f"dense_crf: unary must have shape (B, L, *spatial), got {tuple(unary.shape)}"
        )
    if not torch.is_floating_point(unary):
        raise ValueError(f"dense_crf: unary must be floating point, got {unary.dtype}")
    if iterations < 0:
        raise ValueError(f"dense_crf: iterations must be 0 or more, got {iterations}")
    if not tolerance >= 0:
        raise ValueError(f"dense_crf: tolerance must be 0 or more, got {tolerance}")
    if start is not None and start.shape != unary.shape:
        raise ValueError(
            f"dense_crf: start must have the shape of unary {tuple(unary.shape)}, "
            f"got {tuple(start.shape)}"
        )
    if unary.shape[1] < 1:
        raise ValueError("dense_crf: unary must have at least one label, got 0")
    if mask is not None:
        _check_mask("dense_crf", mask, unary)
    if unary.numel() == 0:
        return unary.clone()
    u = unary.to(_compute_dtype(unary))
    start = None if start is None else start.to(u.dtype)
    if mask is None:
        beliefs = _solve(u, terms, iterations, start, tolerance, logits)
    else:
        energy = -u if logits else u
        beliefs = _solve_masked(energy, terms, iterations, start, tolerance, mask)
    return beliefs.to(unary.dtype)


def kl_divergence(
    beliefs: Tensor, unary: Tensor, terms: Sequence[PairwiseTerm], *, mask: Tensor | None = None
) -> Tensor:
    """The objective that mean field lowers, up to the partition function: (B) float64.

    ``sum Q log Q + sum Q U - sum_m sum Q (C_m K_m Q)``, the pairwise part not halved, as in the
    authors' code. Arguments as in :func:`dense_crf`; masked points do not count. Differentiable.
    """
    if beliefs.shape != unary.shape or unary.dim() < 3:
        raise ValueError(
            "kl_divergence: beliefs and unary must have one shape (B, L, *spatial), got "
            f"{tuple(beliefs.shape)} and {tuple(unary.shape)}"
        )
    if mask is not None:
        _check_mask("kl_divergence", mask, unary)
        grid = grid_shape(unary.shape[2:])
        parts = []
        for image, one in enumerate(mask.expand(len(unary), *mask.shape[1:])):
            points = _valid_points(one, *grid)
            q, u = (t[image : image + 1].flatten(2)[..., points] for t in (beliefs, unary))
            parts.append(kl_divergence(q, u, [t.at_points(points, image) for t in terms]))
        return torch.cat(parts)
    dtype = _compute_dtype(unary)
    q, u = beliefs.flatten(2).to(dtype), unary.flatten(2).to(dtype)
    if q.numel() == 0:
        return q.new_zeros(len(q), dtype=torch.float64)
    # A forbidden label costs nothing where it has no belief.
    value = torch.where(q > 0, q * u, 0).double() + q.double() * q.double().clamp_min(1e-20).log()
    for term in terms:
        message, c = term.lattice().filter(q), term.coefficients(q)
        message = c[:, None] * message if c.dim() == 1 else c @ message
        value = value - (q * message).double()
    return value.sum((1, 2))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _solve(
    unary: Tensor,
    terms: Sequence[PairwiseTerm],
    iterations: int,
    start: Tensor | None,
    tolerance: float,
    logits: bool = False,
) -> Tensor:
    """dense_crf without a mask: all points of unary (B, L, \\*spatial) take part."""
    height, width = grid_shape(unary.shape[2:])
    features: list[Tensor] = []
    lattices: list[Tensor] = []
    counts: list[int] = []
    coefficients: list[Tensor] = []
    for term in terms:
        lattice = term.lattice()
        if lattice.points != height * width:
            raise ValueError(
                f"dense_crf: features and unary must have one number of points, got "
                f"{lattice.points} and {height * width}"
            )
        if len(lattice.tensors) not in (1, unary.shape[0]):
            raise ValueError(
                f"dense_crf: features and unary must have one batch size, got "
                f"{len(lattice.tensors)} and {unary.shape[0]}"
            )
        if lattice.features.dtype != unary.dtype:
            raise ValueError(
                f"dense_crf: features must be {unary.dtype} like the energies, "
                f"got {lattice.features.dtype}"
            )
        features.append(lattice.features)
        lattices += lattice.tensors
        counts.append(len(lattice.tensors))
        coefficients.append(term.coefficients(unary).contiguous())
        height, width = lattice.height, lattice.width
    model = Model(features, lattices, counts, coefficients, height, width)
    u = unary.flatten(2).contiguous()
    q = None if start is None else start.flatten(2).contiguous()
    beliefs = mean_field(u, q, model, iterations, tolerance, logits)
    return beliefs.reshape(unary.shape)


def _check_mask(op: str, mask: Tensor, unary: Tensor) -> None:
    batch, spatial = unary.shape[0], unary.shape[2:]
    if mask.dtype != torch.bool or mask.shape[1:] != spatial or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"{op}: mask must be boolean with shape (1 or {batch}, "
            f"{', '.join(map(str, spatial))}), got {mask.dtype} {tuple(mask.shape)}"
        )


def _valid_points(mask: Tensor, height: int, width: int, block: int = 16) -> Tensor:
    """Indices of the true points of one mask, block of pixels by block of pixels: neighbours in
    this order share lattice vertices, as they do in the kernel's own tiles."""
    index = torch.arange(height * width, device=mask.device)
    index = torch.where(mask.flatten(), index, -1).view(1, 1, height, width)
    index = F.pad(index, (0, -width % block, 0, -height % block), value=-1)[0, 0]
    index = index.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2).flatten()
    return index[index >= 0]


def _solve_masked(
    energy: Tensor,
    terms: Sequence[PairwiseTerm],
    iterations: int,
    start: Tensor | None,
    tolerance: float,
    mask: Tensor,
) -> Tensor:
    """dense_crf of the valid points alone, put among softmax(-energy)."""
    grid = grid_shape(energy.shape[2:])
    u = energy.flatten(2)
    q = None if start is None else start.flatten(2)
    shared = len(mask) == 1
    results = []
    for image, one in enumerate(mask):
        images = slice(None) if shared else slice(image, image + 1)
        points = _valid_points(one, *grid)
        # Not torch.softmax, whose last bits depend on the number of threads.
        beliefs = mean_field(u[images].contiguous(), None, Model([], [], [], [], *grid), 0)
        if len(points):
            inside = _solve(
                u[images][..., points],
                [term.at_points(points, None if shared else image) for term in terms],
                iterations,
                None if q is None else q[images][..., points],
                tolerance,
            )
            beliefs = beliefs.index_copy(2, points, inside)
        results.append(beliefs)
    return torch.cat(results).reshape(energy.shape)


def dense_crf_reference(
    unary: Tensor,
    features: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    iterations: int,
    normalization: str = "symmetric",
) -> Tensor:
    """Mean field with the exact kernels, unary (L, N) and features (d, N): O(N^2) memory.

    ``coefficients`` multiply the filtered beliefs in the messages, (L) or (L, L).
    """
    kernels = []
    for f in features:
        k = torch.exp(-0.5 * torch.cdist(f.T, f.T).square())
        n = k.sum(1)
        if normalization == "symmetric":
            k = k / (n[:, None] * n).sqrt()
        elif normalization == "after":
            k = k / n[:, None]
        elif normalization == "before":
            k = k / n
        kernels.append(k)
    q = torch.softmax(-unary, 0)
    for _ in range(iterations):
        logits = -unary
        for k, c in zip(kernels, coefficients, strict=True):
            message = q @ k.T
            logits = logits + (c[:, None] * message if c.dim() == 1 else c @ message)
        q = torch.softmax(logits, 0)
    return q
