"""The kernel of :func:`fastseg.ops.dense_crf` as torch operators: fake kernel and gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .crf_memory import available_memory, mean_field_bytes
from .permutohedral import feature_gradient

MAY_TAKE = 256 << 20  # bytes, without a look at what is available


@dataclass
class Model:
    """What the terms of a CRF are to the kernel; one entry each per term but for the lattices."""

    features: list[Tensor]  # (1 or B, d, N), those of the lattices
    lattices: list[Tensor]  # `counts` of them per term, 1 or B
    counts: list[int]
    coefficients: list[Tensor]  # (L) or (L, L)
    height: int  # of the grid of points that the lattices were built for
    width: int

    def of_image(self, image: int) -> Model:
        features, lattices, first = [], [], 0
        for f, count in zip(self.features, self.counts, strict=True):
            at = image if count > 1 else 0
            features.append(f[at : at + 1])
            lattices.append(self.lattices[first + at])
            first += count
        ones = [1] * len(features)
        return Model(features, lattices, ones, self.coefficients, self.height, self.width)


def mean_field(
    unary: Tensor,
    start: Tensor | None,
    model: Model,
    iterations: int,
    tolerance: float = 0.0,
    logits: bool = False,
) -> Tensor:
    """fastseg::dense_crf for unary (B, L, N); differentiable in the features, too. A positive
    tolerance ends an image's updates early, see :func:`fastseg.ops.dense_crf`."""
    m = model
    if tolerance > 0:
        return _until_still(-unary if logits else unary, start, model, iterations, tolerance)
    if _too_large(unary, start, model):
        return _in_groups(-unary if logits else unary, start, model, iterations)
    if torch.is_grad_enabled() and any(f.requires_grad for f in m.features):
        unary = -unary if logits else unary
        features = [f.contiguous() for f in m.features]
        return dense_crf_at(
            unary,
            start,
            features,
            m.lattices,
            m.counts,
            m.coefficients,
            m.height,
            m.width,
            iterations,
        )
    return torch.ops.fastseg.dense_crf(
        unary,
        start,
        m.lattices,
        m.counts,
        m.coefficients,
        m.height,
        m.width,
        iterations,
        False,
        logits,
    )


GROUP = 8  # labels filtered at a time where all of them need too much memory


def _too_large(unary: Tensor, start: Tensor | None, model: Model) -> bool:
    """Whether mean field over all labels would not fit into memory."""
    inputs = [unary, *model.coefficients, *model.features] + ([] if start is None else [start])
    if unary.is_cuda or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return False
    batch, labels, points = unary.shape
    rows = []
    for tensor in model.lattices:
        d, vertices, extra = tensor[:80].view(torch.int64)[[5, 8, 9]].tolist()
        rows.append(min(vertices + extra, (d + 1) * points))
    element = unary.element_size()
    result = unary.numel() * element
    images = min(batch, torch.get_num_threads())
    largest = sorted(rows, reverse=True)[: len(model.counts)]
    needed = result + images * mean_field_bytes(labels, points, element, largest)
    if needed < MAY_TAKE:
        return False
    available = available_memory()
    if available is None or needed <= available:
        return False
    needed = result + mean_field_bytes(labels, points, element, largest, GROUP)
    if needed > available:
        raise ValueError(
            f"dense_crf: {labels} labels at {points} points need about {needed / 2**30:.1f} GiB, "
            f"more than the {available / 2**30:.1f} GiB available"
        )
    return True


def _in_groups(
    unary: Tensor, start: Tensor | None, model: Model, iterations: int, group: int = GROUP
) -> Tensor:
    """The updates with a few labels filtered at a time: slower, but the vertices of all labels are
    never held at once."""
    if not (unary > -torch.inf).all() or not (unary.amin(1) < torch.inf).all():
        raise ValueError(
            "dense_crf: unary must hold no NaN or -inf, and a finite energy for some label of "
            "every point"
        )
    q = torch.softmax(-unary, 1) if start is None else start.clone()
    logits = torch.empty_like(unary)
    for _ in range(iterations):
        torch.neg(unary, out=logits)
        first = 0
        for count, c in zip(model.counts, model.coefficients, strict=True):
            lattices = model.lattices[first : first + count]
            first += count
            for at in range(0, unary.shape[1], group):
                part = slice(at, at + group)
                message = torch.ops.fastseg.permutohedral_filter(
                    q[:, part].contiguous(), lattices, False
                )
                if c.dim() == 1:
                    logits[:, part].addcmul_(c[part, None], message)
                else:
                    logits += c[:, part] @ message
        torch.softmax(logits, 1, out=q)
    return q


def _until_still(
    unary: Tensor, start: Tensor | None, model: Model, iterations: int, tolerance: float
) -> Tensor:
    """Image by image, since each has its own number of updates."""
    results = []
    for image in range(len(unary)):
        one, u = model.of_image(image), unary[image : image + 1]
        first = None if start is None else start[image : image + 1]
        with torch.no_grad():
            steps, still = 0, False
            q = mean_field(u, None, one, 0) if first is None else first
            while steps < iterations and not still:
                before, q = q, mean_field(u, q, one, 1)
                still = bool((q - before).abs_().max() < tolerance)
                steps += 1
        inputs = [u, *one.coefficients, *one.features] + ([] if first is None else [first])
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            q = mean_field(u, first, one, steps)  # again, for the gradient of so many updates
        results.append(q)
    return torch.cat(results)


