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
    kl_divergence,
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
    opcheck(torch.ops.fastseg.dense_crf.default, (*arguments, False))
    opcheck(torch.ops.fastseg.dense_crf.default, (*arguments, True))
    crf = DenseCRF(iters=2)
    compiled = torch.compile(crf, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(-unary, image), crf(-unary, image), rtol=0, atol=0)


@pytest.mark.parametrize("labels", [2, 3])
def test_logits_are_negative_energies(labels, not_emulated):
    unary, image = scene(17, 21, labels)
    features = bilateral_features(image, 5.0, 30.0)
    mask = torch.ones(1, 17, 21, dtype=torch.bool)
    mask[:, 3:6] = False

    def gradient(sign, features, **options):
        x = (sign * unary).requires_grad_()
        q = dense_crf(x, [PairwiseTerm(features, 2.0)], logits=sign < 0, **options)
        (q * image.mean(1, keepdim=True)).sum().backward()
        return q, sign * x.grad

    wanting = features.clone().requires_grad_()
    for f, options in [(features, {}), (wanting, {}), (features, {"mask": mask})]:
        for got, expected in zip(
            gradient(-1, f, **options), gradient(1, f, **options), strict=True
        ):
            assert torch.equal(got, expected)
    with torch.no_grad():
        terms = [PairwiseTerm(features, 2.0)]
        early = [dense_crf(s * unary, terms, tolerance=1e-2, logits=s < 0) for s in (1, -1)]
        assert torch.equal(*early)
        broken = -unary
        broken[0, 1, 3, 4] = math.inf
        with pytest.raises(ValueError, match=r"no NaN or \+inf, and a finite logit for some"):
            dense_crf(broken, terms, logits=True)


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


def float64_problem(points: int = 20, batch: int = 2, labels: int = 3):
    """Energies, features of two terms and their kernels, at random points."""
    options = {"dtype": torch.float64}
    return (
        torch.randn(batch, labels, points, **options),
        torch.randn(1, 2, points, **options),
        torch.randn(batch, 3, points, **options),
        torch.eye(2, **options) + 0.1 * torch.randn(2, 2, **options),
        torch.tensor([1.1, 0.9, 1.2], **options),
        torch.tensor(0.7, **options),
        torch.randn(labels, labels, **options) / 3,
    )


