"""Mean-field inference in a fully connected CRF with Gaussian pairwise terms.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
NIPS 2011, and "Parameter Learning and Convergent Inference for Dense Random Fields", ICML 2013.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .permutohedral import PermutohedralLattice, grid_shape


@dataclass
class PairwiseTerm:
    """One pairwise term: a Gaussian kernel on features, and how labels interact through it.

    Args:
        features: (d, N), (1 or B, d, N) or (1 or B, d, \\*spatial), divided by the standard
            deviations; or a :class:`PermutohedralLattice`, which brings its own normalisation.
        compatibility: a number w is the Potts model: similar points with one label lower the
            energy by w. A vector (L) v and a matrix (L, L) W are energies that are *added* where
            similar points carry the labels, so the number w means the vector -w and the matrix
            -w I. A matrix is symmetrised.
        normalization: ``"symmetric"`` (default), ``"after"``, ``"before"`` or ``"none"``.
    """

    features: Tensor | PermutohedralLattice
    compatibility: float | Tensor = 1.0
    normalization: str = "symmetric"

    def lattice(self) -> PermutohedralLattice:
        if isinstance(self.features, PermutohedralLattice):
            return self.features
        return PermutohedralLattice(self.features, self.normalization)

    def coefficients(self, unary: Tensor) -> Tensor:
        """Factors of the filtered beliefs in the message: (L), or a symmetric (L, L)."""
        labels, c = unary.shape[1], self.compatibility
        if not isinstance(c, Tensor) or c.dim() == 0:
            weight = torch.as_tensor(c, dtype=unary.dtype, device=unary.device)
            return weight.expand(labels)
        c = c.to(unary)
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

    Returns:
        Probabilities of the shape and dtype of ``unary``, the same bits for any number of threads.
        Differentiable in ``unary``, ``start`` and the compatibilities.

    Raises:
        ValueError: shapes do not match, NaN or -inf in ``unary``, or features that a lattice cannot
            hold.
    """
    if unary.dim() < 3:
        raise ValueError(
            f"dense_crf: unary must have shape (B, L, *spatial), got {tuple(unary.shape)}"
        )
    if not torch.is_floating_point(unary):
        raise ValueError(f"dense_crf: unary must be floating point, got {unary.dtype}")
    if iterations < 0:
        raise ValueError(f"dense_crf: iterations must be 0 or more, got {iterations}")
    if start is not None and start.shape != unary.shape:
        raise ValueError(
            f"dense_crf: start must have the shape of unary {tuple(unary.shape)}, "
            f"got {tuple(start.shape)}"
        )
    if unary.shape[1] < 1:
        raise ValueError("dense_crf: unary must have at least one label, got 0")
    if unary.numel() == 0:
        return unary.clone()
    dtype = unary.dtype if unary.dtype == torch.float64 else torch.float32
    energy = unary.to(dtype)
    height, width = grid_shape(unary.shape[2:])
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
        if lattice.features.dtype != dtype:
            raise ValueError(
                f"dense_crf: features must be {dtype} like the energies, "
                f"got {lattice.features.dtype}"
            )
        lattices += lattice.tensors
        counts.append(len(lattice.tensors))
        coefficients.append(term.coefficients(energy).contiguous())
        height, width = lattice.height, lattice.width
    beliefs = torch.ops.fastseg.dense_crf(
        energy.flatten(2).contiguous(),
        None if start is None else start.to(dtype).flatten(2).contiguous(),
        lattices,
        counts,
        coefficients,
        height,
        width,
        iterations,
        False,
    )
    return beliefs.reshape(unary.shape).to(unary.dtype)


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
    """
    if image.dim() < 3:
        raise ValueError(
            f"bilateral_features: image must have shape (B, C, *spatial), got {tuple(image.shape)}"
        )
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    sigmas = _positive("bilateral_features", "sigma_rgb", sigma_rgb, image.shape[1])
    colour = torch.tensor(sigmas, dtype=dtype, device=image.device)
    position = gaussian_features(image.shape[2:], sigma_xy, dtype=dtype, device=image.device)
    return torch.cat(
        [
            position.expand(image.shape[0], *position.shape[1:]),
            image.to(dtype) / colour.view(1, -1, *[1] * (image.dim() - 2)),
        ],
        dim=1,
    )


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
    if torch.compiler.is_compiling():
        features = gaussian_features(spatial, sigma, dtype=dtype, device=device)
        return PermutohedralLattice(features, normalization)
    return _cached_lattice(
        tuple(map(int, spatial)), _as_tuple(sigma), normalization, dtype, str(device)
    )


def _as_tuple(sigma: float | Sequence[float]) -> float | tuple[float, ...]:
    return tuple(map(float, sigma)) if isinstance(sigma, Sequence) else float(sigma)


@functools.lru_cache(maxsize=8)
def _cached_lattice(
    spatial: tuple[int, ...],
    sigma: float | tuple[float, ...],
    normalization: str,
    dtype: torch.dtype,
    device: str,
) -> PermutohedralLattice:
    with torch.inference_mode(False):
        features = gaussian_features(spatial, sigma, dtype=dtype, device=device)
        return PermutohedralLattice(features, normalization)


def _positive(op: str, name: str, sigma: float | Sequence[float], count: int) -> list[float]:
    values = [float(s) for s in sigma] if isinstance(sigma, Sequence) else [float(sigma)] * count
    if len(values) != count or not all(s > 0 and math.isfinite(s) for s in values):
        raise ValueError(
            f"{op}: {name} must be one positive number or {count} of them, got {sigma}"
        )
    return values


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


@torch.library.register_fake("fastseg::dense_crf")
def _(unary, start, lattices, lattice_counts, coefficients, height, width, iterations, point_major):
    b, labels, n = unary.shape
    return unary.new_empty(b, n, labels) if point_major else torch.empty_like(unary)


def _setup(ctx, inputs, output):
    unary, start, lattices, counts, coefficients, height, width, iterations, point_major = inputs
    ctx.has_start = start is not None
    ctx.save_for_backward(unary, output, *([] if start is None else [start]))
    ctx.lattices, ctx.counts, ctx.coefficients = lattices, counts, coefficients
    ctx.grid, ctx.iterations, ctx.point_major = (height, width), iterations, point_major


def _backward(ctx, grad):
    """Backpropagation through the unrolled updates.

    The beliefs of about sqrt(iterations) steps are kept and the others computed again from them, so
    memory does not grow with the number of updates times that of labels and points.
    """
    unary, output, *start = ctx.saved_tensors
    terms = []
    first = 0
    for count, c in zip(ctx.counts, ctx.coefficients, strict=True):
        terms.append((ctx.lattices[first : first + count], c))
        first += count

    def updates(beliefs: Tensor | None, steps: int) -> Tensor:
        return torch.ops.fastseg.dense_crf(
            unary, beliefs, ctx.lattices, ctx.counts, ctx.coefficients, *ctx.grid, steps, False
        )

    def softmax_adjoint(g: Tensor, q: Tensor) -> Tensor:
        return q * (g - (g * q).sum(1, keepdim=True))

    if ctx.point_major:
        grad, output = grad.transpose(1, 2).contiguous(), output.transpose(1, 2).contiguous()
    grad_unary = torch.zeros_like(unary)
    grad_coefficients = [torch.zeros_like(c) for _, c in terms]
    first_beliefs = start[0] if start else updates(None, 0)
    segment = max(1, math.isqrt(ctx.iterations))
    kept = [first_beliefs]
    for _ in range(segment, ctx.iterations, segment):
        kept.append(updates(kept[-1], segment))
    after = output
    step = ctx.iterations
    while step > 0:
        begin = (step - 1) // segment * segment
        trajectory = [kept.pop()]
        while len(trajectory) < step - begin:
            trajectory.append(updates(trajectory[-1], 1))
        while step > begin:
            before = trajectory.pop()
            grad = softmax_adjoint(grad, after)  # of the logits
            grad_unary -= grad
            grad_before = torch.zeros_like(grad)
            for k, (lattices, c) in enumerate(terms):
                filtered = torch.ops.fastseg.permutohedral_filter(before, lattices, False)
                if c.dim() == 1:
                    grad_coefficients[k] += (grad * filtered).sum((0, 2))
                    message = c[:, None] * grad
                else:
                    grad_coefficients[k] += torch.einsum("bln,bmn->lm", grad, filtered)
                    message = c.T @ grad
                grad_before += torch.ops.fastseg.permutohedral_filter(
                    message.contiguous(), lattices, True
                )
            grad, after, step = grad_before, before, step - 1
    grad_start = None
    if start:
        grad_start = grad
    else:
        grad_unary -= softmax_adjoint(grad, after)
    return (
        grad_unary,
        grad_start,
        [None] * len(ctx.lattices),
        None,
        grad_coefficients,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd("fastseg::dense_crf", _backward, setup_context=_setup)
