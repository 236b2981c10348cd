"""The CUDA benchmark table: the cases of gpu_cases.py, and the ceilings they are held against.

    python -m benchmarks.gpu_table [--seconds S | --plan | --once [PATTERN]]

Variants alternate; between runs a buffer larger than the L2 cache is overwritten. Times are medians
of CUDA events around one call; where a call can be captured, of a replayed graph. Writes
benchmarks/results/<date>-<gpu>.json and the table in benchmarks/README.md. ``--seconds``: no case
begins later. ``--plan`` prints what would be measured and needs no GPU. ``--once`` runs each
fastseg variant once, for profilers.
"""

import datetime
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .gpu_cases import Call, Case, cases

ROUNDS = 30
HERE = Path(__file__).parent
BEGIN, END = "<!-- written by gpu_table.py -->", "<!-- end of what gpu_table.py writes -->"


def replayed(fn: Call) -> Call:
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


def medians(variants: dict[str, Call]) -> dict[str, float]:
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
    source = torch.rand(1 << 28, device="cuda")
    target = torch.empty_like(source)
    # By a kernel: the copies of a graph are slower.
    us = medians({"copy": lambda: torch.abs(source, out=target), "matmul": lambda: a @ a})
    return {
        "copy GB/s": 2 * source.nbytes / us["copy"] / 1e3,
        "bf16 TFLOP/s": 2 * 8192**3 / us["matmul"] / 1e6,
    }


def row_of(case: Case, us: dict[str, float], limits: dict[str, float]) -> dict[str, Any]:
    """What the table says of one case, from its times and the ceilings."""
    floor = max(
        case.flops / limits["bf16 TFLOP/s"] / 1e6,
        case.bytes / limits["copy GB/s"] / 1e3,
    )
    peers = {name: t for name, t in us.items() if not name.startswith("fastseg")}
    best = min(peers, key=peers.__getitem__, default=None)
    return {
        "case": case.name,
        "us": us,
        "floor us": floor or None,
        "best peer": best,
        "ratio": us[best] / us["fastseg"] if best else None,
        "goal": case.goal,
    }


def facts() -> dict[str, Any]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "date": str(datetime.date.today()),
        "gpu": torch.cuda.get_device_name(),
        "commit": output("git", "rev-parse", "HEAD"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver.splitlines()[0] if driver else "",
    }


def markdown(results: dict[str, Any]) -> str:
    """The results as the section of benchmarks/README.md."""
    limits = ", ".join(f"{value:.0f} {name}" for name, value in results["ceilings"].items())
    lines = [
        f"`benchmarks/gpu_check.sh`, {results['gpu']}, {results['date']}, commit "
        f"{results['commit'][:10]}, torch {results['torch']}, cuDNN {results['cudnn']}, driver "
        f"{results['driver']}. Medians in us of calls that find nothing in the L2 cache. Ceilings "
        f"measured in the same run: {limits}.",
        "",
        "| case | floor | fastseg | best peer | ratio | goal |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "error" in row:
            lines.append(f"| {row['case']} | | failed: {row['error']} | | | |")
            continue
        floor = f"{row['floor us']:.1f}" if row["floor us"] else ""
        ours = " / ".join(f"{t:.1f}" for name, t in row["us"].items() if name.startswith("fastseg"))
        best = row["best peer"]
        peer = f"{row['us'][best]:.1f} ({best})" if best else "none"
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        lines.append(
            f"| {row['case']} | {floor} | {ours} | {peer} | {ratio} | {row['goal'] or ''} |"
        )
    return "\n".join(lines)


def insert(readme: str, section: str) -> str:
    """The README with `section` between its marks."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    if not re.search(pattern, readme, re.DOTALL):
        raise ValueError(f"benchmarks/README.md lacks its marks {BEGIN} and {END}")
    return re.sub(pattern, lambda _: f"{BEGIN}\n{section}\n{END}", readme, flags=re.DOTALL)


def write(results: dict[str, Any], folder: Path = HERE) -> Path:
    """Writes the JSON file of `results` and the table in the folder's README; returns the first."""
    name = f"{results['date']}-{re.sub('[^A-Za-z0-9]+', '-', results['gpu']).strip('-')}.json"
    path = folder / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    readme = folder / "README.md"
    readme.write_text(insert(readme.read_text(), markdown(results)))
    return path


def measure(
    seconds: float, save: Callable[[dict[str, Any]], object], report: Callable[[str], None] = print
) -> dict[str, Any]:
    """The results; what there is of them goes to `save` after every case, for a run that is cut."""
    end = time.monotonic() + seconds
    limits = ceilings()
    report(", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    rows: list[dict[str, Any]] = []
    results = {**facts(), "ceilings": limits, "rows": rows}
    for case in cases():
        try:
            if time.monotonic() > end:
                raise TimeoutError("not measured, out of time")
            row = row_of(case, medians(case.build()), limits)
        except Exception as error:  # a failing case must not cost the others
            row = {"case": case.name, "error": str(error).splitlines()[0][:200]}
        rows.append(row)
        shown = ", ".join(f"{name} {t:.0f} us" for name, t in row.get("us", {}).items())
        report(f"{case.name}: {shown or row['error']}")
        save(results)
        torch.cuda.empty_cache()
    return results


def main(arguments: list[str]) -> int:
    if "--plan" in arguments:
        for case in cases():
            print(f"{case.name}: {', '.join(case.variants)}")
        return 0
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    if "--once" in arguments:
        wanted = arguments[arguments.index("--once") + 1 :]
        for case in cases():
            if not wanted or re.search(wanted[0], case.name):
                case.build()["fastseg"]()
        torch.cuda.synchronize()
        return 0
    limit = "1e9"
    if "--seconds" in arguments:
        limit = arguments[arguments.index("--seconds") + 1]
    results = measure(float(limit), write)
    print(f"wrote {write(results)}")
    return 1 if any("error" in row for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
