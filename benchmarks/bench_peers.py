"""Layers, networks and the dense CRF against every peer that is installed: `fastseg bench`."""

import pytest

from fastseg.bench import list_works, measure


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("work", list_works(), ids=lambda work: work.name)
def bench_peers(benchmark, work, dtype):
    if work.group == "crf" and dtype != "float32":
        pytest.skip("the dense CRF computes in float32")
    benchmark.group = f"{work.name} {dtype}"
    # With --benchmark-disable one turn each, as a check that the outputs agree.
    turns = {"rounds": 1, "seconds": 0.0} if benchmark.disabled else {}
    results = []
    benchmark.pedantic(lambda: results.append(measure(work, dtype=dtype, **turns)), rounds=1)
    for entry in results[0].entries:
        benchmark.extra_info[entry.peer] = entry.reason or {
            "ms": round(entry.median * 1e3, 3),
            "error": entry.error,
        }
    assert results[0].entry("fastseg"), benchmark.extra_info["fastseg"]
    benchmark.extra_info["ratio to the best peer"] = results[0].ratio()
