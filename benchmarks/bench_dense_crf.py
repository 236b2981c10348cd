"""Dense CRF on the CPU: whole calls beside pydensecrf, and the stages of one call.

``python -m benchmarks.bench_dense_crf CASE fastseg|pydensecrf`` makes one call and prints the peak
memory of its process beyond what the imports, the inputs and a call of 32 x 32 pixels take.
``python -m benchmarks.bench_dense_crf CASE stages`` prints where the time of a call goes.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg.image import read_image
from fastseg.nn import DenseCRF
from fastseg.ops import (
    PermutohedralLattice,
    bilateral_features,
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


@pytest.mark.parametrize("case", ["voc", "voc, many vertices", "two labels"])
def bench_stages(benchmark, case):
    """The stages of one call, see :func:`stages`, each with its floor."""
    torch.set_num_threads(1)
    for name, seconds, moved, floor in benchmark.pedantic(stages, (case,)):
        benchmark.extra_info[name] = (
            f"{1e3 * seconds:.2f} ms, {moved / seconds / 1e9:.1f} GB/s, floor {1e3 * floor:.2f} ms"
        )


STAGES = ("load", "slice", "update", "splat", "blur", "store")


def stages(case: str, rounds: int = 5) -> list[tuple[str, float, int, float]]:
    """Name, median seconds, bytes moved and the time these take at the bandwidths measured beside
    them, on one thread: construction of the bilateral lattice, load and store of a call, and the
    stages of one iteration.

    Features, logits, energies, beliefs and the records of the points come from or go to memory
    beyond a core's own caches, in slice; near are the tile's rows and records that update and splat
    find where slice left them, and the rows of vertices.
    """
    shape, spatial, bilateral = CASES[case]
    logits, image = inputs(shape)
    _, height, width, labels = shape
    features = [gaussian_features((height, width), spatial), bilateral_features(image, *bilateral)]
    lattices = [PermutohedralLattice(f, "symmetric") for f in features]
    points, channels = height * width, 1 if labels == 2 else labels + -labels % 8
    rows = 4 * channels * points  # bytes of a value per point
    records = vertices = sums = axes = 0
    for lattice in lattices:
        corners = lattice.features.shape[1] + 1
        (count,), (extra,), (simplices,) = map(
            lattice._header, ("vertices", "extra_rows", "simplices")
        )
        records += points * (4 * corners + 2) + 4 * corners * simplices
        vertices += 4 * channels * count
        sums += 4 * channels * (count + extra)
        axes += 4 * channels * count * 2 * corners
    logit_bytes = 4 * logits.numel()
    large, small = torch.ones(2, 1 << 22), torch.ones(1 << 16)  # 32 MB; 256 KB, in the second cache
    target = torch.empty_like(small)
    moved = {  # far, near
        "read far": (4 * large.numel(), 0),
        "copy near": (0, 8 * small.numel()),
        "construct": (4 * features[1].numel() + lattices[1].nbytes, 0),
        "load": (logit_bytes + rows, 0),
        "slice": (records + rows, vertices),
        "update": (0, 2 * rows),
        "splat": (0, records + 2 * sums),
        "blur": (0, 2 * sums + vertices + axes),
        "store": (logit_bytes, 0),
    }
    weights = [torch.full((labels,), w) for w in (3.0, 10.0)]
    problem = [t for lattice in lattices for t in lattice.tensors], [1, 1], weights
    times: dict[str, list[float]] = {name: [] for name in moved}
    for _ in range(rounds):
        times["read far"].append(seconds_of(lambda: large[0].dot(large[1])))
        target.copy_(small)
        times["copy near"].append(seconds_of(lambda: target.copy_(small)))
        times["construct"].append(
            seconds_of(lambda: PermutohedralLattice(features[1], "symmetric"))
        )
        spent = torch.ops.fastseg.dense_crf_stages(
            logits.flatten(2), *problem, height, width, ITERATIONS
        )
        for name, seconds in zip(STAGES, spent.tolist(), strict=True):
            times[name].append(seconds / (1 if name in ("load", "store") else ITERATIONS))
    median = {name: float(np.median(t)) for name, t in times.items()}
    far, near = (
        median["read far"] / moved["read far"][0],
        median["copy near"] / moved["copy near"][1],
    )
    return [(name, median[name], a + b, a * far + b * near) for name, (a, b) in moved.items()]


def bench_accuracy(benchmark):
    """The lattice against the exact kernels in float64, beside pydensecrf where it is there."""
    logits, image = inputs((1, 60, 80, 21))
    exact = exact_beliefs(logits, image)
    results = {"fastseg": DenseCRF(ITERATIONS, (3, 3.0), (80, 13, 10.0))(logits, image)}
    if importlib.util.find_spec("pydensecrf"):
        results["pydensecrf"] = with_pydensecrf(logits, image, 3, (80, 13))
    for name, q in results.items():
        differ = (q.argmax(1) != exact.argmax(1)).double().mean().item()
        error = (q - exact).abs()
        benchmark.extra_info[name] = (
            f"{100 * differ:.2f} % of labels differ, largest |dQ| {error.max():.3f}, "
            f"mean {error.mean():.1e}"
        )
        assert differ < 0.01
        assert error.mean() < 1e-3
    benchmark.pedantic(lambda: None)


def exact_beliefs(logits: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean field with the exact kernels 3 and 80/13, weights 3 and 10, in float64."""
    shape = logits.shape[2:]
    features = [gaussian_features(shape, 3.0), bilateral_features(image, 80.0, 13.0)]
    weights = [torch.full((logits.shape[1],), w, dtype=torch.float64) for w in (3.0, 10.0)]
    return dense_crf_reference(
        -logits[0].flatten(1).double(),
        [f[0].flatten(1).double() for f in features],
        weights,
        ITERATIONS,
    ).view(logits.shape)


def seconds_of(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def print_stages(case: str) -> None:
    print(f"{case}, 1 thread: ms, GB/s, floor in ms (an iteration's for slice to blur)")
    for name, seconds, moved, floor in stages(case):
        print(f"{name:10} {1e3 * seconds:6.2f} {moved / seconds / 1e9:6.1f} {1e3 * floor:6.2f}")


def main(case: str, variant: str) -> None:
    if variant == "stages":
        torch.set_num_threads(1)
        return print_stages(case)
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
