"""Dense CRF on the CPU: whole calls beside pydensecrf, and the stages of one call.

``python -m benchmarks.bench_dense_crf CASE fastseg|pydensecrf`` makes one call and prints the peak
memory of its process beyond what the imports, the inputs and a call of 32 x 32 pixels take.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg.image import read_image
from fastseg.nn import DenseCRF
from fastseg.ops import (
    PairwiseTerm,
    PermutohedralLattice,
    bilateral_features,
    dense_crf,
    dense_crf_reference,
    gaussian_features,
)

# (images, H, W, labels), sigma_xy of the spatial term, (sigma_xy, sigma_rgb) of the bilateral term
CASES = {
    "voc": ((1, 375, 500, 21), 3, (80, 13)),
    "voc, many vertices": ((1, 375, 500, 21), 3, (160, 3)),
    "city": ((1, 1024, 2048, 19), 3, (80, 13)),
    "two labels": ((1, 300, 400, 2), 3, (80, 13)),
    "batch": ((16, 375, 500, 21), 3, (80, 13)),
}
ITERATIONS = 10


def inputs(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of colour clusters with smooth noise, and the photograph at this size."""
    batch, height, width, labels = shape
    photo = torch.from_numpy(read_image("examples/coffee.jpg")).permute(2, 0, 1)[None].float()
    image = F.interpolate(photo, (height, width), mode="bilinear", antialias=True)
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(labels, 3, 1, 1, generator=generator) * 255
    noise = torch.randn(batch, labels, height // 8 + 1, width // 8 + 1, generator=generator)
    distance = (image - centres).square().sum(1)[None] / 1200
    logits = F.interpolate(noise, (height, width), mode="bilinear") - distance
    shifted = [image.roll(8 * i, 3) for i in range(batch)]  # every image has its own lattice
    return logits, torch.cat(shifted).byte()


def with_pydensecrf(logits, image, spatial, bilateral):
    dcrf = pytest.importorskip("pydensecrf.densecrf")
    _, labels, height, width = logits.shape
    results = []
    for x, rgb in zip(logits, image, strict=True):
        crf = dcrf.DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(-torch.log_softmax(x, 0).flatten(1).numpy())
        crf.addPairwiseGaussian(spatial, 3)
        pixels = np.ascontiguousarray(rgb.permute(1, 2, 0).numpy())
        crf.addPairwiseBilateral(bilateral[0], bilateral[1], pixels, 10)
        results.append(torch.from_numpy(np.array(crf.inference(ITERATIONS))))
    return torch.stack(results).view(logits.shape)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("case", CASES)
def bench_dense_crf(compare, benchmark, case, threads):
    """Construction included, except that of the spatial lattice, which the layer keeps."""
    shape, spatial, bilateral = CASES[case]
    benchmark.group = f"dense_crf {case} {shape}"
    logits, image = inputs(shape)
    layer = DenseCRF(ITERATIONS, (spatial, 3.0), (*bilateral, 10.0))
    compare(
        {
            "fastseg": lambda: layer(logits, image),
            "pydensecrf": lambda: with_pydensecrf(logits, image, spatial, bilateral),
        },
        rounds=3 if logits.numel() > 10**7 else 9,
    )


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", ["build", "filter", "mean field"])
@pytest.mark.parametrize("kernel", ["spatial", "bilateral"])
def bench_stages(time_op, benchmark, kernel, stage, threads):
    """One lattice of the VOC case. An iteration of mean field is a filter fused with soft-max.

    The bytes are those that no cache of a core can hold back: the records of the points, once for
    splat and slice together, the energies, and the vertices' rows read and written by each axis.
    """
    benchmark.group = f"permutohedral {kernel}, 500 x 375 x 21"
    logits, image = inputs((1, 375, 500, 21))
    features = (
        gaussian_features((375, 500), 3.0)
        if kernel == "spatial"
        else bilateral_features(image, 80.0, 13.0)
    )
    lattice = PermutohedralLattice(features, "symmetric")
    benchmark.extra_info["vertices per point"] = round(lattice.occupancy[0], 3)
    points, corners = lattice.points, features.shape[1] + 1
    rows = 24 * 4 * (points + 2 * corners * lattice.vertices[0])
    iteration = rows + points * (4 * corners + 2)
    terms = [PairwiseTerm(lattice, 3.0)]
    run, moved = {
        "build": (
            lambda: PermutohedralLattice(features, "symmetric"),
            4 * features.numel() + lattice.nbytes,
        ),
        "filter": (lambda: lattice.filter(logits), 2 * 4 * logits.numel() + iteration),
        "mean field": (
            lambda: dense_crf(logits, terms, iterations=ITERATIONS),
            2 * 4 * logits.numel() + ITERATIONS * iteration,
        ),
    }[stage]
    time_op(run, bytes_moved=moved)


def bench_accuracy(benchmark):
    """The lattice against the exact kernels in float64 on 60 x 80 pixels."""
    logits, image = inputs((1, 60, 80, 21))
    q = DenseCRF(ITERATIONS, (3, 3.0), (80, 13, 10.0))(logits, image)
    features = [gaussian_features((60, 80), 3.0), bilateral_features(image, 80.0, 13.0)]
    weights = [torch.full((21,), w, dtype=torch.float64) for w in (3.0, 10.0)]
    exact = dense_crf_reference(
        -logits[0].flatten(1).double(),
        [f[0].flatten(1).double() for f in features],
        weights,
        ITERATIONS,
    ).view_as(q[0])
    benchmark.extra_info["labels that differ"] = (
        (q[0].argmax(0) != exact.argmax(0)).float().mean().item()
    )
    benchmark.extra_info["mean difference"] = (q[0] - exact).abs().mean().item()
    benchmark.pedantic(lambda: None)


def main(case: str, variant: str) -> None:
    shape, spatial, bilateral = CASES[case]
    layer = DenseCRF(ITERATIONS, (spatial, 3.0), (*bilateral, 10.0))
    call = {
        "fastseg": layer,
        "pydensecrf": lambda *x: with_pydensecrf(*x, spatial, bilateral),
    }[variant]
    with torch.inference_mode():
        call(*inputs((1, 32, 32, shape[3])))  # pages of code, threads
        logits, image = inputs(shape)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
        call(logits, image)
    print(f"{case}, {variant}: {resident('VmHWM') - before:.0f} MB beyond the inputs")


def resident(field: str) -> float:
    """Memory of this process in MB: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(field + ":"))


if __name__ == "__main__":
    main(*sys.argv[1:])