# fastseg::dense_crf as a function of the lattices' features, too.
@torch.library.custom_op("fastseg::dense_crf_at", mutates_args=())
def dense_crf_at(
    unary: Tensor,
    start: Tensor | None,
    features: list[Tensor],
    lattices: list[Tensor],
    counts: list[int],
    coefficients: list[Tensor],
    height: int,
    width: int,
    iterations: int,
) -> Tensor:
    return torch.ops.fastseg.dense_crf(
        unary, start, lattices, counts, coefficients, height, width, iterations, False, False
    )


@dense_crf_at.register_fake
def _(unary, start, features, lattices, counts, coefficients, height, width, iterations):
    return torch.empty_like(unary)


@torch.library.register_fake("fastseg::dense_crf")
def _(
    unary,
    start,
    lattices,
    counts,
    coefficients,
    height,
    width,
    iterations,
    point_major,
    logits,
):
    b, labels, n = unary.shape
    return unary.new_empty(b, n, labels) if point_major else torch.empty_like(unary)


def _unrolled_gradient(
    unary: Tensor,
    start: Tensor | None,
    output: Tensor,
    grad: Tensor,
    features: list[Tensor | None],
    lattices: list[Tensor],
    counts: list[int],
    coefficients: list[Tensor],
    grid: tuple[int, int],
    iterations: int,
) -> tuple[Tensor, Tensor | None, list[Tensor | None], list[Tensor]]:
    """Backpropagation through the unrolled updates: the gradients for unary, start, each term's
    features (None for those that are None) and coefficients.

    The beliefs of about sqrt(iterations) steps are kept and the others computed again from them, so
    memory does not grow with the number of updates times that of labels and points.
    """
    terms = []
    first = 0
    for count, c in zip(counts, coefficients, strict=True):
        terms.append((lattices[first : first + count], c))
        first += count

    def updates(beliefs: Tensor | None, steps: int) -> Tensor:
        return torch.ops.fastseg.dense_crf(
            unary, beliefs, lattices, counts, coefficients, *grid, steps, False, False
        )

    def softmax_adjoint(g: Tensor, q: Tensor) -> Tensor:
        return q * (g - (g * q).sum(1, keepdim=True))

    grad_start = None
    grad_unary = torch.zeros_like(unary)
    grad_coefficients = [torch.zeros_like(c) for c in coefficients]
    grad_features = {k: torch.zeros_like(f) for k, f in enumerate(features) if f is not None}
    segment = max(1, math.isqrt(iterations))
    kept = [updates(None, 0) if start is None else start]
    for _ in range(segment, iterations, segment):
        kept.append(updates(kept[-1], segment))
    after = output
    step = iterations
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
            for k, (tensors, c) in enumerate(terms):
                filtered = torch.ops.fastseg.permutohedral_filter(before, tensors, False)
                if c.dim() == 1:
                    grad_coefficients[k] += (grad * filtered).sum((0, 2))
                    message = c[:, None] * grad
                else:
                    grad_coefficients[k] += torch.einsum("bln,bmn->lm", grad, filtered)
                    message = c.T @ grad
                message = message.contiguous()
                grad_before += torch.ops.fastseg.permutohedral_filter(message, tensors, True)
                f = features[k]
                if f is not None:
                    grad_features[k] += feature_gradient(f, before, message, tensors)
            grad, after, step = grad_before, before, step - 1
    if start is not None:
        grad_start = grad
    else:
        grad_unary -= softmax_adjoint(grad, after)
    return (
        grad_unary,
        grad_start,
        [grad_features.get(k) for k in range(len(terms))],
        grad_coefficients,
    )


def _setup(ctx, inputs, output):
    unary, start, lattices, counts, coefficients, height, width, iterations, *options = inputs
    ctx.save_for_backward(unary, start, output)
    ctx.point_major, ctx.logits = options
    ctx.model = lattices, counts, coefficients, (height, width), iterations


def _backward(ctx, grad):
    unary, start, output = ctx.saved_tensors
    if ctx.point_major:
        grad, output = grad.transpose(1, 2).contiguous(), output.transpose(1, 2).contiguous()
    lattices, _, coefficients, *_ = ctx.model
    unary = -unary if ctx.logits else unary
    grad_unary, grad_start, _, grad_coefficients = _unrolled_gradient(
        unary, start, output, grad, [None] * len(coefficients), *ctx.model
    )
    return (
        -grad_unary if ctx.logits else grad_unary,
        grad_start,
        [None] * len(lattices),
        None if lattices else [],  # torch takes an empty list for one of tensors
        grad_coefficients,
        None,
        None,
        None,
        None,
        None,
    )


def _setup_at(ctx, inputs, output):
    unary, start, features, lattices, counts, coefficients, height, width, iterations = inputs
    ctx.save_for_backward(unary, start, output, *features)
    ctx.model = lattices, counts, coefficients, (height, width), iterations


def _backward_at(ctx, grad):
    unary, start, output, *features = ctx.saved_tensors
    wanted = [
        f if needed else None for f, needed in zip(features, ctx.needs_input_grad[2], strict=True)
    ]
    grad_unary, grad_start, grad_features, grad_coefficients = _unrolled_gradient(
        unary, start, output, grad, wanted, *ctx.model
    )
    return (
        grad_unary,
        grad_start,
        grad_features,
        [None] * len(ctx.model[0]),
        None,
        grad_coefficients,
        None,
        None,
        None,
    )


torch.library.register_autograd("fastseg::dense_crf", _backward, setup_context=_setup)
dense_crf_at.register_autograd(_backward_at, setup_context=_setup_at)
