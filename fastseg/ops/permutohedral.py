"""The permutohedral lattice: Gaussian filtering of points with many feature dimensions.

A point i has features f_i and values x_i; the filter computes, approximately,
``y_i = sum_j exp(-|f_i - f_j|^2 / 2) x_j`` in time linear in the number of points.
Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .crf_memory import available_memory, lattice_bytes, sample_lattice

NORMALIZATIONS = ("none", "before", "after", "symmetric")
MAX_FEATURES = 16
_STORAGES = (None, torch.float16, torch.bfloat16)
_HEADER = ("points", "features", "height", "width", "vertices", "extra_rows", "simplices")
HALF_CHANNELS = 32


class PermutohedralLattice:
    """The lattice of a set of points, built once and used for any number of filterings.

    Args:
        features: (d, N), (B, d, N) or (B, d, \\*spatial), float32 or float64, d = 1..16, already
            divided by the standard deviations of the Gaussian. A batch holds one lattice per item.
        normalization: ``"none"`` filters with K; ``"after"`` divides the result by the row sums
            K 1, ``"before"`` the values, ``"symmetric"`` both by their square root.
        storage: on CUDA, float16 or bfloat16 holds the values of the vertices in 16 bits while
            float32 values are filtered; sums stay float32. None, and on the CPU: as they are.
            float16 overflows where more than 65504 add up in one vertex.

    Features that require gradients get them from every filtering, through the normalisation too:
    the derivative of the piecewise multilinear lattice operator, CPU only.

    Raises:
        ValueError: d or N out of range, NaN or infinite features, or features spread over more
            lattice cells than a vertex key can count.
    """

    def __init__(
        self,
        features: Tensor,
        normalization: str = "none",
        *,
        storage: torch.dtype | None = None,
    ) -> None:
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"PermutohedralLattice: normalization must be one of {NORMALIZATIONS}, "
                f"got {normalization!r}"
            )
        if not torch.is_floating_point(features):
            raise ValueError(
                f"PermutohedralLattice: features must be floating point, got {features.dtype}"
            )
        if features.dim() < 2:
            raise ValueError(
                "PermutohedralLattice: features must have shape (d, N) or (B, d, N), "
                f"got {tuple(features.shape)}"
            )
        if features.dim() == 2:
            features = features.unsqueeze(0)
        if features.dtype not in (torch.float32, torch.float64):
            features = features.float()
        height, width = grid_shape(features.shape[2:])
        d, points = features.shape[1], height * width
        if not 1 <= d <= MAX_FEATURES or points < 1:
            raise ValueError(
                f"PermutohedralLattice: needs 1 to {MAX_FEATURES} feature dimensions and at least "
                f"one point, got features {tuple(features.shape)}"
            )
        if storage not in _STORAGES or (storage and features.dtype == torch.float64):
            raise ValueError(
                "PermutohedralLattice: storage must be None, or float16 or bfloat16 for float32 "
                f"features, got {storage} for {features.dtype}"
            )
        mode = NORMALIZATIONS.index(normalization)
        if features.is_cuda:
            mode += len(NORMALIZATIONS) * _STORAGES.index(storage)
        self.features = features.flatten(2)
        self.normalization = normalization
        self.height, self.width = height, width
        if not self.features.is_cuda and not torch.compiler.is_compiling():
            _check_memory(self.features.detach(), height, width)
        self.tensors: list[Tensor] = torch.ops.fastseg.permutohedral_build(
            self.features.detach().contiguous(), height, width, mode
        )

    def _header(self, name: str) -> list[int]:
        at = 4 + _HEADER.index(name)
        return [int(t[8 * at : 8 * at + 8].view(torch.int64)) for t in self.tensors]

    @property
    def points(self) -> int:
        return self.height * self.width

    @property
    def vertices(self) -> list[int]:
        """Number of lattice vertices of each item of the batch."""
        return self._header("vertices")

    @property
    def occupancy(self) -> list[float]:
        """Vertices per point of each item; the filter's cost grows with it. At most d + 1."""
        return [m / self.points for m in self.vertices]

    @property
    def nbytes(self) -> int:
        """Memory the lattice holds, in bytes."""
        return sum(t.numel() for t in self.tensors)

    def filter(self, values: Tensor, transposed: bool = False) -> Tensor:
        """K values, or K^T values if ``transposed``; see :func:`permutohedral_filter`."""
        return permutohedral_filter(values, self, transposed=transposed)


