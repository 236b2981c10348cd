"""Memory of the dense CRF: estimated before it is taken, refused or taken in groups of labels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastseg.ops import (
    PairwiseTerm,
    PermutohedralLattice,
    bilateral_features,
    dense_crf,
    estimate_memory,
    gaussian_features,
    mean_field,
    permutohedral,
)

pytestmark = pytest.mark.usefixtures("not_emulated")

PEAK = """
import torch
from fastseg.ops import *
torch.manual_seed(0)
unary = torch.rand(1, {labels}, {size}, {size})
image = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 20), ({size}, {size}), mode="bilinear")
image = image * 255 + {noise} * torch.randn(1, 3, {size}, {size})
features = [gaussian_features(({size}, {size}), 3.0), bilateral_features(image, {xy}, {rgb})]
estimate = estimate_memory(unary.shape, features)
def status(key):
    return next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith(key)) * 1024
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
dense_crf(unary, [PairwiseTerm(f, 3.0) for f in features], iterations=2)
print(estimate, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory"
)
@pytest.mark.parametrize(
    "case",
    [
        {"size": 600, "labels": 21, "noise": 3, "xy": 80, "rgb": 13},
        {"size": 500, "labels": 8, "noise": 20, "xy": 160, "rgb": 3},  # many vertices
    ],
)
def test_estimate_bounds_the_measured_peak(case):
    result = subprocess.run(
        [sys.executable, "-c", PEAK.format(**case)], capture_output=True, text=True, check=True
    )
    estimate, measured = map(int, result.stdout.split())
    assert measured <= 1.1 * estimate
    assert estimate <= 3 * measured


def problem(labels=11):
    unary = torch.rand(2, labels, 40, 50) * 3
    image = torch.rand(2, 3, 40, 50) * 255
    matrix = torch.rand(labels, labels)
    return unary, [
        PairwiseTerm(gaussian_features((40, 50), 3.0), 2.0),
        PairwiseTerm(bilateral_features(image, 20.0, 60.0), matrix - 2 * torch.eye(labels)),
    ]


def test_groups_of_labels_give_the_same_beliefs(monkeypatch):
    unary, terms = problem()
    expected = dense_crf(unary, terms, iterations=4)
    monkeypatch.setattr(mean_field, "_too_large", lambda *_: True)
    torch.testing.assert_close(dense_crf(unary, terms, iterations=4), expected, rtol=0, atol=1e-5)
    unary[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="unary must hold no NaN"):
        dense_crf(unary, terms)


def test_limits_are_found_before_the_work(monkeypatch):
    unary, terms = problem()
    needed = unary.numel() * 4 * 3
    monkeypatch.setattr(mean_field, "MAY_TAKE", 0)
    monkeypatch.setattr(mean_field, "available_memory", lambda: needed // 100)
    with pytest.raises(ValueError, match="dense_crf: 11 labels at 2000 points need about"):
        dense_crf(unary, terms)
    monkeypatch.setattr(permutohedral, "available_memory", lambda: 1 << 20)
    with pytest.raises(ValueError, match=r"100000 points with 5 features need about .* GiB"):
        PermutohedralLattice(torch.rand(5, 100000) * 1000)


def test_estimate_grows_with_what_it_counts():
    image = torch.rand(1, 3, 60, 70) * 255
    few, many = (bilateral_features(image, xy, rgb) for xy, rgb in ((80, 50), (5, 3)))
    assert estimate_memory((1, 5, 60, 70), [many]) > estimate_memory((1, 5, 60, 70), [few])
    assert estimate_memory((1, 9, 60, 70), [few]) > estimate_memory((1, 5, 60, 70), [few])
