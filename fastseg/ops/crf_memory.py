"""How much memory lattices and mean field need, known before it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

KEPT = 256 << 20  # what the kernels keep for their next call, see csrc/common/workspace.h
_BLOCK = 128  # side of a sampled block, in points


def available_memory() -> int | None:
    """Bytes the system can give this process without swapping; None where it does not say."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(1024 * int(line.split()[1]))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free.append(int(limit) - used)
    except (OSError, ValueError, IndexError):
        pass
    return min(free, default=None)


def sample_lattice(features: Tensor, height: int, width: int) -> tuple[float, float]:
    """Vertices and simplices per point, found in at most nine blocks of features (1, d, N): upper
    bounds in the mean, since blocks share vertices."""
    grid = features.unflatten(2, (height, width))
    rows = min(height, _BLOCK)
    columns = min(width, _BLOCK * _BLOCK // rows)
    points = vertices = simplices = 0
    for i in range(9):
        y, x = (height - rows) * (i // 3) // 2, (width - columns) * (i % 3) // 2
        block = grid[:, :, y : y + rows, x : x + columns]
        (lattice,) = torch.ops.fastseg.permutohedral_build(
            block.flatten(2).contiguous(), rows, columns, 0
        )
        header = lattice[:160].view(torch.int64)
        points += rows * columns
        vertices += int(header[8])
        simplices += int(header[10])
    return vertices / points, simplices / points


def lattice_bytes(
    points: int, d: int, element: int, vertices: float, simplices: float
) -> tuple[int, int]:
    """Bytes of one lattice, and those that building it takes besides, for the given numbers per
    point; every chunk of points counts its own vertices."""
    rows = vertices * points
    kept = points * (2 + (d + 2) * element + 8 * (d + 1) * simplices) + rows * (8 + 6 * (d + 1))
    table = 16 + 4 * (24 if d > 6 else 16)  # keys and slots, which double when half full
    build = points * (2 + (d + 1) * (4 + element)) + rows * (2 * table + 8 + 9 * (d + 1))
    return int(kept), int(build)


def mean_field_bytes(
    labels: int, points: int, element: int, rows: Sequence[float], group: int | None = None
) -> int:
    """Bytes that mean field takes for one image besides its result; ``rows`` are those of each
    term's lattice. With ``group``, so many labels are filtered at a time."""
    width = labels + -labels % 8
    if group is None:
        width = 1 if labels == 2 else width
        return int(element * width * (points + sum(2 * r for r in rows)))
    # Logits, a message, its group of beliefs, and a full one for a matrix of compatibilities.
    return int(element * (points * (2 * labels + 3 * group) + group * max(rows, default=0)))


def estimate_memory(
    shape: Sequence[int],
    features: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
) -> int:
    """Bytes that :func:`dense_crf` takes at most besides its arguments, on the CPU and without
    gradients. Counts vertices in a sample of the points; takes milliseconds.

    Args:
        shape: that of the unary energies, (B, L, \\*spatial).
        features: of each term, (1 or B, d, \\*spatial).
        dtype: of the energies.
        threads: images computed at a time, by default those of torch.
    """
    from .permutohedral import grid_shape

    batch, labels = shape[:2]
    height, width = grid_shape(shape[2:])
    points = height * width
    element = 8 if dtype == torch.float64 else 4
    threads = torch.get_num_threads() if threads is None else threads
    at_once = min(batch, threads) if batch >= threads else 1
    kept = build = 0
    rows = []
    for f in features:
        f = (f.unsqueeze(0) if f.dim() == 2 else f).flatten(2).detach()
        f = f if f.dtype in (torch.float32, torch.float64) else f.float()
        samples = [sample_lattice(f[i : i + 1], height, width) for i in range(len(f))]
        sizes = [lattice_bytes(points, f.shape[1], element, *sample) for sample in samples]
        kept += sum(size for size, _ in sizes)
        build = max(build, *(size for _, size in sizes))
        rows.append(points * max(vertices for vertices, _ in samples))
    result = batch * labels * points * element
    field = at_once * mean_field_bytes(labels, points, element, rows)
    return kept + max(build, result + field + min(build, KEPT))
