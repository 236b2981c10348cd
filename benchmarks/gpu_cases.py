"""What the CUDA benchmark table measures: each op of fastseg against the strongest PyTorch calls.

A case names its peers and floors without a GPU; ``build`` makes its inputs and returns one callable
per variant. Peers get channels-last inputs, ``cudnn.benchmark`` and the same dtype.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from fastseg.bench.works import unfused
from fastseg.ops import (
    conv_act,
    conv_bn_act,
    conv_bn_act_reference,
    conv_branches,
    max_pool2d,
    max_unpool2d,
)

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of the table. ``goal``: how many times as fast as the best peer it should be."""

    name: str
    goal: float | None
    flops: float
    bytes: float
    variants: tuple[str, ...]
    build: Callable[[], dict[str, Call]]


def nhwc(*shape: int) -> Tensor:
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    return x.contiguous(memory_format=torch.channels_last)


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without its own graphs: every variant is captured by the table. Not max-autotune, which takes
    minutes for a network and leaves dilated convolutions to cuDNN as well."""
    return torch.compile(fn)


def chosen(convolution: str, fn: Call) -> Call:
    """fn with FASTSEG_CONV set, which says whose convolution runs."""

    def run() -> object:
        os.environ["FASTSEG_CONV"] = convolution
        try:
            return fn()
        finally:
            del os.environ["FASTSEG_CONV"]

    return run


def choices(fn: Call) -> dict[str, Call]:
    """fastseg, and what it chooses from."""
    return {
        "fastseg": fn,
        "fastseg, mma.sync": chosen("mma", fn),
        "fastseg, wgmma": chosen("wgmma", fn),
        "fastseg, torch's convolution": chosen("torch", fn),
    }


CHOICES = ("fastseg", "fastseg, mma.sync", "fastseg, wgmma", "fastseg, torch's convolution")


def pooling(batch: int) -> list[Case]:
    """SegNet's first pooling, 64 x 360 x 480."""
    full, small = batch * 64 * 360 * 480, batch * 64 * 180 * 240

    def build(kind: str) -> dict[str, Call]:
        x = nhwc(batch, 64, 360, 480)
        y, flat = F.max_pool2d(x, 2, return_indices=True)
        calls: dict[str, Call] = {}
        if kind == "pool":
            calls["torch"] = lambda: F.max_pool2d(x, 2, return_indices=True)
        else:
            calls["torch"] = lambda: F.max_unpool2d(y, flat, 2)
        for name, packed in (("fastseg", False), ("fastseg 2-bit", True)):
            _, indices = max_pool2d(x, 2, packed=packed)
            if kind == "pool":
                calls[name] = lambda packed=packed: max_pool2d(x, 2, packed=packed)
            else:
                calls[name] = lambda indices=indices: max_unpool2d(y, indices, 2)
        return calls

    variants = ("torch", "fastseg", "fastseg 2-bit")
    moved = 2.0 * (full + small) + small
    return [
        Case(f"max_pool2d 64x360x480, N={batch}", 1.5, 0, moved, variants, lambda: build("pool")),
        Case(f"max_unpool2d to 64x360x480, N={batch}", 2.3, 0, moved, variants, lambda: build("")),
    ]


def inference(batch: int, channels: int, dilation: int, goal: float) -> Case:
    """A 3x3 layer at 65x65 with folded batch norm, residual and ReLU."""
    padding = {"padding": dilation, "dilation": dilation}
    values = batch * channels * 65 * 65

    def build() -> dict[str, Call]:
        x, r = nhwc(batch, channels, 65, 65), nhwc(batch, channels, 65, 65)
        w, b = nhwc(channels, channels, 3, 3), torch.randn(channels, device="cuda").half()

        def eager() -> Tensor:
            return F.relu(F.conv2d(x, w, b, **padding) + r)

        def cudnn() -> Tensor:
            pair = [dilation] * 2
            return torch.cudnn_convolution_add_relu(x, w, r, 1.0, b, [1, 1], pair, pair, 1)

        return {
            "eager": eager,
            "cudnn fused": cudnn,
            "compiled": compiled(eager),
            **choices(lambda: conv_act(x, w, b, r, **padding)),
        }

    return Case(
        f"conv 3x3 {channels} + residual + ReLU, d={dilation}, 65x65, N={batch}",
        goal,
        2.0 * 9 * channels * values,
        2.0 * 3 * values,
        ("eager", "cudnn fused", "compiled", *CHOICES),
        build,
    )


def pyramid(batch: int, rates: tuple[int, ...], goal: float) -> Case:
    """The dilated branches of an ASPP on 2048 x 65 x 65, with folded batch norms and ReLU."""
    pixels = batch * 65 * 65

    def build() -> dict[str, Call]:
        x = nhwc(batch, 2048, 65, 65)
        weights = [nhwc(256, 2048, 3, 3) for _ in rates]
        biases = [torch.randn(256, device="cuda").half() for _ in rates]
        branches = list(zip(weights, biases, rates, strict=True))

        def eager() -> Tensor:
            parts = [F.relu(F.conv2d(x, w, b, padding=d, dilation=d)) for w, b, d in branches]
            return torch.cat(parts, 1)

        def cudnn() -> Tensor:
            parts = [
                torch.cudnn_convolution_relu(x, w, b, [1, 1], [d, d], [d, d], 1)
                for w, b, d in branches
            ]
            return torch.cat(parts, 1)

        return {
            "eager": eager,
            "cudnn fused": cudnn,
            "compiled": compiled(eager),
            "fastseg": lambda: conv_branches(x, weights, biases, rates),
        }

    return Case(
        f"ASPP branches 2048 -> 256, rates {', '.join(map(str, rates))}, 65x65, N={batch}",
        goal,
        2.0 * 9 * 2048 * 256 * len(rates) * pixels,
        2.0 * pixels * (2048 + 256 * len(rates)),
        ("eager", "cudnn fused", "compiled", "fastseg"),
        build,
    )