def run_problem(u, f1, f2, full, diagonal, weight, matrix, normalizations, **options):
    terms = [
        PairwiseTerm(f1, weight, normalizations[0], full),
        PairwiseTerm(f2, matrix, normalizations[1], diagonal),
    ]
    return dense_crf(u, terms, iterations=5, **options)


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("normalizations", [("symmetric", "after"), ("before", "none")])
@pytest.mark.parametrize("option", ["plain", "mask", "tolerance", "start"])
def test_gradient_for_features_and_kernels(normalizations, option, threads):
    threads(1)
    inputs = float64_problem()
    options = {
        "plain": {},
        "mask": {"mask": torch.rand(2, 20) > 0.3},
        "tolerance": {"tolerance": 1e-2},
        "start": {"start": torch.softmax(torch.randn_like(inputs[0]), 1)},
    }[option]

    def run(*tensors):
        return run_problem(*tensors, normalizations, **options)

    variables = [t.requires_grad_() for t in inputs]
    assert gradcheck(run, variables, eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("which", [0, 1])
def test_kernel_gradient_against_exact_kernels(which, threads):
    """Integrated over a range of widths, the gradient is the change of the exact mean field, but
    for the lattice's error. At single widths it is that of a piecewise function, and rougher."""
    threads(1)
    unary, image = scene(24, 32, 3, dtype=torch.float64)
    features = [gaussian_features((24, 32), 3.0), bilateral_features(image.float(), 20.0, 40.0)]
    features = [f.double() for f in features]
    weights = (1.0, 2.0)
    target = torch.softmax(-unary, 1).roll(3, 2)

    def exact(scale):
        scaled = [f[0].flatten(1) * (scale if k == which else 1) for k, f in enumerate(features)]
        factors = [torch.full((3,), w, dtype=torch.float64) for w in weights]
        q = dense_crf_reference(unary[0].flatten(1), scaled, factors, 3, "after")
        return (q * target[0].flatten(1)).sum().item()

    def gradient(scale):
        kernel = torch.full((features[which].shape[1],), scale, dtype=torch.float64)
        kernel.requires_grad_()
        terms = [PairwiseTerm(f, w, "after") for f, w in zip(features, weights, strict=True)]
        terms[which].kernel = kernel
        (dense_crf(unary, terms, iterations=3) * target).sum().backward()
        return kernel.grad.sum().item() / scale

    steps = torch.linspace(0.6, 1.4, 17, dtype=torch.float64)
    integral = torch.trapezoid(torch.tensor([gradient(s.item()) for s in steps]), steps).item()
    assert integral == pytest.approx(exact(1.4) - exact(0.6), rel=0.25)


@pytest.mark.usefixtures("not_emulated")
def test_feature_gradient_operator():
    unary, image = scene(8, 9, 3)
    features = bilateral_features(image, 3.0, 30.0).flatten(2).requires_grad_()
    lattice = PermutohedralLattice(features.unflatten(2, (8, 9)), "symmetric")
    unary = unary.flatten(2).requires_grad_()
    arguments = (unary, None, [features], lattice.tensors, [1], [torch.ones(3)], 8, 9, 2)
    opcheck(torch.ops.fastseg.dense_crf_at.default, arguments)


def test_kernels_scale_the_features():
    unary, image = scene()
    f = bilateral_features(image, 20.0, 20.0)
    scales = torch.tensor([0.5, 0.5, 2.0, 1.0, 1.0])
    wanted = dense_crf(unary, [PairwiseTerm(f * scales.view(1, 5, 1, 1), 2.0)])
    assert torch.equal(dense_crf(unary, [PairwiseTerm(f, 2.0, kernel=scales)]), wanted)
    full = dense_crf(unary, [PairwiseTerm(f, 2.0, kernel=scales.diag())])
    torch.testing.assert_close(full, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"kernel must be \(5,\) or \(5, 5\)"):
        dense_crf(unary, [PairwiseTerm(f, kernel=torch.ones(3))])
    with pytest.raises(ValueError, match="a kernel needs the term's features"):
        dense_crf(unary, [PairwiseTerm(PermutohedralLattice(f), kernel=scales)])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalization", ["none", "before", "after", "symmetric"])
def test_mask_equals_running_the_valid_points_alone(normalization, shared):
    unary, image = scene(25, 39, 4, batch=2)
    mask = torch.rand(1 if shared else 2, 25, 39) > 0.4
    weight = 0.02 if normalization == "none" else 2.0
    f = torch.where(mask[:, None], bilateral_features(image, 20.0, 20.0), math.nan)
    spatial = PermutohedralLattice(gaussian_features((25, 39), 3.0), normalization)
    terms = [PairwiseTerm(spatial, weight), PairwiseTerm(f, 2 * weight, normalization)]
    q = dense_crf(unary, terms, iterations=4, mask=mask)
    for b in range(2):
        valid = mask[0 if shared else b].flatten()
        few = [
            PairwiseTerm(spatial.features[:, :, valid], weight, normalization),
            PairwiseTerm(f[b].flatten(1)[:, valid], 2 * weight, normalization),
        ]
        alone = dense_crf(unary[b : b + 1].flatten(2)[..., valid], few, iterations=4)
        inside = q[b].flatten(1)[:, valid]
        torch.testing.assert_close(inside, alone[0], rtol=0, atol=2e-5)
        outside = torch.softmax(-unary[b].flatten(1)[:, ~valid], 0)
        torch.testing.assert_close(q[b].flatten(1)[:, ~valid], outside)


def test_mask_of_a_region_and_extremes():
    unary, image = scene(32, 32, 3)
    crf = DenseCRF(iters=3)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    torch.testing.assert_close(crf(-unary, image, mask), torch.softmax(-unary, 1))
    everywhere = torch.ones_like(mask)
    torch.testing.assert_close(
        crf(-unary, image, everywhere), crf(-unary, image), rtol=0, atol=2e-5
    )
    mask[:, 5:20, 3:30] = True
    part = crf(-unary, image, mask)[:, :, 5:20, 3:30]
    # A crop has other coordinates, and so another place in the lattice: the method's own spread.
    cropped = crf(-unary[:, :, 5:20, 3:30], image[:, :, 5:20, 3:30])
    assert (part - cropped).abs().mean() < 5e-3
    for bad in (mask.float(), mask[:, 1:], mask.expand(3, -1, -1)):
        with pytest.raises(ValueError, match="mask must be boolean with shape"):
            crf(-unary, image, bad)


@pytest.mark.usefixtures("not_emulated")
def test_masked_points_receive_no_gradient():
    unary, image = scene(12, 13, 3)
    mask = torch.rand(1, 12, 13) > 0.3
    image = torch.where(mask[:, None], image, math.nan).requires_grad_()
    crf = DenseCRF(iters=3, kernel="diag", trainable=True)
    crf(-unary, image, mask)[:, 1].sum().backward()
    assert image.grad.isfinite().all()
    assert image.grad[:, :, ~mask[0]].abs().max() == 0
    assert image.grad[:, :, mask[0]].abs().sum() > 0
    for parameter in crf.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


def test_tolerance_stops_each_image_by_itself():
    unary, image = scene(batch=3)
    crf = DenseCRF(iters=60, gaussian=(3, 1.0), bilateral=(20, 13, 1.0), tolerance=1e-3)
    q = crf(-unary, image)
    for b in range(3):
        one, photo = unary[b : b + 1], image[b : b + 1]
        assert torch.equal(crf(-one, photo), q[b : b + 1])
        steps = crf.steps(-one, photo)
        before, after, count = next(steps), next(steps), 1
        while (after - before).abs().max() >= 1e-3:
            before, after, count = after, next(steps), count + 1
        assert 2 < count < 60
        assert torch.equal(after, q[b : b + 1])
    with pytest.raises(ValueError, match="tolerance must be 0 or more, got -1"):
        DenseCRF(tolerance=-1.0)


@pytest.mark.parametrize("masked", [False, True])
def test_steps_and_objective(masked):
    unary, image = scene(17, 21, 3, batch=2)
    mask = torch.rand(2, 17, 21) > 0.3 if masked else None
    crf = DenseCRF(iters=4, gaussian=(3, 1.0), bilateral=(20, 13, 2.0))
    steps = crf.steps(-unary, image, mask)
    beliefs = [next(steps) for _ in range(5)]
    torch.testing.assert_close(beliefs[0], torch.softmax(-unary, 1))
    torch.testing.assert_close(beliefs[4], crf(-unary, image, mask), rtol=1e-4, atol=1e-6)
    objective = torch.stack([crf.kl_divergence(q, -unary, image, mask) for q in beliefs])
    assert objective.shape == (5, 2)
    assert (objective.diff(dim=0) < 0).all()


def test_objective_by_hand():
    """A kernel that is one number for all points, and a forbidden label that has no belief."""
    unary, _ = scene(6, 7, 3, dtype=torch.float64)
    unary[:, 2] = math.inf
    term = PairwiseTerm(torch.zeros(1, 42, dtype=torch.float64), 2.0, "after")
    q = dense_crf(unary, [term], iterations=1)
    flat = q[0, :2].flatten(1)
    energy = (flat * flat.log() + flat * unary[0, :2].flatten(1)).sum()
    expected = energy - 2 * (flat.mean(1) * flat.sum(1)).sum()
    torch.testing.assert_close(kl_divergence(q, unary, [term]), expected[None])


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("kernel", ["diag", "full"])
def test_layer_learns_kernels(kernel):
    unary, image = scene(24, 32, 3)
    plain, crf = DenseCRF(iters=3), DenseCRF(iters=3, kernel=kernel, trainable=True)
    torch.testing.assert_close(crf(-unary, image), plain(-unary, image), rtol=0, atol=1e-4)
    assert crf.bilateral_kernel.shape == ((1, 5) if kernel == "diag" else (1, 5, 5))
    target = torch.softmax(-unary, 1)[:, 1]
    losses = []
    optimizer = torch.optim.SGD([crf.gaussian_kernel, crf.bilateral_kernel], 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss = (crf(-unary, image)[:, 1] - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
