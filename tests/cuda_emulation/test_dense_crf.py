"""What only the CUDA kernels of the dense CRF have: batches in one launch, lattices of a capacity,
graph capture, 16-bit storage."""

import pytest
import torch

from . import build

pytestmark = pytest.mark.skipif(build.cxx() is None, reason="no C++ compiler")

FASTSEG, CUDA = torch.ops.fastseg, torch.ops.fastseg_emulated
SYMMETRIC, HALF, BFLOAT16 = 3, 4, 8


@pytest.fixture(scope="module", autouse=True)
def emulator():
    return build.emulated_library()


def photograph(batch: int, height: int, width: int) -> torch.Tensor:
    """Bilateral features (batch, 5, points), sigmas 8 and 13, of smooth colours with an edge."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    colours = []
    for b in range(batch):
        edge = 120.0 * (x > width // 2 + b)
        colours.append(torch.stack([edge + 2 * y, 90 + x + 0 * y, 200 - edge]))
    colour = torch.stack(colours) + 3 * torch.randn(batch, 3, height, width)
    position = torch.stack([x, y]).float().expand(batch, 2, height, width)
    return torch.cat([position / 8, colour / 13], 1).flatten(2).contiguous()


def updates(ops, unary, features, grid, iterations, storage=0, coefficient=4.0):
    """Lattices of the features and of positions shared by the batch, then the updates."""
    lattices = ops.permutohedral_build(features, *grid, SYMMETRIC + storage)
    shared = ops.permutohedral_build(features[:1, :2].contiguous() * 3, *grid, SYMMETRIC + storage)
    labels = unary.shape[1]
    coefficients = [torch.full((labels,), coefficient), 2 * torch.eye(labels)]
    counts = [len(lattices), 1]
    return ops.dense_crf(
        unary, None, lattices + shared, counts, coefficients, *grid, iterations, False, False
    )


@pytest.mark.parametrize("labels", [1, 21, 130, 256])
def test_beliefs_equal_the_cpu(labels):
    grid = (15, 19)
    unary = 2 * torch.rand(2, labels, 15 * 19)
    features = photograph(2, *grid)
    expected = updates(FASTSEG, unary, features, grid, 10)
    got = updates(CUDA, unary, features, grid, 10)
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("grid", [(8, 16), (3, 43), (10, 20), (40, 50)], ids=str)
def test_a_constant_image_has_vertices_of_some_chunks(grid):
    """Of 128 splats each: 1, 2, 2 and 16 chunks."""
    points = grid[0] * grid[1]
    features = torch.full((1, 5, points), 0.3)
    unary = 2 * torch.rand(1, 5, points)
    expected = updates(FASTSEG, unary, features, grid, 5)
    got = updates(CUDA, unary, features, grid, 5)
    assert (got - expected).abs().max() < 1e-4


def test_a_batch_gives_the_bits_of_its_images(emulator):
    grid = (9, 14)
    unary, features = torch.rand(3, 6, 9 * 14), photograph(3, *grid)
    whole = updates(CUDA, unary, features, grid, 4)
    for b in range(3):
        one = updates(CUDA, unary[b : b + 1], features[b : b + 1], grid, 4)
        assert torch.equal(whole[b : b + 1], one) or b > 0  # the shared term is that of image 0
    lattices = CUDA.permutohedral_build(features, *grid, SYMMETRIC)
    filtered = CUDA.permutohedral_filter(unary, lattices, True)
    for b in range(3):
        alone = CUDA.permutohedral_build(features[b : b + 1].contiguous(), *grid, SYMMETRIC)
        for lattice in (alone, lattices[b : b + 1]):
            one = CUDA.permutohedral_filter(unary[b : b + 1], lattice, True)
            assert torch.equal(filtered[b : b + 1], one)
    with emulator.counting() as counts:
        CUDA.permutohedral_filter(unary, lattices, False)
    launches = counts["launches"]
    scattered = [lattice.clone() for lattice in reversed(lattices)]
    with emulator.counting() as counts:
        other = CUDA.permutohedral_filter(unary, scattered[::-1], True)
    assert torch.equal(other, filtered)
    assert counts["launches"] in (launches, 3 * launches)  # clones may happen to lie evenly


@pytest.mark.parametrize("storage", [0, HALF, BFLOAT16])
def test_build_and_updates_can_be_captured(emulator, storage):
    grid = (9, 14)
    unary, features = torch.rand(2, 6, 9 * 14), photograph(2, *grid)
    expected = updates(CUDA, unary, features, grid, 10, storage)
    with emulator.capturing():
        got = updates(CUDA, unary, features, grid, 10, storage)
    assert torch.equal(got, expected)


def test_more_vertices_than_the_capacity(emulator):
    grid = (40, 50)  # 2000 points have 12000 corners, hardly any of which share a vertex
    features, values = 200 * torch.rand(1, 5, 2000), torch.rand(1, 3, 2000)
    built = CUDA.permutohedral_build(features, *grid, SYMMETRIC)
    expected = FASTSEG.permutohedral_filter(
        values, FASTSEG.permutohedral_build(features, *grid, SYMMETRIC), False
    )
    torch.testing.assert_close(CUDA.permutohedral_filter(values, built, False), expected)
    with emulator.capturing():  # nobody can look at the outcome: NaN, not a wrong result
        captured = CUDA.permutohedral_build(features, *grid, SYMMETRIC)
        assert captured[0].numel() < built[0].numel()
        assert CUDA.permutohedral_filter(values, captured, False).isnan().all()
        assert updates(CUDA, values, features, grid, 1).isnan().all()


def with_vertices(wanted: int) -> torch.Tensor:
    """Features (1, 1, 2730) of that many vertices: 2 each of 2047 places far from each other, and
    2 to 4 of two neighbours."""
    for step in torch.arange(0.0, 4.0, 0.05):
        places = torch.cat([10 + 7.3 * torch.arange(2047), torch.tensor([0.1, 0.1 + step])])
        features = places[torch.arange(2730) % len(places)].view(1, 1, -1).contiguous()
        (lattice,) = FASTSEG.permutohedral_build(features, 1, 2730, SYMMETRIC)
        if int(lattice[:80].view(torch.int64)[8]) == wanted:
            return features
    raise AssertionError(f"no features have {wanted} vertices")


@pytest.mark.parametrize(("vertices", "fit"), [(4096, True), (4097, False)])
def test_the_capacity_to_the_vertex(emulator, vertices, fit):
    """2730 points have room for 4096 vertices."""
    features, values = with_vertices(vertices), torch.rand(1, 3, 2730)
    expected = FASTSEG.permutohedral_filter(
        values, FASTSEG.permutohedral_build(features, 1, 2730, SYMMETRIC), False
    )
    with emulator.capturing():
        captured = CUDA.permutohedral_build(features, 1, 2730, SYMMETRIC)
        filtered = CUDA.permutohedral_filter(values, captured, False)
    assert filtered.isnan().all() != fit
    built = CUDA.permutohedral_build(features, 1, 2730, SYMMETRIC)
    assert (built[0].numel() == captured[0].numel()) == fit
    torch.testing.assert_close(CUDA.permutohedral_filter(values, built, False), expected)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), "features must be finite, feature 1"),
        (float("inf"), "features must be finite, feature 1"),
        (1e8, "features are too large"),
    ],
)
def test_features_that_no_lattice_holds(emulator, bad, message):
    features = torch.rand(2, 3, 50)
    features[1, 1, 7] = bad
    with pytest.raises(ValueError, match=message):
        CUDA.permutohedral_build(features, 5, 10, SYMMETRIC)
    with emulator.capturing():
        lattices = CUDA.permutohedral_build(features, 5, 10, SYMMETRIC)
        assert CUDA.permutohedral_filter(torch.rand(2, 1, 50), lattices, False).isnan().all()


@pytest.mark.parametrize(("storage", "dtype"), [(HALF, torch.float16), (BFLOAT16, torch.bfloat16)])
def test_values_of_vertices_stored_in_16_bits(storage, dtype):
    grid = (15, 19)
    unary, features = 2 * torch.rand(1, 21, 15 * 19), photograph(1, *grid)
    exact = updates(FASTSEG, unary, features, grid, 10)
    got = updates(CUDA, unary, features, grid, 10, storage)
    # Each update rounds 8 times (splat, blur along 6 axes), messages are up to 6.
    error = (got - exact).abs().max()
    assert 0 < error < 8 * 6 * torch.finfo(dtype).eps
    lattices = CUDA.permutohedral_build(features, *grid, SYMMETRIC + storage)
    filtered = CUDA.permutohedral_filter(unary, lattices, False)
    plain = CUDA.permutohedral_build(features, *grid, SYMMETRIC)
    expected = CUDA.permutohedral_filter(unary, plain, False)
    assert not torch.equal(filtered, expected)
    torch.testing.assert_close(filtered, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-3)
    two = [torch.ones(21), torch.ones(21)]
    with pytest.raises(ValueError, match="one storage"):
        CUDA.dense_crf(unary, None, lattices + plain, [1, 1], two, *grid, 1, False, False)
