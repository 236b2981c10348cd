"""dense_crf: mean field against the exact kernels, its own algebra, and its gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from fastseg.nn import DenseCRF
from fastseg.nn.crf import PRESETS
from fastseg.ops import (
    PairwiseTerm,
    PermutohedralLattice,
    bilateral_features,
    dense_crf,
    dense_crf_reference,
    gaussian_features,
    permutohedral_filter,
)


def scene(h: int = 24, w: int = 32, labels: int = 4, batch: int = 1, dtype=torch.float32):
    """An image of a bright disc on a gradient, and noisy energies that prefer it."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    disc = ((y - h / 2) ** 2 + (x - w / 2) ** 2 < (h / 3) ** 2).float()
    image = torch.stack([60 + 2 * x + 100 * disc, 80 + y + 60 * disc, 200 - 90 * disc])
    image = image + 5 * torch.randn(batch, 3, h, w)
    logits = torch.randn(batch, labels, h, w)
    logits[:, 0] += 1 - disc
    logits[:, min(1, labels - 1)] += disc
    return -torch.log_softmax(logits, 1).to(dtype), image.clamp(0, 255).to(dtype)


def mean_field_with_lattice(unary, lattices, coefficients, iterations):
    """Mean field in plain PyTorch over the lattice filter."""
    q = torch.softmax(-unary, 1)
    for _ in range(iterations):
        logits = -unary
        for lattice, c in zip(lattices, coefficients, strict=True):
            message = permutohedral_filter(q, lattice)
            flat = message.flatten(2)
            flat = c[:, None] * flat if c.dim() == 1 else c @ flat
            logits = logits + flat.reshape(message.shape)
        q = torch.softmax(logits, 1)
    return q


@pytest.mark.parametrize("normalization", ["none", "before", "after", "symmetric"])
@pytest.mark.parametrize("labels", [1, 2, 3, 8, 9, 21, 32, 33, 70])
def test_matches_plain_mean_field(labels, normalization, cpu_isa):
    unary, image = scene(17, 23, labels, batch=2)
    features = [gaussian_features((17, 23), 2.0), bilateral_features(image, 15.0, 20.0)]
    symmetric = torch.randn(labels, labels)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        lattices = [PermutohedralLattice(f.to(dtype), normalization) for f in features]
        scale = 0.02 if normalization == "none" else 1.0
        full = (symmetric + symmetric.T).to(dtype) * scale / 4
        coefficients = [torch.full((labels,), 2.0 * scale, dtype=dtype), full]
        q = dense_crf(
            unary.to(dtype),
            [PairwiseTerm(lattices[0], 2.0 * scale), PairwiseTerm(lattices[1], -full)],
            iterations=4,
        )
        expected = mean_field_with_lattice(unary.to(dtype), lattices, coefficients, 4)
        assert (q - expected).abs().max() <= tolerance


@pytest.mark.parametrize("normalization", ["before", "after", "symmetric"])
def test_close_to_exact_kernels(normalization):
    """The lattice approximates the Gaussian: 98 % of the labels agree."""
    unary, image = scene(24, 32, 4, dtype=torch.float64)
    features = [gaussian_features((24, 32), 3.0), bilateral_features(image.float(), 20.0, 25.0)]
    features = [f.double() for f in features]
    terms = [PairwiseTerm(f, w, normalization) for f, w in zip(features, (1.0, 2.0), strict=True)]
    q = dense_crf(unary, terms, iterations=5)
    exact = dense_crf_reference(
        unary[0].flatten(1),
        [f[0].flatten(1) for f in features],
        [torch.full((4,), w, dtype=torch.float64) for w in (1.0, 2.0)],
        5,
        normalization,
    ).reshape(q.shape)
    assert (q.argmax(1) == exact.argmax(1)).double().mean() > 0.98
    assert (q - exact).abs().mean() < 0.01


def test_compatibility_forms_agree():
    """Weight w, vector -w, matrix -w I, and w (1 - I) because beliefs sum to 1."""
    unary, image = scene()
    lattice = PermutohedralLattice(bilateral_features(image, 20.0, 20.0), "after")
    forms = [
        3.0,
        torch.tensor(3.0),
        torch.full((4,), -3.0),
        -3 * torch.eye(4),
        3 - 3 * torch.eye(4),
    ]
    results = [dense_crf(unary, [PairwiseTerm(lattice, form)]) for form in forms]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-4)


