"""fastseg.compat.pydensecrf: names, results, buffers and errors of pydensecrf."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch

import fastseg.compat.pydensecrf.densecrf as dcrf
import fastseg.compat.pydensecrf.eigen as eigen
from fastseg.compat.pydensecrf import utils
from fastseg.nn import DenseCRF

H, W, L = 12, 17, 3


@pytest.fixture
def image() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 255, (H, W, 3), np.uint8)


@pytest.fixture
def unary() -> np.ndarray:
    return np.random.RandomState(1).rand(L, H * W).astype(np.float32)


def crf_2d(unary, image, compat=5.0, **options):
    d = dcrf.DenseCRF2D(W, H, L)
    d.setUnaryEnergy(unary)
    d.addPairwiseGaussian(sxy=3, compat=3, **options)
    d.addPairwiseBilateral(sxy=20, srgb=13, rgbim=image, compat=compat, **options)
    return d


def test_same_as_the_layer(unary, image):
    q = np.array(crf_2d(unary, image).inference(5))
    logits = -torch.from_numpy(unary).reshape(1, L, H, W)
    layer = DenseCRF(5, (3, 3.0), (20, 13, 5.0))
    expected = layer(logits, torch.from_numpy(image).permute(2, 0, 1)[None])
    np.testing.assert_allclose(q, expected[0].flatten(1).numpy(), atol=1e-5)


@pytest.mark.parametrize("normalization", list(dcrf.NormalizationType))
@pytest.mark.parametrize("kernel", list(dcrf.KernelType))
def test_generic_features_give_the_same(unary, image, kernel, normalization):
    """utils lists the row first; swapping the first two features gives DenseCRF2D's order."""
    options = {"kernel": kernel, "normalization": normalization}
    generic = dcrf.DenseCRF(H * W, L)
    generic.setUnaryEnergy(unary)
    for features, compat in (
        (utils.create_pairwise_gaussian((3, 3), (H, W)), 3),
        (utils.create_pairwise_bilateral((20, 20), 13, image, chdim=2), 5.0),
    ):
        features[[0, 1]] = features[[1, 0]]
        generic.addPairwiseEnergy(np.ascontiguousarray(features), compat, **options)
    specialised = crf_2d(unary, image, **options)
    np.testing.assert_allclose(
        np.array(generic.inference(4)), np.array(specialised.inference(4)), atol=1e-5
    )


def test_volumes_with_two_channels():
    """Generic features of a 3-D image; reversing their axes gives the layer's order x, y, z."""
    random = np.random.RandomState(2)
    shape = (5, 6, 7)
    volume = (random.rand(*shape, 2) * 50).astype(np.float32)
    energies = utils.unary_from_labels(random.randint(0, L + 1, shape), L, 0.7)
    d = dcrf.DenseCRF(volume[..., 0].size, L)
    d.setUnaryEnergy(energies)
    for features, compat in (
        (utils.create_pairwise_gaussian((2, 3, 4), shape), 3),
        (utils.create_pairwise_bilateral((4, 5, 6), (20, 30), volume, chdim=3), 5),
    ):
        features[:3] = features[2::-1].copy()
        d.addPairwiseEnergy(features, compat)
    layer = DenseCRF(4, ((4, 3, 2), 3.0), ((6, 5, 4), (20, 30), 5.0))
    logits = -torch.from_numpy(energies).reshape(1, L, *shape)
    expected = layer(logits, torch.from_numpy(volume).movedim(-1, 0)[None])
    np.testing.assert_allclose(
        np.array(d.inference(4)), expected[0].flatten(1).numpy(), rtol=0, atol=1e-5
    )


def test_result_is_a_column_major_buffer(unary, image):
    q = crf_2d(unary, image).inference(2)
    view = memoryview(q)
    assert (view.shape, view.strides, view.format) == ((L, H * W), (4, 4 * L), "f")
    assert not view.readonly
    array = np.asarray(q)
    assert array.flags.f_contiguous
    np.testing.assert_array_equal(np.argmax(q, axis=0), array.argmax(0))
    np.testing.assert_allclose(array.sum(0), 1, rtol=1e-5)
    assert memoryview(eigen.MatrixXf()).shape == (0, 0)


def test_steps_and_objective(unary, image):
    d = crf_2d(unary, image)
    q, t1, t2 = d.startInference()
    np.testing.assert_allclose(np.array(q), np.array(d.inference(0)))
    objective = [d.klDivergence(q)]
    for _ in range(5):
        d.stepInference(q, t1, t2)
        objective.append(d.klDivergence(q))
    np.testing.assert_allclose(np.array(q), np.array(d.inference(5)), atol=1e-5)
    assert objective[-1] < objective[0]
    no_unary = dcrf.DenseCRF(4, 2)
    assert np.array(no_unary.startInference()[0]).tolist() == [[0] * 4] * 2
    np.testing.assert_allclose(np.array(no_unary.inference(3)), 0.5)


