"""Dense CRF on the CPU: stages, whole calls, and pydensecrf beside them where it is installed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg.image import read_image
from fastseg.nn import DenseCRF
from fastseg.ops import PermutohedralLattice, bilateral_features, gaussian_features

# (H, W, labels), sigma_xy of the spatial term, (sigma_xy, sigma_rgb) of the bilateral term
CASES = {
    "voc": ((375, 500, 21), 3, (80, 13)),
    "voc, many vertices": ((375, 500, 21), 3, (160, 3)),
    "city": ((1024, 2048, 19), 3, (80, 13)),
    "two labels": ((300, 400, 2), 3, (80, 13)),
}
ITERATIONS = 10


def inputs(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of colour clusters with smooth noise, and the photograph at this size."""
    height, width, labels = shape
    photo = torch.from_numpy(read_image("examples/coffee.jpg")).permute(2, 0, 1)[None].float()
    image = F.interpolate(photo, (height, width), mode="bilinear", antialias=True)
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(labels, 3, 1, 1, generator=generator) * 255
    noise = torch.randn(1, labels, height // 8 + 1, width // 8 + 1, generator=generator)
    distance = (image - centres).square().sum(1)[None] / 1200
    return F.interpolate(noise, (height, width), mode="bilinear") - distance, image.byte()


def with_pydensecrf(logits, image, spatial, bilateral):
    dcrf = pytest.importorskip("pydensecrf.densecrf")
    _, labels, height, width = logits.shape
    crf = dcrf.DenseCRF2D(width, height, labels)
    energy = -torch.log_softmax(logits, 1)
    crf.setUnaryEnergy(energy[0].flatten(1).numpy())
    crf.addPairwiseGaussian(spatial, 3)
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    crf.addPairwiseBilateral(bilateral[0], bilateral[1], pixels, 10)
    return torch.from_numpy(np.array(crf.inference(ITERATIONS))).view(labels, height, width)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["fastseg", "pydensecrf"])
def bench_dense_crf(time_op, benchmark, case, variant, threads):
    shape, spatial, bilateral = CASES[case]
    benchmark.group = f"dense_crf {case} {shape}, {threads} threads"
    logits, image = inputs(shape)
    layer = DenseCRF(ITERATIONS, (spatial, 3.0), (*bilateral, 10.0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if variant == "fastseg":
            time_op(lambda: layer(logits, image))
        else:
            q = with_pydensecrf(logits, image, spatial, bilateral)
            assert (layer(logits, image)[0] - q).abs().max() < 1e-4
            time_op(lambda: with_pydensecrf(logits, image, spatial, bilateral))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stage", ["build", "filter 21 channels", "10 iterations"])
@pytest.mark.parametrize("kernel", ["spatial", "bilateral"])
def bench_stages(time_op, benchmark, kernel, stage):
    """One lattice of the VOC case. An iteration is a filter fused with the soft-max."""
    benchmark.group = f"permutohedral {kernel}, 500 x 375 x 21, 1 thread"
    logits, image = inputs((375, 500, 21))
    if kernel == "spatial":
        features = gaussian_features((375, 500), 3.0)
    else:
        features = bilateral_features(image, 80.0, 13.0)
    lattice = PermutohedralLattice(features, "symmetric")
    benchmark.extra_info["vertices per point"] = round(lattice.occupancy[0], 3)
    layer = DenseCRF(
        ITERATIONS,
        (3, 3.0) if kernel == "spatial" else None,
        (80, 13, 10.0) if kernel == "bilateral" else None,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        time_op(
            {
                "build": lambda: PermutohedralLattice(features, "symmetric"),
                "filter 21 channels": lambda: lattice.filter(logits),
                "10 iterations": lambda: layer(logits, image),
            }[stage]
        )
    finally:
        torch.set_num_threads(before)