def test_iterations_and_start():
    unary, image = scene()
    term = PairwiseTerm(
        PermutohedralLattice(bilateral_features(image, 20.0, 20.0), "symmetric"), 4.0
    )
    torch.testing.assert_close(dense_crf(unary, [term], iterations=0), torch.softmax(-unary, 1))
    torch.testing.assert_close(dense_crf(unary, [], iterations=3), torch.softmax(-unary, 1))
    q = torch.softmax(-unary, 1)
    for _ in range(3):
        q = dense_crf(unary, [term], iterations=1, start=q)
    torch.testing.assert_close(q, dense_crf(unary, [term], iterations=3), rtol=1e-4, atol=1e-6)


def test_same_bits_for_any_number_of_threads(threads):
    unary, image = scene(61, 83, 21, batch=3)
    crf = DenseCRF(iters=4, bilateral=(20, 13, 5.0))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(crf(-unary, image))
    assert all(torch.equal(results[0], r) for r in results[1:])
    single = torch.cat([crf(-unary[i : i + 1], image[i : i + 1]) for i in range(3)])
    assert torch.equal(single, results[0])


@pytest.mark.parametrize("spatial", [(1, 1), (1, 7), (7, 1), (5,), (3, 4, 5), (16, 17), (33, 50)])
def test_any_shape(spatial):
    logits, image = torch.randn(2, 3, *spatial), torch.rand(2, 3, *spatial) * 255
    q = DenseCRF()(logits, image)
    assert q.shape == logits.shape
    torch.testing.assert_close(q.sum(1), torch.ones(2, *spatial))


def test_dtypes_and_layouts():
    unary, image = scene(batch=2)
    crf = DenseCRF(iters=3)
    q = crf(-unary, image)
    assert torch.equal(crf((-unary).to(memory_format=torch.channels_last), image), q)
    strided = (-unary).repeat_interleave(2, 3)[..., ::2]
    assert torch.equal(crf(strided, image.flip(2).flip(2)), q)
    as_bytes = crf(-unary, image.byte())
    torch.testing.assert_close(as_bytes, crf(-unary, image.byte().float()))
    double = crf(-unary.double(), image)
    assert double.dtype == torch.float64
    assert (double - q).abs().mean() < 1e-3
    assert crf(-unary[:0], image[:0]).shape == (0, 4, 24, 32)


def test_unary_forms():
    unary, image = scene(labels=5)
    logits = -unary + 3
    expected = DenseCRF()(logits, image)
    torch.testing.assert_close(
        DenseCRF(unary="probs", clip=1e-12)(torch.softmax(logits, 1), image), expected
    )
    labels = logits.argmax(1)
    crf = DenseCRF(unary="labels", num_classes=5, label_confidence=0.6)
    energy = crf.energies(labels)
    assert energy.exp().reciprocal().sum(1) == pytest.approx(torch.ones(1, 24, 32))
    assert torch.equal(energy.argmin(1), labels)
    labels[:, 3] = -1
    torch.testing.assert_close(crf.energies(labels)[:, :, 3], torch.full((1, 5, 32), math.log(5.0)))
    hard = DenseCRF(iters=0, start="hard")(logits, image)
    assert set(hard.unique().tolist()) == {0.0, 1.0}


def test_hard_constraints_and_extremes():
    unary, image = scene()
    unary[:, 2, :12] = math.inf
    q = DenseCRF(gaussian=(3, 30.0))(-unary, image)
    assert q[:, 2, :12].max() == 0
    assert q.isfinite().all()
    big = PairwiseTerm(PermutohedralLattice(bilateral_features(image, 20.0, 20.0), "none"), 1e3)
    assert dense_crf(unary * 1e4, [big]).isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_clean_up_noise(name):
    unary, image = scene(48, 64, 3)
    truth = torch.zeros(48, 64, dtype=torch.long)
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    truth[(y - 24) ** 2 + (x - 32) ** 2 < 256] = 1
    before = (unary.argmin(1)[0] == truth).float().mean()
    after = (DenseCRF.from_preset(name)(-unary, image).argmax(1)[0] == truth).float().mean()
    assert after > before + 0.05