def test_objective_by_hand(unary):
    """One term whose kernel is the same number for all points: features of zero."""
    d = dcrf.DenseCRF(H * W, L)
    d.setUnaryEnergy(unary)
    d.addPairwiseEnergy(np.zeros((1, H * W), np.float32), 2, normalization=2)
    q = np.array(d.inference(1)).astype(np.float64)
    expected = (q * np.log(q) + unary * q).sum() - 2 * (q.mean(1) * q.sum(1)).sum()
    assert d.klDivergence(d.inference(1)) == pytest.approx(expected, rel=1e-5)


def test_compat_forms(unary, image):
    """A number attracts; vectors and matrices are energies, so their sign is opposite."""
    by_number = np.array(crf_2d(unary, image, 4).inference(3))
    for compat in (
        np.float32(4),
        np.full(L, -4, np.float32),
        -4 * np.eye(L, dtype=np.float32),
        4 - 4 * np.eye(L, dtype=np.float32),
    ):
        np.testing.assert_allclose(
            np.array(crf_2d(unary, image, compat).inference(3)), by_number, atol=1e-4
        )


def test_unary_objects_are_taken_over(unary):
    given = dcrf.ConstUnary(unary)
    first, second = dcrf.DenseCRF(H * W, L), dcrf.DenseCRF(H * W, L)
    first.setUnary(given)
    second.setUnary(given)
    np.testing.assert_allclose(
        np.array(first.inference(0)), torch.softmax(-torch.from_numpy(unary), 0), atol=1e-6
    )
    np.testing.assert_allclose(np.array(second.inference(0)), 1 / L)
    weights, features = unary[:, :4].copy(), np.random.rand(4, H * W).astype(np.float32)
    first.setUnary(dcrf.LogisticUnary(weights, features))
    expected = torch.softmax(-torch.from_numpy(weights @ features), 0)
    np.testing.assert_allclose(np.array(first.inference(0)), expected, atol=1e-5)


def test_constants_and_subclasses(unary):
    assert dcrf.NORMALIZE_SYMMETRIC is dcrf.NormalizationType.NORMALIZE_SYMMETRIC
    assert [int(n) for n in dcrf.NormalizationType] == [0, 1, 2, 3]
    assert (dcrf.CONST_KERNEL, dcrf.DIAG_KERNEL, dcrf.FULL_KERNEL) == (0, 1, 2)

    class Mine(dcrf.DenseCRF2D):
        def __init__(self, w, h, labels, name):
            self.name = name

    mine = Mine(W, H, L, "x")
    mine.setUnaryEnergy(unary)
    assert np.array(mine.inference(1)).shape == (L, H * W)


