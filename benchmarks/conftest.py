"""`time_op`, shared by all benchmarks: times one variant and records its throughput."""

import platform
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
        median = benchmark.stats.stats.median
        if bytes_moved:
            benchmark.extra_info["GB/s"] = round(bytes_moved / median / 1e9, 1)
        if flops:
            benchmark.extra_info["GFLOP/s"] = round(flops / median / 1e9, 1)

    return run


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_isa"] = fastseg._C.cpu_isa()
    machine_info["processor"] = platform.processor()
    if torch.cuda.is_available():
        machine_info["cuda"] = torch.cuda.get_device_name()