@pytest.mark.parametrize("normalization", ["none", "after", "symmetric"])
def test_gradient(normalization):
    unary, image = scene(5, 6, 3, dtype=torch.float64)
    scale = 0.1 if normalization == "none" else 1.0
    space = PermutohedralLattice(gaussian_features((5, 6), 1.5).double(), normalization)
    colour = PermutohedralLattice(bilateral_features(image, 3.0, 30.0), normalization)
    weight = torch.tensor(0.8 * scale, dtype=torch.float64, requires_grad=True)
    matrix = (torch.randn(3, 3, dtype=torch.float64) * scale).requires_grad_()
    start = torch.softmax(torch.randn_like(unary), 1).requires_grad_()

    def run(u, w, m, s):
        terms = [PairwiseTerm(space, w), PairwiseTerm(colour, m)]
        return dense_crf(u, terms, iterations=5, start=s)

    assert gradcheck(run, (unary.requires_grad_(), weight, matrix, start))
    assert gradcheck(lambda u, w, m: run(u, w, m, None), (unary, weight, matrix))


def test_operator_registration():
    unary, image = scene(8, 9, 3)
    lattice = PermutohedralLattice(bilateral_features(image, 3.0, 30.0), "symmetric")
    arguments = (
        unary.flatten(2).requires_grad_(),
        None,
        lattice.tensors,
        [1],
        [torch.ones(3)],
        8,
        9,
        2,
        False,
    )
    opcheck(torch.ops.fastseg.dense_crf.default, arguments)
    crf = DenseCRF(iters=2)
    compiled = torch.compile(crf, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(-unary, image), crf(-unary, image), rtol=0, atol=0)


def test_training_through_the_layer():
    unary, image = scene(20, 20, 3)
    crf = DenseCRF(iters=3, compatibility=1 - torch.eye(3), trainable=True)
    logits = (-unary).requires_grad_()
    crf(logits, image)[:, 1].sum().backward()
    for tensor in (logits, crf.gaussian_weight, crf.bilateral_weight, crf.compatibility):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gaussian": (0, 3.0)}, "sigma must be one positive number"),
        ({"bilateral": (50, -5, 10.0)}, "sigma_rgb must be one positive number"),
        ({"bilateral": (math.nan, 5, 10.0)}, "sigma must be one positive number"),
        ({"bilateral": (50, 10.0)}, "bilateral must be"),
        ({"iters": -1}, "iters must be 0 or more"),
        ({"unary": "energy"}, "unary must be logits, probs or labels"),
        ({"unary": "labels"}, "needs num_classes"),
        ({"normalization": "row"}, "normalization must be one of"),
        ({"start": "cold"}, "start must be soft or hard"),
        ({"bilateral": (1e-8, 5, 10.0)}, "too large for their dtype"),
        ({"compatibility": torch.eye(5)}, "compatibility must be a number"),
    ],
)
def test_bad_parameters(arguments, message):
    unary, image = scene()
    with pytest.raises(ValueError, match=message):
        DenseCRF(**arguments)(-unary, image)


def test_bad_input():
    unary, image = scene()
    crf = DenseCRF()
    with pytest.raises(ValueError, match="image must have shape"):
        crf(-unary, image[..., :-1])
    with pytest.raises(ValueError, match="needs the image"):
        crf(-unary)
    image_with_nan = image.clone()
    image_with_nan[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="must be finite, feature 2"):
        crf(-unary, image_with_nan)
    for bad in (math.nan, -math.inf):
        broken = unary.clone()
        broken[0, 1, 3, 4] = bad
        with pytest.raises(ValueError, match="unary must hold no NaN or -inf"):
            dense_crf(broken, [PairwiseTerm(gaussian_features((24, 32), 3.0))])
    with pytest.raises(ValueError, match="one number of points"):
        dense_crf(unary, [PairwiseTerm(gaussian_features((24, 31), 3.0))])
    with pytest.raises(ValueError, match="floating point"):
        dense_crf(unary.long(), [])
    with pytest.raises(ValueError, match="must be one of"):
        DenseCRF.from_preset("best")
