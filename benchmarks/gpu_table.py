"""The CUDA benchmark table: every op against the strongest PyTorch calls, and the ceilings.

    python -m benchmarks.gpu_table [--once]

Variants alternate; between runs a buffer larger than the L2 cache is overwritten. Times are medians
of CUDA events around one call; where a call can be captured, of a replayed graph. Writes
benchmarks/results/<date>-<gpu>.json. ``--once`` runs each fastseg variant once, for profilers.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import fastseg
from fastseg.ops import max_pool2d, max_unpool2d
from fastseg.ops.conv_bn import conv_act, conv_bn_act, conv_bn_act_reference
from fastseg.ops.conv_branches import conv_branches, conv_branches_reference

ROUNDS = 30
Case = tuple[str, float, dict[str, Callable[[], object]]]  # name, bytes moved at least, variants


def nhwc(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    return x.contiguous(memory_format=torch.channels_last)


def pooling(batch: int) -> list[Case]:
    """SegNet's first pooling, 64 x 360 x 480."""
    x = nhwc(batch, 64, 360, 480)
    y, flat = F.max_pool2d(x, 2, return_indices=True)
    full, small = x.numel() * 2, y.numel() * 2
    pool: dict = {"torch": lambda: F.max_pool2d(x, 2, return_indices=True)}
    unpool: dict = {"torch": lambda: F.max_unpool2d(y, flat, 2)}
    for name, packed in (("fastseg", False), ("fastseg 2-bit", True)):
        _, indices = max_pool2d(x, 2, packed=packed)
        pool[name] = lambda packed=packed: max_pool2d(x, 2, packed=packed)
        unpool[name] = lambda indices=indices: max_unpool2d(y, indices, 2)
    moved = full + small + y.numel()
    return [(f"max_pool2d N={batch}", moved, pool), (f"max_unpool2d N={batch}", moved, unpool)]


def inference(batch: int, channels: int, dilation: int) -> Case:
    """A 3x3 layer at 65x65 with folded batch norm, residual and ReLU."""
    x, r = nhwc(batch, channels, 65, 65), nhwc(batch, channels, 65, 65)
    w, b = nhwc(channels, channels, 3, 3), torch.randn(channels, device="cuda").half()
    padding = {"padding": dilation, "dilation": dilation}

    def eager() -> torch.Tensor:
        return F.relu(F.conv2d(x, w, b, **padding) + r)

    def cudnn() -> torch.Tensor:
        pair = [dilation] * 2
        return torch.cudnn_convolution_add_relu(x, w, r, 1.0, b, [1, 1], pair, pair, 1)

    return (
        f"conv_act {channels}, d={dilation}, N={batch}",
        3.0 * x.numel() * 2,
        {
            "eager": eager,
            "cudnn fused": cudnn,
            "compiled": torch.compile(eager, mode="max-autotune-no-cudagraphs"),
            "fastseg": lambda: conv_act(x, w, b, r, **padding),
            "fastseg's convolution": chosen("own", lambda: conv_act(x, w, b, r, **padding)),
            "fastseg around torch's": chosen("torch", lambda: conv_act(x, w, b, r, **padding)),
        },
    )


def chosen(convolution: str, fn: Callable[[], object]) -> Callable[[], object]:
    """fn with FASTSEG_CONV set, which says whose convolution runs."""

    def run() -> object:
        os.environ["FASTSEG_CONV"] = convolution
        try:
            return fn()
        finally:
            del os.environ["FASTSEG_CONV"]

    return run


def pyramid(batch: int, rates: tuple[int, ...]) -> Case:
    """The 1x1 and the dilated branches of DeepLab v3, 2048 to 256 each, at 65x65."""
    x = nhwc(batch, 2048, 65, 65)
    dilations = [1, *rates]
    weights = [nhwc(256, 2048, k, k) * 0.01 for k in (1, *(3 for _ in rates))]
    biases = [torch.randn(256, device="cuda").half() for _ in dilations]

    def eager() -> torch.Tensor:
        return conv_branches_reference(x, weights, biases, dilations)

    return (
        f"conv_branches rates {rates}, N={batch}",
        2.0 * (x.numel() + batch * 256 * len(dilations) * 65 * 65),
        {
            "eager": eager,
            "compiled": torch.compile(eager, mode="max-autotune-no-cudagraphs"),
            "fastseg": lambda: conv_branches(x, weights, biases, dilations),
        },
    )