def test_utils():
    labels = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    unknown, right, wrong = 1 / 3, 0.8, 0.1
    expected = -np.log(
        [
            [unknown, right, wrong, wrong, wrong, wrong, right, unknown],
            [unknown, wrong, right, wrong, wrong, right, wrong, unknown],
            [unknown, wrong, wrong, right, right, wrong, wrong, unknown],
        ]
    )
    np.testing.assert_allclose(utils.unary_from_labels(labels, 3, 0.8), expected, rtol=1e-6)
    np.testing.assert_allclose(utils.compute_unary(labels, 3, GT_PROB=0.8), expected, rtol=1e-6)
    plain = utils.unary_from_labels(labels, 4, 0.7, zero_unsure=False)
    np.testing.assert_array_equal(plain.argmin(0), labels.ravel())
    p = np.array([[0.0, 0.25], [1.0, 0.75]])
    np.testing.assert_allclose(
        utils.unary_from_softmax(p), -np.log([[1e-5, 0.25], [1, 0.75]]), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        utils.unary_from_softmax(p, scale=0.5), -np.log(0.5 * p + 0.25), rtol=1e-6
    )
    grid = utils.create_pairwise_gaussian((2, 4), (3, 5))
    np.testing.assert_array_equal(grid[:, 7], [0.5, 0.5])
    volume = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    features = utils.create_pairwise_bilateral((1, 2, 4), 8, volume)
    assert features.shape == (4, 24)
    np.testing.assert_array_equal(features[:, 23], [1, 1, 0.75, 23 / 8])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda u: u.astype(np.float64), ValueError, "expected 'float' but got 'double'"),
        (lambda u: u.T.copy().T, ValueError, "ndarray is not C-contiguous"),
        (lambda u: u[0], ValueError, r"wrong number of dimensions \(expected 2, got 1\)"),
        (lambda u: u[:, :-1].copy(), ValueError, "Bad shape for unary energy"),
        (lambda u: None, TypeError, "Argument 'u' must not be None"),
        (lambda u: u.tolist(), TypeError, "bytes-like"),
        (lambda u: np.full_like(u, np.nan), ValueError, "unary must hold no NaN"),
    ],
)
def test_bad_unary(unary, change, error, message):
    def run():
        d = dcrf.DenseCRF2D(W, H, L)
        d.setUnaryEnergy(change(unary))
        d.inference(1)

    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rgbim": np.zeros((W, H, 3), np.uint8)}, ValueError, "Bad shape for pairwise bilateral"),
        ({"rgbim": np.zeros((H, W, 4), np.uint8)}, ValueError, "create_pairwise_bilateral"),
        ({"rgbim": np.zeros((H, W, 3), np.float32)}, ValueError, "expected 'unsigned char'"),
        ({"compat": [1.0, 2.0, 3.0]}, TypeError, "bytes-like"),
        ({"compat": np.ones(L)}, ValueError, "expected 'float' but got 'double'"),
        ({"compat": np.ones((L, L, L), np.float32)}, ValueError, "dimension >2"),
        ({"compat": np.ones(L + 1, np.float32)}, ValueError, "Bad shape for label compat"),
        ({"sxy": 0}, ValueError, "must be positive"),
        ({"srgb": (1, -1, 1)}, ValueError, "must be positive"),
        ({"normalization": 4}, ValueError, "not a valid NormalizationType"),
        ({"normalization": None}, TypeError, "an integer is required"),
        ({"kernel": "full"}, TypeError, "an integer is required"),
        ({"srgb": (3, 3)}, IndexError, "one standard deviation or 3"),
        ({"sxy": "3"}, IndexError, "one standard deviation or 2"),
        ({"rgbim": np.zeros((H, W, 3), np.uint8)[:, ::-1]}, ValueError, "not C-contiguous"),
        ({"rgbim": None}, TypeError, "Argument 'rgbim' must not be None"),
    ],
)
def test_bad_bilateral(image, arguments, error, message):
    d = dcrf.DenseCRF2D(W, H, L)
    with pytest.raises(error, match=message):
        d.addPairwiseBilateral(**{"sxy": 3, "srgb": 3, "rgbim": image, "compat": 3, **arguments})


def test_bad_arguments(unary, image):
    d = crf_2d(unary, image)
    q = d.inference(1)
    for bad in (None, 1, [[0.0]]):
        with pytest.raises(TypeError):
            d.klDivergence(bad)
        with pytest.raises(TypeError):
            d.stepInference(bad, q, q)
    with pytest.raises(TypeError, match="an integer is required, got str"):
        d.inference("3")
    with pytest.raises(TypeError, match="an integer is required, got str"):
        dcrf.DenseCRF("5", 2)
    with pytest.raises(ValueError, match="needs points and labels, got 0 and 2"):
        dcrf.DenseCRF(0, 2)
    with pytest.raises(TypeError, match="cannot pickle 'DenseCRF2D' object"):
        pickle.dumps(d)
    np.testing.assert_array_equal(np.array(d.inference(2.9)), np.array(d.inference(2)))
    np.testing.assert_array_equal(np.array(d.inference(-3)), np.array(d.inference(0)))


def refine(unary):
    d = dcrf.DenseCRF2D(300, 200, len(unary))
    d.setUnaryEnergy(unary)
    d.addPairwiseGaussian(sxy=3, compat=3)
    return np.array(d.inference(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_workers(threads):
    """Scripts map inference over a pool of forked processes, also after use in the parent."""
    threads(2)
    unary = np.random.RandomState(0).rand(5, 200 * 300).astype(np.float32)
    expected = refine(unary)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map_async(refine, [unary] * 3).get(timeout=60)
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_bad_eigen_and_features():
    with pytest.raises(ValueError, match="dimensions"):
        eigen.matrixXf(np.zeros((2, 2, 2), np.float32))
    with pytest.raises(ValueError, match="dtype"):
        eigen.matrixXf(np.zeros((2, 2)))
    with pytest.raises(TypeError, match="None"):
        eigen.matrixXf(None)
    matrix = np.random.randn(3, 4).astype(np.float32)
    np.testing.assert_array_equal(np.array(eigen.matrixXf(matrix)), matrix)
    np.testing.assert_array_equal(np.array(eigen.vectorXf(matrix[0])), matrix[0])
    with pytest.raises(ValueError, match="Bad shape for pairwise energy"):
        dcrf.DenseCRF(10, 2).addPairwiseEnergy(np.zeros((2, 9), np.float32), 3)
    with pytest.raises(ValueError, match="finite"):
        dcrf.DenseCRF(10, 2).addPairwiseEnergy(np.full((2, 10), np.nan, np.float32), 3)
    read_only = np.zeros((2, 10), np.float32)
    read_only.flags.writeable = False
    dcrf.DenseCRF(10, 2).addPairwiseEnergy(read_only, 3)
