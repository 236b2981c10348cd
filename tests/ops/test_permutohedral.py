"""permutohedral_filter: the lattice against its dictionary reference and its mathematics."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from fastseg.ops import (
    PermutohedralLattice,
    gaussian_features,
    permutohedral_filter,
    permutohedral_filter_reference,
)


def points(d: int, n: int, spread: float, dtype=torch.float32):
    return torch.randn(d, n, dtype=torch.float64).mul(spread).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("d", "n", "spread"),
    [
        (1, 50, 3),
        (2, 900, 5),
        (3, 257, 2),
        (4, 300, 1),
        (5, 513, 1),
        (5, 31, 0.1),
        (9, 80, 0.7),
        (16, 40, 0.5),
        (2, 1, 1),
        (5, 3, 1000),
    ],
)
def test_matches_reference(d, n, spread, transposed, cpu_isa):
    features, values = points(d, n, spread), torch.randn(3, n)
    exact = permutohedral_filter_reference(values, features, transposed)
    # float32 knows a coordinate to 1e-7 of its size; a weight changes by as much of a cell.
    for dtype, tolerance in ((torch.float32, 1e-5 * max(1, spread)), (torch.float64, 1e-9)):
        y = permutohedral_filter(values.to(dtype), features.to(dtype), transposed=transposed)
        assert (y.double() - exact).abs().max() <= tolerance * max(1, exact.abs().max())


def test_adjoint():
    """<K x, y> = <x, K^T y>, and K is not symmetric where vertices are missing."""
    lattice = PermutohedralLattice(points(5, 400, 1.0, torch.float64))
    x, y = torch.randn(2, 1, 400, dtype=torch.float64)
    forward = (lattice.filter(x) * y).sum()
    assert torch.isclose(forward, (x * lattice.filter(y, transposed=True)).sum(), rtol=1e-12)
    assert not torch.isclose(forward, (x * lattice.filter(y)).sum(), rtol=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_gain_on_constants(d):
    """On a dense grid the row sum is 2^(d+1) (3/2)^(d/2) / (sqrt(d+1) (1 + 2^-d)) sigma^d."""
    size, sigma = {1: (400, 20.0), 2: (160, 9.0), 3: (56, 4.0)}[d]
    features = gaussian_features([size] * d, sigma)
    y = permutohedral_filter(torch.ones(1, 1, *[size] * d), features)
    gain = 2 ** (d + 1) / (1 + 2**-d) * 1.5 ** (d / 2) / math.sqrt(d + 1)
    middle = y[(0, 0, *[slice(2 * size // 5, 3 * size // 5)] * d)].mean().item()
    assert middle / sigma**d == pytest.approx(gain, rel=2e-2 if d == 3 else 5e-3)


def test_normalizations():
    features, ones = points(3, 500, 1.0, torch.float64), torch.ones(1, 500, dtype=torch.float64)
    k = permutohedral_filter(torch.eye(500, dtype=torch.float64), features).T
    n = k.sum(1)
    expected = {
        "none": k,
        "before": k / n,
        "after": k / n[:, None],
        "symmetric": k / (n[:, None] * n).sqrt(),
    }
    for name, matrix in expected.items():
        lattice = PermutohedralLattice(features, name)
        torch.testing.assert_close(lattice.filter(torch.eye(500, dtype=torch.float64)).T, matrix)
        torch.testing.assert_close(
            lattice.filter(torch.eye(500, dtype=torch.float64), transposed=True), matrix
        )
    constant = permutohedral_filter(ones, features, normalization="after")
    torch.testing.assert_close(constant, ones)


def test_same_bits_for_any_number_of_threads(threads):
    features = gaussian_features((63, 70), 2.0)
    features = torch.cat([features, torch.rand(1, 3, 63, 70) * 8], 1)
    values = torch.randn(1, 37, 63, 70)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(permutohedral_filter(values, features))
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_permuting_points_permutes_the_result():
    features, values = points(4, 600, 1.0), torch.randn(2, 600)
    order = torch.randperm(600)
    y = permutohedral_filter(values, features)
    torch.testing.assert_close(
        permutohedral_filter(values[:, order], features[:, order]),
        y[:, order],
        rtol=1e-4,
        atol=1e-5,
    )


def test_shapes_and_layouts():
    features, values = torch.rand(2, 3, 9, 11) * 4, torch.randn(2, 5, 9, 11)
    y = permutohedral_filter(values, features)
    single = [permutohedral_filter(values[i : i + 1], features[i : i + 1]) for i in range(2)]
    assert torch.equal(y, torch.cat(single))
    last = values.to(memory_format=torch.channels_last)
    assert torch.equal(permutohedral_filter(last, features), y)
    strided = values.repeat_interleave(2, 3)[..., ::2]
    assert torch.equal(permutohedral_filter(strided, features), y)
    shared = PermutohedralLattice(features[:1])
    assert torch.equal(permutohedral_filter(values, shared)[0], y[0])
    assert permutohedral_filter(values[:, :0], features).shape == (2, 0, 9, 11)
    half = permutohedral_filter(values.half(), features)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), y, rtol=2e-3, atol=2e-2)


def test_lattice_facts():
    lattice = PermutohedralLattice(torch.zeros(5, 100))
    assert lattice.vertices == [6]
    assert lattice.occupancy == [0.06]
    assert lattice.points == 100
    assert lattice.nbytes > 0
    far_apart = PermutohedralLattice(torch.arange(50.0)[None].expand(3, 50) * 100)
    assert far_apart.vertices[0] <= 4 * 50


def test_wide_keys():
    """16 features over hundreds of cells need more than 64 bits."""
    features, values = points(16, 30, 6.0, torch.float64), torch.randn(2, 30, dtype=torch.float64)
    exact = permutohedral_filter_reference(values, features)
    torch.testing.assert_close(permutohedral_filter(values, features), exact)


def test_gradient():
    features = points(3, 40, 1.0, torch.float64)
    values = torch.randn(1, 2, 40, dtype=torch.float64, requires_grad=True)
    for normalization in ("none", "before", "after", "symmetric"):
        lattice = PermutohedralLattice(features, normalization)
        assert gradcheck(lattice.filter, (values,), check_batched_grad=False)


def test_operator_registration():
    lattice = PermutohedralLattice(points(3, 40, 1.0))
    values = torch.randn(1, 2, 40, requires_grad=True)
    opcheck(torch.ops.fastseg.permutohedral_filter.default, (values, lattice.tensors, False))
    compiled = torch.compile(permutohedral_filter, fullgraph=True, backend="aot_eager")
    features = points(3, 40, 1.0)
    torch.testing.assert_close(
        compiled(values, features), permutohedral_filter(values, features), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("features", "values", "message"),
    [
        (torch.full((2, 5), math.nan), torch.ones(1, 5), "must be finite, feature 0"),
        (torch.tensor([[0.0, math.inf]]), torch.ones(1, 2), "must be finite"),
        (torch.tensor([[0.0, 1e9]]), torch.ones(1, 2), "too large for their dtype"),
        (torch.zeros(17, 5), torch.ones(1, 5), "1 to 16 feature dimensions"),
        (torch.zeros(0, 5), torch.ones(1, 5), "1 to 16 feature dimensions"),
        (torch.zeros(2, 0), torch.ones(1, 0), "at least one point"),
        (torch.zeros(2, 5), torch.ones(1, 6), "N = 5 points"),
        (torch.zeros(2, 2, 5), torch.ones(3, 1, 5), "one batch size"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.ones(1, 5), "floating point"),
        (torch.randn(16, 5, dtype=torch.float64) * 1e6, torch.ones(1, 5), "more than 128"),
    ],
)
def test_bad_input(features, values, message):
    with pytest.raises(ValueError, match=message):
        permutohedral_filter(values, features)
    with pytest.raises(ValueError, match="normalization must be one of"):
        PermutohedralLattice(torch.zeros(2, 5), "row")


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_storage_of_vertex_values(storage, device):
    features, values = torch.rand(1, 3, 200, device=device), torch.rand(1, 4, 200, device=device)
    exact = PermutohedralLattice(features, "symmetric").filter(values)
    stored = PermutohedralLattice(features, "symmetric", storage=storage).filter(values)
    if device == "cpu":
        assert torch.equal(stored, exact)
    else:
        assert 0 < (stored - exact).abs().max() < 8 * torch.finfo(storage).eps * exact.max()


def test_storage_must_be_of_16_bits():
    with pytest.raises(ValueError, match="storage must be None, or float16"):
        PermutohedralLattice(torch.rand(1, 3, 200), storage=torch.float32)
    with pytest.raises(ValueError, match=r"for torch\.float64"):
        PermutohedralLattice(torch.rand(1, 3, 200).double(), storage=torch.float16)


def weighted_sum(features, values, weights, **options):
    return (permutohedral_filter(values, features, **options) * weights).sum()


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("normalization", ["none", "before", "after", "symmetric"])
@pytest.mark.parametrize("d", [1, 2, 3, 5, 9, 16])
def test_feature_gradient(d, normalization, cpu_isa):
    """Against central differences in float64; random points lie away from simplex faces."""
    features = torch.stack([points(d, 40, 0.8, torch.float64) for _ in range(2)])
    values, weights = torch.randn(2, 2, 35, 40, dtype=torch.float64)  # more than 32 channels
    for transposed in (False, True):
        options = {"normalization": normalization, "transposed": transposed}
        f = features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(weighted_sum(f, values, weights, **options), f)
        for _ in range(4):
            direction = torch.randn_like(f)
            ends = [features + s * 1e-6 * direction for s in (1, -1)]
            above, below = (weighted_sum(f, values, weights, **options) for f in ends)
            expected = (above - below).item() / 2e-6
            assert (gradient * direction).sum().item() == pytest.approx(
                expected, rel=1e-5, abs=1e-4
            )


@pytest.mark.usefixtures("not_emulated")
def test_feature_gradient_of_a_shared_lattice_and_in_float32(threads):
    features = torch.rand(1, 4, 19, 23) * 4  # a grid has points on simplex faces
    values, weights = torch.randn(2, 3, 5, 19, 23)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        for count in (1, 2):
            threads(count)
            f = features.detach().clone().to(dtype).requires_grad_()
            weighted_sum(f, values.to(dtype), weights.to(dtype), normalization="after").backward()
            gradients.append(f.grad)
    assert torch.equal(gradients[0], gradients[1])
    size = gradients[2].abs().max().item()
    torch.testing.assert_close(gradients[0].double(), gradients[2], rtol=0, atol=1e-5 * size)
    one = features.detach().double().requires_grad_()
    weighted_sum(
        one.expand(3, -1, -1, -1), values.double(), weights.double(), normalization="after"
    ).backward()
    torch.testing.assert_close(one.grad, gradients[2])


@pytest.mark.usefixtures("not_emulated")
def test_feature_gradient_operators():
    features = points(3, 40, 1.0)[None].requires_grad_()
    lattice = PermutohedralLattice(features, "symmetric")
    values = torch.randn(1, 2, 40, requires_grad=True)
    opcheck(
        torch.ops.fastseg.permutohedral_filter_at.default,
        (values, features, lattice.tensors, False),
    )
    detached = (features.detach(), values.detach(), values.detach(), lattice.tensors)
    opcheck(torch.ops.fastseg.permutohedral_feature_gradient.default, detached)
    with pytest.raises(ValueError, match="lattices must be those of the features"):
        torch.ops.fastseg.permutohedral_feature_gradient(
            torch.zeros(1, 2, 40), values.detach(), values.detach(), lattice.tensors
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_values_are_rounded_once(dtype):
    """Values and result are stored in half precision; sums are float32, for any channel count."""
    features, values = points(3, 300, 1.0), torch.randn(2, 70, 300).to(dtype)
    y = permutohedral_filter(values, features)
    assert torch.equal(y, permutohedral_filter(values.float(), features).to(dtype))
