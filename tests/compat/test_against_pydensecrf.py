"""fastseg.compat.pydensecrf beside pydensecrf itself, where that is installed, on random calls."""

import os

import numpy as np
import pytest

import fastseg.compat.pydensecrf.densecrf as ours
from fastseg.compat.pydensecrf import utils as our_utils

theirs = pytest.importorskip("pydensecrf.densecrf")
their_utils = pytest.importorskip("pydensecrf.utils")

CASES = int(os.environ.get("FASTSEG_FUZZ_CASES", "200"))


def smooth_image(random, height, width, channels=3):
    """A few flat regions with noise, as photographs have them: labels do not hang on rounding."""
    corners = random.randint(0, 256, (height // 9 + 1, width // 9 + 1, channels))
    image = corners.repeat(9, 0).repeat(9, 1)[:height, :width]
    return np.clip(image + random.randint(-9, 10, image.shape), 0, 255)


def energies(random, utils, labels, shape):
    """Unary energies from probabilities of any dtype, or from labels."""
    probabilities = np.moveaxis(random.dirichlet(np.ones(labels), shape), 2, 0).copy()
    dtype = random.choice([np.float32, np.float64, np.float16])
    scale = random.choice([None, 0.5, 0.9])
    best = probabilities.argmax(0)
    if labels > 1 and random.rand() < 0.3:
        unsure = bool(random.rand() < 0.5)
        return utils.unary_from_labels(
            best + unsure * (random.rand(*shape) < 0.9), labels, 0.7, unsure
        )
    return utils.unary_from_softmax(probabilities.astype(dtype), scale)


def compatibility(random, labels):
    """A number, vector or matrix that lets equal labels attract, as mean field needs to settle."""
    weight = np.float32(random.uniform(0.5, 10))
    form = random.randint(4)
    if form == 0:
        return float(weight)
    if form == 1:
        return -weight * random.uniform(0.5, 1, labels).astype(np.float32)
    if form == 2:
        return weight * (1 - np.eye(labels, dtype=np.float32))
    costs = random.uniform(0, 0.3, (labels, labels)).astype(np.float32)
    return weight * (costs - np.eye(labels, dtype=np.float32))


def beliefs(dcrf, utils, seed, two_dimensional, nudge=0.0):
    random = np.random.RandomState(seed)
    # pydensecrf takes points four at a time and fills the last four up with points at the origin,
    # which can add vertices there: a multiple of 4 keeps to the model.
    height, width = random.randint(1, 40), 4 * random.randint(1, 12)
    labels = random.choice([1, 2, 2, 3, 5, 11, 21, 40])
    kernel, normalization = int(random.randint(3)), int(random.randint(4))
    strength = 0.01 if normalization == 0 else 1.0  # rows of such a kernel sum to hundreds
    widths = random.uniform(1, 5, 2), random.uniform(5, 100, 2), random.uniform(3, 20, 3)
    if random.rand() < 0.5:
        widths = tuple(w[:1].repeat(len(w)) for w in widths)
    image = smooth_image(random, height, width)
    options = {"kernel": kernel, "normalization": normalization}
    unary = energies(random, utils, labels, (height, width)) * np.float32(1 + nudge)
    first, second = (strength * compatibility(random, labels) for _ in range(2))
    if two_dimensional:
        crf = dcrf.DenseCRF2D(width, height, int(labels))
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(tuple(widths[0]), first, **options)
        pixels = np.ascontiguousarray(image.astype(np.uint8))
        crf.addPairwiseBilateral(tuple(widths[1]), tuple(widths[2]), pixels, second, **options)
    else:
        crf = dcrf.DenseCRF(height * width, int(labels))
        crf.setUnaryEnergy(unary)
        pixels = image.astype(random.choice([np.uint8, np.float32, np.float64, np.int32]))
        for features, compat in (
            (utils.create_pairwise_gaussian(tuple(widths[0]), (height, width)), first),
            (
                utils.create_pairwise_bilateral(tuple(widths[1]), tuple(widths[2]), pixels, 2),
                second,
            ),
        ):
            crf.addPairwiseEnergy(features, compat, **options)
    iterations = int(random.choice([0, 1, 5, 10]))
    q = crf.inference(iterations)
    return np.array(q), crf.klDivergence(q)


@pytest.mark.parametrize("two_dimensional", [True, False])
def test_random_calls_give_the_same_beliefs(two_dimensional):
    for seed in range(CASES // 2):
        q, divergence = beliefs(ours, our_utils, seed, two_dimensional)
        expected, their_divergence = beliefs(theirs, their_utils, seed, two_dimensional)
        if np.abs(q - expected).max() > 1e-4:
            # Updates can amplify rounding, two- or threefold each, before they settle: no further
            # from each other than pydensecrf from itself with the last bits of its input changed.
            limit = max(
                np.abs(beliefs(theirs, their_utils, seed, two_dimensional, n)[0] - expected).max()
                for n in (1e-6, -1e-6)
            )
            np.testing.assert_allclose(q, expected, rtol=0, atol=limit, err_msg=f"seed {seed}")
        assert divergence == pytest.approx(their_divergence, rel=1e-3, abs=0.1), seed
