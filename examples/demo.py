"""The main job on real photographs, and the network against the same network in stock PyTorch.

Segments the pictures beside this file with U2-Net-p, refines the masks with the dense CRF and
writes masks, overlays and comparisons to out/demo/. Then times the network alone on the CPU:
same weights, same input, both in turn in one run.
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fastseg
from fastseg.image import read_image

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "demo"
PHOTOS = sorted(HERE.glob("*.jpg"))
SECONDS = 6.0  # of timing, at most


def stock(model: nn.Module) -> nn.Module:
    """The same network with torch.nn's convolution, batch norm and ReLU."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, fastseg.nn.ConvBNReLU2d):
                setattr(module, name, nn.Sequential(child.conv, child.bn, nn.ReLU(inplace=True)))
    return model


@torch.inference_mode()
def interleaved(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, called in turn so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}  # the first warms up


def segment_photos(predictor: fastseg.Predictor) -> None:
    for photo in PHOTOS:
        r = predictor(photo)
        r.save(OUT, photo.stem, ("mask", "overlay", "compare"))
        height, width = r.mask.shape
        stages = ", ".join(f"{stage} {1000 * t:.0f}" for stage, t in r.timings.items())
        found = r.shares.get("object", 0.0)
        print(
            f"{photo.name:<14} {width}x{height}  object {found:6.1%} of the picture  (ms: {stages})"
        )


def compare_networks() -> None:
    """The network alone, on the CPU."""
    network = fastseg.models.u2netp(weights="shipped").eval()
    plain, optimized = stock(network), fastseg.optimize(network)
    photo = torch.from_numpy(read_image(PHOTOS[0])).permute(2, 0, 1)[None] / 255
    x = nn.functional.interpolate(photo, (320, 320), mode="bilinear", antialias=True)
    variants = {
        "stock": lambda: plain(x)["out"],
        "fastseg": lambda: optimized(x)["out"],
    }
    with torch.inference_mode():
        difference = (variants["stock"]().sigmoid() - variants["fastseg"]().sigmoid()).abs().max()
    seconds = interleaved(variants)
    print(
        f"\nU2-Net-p on {tuple(x.shape)} float32, {torch.get_num_threads()} CPU threads, "
        "median of interleaved runs\n"
        f"  stock PyTorch {torch.__version__:<12} {1000 * seconds['stock']:8.1f} ms\n"
        f"  fastseg {fastseg.__version__:<18} {1000 * seconds['fastseg']:8.1f} ms   "
        f"{seconds['stock'] / seconds['fastseg']:.2f}x as fast\n"
        f"  largest difference of the probabilities {difference:.1e}"
    )


def main() -> None:
    predictor = fastseg.Predictor("u2netp", crf="default")
    segment_photos(predictor)
    compare_networks()
    print(f"\npictures: {OUT}")


if __name__ == "__main__":
    main()
