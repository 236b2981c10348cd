"""Runs the peers of a work in turn and compares what they return."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .peers import peers_of
from .works import Work


@dataclass
class Entry:
    """One peer on one work. Either ``reason`` says why there is no figure, or the rest is set."""

    peer: str
    reason: str = ""
    median: float = 0.0  # seconds
    minimum: float = 0.0
    runs: int = 0
    error: float = 0.0  # largest difference from the exact result, over its largest value
    rms: float = 0.0  # root of the mean squared difference, over that of the exact result
    rss: int = 0  # peak resident bytes of the process, everything included


@dataclass
class Measurement:
    work: str
    group: str
    dtype: str
    threads: int
    flops: int
    bytes: int
    entries: list[Entry] = field(default_factory=list)

    def entry(self, peer: str) -> Entry | None:
        """The figure of that peer, if it has one."""
        return next((e for e in self.entries if e.peer == peer and not e.reason), None)

    def best_peer(self) -> Entry | None:
        """The fastest of all but fastseg."""
        timed = [e for e in self.entries if e.peer != "fastseg" and not e.reason]
        return min(timed, key=lambda e: e.median, default=None)

    def ratio(self) -> float | None:
        """How many times as fast as the best peer fastseg is."""
        ours, best = self.entry("fastseg"), self.best_peer()
        return best.median / ours.median if ours and best else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio()}


class _Peer:
    """A worker process and the calls it has timed."""

    def __init__(self, work: Work, peer: str, dtype: str, threads: int, folder: Path) -> None:
        self.entry = Entry(peer)
        self.output = folder / f"{peer}.npy"
        self.times: list[float] = []
        command = [sys.executable, "-m", "fastseg.bench.worker", work.name, peer, dtype]
        self.process = subprocess.Popen(
            [*command, str(threads), str(self.output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": "its process ended without an answer"}

    def prepare(self) -> bool:
        answer = self.answer()
        self.entry.reason = answer.get("absent") or answer.get("failed") or ""
        return "ready" in answer

    def run(self) -> bool:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.answer()
        if "seconds" not in answer:
            self.entry.reason = str(answer["failed"])
            return False
        self.times += answer["seconds"]
        return True

    def finish(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.times and not self.entry.reason:
            self.entry.median = statistics.median(self.times)
            self.entry.minimum = min(self.times)
            self.entry.runs = len(self.times)
            self.entry.rss = self.answer().get("rss", 0)
        self.process.wait()


def measure(
    work: Work,
    peers: Sequence[str] | None = None,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    seconds: float = 10.0,
    rounds: int = 15,
    report: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Time a work with every peer, interleaved, each peer in its own process.

    Args:
        work: from ``list_works``.
        peers: names from ``peers_of(work.group)``; None means all. Absent ones are left out.
        dtype: "float32" or "bfloat16".
        threads: of each peer; None means torch's default.
        seconds: no further round of turns starts after this time, but at least three are made.
        rounds: at most so many turns of each peer, each of three calls or more.
        report: called with the name of what is being prepared.

    Raises:
        ValueError: an unknown peer or dtype, an output of fastseg's in float32 that is further
            from float64 than the work's tolerance, or a network that is less accurate than those
            of the peers (:func:`check_accuracy`).
    """
    known = peers_of(work.group)
    unknown = sorted(set(peers or ()) - set(known))
    if unknown:
        raise ValueError(f"bench: peers must be among {', '.join(known)}, got {unknown}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"bench: dtype must be float32 or bfloat16, got {dtype!r}")
    threads = threads or torch.get_num_threads()
    result = Measurement(work.name, work.group, dtype, threads, work.flops(), work.bytes())
    # The CRF's exact result would need N^2 memory: there pydensecrf is what to agree with.
    reference = "pydensecrf" if work.group == "crf" else "exact"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if reference == "exact":
            report("exact")
            other = _Peer(work, "exact", dtype, threads, folder)
            if not other.prepare():
                raise RuntimeError(f"bench: float64 {work.name} failed: {other.entry.reason}")
            other.finish()
        ready = []
        for peer in [p for p in known if peers is None or p in peers]:
            report(peer)
            worker = _Peer(work, peer, dtype, threads, folder)
            result.entries.append(worker.entry)
            if worker.prepare():
                ready.append(worker)
            else:
                worker.finish()
        stop = time.monotonic() + seconds
        for i in range(rounds):
            if i >= 3 and time.monotonic() > stop:
                break
            ready = [worker for worker in ready if worker.run()]
        for worker in ready:
            worker.finish()
        if (folder / f"{reference}.npy").exists():
            expected = np.load(folder / f"{reference}.npy")
            for worker in ready:
                difference = np.load(worker.output) - expected
                worker.entry.error = float(np.abs(difference).max() / np.abs(expected).max())
                worker.entry.rms = float(np.sqrt((difference**2).sum() / (expected**2).sum()))
    ours = result.entry("fastseg")
    if dtype == "float32" and ours and ours.error > work.tolerance:
        raise ValueError(
            f"bench: fastseg's {work.name} must be within {work.tolerance:.0e} of {reference}, "
            f"got {ours.error:.1e}"
        )
    check_accuracy(result)
    return result


def check_accuracy(result: Measurement, slack: float = 1.25) -> None:
    """Raise ValueError where a network of fastseg's is further from float64 than ``slack`` times
    the worst of two or more peers, root mean square: one flipped maximum is no loss of accuracy."""
    ours = result.entry("fastseg")
    others = [e.rms for e in result.entries if e.peer != "fastseg" and not e.reason]
    if result.group != "models" or ours is None or len(others) < 2:
        return
    if ours.rms > slack * max(others):
        raise ValueError(
            f"bench: the error of fastseg's {result.work} in {result.dtype} must be at most "
            f"{slack} times the peers' {max(others):.1e}, got {ours.rms:.1e}"
        )
