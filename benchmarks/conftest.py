"""`time_op` times one variant and records its throughput, `compare` several in turn."""

import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch

import fastseg


@pytest.fixture
def time_op(benchmark):
    """time_op(fn, device, bytes_moved=, flops=) warms up and times fn, synchronise included."""

    def run(
        fn: Callable[[], object], device: str = "cpu", *, bytes_moved: int = 0, flops: int = 0
    ) -> None:
        def call() -> None:
            fn()
            if device != "cpu":
                torch.cuda.synchronize()

        with torch.inference_mode():
            benchmark.pedantic(call, warmup_rounds=2, rounds=15, iterations=1)
        if benchmark.disabled:  # --benchmark-disable runs each case once, as a check
            return
        median = benchmark.stats.stats.median
        if bytes_moved:
            benchmark.extra_info["GB/s"] = round(bytes_moved / median / 1e9, 1)
        if flops:
            benchmark.extra_info["GFLOP/s"] = round(flops / median / 1e9, 1)

    return run


@pytest.fixture
def compare(benchmark):
    """compare(variants, flops=) times functions in turn, so that a busy moment of the machine hits
    all of them: medians and ratios to the first variant go to ``extra_info``. The outputs must
    agree within ``tolerance`` of the largest value; where there is an ``exact`` one, the first
    variant's must agree with that."""

    def run(
        variants: dict[str, Callable[[], torch.Tensor]],
        *,
        flops: int = 0,
        tolerance: float = 1e-4,
        exact: torch.Tensor | None = None,
        rounds: int = 15,
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in variants}
        with torch.inference_mode():
            outputs = [fn() for fn in variants.values()]
            expected = outputs[0] if exact is None else exact
            for y in outputs[1:] if exact is None else outputs[:1]:
                error = (y - expected).abs().max() / expected.abs().max()
                assert error <= tolerance, f"outputs differ by {error:.1e}"
            del outputs
            if benchmark.disabled:
                return
            for _ in range(rounds + 1):
                for name, fn in variants.items():
                    start = time.perf_counter()
                    fn()
                    times[name].append(time.perf_counter() - start)
            benchmark.pedantic(next(iter(variants.values())), rounds=rounds)
        medians = {name: statistics.median(t[1:]) for name, t in times.items()}
        ours = next(iter(medians.values()))
        for name, median in medians.items():
            benchmark.extra_info[f"{name}, ms"] = round(median * 1e3, 3)
            benchmark.extra_info[f"{name}, ratio"] = round(median / ours, 2)
        if flops:
            benchmark.extra_info["GFLOP/s"] = round(flops / ours / 1e9, 1)

    return run


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_isa"] = fastseg._C.cpu_isa()
    machine_info["processor"] = platform.processor()
    if torch.cuda.is_available():
        machine_info["cuda"] = torch.cuda.get_device_name()
