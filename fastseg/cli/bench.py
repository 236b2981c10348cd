"""``fastseg bench``: this library and what else is installed, on this machine."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastseg import bench as benchmarks
from fastseg.bench.machine import describe
from fastseg.image import atomic_write


def bench(
    group: Annotated[str, typer.Argument(help="ops, models, crf or all.")] = "models",
    pattern: Annotated[str, typer.Option("--only", help="Names, such as 'conv3x3-*'.")] = "*",
    peers: Annotated[
        str | None, typer.Option(help="Comma-separated; default: all that are installed.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or both with a comma.")
    ] = "float32",
    threads: Annotated[int | None, typer.Option(help="Default: as torch chooses.", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="Of timed calls for each work.")] = 10.0,
    html: Annotated[Path | None, typer.Option(help="Write one page with pictures.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every figure.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Only list the works.")] = False,
) -> None:
    """Time networks, layers or the dense CRF against every peer that is installed.

    Peers: torch (eager, channels-last, compiled with frozen weights), onnxruntime, openvino,
    ncnn, and pydensecrf for the CRF. Each runs in a process of its own, calls take turns, and
    outputs are compared with float64.
    """
    if group not in ("ops", "models", "crf", "all"):
        raise ValueError(f"bench: the group must be ops, models, crf or all, got {group!r}")
    works = benchmarks.list_works(group, pattern)
    if not works:
        raise ValueError(f"bench: --only must match a work of {group!r}, got {pattern!r}")
    if show:
        for work in works:
            print(f"{work.name:30} {work.group:7} {'x'.join(map(str, work.shape))}")
        return
    if seconds <= 0:
        raise ValueError(f"bench: --seconds must be positive, got {seconds:g}")
    precisions = [p.strip() for p in dtype.split(",")]
    if unknown := set(precisions) - {"float32", "bfloat16"}:
        raise ValueError(f"bench: --dtype must be float32 or bfloat16, got {unknown.pop()!r}")
    chosen = None if peers is None else [p.strip() for p in peers.split(",")]
    threads = threads or torch.get_num_threads()
    machine = describe(threads)
    results = []

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text:60}", end="", file=sys.stderr)

    for work in works:
        for precision in precisions if work.group != "crf" else ["float32"]:
            result = benchmarks.measure(
                work,
                chosen,
                dtype=precision,
                threads=threads,
                seconds=seconds,
                report=lambda peer, name=work.name: progress(f"{name}: {peer}"),  # type: ignore[misc]
            )
            results.append(result)
            progress("")
            _write(html, json, results, machine)  # an interrupted run keeps what it has
    progress("\r")
    print(benchmarks.markdown(results, machine))


def _write(
    html: Path | None,
    json: Path | None,
    results: list[benchmarks.Measurement],
    machine: dict[str, Any],
) -> None:
    if html is not None:
        with atomic_write(html) as path:
            path.write_text(benchmarks.html(results, machine), encoding="utf-8")
    if json is not None:
        figures = {"machine": machine, "results": [r.to_dict() for r in results]}
        with atomic_write(json) as path:
            path.write_text(json_module.dumps(figures, indent=1) + "\n")