def training(batch: int, channels: int, goal: float) -> Case:
    """Forward and backward of a 3x3 layer at 65x65 with batch norm and ReLU."""
    values = batch * channels * 65 * 65

    def build() -> dict[str, Call]:
        x, w = nhwc(batch, channels, 65, 65), nhwc(channels, channels, 3, 3)
        leaves = [t.requires_grad_() for t in (x, w, *torch.randn(2, channels, device="cuda"))]
        stats = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
        weights = torch.randn_like(x)

        def step(fn: Callable) -> Call:
            def run() -> object:
                z = fn(x, w, None, *leaves[2:], *stats, padding=2, dilation=2, training=True)
                return torch.autograd.grad(z, leaves, weights)

            return run

        plain = conv_bn_act_reference
        return {
            "eager": step(plain),
            "compiled": step(torch.compile(plain)),
            **choices(step(conv_bn_act)),
        }

    return Case(
        f"conv 3x3 {channels} + batch norm + ReLU, training step, d=2, 65x65, N={batch}",
        goal,
        3 * 2.0 * 9 * channels * values,
        2.0 * 10 * values,
        ("eager", "compiled", *CHOICES),
        build,
    )


def global_conv(batch: int, kernel: int, goal: float) -> Case:
    """GCN's large separable convolution, 2048 -> 21 at 65x65."""
    pixels = batch * 65 * 65

    def build() -> dict[str, Call]:
        layer = fastseg.nn.GlobalConv2d(2048, 21, kernel).cuda().half().eval()
        layer = layer.to(memory_format=torch.channels_last).requires_grad_(False)
        x = nhwc(batch, 2048, 65, 65)

        def four() -> Tensor:
            left, right = (
                F.conv2d(
                    F.conv2d(x, a.weight, a.bias, padding=a.padding),
                    b.weight,
                    b.bias,
                    padding=b.padding,
                )
                for a, b in ((layer.l1, layer.l2), (layer.r1, layer.r2))
            )
            return left + right

        return {"eager": four, "compiled": compiled(four), "fastseg": lambda: layer(x)}

    return Case(
        f"global convolution k={kernel}, 2048 -> 21, 65x65, N={batch}",
        goal,
        2.0 * 2 * kernel * pixels * (2048 * 21 + 21 * 21),
        2.0 * pixels * (2048 + 21),
        ("eager", "compiled", "fastseg"),
        build,
    )


def crf(batch: int, labels: int) -> Case:
    """Labels on a 500x375 image, 10 updates, lattices built anew."""
    monai = labels <= 16 and importlib.util.find_spec("monai") is not None

    def build() -> dict[str, Call]:
        layer = fastseg.nn.DenseCRF(iters=10, gaussian=(3, 3.0), bilateral=(80, 13, 10.0)).cuda()
        ramp = torch.linspace(0, 255, 500, device="cuda").expand(batch, 3, 375, 500)
        image = (ramp + 8 * torch.randn(batch, 3, 375, 500, device="cuda")).clamp(0, 255)
        logits = torch.randn(batch, labels, 375, 500, device="cuda")
        calls: dict[str, Call] = {"fastseg": lambda: layer(logits, image)}
        if monai:
            from monai.networks.blocks import CRF

            peer = CRF(10, 10.0, 3.0, 80.0, 13.0, 3.0, 1.0)
            calls["MONAI"] = lambda: peer(logits, image)
        return calls

    values = batch * labels * 375 * 500
    return Case(
        f"dense CRF {labels} labels, 500x375, 10 updates, N={batch}",
        None,
        0,
        10.0 * 4 * values * 4,  # energies, beliefs read and written, gathered
        ("MONAI", "fastseg") if monai else ("fastseg",),
        build,
    )


def network(batch: int, goal: float) -> Case:
    """Whole DeepLab v3 ResNet-50 at 513x513."""

    def build() -> dict[str, Call]:
        model = fastseg.models.deeplabv3_resnet50().eval().cuda().half()
        model = model.to(memory_format=torch.channels_last).requires_grad_(False)
        x = nhwc(batch, 3, 513, 513)
        plain = unfused(copy.deepcopy(model))  # in place
        fast = compiled(plain)
        return {
            "eager": lambda: plain(x),
            "compiled": lambda: fast(x),
            "fastseg": lambda: model(x),
        }

    return Case(
        f"DeepLab v3 ResNet-50, 513x513, N={batch}",
        goal,
        0,
        0,
        ("eager", "compiled", "fastseg"),
        build,
    )


def cases() -> list[Case]:
    return [
        *pooling(8),
        inference(1, 512, 2, 1.3),
        inference(1, 512, 4, 1.3),
        inference(8, 512, 4, 0.9),
        inference(16, 512, 4, 0.9),
        pyramid(1, (6, 12, 18), 1.4),
        pyramid(8, (6, 12, 18), 1.2),
        pyramid(1, (12, 24, 36), 1.4),
        training(8, 128, 1.3),
        training(8, 512, 1.1),
        global_conv(1, 15, 3.0),
        global_conv(8, 15, 3.0),
        global_conv(8, 7, 2.0),
        crf(1, 21),
        crf(8, 21),
        crf(1, 8),
        network(1, 1.3),
        network(8, 1.05),
    ]