def _check_memory(features: Tensor, height: int, width: int) -> None:
    """Raises where a lattice per image would not fit into memory. The worst case, d + 1 vertices
    per point, settles most calls; else vertices are counted in a sample."""
    batch, d, points = features.shape
    element = features.element_size()
    worst = lattice_bytes(points, d, element, d + 1, 1)
    if batch * worst[0] + worst[1] < 64 << 20:
        return
    available = available_memory()
    if available is None or batch * worst[0] + worst[1] <= available:
        return
    kept = build = 0
    for f in features.split(1):
        sizes = lattice_bytes(points, d, element, *sample_lattice(f, height, width))
        kept, build = kept + sizes[0], max(build, sizes[1])
    if kept + build > available:
        raise ValueError(
            f"PermutohedralLattice: {points} points with {d} features need about "
            f"{(kept + build) / 2**30:.1f} GiB, more than the {available / 2**30:.1f} GiB "
            "available: divide the features by larger standard deviations or use fewer points"
        )


def grid_shape(spatial: Sequence[int]) -> tuple[int, int]:
    """The rows and columns that points of this spatial shape are tiled as."""
    if len(spatial) == 0:
        return 1, 1
    if len(spatial) == 1:
        return 1, int(spatial[0])
    return math.prod(spatial[:-1]), spatial[-1]


def permutohedral_filter(
    values: Tensor,
    features: Tensor | PermutohedralLattice,
    *,
    normalization: str = "none",
    transposed: bool = False,
) -> Tensor:
    """Filter ``values`` with a Gaussian of the points' features.

    ``permutohedral_filter_reference`` states the lattice operator K, which approximates
    ``exp(-|f_i - f_j|^2 / 2)``: without normalisation its rows sum to 0.71 (d = 5) to 0.92 (d = 1)
    of the true kernel's on dense data, and less where the points are sparse.

    Args:
        values: (C, N), (B, C, N) or (B, C, \\*spatial), any number of channels; float32 or float64
            like the features; float16 and bfloat16 store values and result, 32 channels at a time
            are computed in float32.
        features: (d, N), (1 or B, d, N) or (1 or B, d, \\*spatial), d = 1..16, divided by the
            standard deviations; or a :class:`PermutohedralLattice` to use again.
        normalization: ``"none"``, ``"before"``, ``"after"`` or ``"symmetric"``; a lattice keeps
            its own.
        transposed: apply the adjoint, which is the filter with its blur axes in reversed order.

    Returns:
        The shape and dtype of ``values``. Differentiable in ``values`` and, on the CPU, once in
        ``features``. The same bits for any number of threads.

    Raises:
        ValueError: shapes do not match, or the features cannot be held by a lattice.
    """
    lattice = (
        features
        if isinstance(features, PermutohedralLattice)
        else PermutohedralLattice(features, normalization)
    )
    unbatched = values.dim() == 2
    x = values.unsqueeze(0) if unbatched else values
    if x.dim() < 3 or math.prod(x.shape[2:]) != lattice.points:
        raise ValueError(
            f"permutohedral_filter: values must have shape (B, C, N) with the lattice's N = "
            f"{lattice.points} points, got {tuple(values.shape)}"
        )
    if len(lattice.tensors) not in (1, x.shape[0]):
        raise ValueError(
            f"permutohedral_filter: values and features must have one batch size, got "
            f"{x.shape[0]} and {len(lattice.tensors)}"
        )
    y = _filter(x.flatten(2), lattice, transposed).reshape(x.shape)
    return y.squeeze(0) if unbatched else y


def _filter(x: Tensor, lattice: PermutohedralLattice, transposed: bool) -> Tensor:
    """The filter of values (B, C, N) of any floating-point dtype."""
    f = lattice.features
    if x.dtype in (torch.float16, torch.bfloat16) and x.shape[1] > HALF_CHANNELS:
        # Only a group at a time is held in float32.
        return torch.cat([_filter(g, lattice, transposed) for g in x.split(HALF_CHANNELS, 1)], 1)
    values = x.to(f.dtype).contiguous()
    if torch.is_grad_enabled() and f.requires_grad:
        y = permutohedral_filter_at(values, f.contiguous(), lattice.tensors, transposed)
    else:
        y = torch.ops.fastseg.permutohedral_filter(values, lattice.tensors, transposed)
    return y.to(x.dtype)


