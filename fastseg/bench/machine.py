"""The machine that was measured: what it is and what it can do at most."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.ops.conv_engine import conv_engine, pack_conv


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _best_seconds(call: Callable[[], object], runs: int = 25) -> float:
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def ceilings(threads: int) -> dict[str, float]:
    """FLOP/s of the fastest float32 matrix product found here, torch's or the engine's, with
    operands in cache, and bytes per second of a copy of 128 MiB, reads and writes counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            a, b = torch.randn(1536, 1024), torch.randn(1024, 1024)
            x = a.view(1, 48, 32, 1024).permute(0, 3, 1, 2)
            packed = pack_conv(b.view(1024, 1024, 1, 1))
            product = min(
                _best_seconds(lambda: torch.mm(a, b)), _best_seconds(lambda: conv_engine(x, packed))
            )
            source = torch.ones(2**25)
            target = torch.empty_like(source)
            copy = _best_seconds(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    return {"flops": 2 * a.shape[0] * 1024 * 1024 / product, "bandwidth": 2 * 2**27 / copy}


def describe(threads: int) -> dict[str, Any]:
    """What a table of results has to say about its machine."""
    return {
        "processor": processor(),
        "isa": fastseg._C.cpu_isa(),
        "threads": threads,
        "torch": torch.__version__,
        "fastseg": fastseg.__version__,
        **ceilings(threads),
    }