def training(batch: int, channels: int) -> Case:
    """Forward and backward of a 3x3 layer at 65x65 with batch norm and ReLU."""
    x, w = nhwc(batch, channels, 65, 65), nhwc(channels, channels, 3, 3)
    leaves = [t.requires_grad_() for t in (x, w, *torch.randn(2, channels, device="cuda"))]
    stats = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    weights = torch.randn_like(x)

    def step(fn: Callable) -> Callable[[], object]:
        def run() -> object:
            z = fn(x, w, None, *leaves[2:], *stats, padding=2, dilation=2, training=True)
            return torch.autograd.grad(z, leaves, weights)

        return run

    compiled = torch.compile(conv_bn_act_reference)
    variants = {"eager": conv_bn_act_reference, "compiled": compiled, "fastseg": conv_bn_act}
    steps = {name: step(fn) for name, fn in variants.items()}
    steps["fastseg's convolution"] = chosen("own", steps["fastseg"])
    steps["fastseg around torch's"] = chosen("torch", steps["fastseg"])
    return (
        f"conv_bn_act training {channels}, N={batch}",
        10.0 * x.numel() * 2,
        steps,
    )


def crf(batch: int) -> Case:
    """21 labels on a 500x375 image, 10 updates, lattices built anew."""
    layer = fastseg.nn.DenseCRF(iters=10, gaussian=(3, 3.0), bilateral=(80, 13, 10.0)).cuda()
    ramp = torch.linspace(0, 255, 500, device="cuda").expand(batch, 3, 375, 500)
    image = (ramp + 8 * torch.randn(batch, 3, 375, 500, device="cuda")).clamp(0, 255)
    logits = torch.randn(batch, 21, 375, 500, device="cuda")
    return (f"dense CRF N={batch}", 0.0, {"fastseg": lambda: layer(logits, image)})


def cases() -> list[Case]:
    return [
        *pooling(8),
        inference(1, 512, 2),
        inference(8, 512, 4),
        inference(16, 512, 4),
        *(pyramid(n, rates) for n in (1, 8) for rates in ((12, 24, 36), (6, 12, 18))),
        training(8, 128),
        training(8, 512),
        crf(1),
        crf(8),
    ]


def replayed(fn: Callable[[], object]) -> Callable[[], object]:
    """fn as a replayed CUDA graph, or fn itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            fn()
    except RuntimeError:
        torch.cuda.synchronize()
        return fn
    return graph.replay


def medians(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds per call."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    ready = {name: replayed(fn) for name, fn in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, fn in ready.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            fn()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def ceilings() -> dict[str, float]:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = medians({"copy": lambda: target.copy_(source), "matmul": lambda: a @ a})
    return {
        "copy GB/s": 2 * source.numel() / us["copy"] / 1e3,
        "bf16 TFLOP/s": 2 * 8192**3 / us["matmul"] / 1e6,
    }


def main() -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    if "--once" in sys.argv:
        for _, _, variants in cases():
            variants["fastseg"]()
        return
    limits = ceilings()
    print(" | ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    rows = []
    for name, moved, variants in cases():
        us = medians(variants)
        peer = min((t for variant, t in us.items() if "fastseg" not in variant), default=None)
        ours = us["fastseg"]
        row = {"case": name, "us": us, "GB/s": moved / ours / 1e3 if moved else None}
        row["ratio"] = peer / ours if peer else None
        rows.append(row)
        shown = ", ".join(f"{variant} {t:.0f} us" for variant, t in us.items())
        print(f"{name}: {shown}" + (f"; {row['ratio']:.2f}x" if peer else ""))
    gpu = torch.cuda.get_device_name()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{datetime.date.today()}-{gpu.replace(' ', '-')}.json"
    facts = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda}
    facts |= {"cudnn": torch.backends.cudnn.version(), "commit": commit.stdout.strip()}
    path.write_text(json.dumps({**facts, "ceilings": limits, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