def permutohedral_filter_reference(
    values: Tensor, features: Tensor, transposed: bool = False
) -> Tensor:
    """What the lattice filter means: values (C, N) and features (d, N), in plain Python.

    Vertices are a dictionary keyed by their integer coordinates. Slow; float64.
    """
    d, n = features.shape
    f = features.double()
    spread = math.sqrt(2 / 3) * (d + 1)
    lifted = torch.zeros(d + 1, n, dtype=torch.float64)
    total = torch.zeros(n, dtype=torch.float64)
    for j in range(d, 0, -1):
        t = f[j - 1] * (spread / math.sqrt(j * (j + 1)))
        lifted[j] = total - j * t
        total = total + t
    lifted[0] = total

    cell = (lifted / (d + 1)).round()
    order = (lifted - cell * (d + 1)).argsort(dim=0, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        0, order, torch.arange(d + 1).unsqueeze(1).expand(-1, n).contiguous()
    )
    rank = rank + cell.sum(0).long()
    wrap = (rank < 0).long() - (rank > d).long()
    rank, cell = rank + wrap * (d + 1), cell + wrap
    residual = lifted / (d + 1) - cell
    columns = torch.arange(n)
    weight = torch.zeros(d + 2, n, dtype=torch.float64)
    for j in range(d + 1):
        weight[d - rank[j], columns] += residual[j]
        weight[d + 1 - rank[j], columns] -= residual[j]
    weight[0] += 1 + weight[d + 1]

    vertices: dict[tuple[int, ...], int] = {}
    index = torch.empty(d + 1, n, dtype=torch.long)
    for r in range(d + 1):
        corner = cell.long() * (d + 1) + r - (d + 1) * (rank > d - r)
        for i, key in enumerate(map(tuple, corner.T.tolist())):
            index[r, i] = vertices.setdefault(key, len(vertices))

    rows = torch.zeros(len(vertices) + 1, values.shape[0], dtype=torch.float64)  # last row stays 0
    for r in range(d + 1):
        rows.index_add_(0, index[r], (weight[r] * values.double()).T)
    for axis in reversed(range(d + 1)) if transposed else range(d + 1):
        sides = []
        for sign in (1, -1):
            step = [sign] * (d + 1)
            step[axis] -= sign * (d + 1)
            sides.append(
                [
                    vertices.get(tuple(a + b for a, b in zip(key, step, strict=True)), -1)
                    for key in vertices
                ]
            )
        blurred = rows[:-1] + 0.5 * (rows[sides[0]] + rows[sides[1]])
        rows = torch.cat([blurred, torch.zeros_like(rows[:1])])
    gain = 1 / (1 + 2.0**-d)
    return gain * sum((weight[r] * rows[index[r]].T for r in range(d + 1)), torch.tensor(0.0))


@torch.library.register_fake("fastseg::permutohedral_build")
def _(features: Tensor, height: int, width: int, normalization: int) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [
        features.new_empty(context.new_dynamic_size(), dtype=torch.uint8)
        for _ in range(features.shape[0])
    ]


@torch.library.register_fake("fastseg::permutohedral_filter")
def _(values: Tensor, lattices: list[Tensor], transposed: bool) -> Tensor:
    return torch.empty_like(values)


def _setup_filter(ctx, inputs, output):
    _, ctx.lattices, ctx.transposed = inputs


def _backward_filter(ctx, grad):
    return (
        torch.ops.fastseg.permutohedral_filter(grad.contiguous(), ctx.lattices, not ctx.transposed),
        [None] * len(ctx.lattices),
        None,
    )


torch.library.register_autograd(
    "fastseg::permutohedral_filter", _backward_filter, setup_context=_setup_filter
)


@torch.library.custom_op("fastseg::permutohedral_filter_at", mutates_args=())
def permutohedral_filter_at(
    values: Tensor, features: Tensor, lattices: list[Tensor], transposed: bool
) -> Tensor:
    """permutohedral_filter as a function of the (1 or B, d, N) features of the lattices, too."""
    return torch.ops.fastseg.permutohedral_filter(values, lattices, transposed)


@permutohedral_filter_at.register_fake
def _(values: Tensor, features: Tensor, lattices: list[Tensor], transposed: bool) -> Tensor:
    return torch.empty_like(values)


def feature_gradient(
    features: Tensor, values: Tensor, grad: Tensor, lattices: list[Tensor], transposed: bool = False
) -> Tensor:
    """The gradient of <grad, K values> for the features, (1 or B, d, N)."""
    if features.is_cuda:
        raise ValueError(
            "permutohedral_filter: gradients for the features are computed on the CPU only, "
            "got features on CUDA: detach them or move the filter to the CPU"
        )
    if transposed:  # <grad, K^T values> = <values, K grad>
        values, grad = grad, values
    return torch.ops.fastseg.permutohedral_feature_gradient(features, values, grad, lattices)


@torch.library.register_fake("fastseg::permutohedral_feature_gradient")
def _(features: Tensor, values: Tensor, grad: Tensor, lattices: list[Tensor]) -> Tensor:
    return torch.empty_like(features)


def _setup_filter_at(ctx, inputs, output):
    values, features, ctx.lattices, ctx.transposed = inputs
    ctx.save_for_backward(values, features)


def _backward_filter_at(ctx, grad):
    values, features = ctx.saved_tensors
    grad = grad.contiguous()
    grad_values = grad_features = None
    if ctx.needs_input_grad[0]:
        grad_values = torch.ops.fastseg.permutohedral_filter(grad, ctx.lattices, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        grad_features = feature_gradient(features, values, grad, ctx.lattices, ctx.transposed)
    return grad_values, grad_features, [None] * len(ctx.lattices), None


permutohedral_filter_at.register_autograd(_backward_filter_at, setup_context=_setup_filter_at)
