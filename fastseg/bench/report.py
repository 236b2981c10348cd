"""Results as a Markdown table and as one HTML page with its pictures inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from .measure import Entry, Measurement

_COLOURS = {
    "fastseg": "#0b7a75",
    "torch": "#b8b8b8",
    "torch channels-last": "#909090",
    "torch.compile": "#5c5c5c",
    "onnxruntime": "#7b5ea7",
    "openvino": "#3f6fb5",
    "ncnn": "#c98a2b",
    "pydensecrf": "#b0413e",
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
tr.work td { font-weight: 600; border-top: 2px solid #bbb }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #222 }
.muted { color: #666 }
"""


def floor_seconds(m: Measurement, machine: dict[str, Any]) -> float:
    """No direct computation can be faster: its flops and its bytes at the machine's ceilings."""
    return max(m.flops / machine["flops"], m.bytes / machine["bandwidth"])


def markdown(results: Sequence[Measurement], machine: dict[str, Any]) -> str:
    """One row per work: ours, the best peer, their ratio, and the floor of a direct computation."""
    lines = [
        _sentence(machine),
        "",
        "| work | dtype | floor, ms | fastseg, ms | error | best peer, ms | its error | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in results:
        ours, best, ratio = m.entry("fastseg"), m.best_peer(), m.ratio()
        lines.append(
            f"| {m.work} | {m.dtype} | {_ms(floor_seconds(m, machine))} | "
            + (f"{_ms(ours.median)} | {ours.error:.0e} | " if ours else "- | - | ")
            + (f"{best.peer} {_ms(best.median)} | {best.error:.0e} | " if best else "- | - | ")
            + (f"{ratio:.2f} |" if ratio else "- |")
        )
    return "\n".join(lines)


def html(results: Sequence[Measurement], machine: dict[str, Any]) -> str:
    """A page that needs nothing else: ratios as bars, the roofline, and every figure."""
    drawn = [m for m in results if m.ratio()]
    roofline = [m for m in results if m.flops and m.entry("fastseg")]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>fastseg benchmarks</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>fastseg benchmarks</h1><p>{escape(_sentence(machine))}</p>",
    ]
    if drawn:
        parts += [
            "<h2>Against the fastest peer of the same precision</h2>",
            "<p class=muted>Ratio of the medians; right of the line fastseg is faster.</p>",
            _ratio_bars(drawn),
        ]
    if roofline:
        parts += [
            "<h2>Roofline</h2>",
            "<p class=muted>GFLOP/s of the convolutions as the papers write them, over flops per "
            "byte of input, weights and output. The roof is what the machine does in a matrix "
            "product and in a copy. Fast algorithms need fewer multiplications, and so may lie "
            "above it.</p>",
            _roofline(roofline, machine),
        ]
    parts += ["<h2>All figures</h2>", _table(results, machine), "</html>"]
    return "\n".join(parts)


def _sentence(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, fastseg {machine['fastseg']}. Ceilings measured here: "
        f"{machine['flops'] / 1e9:.0f} GFLOP/s in a float32 matrix product, "
        f"{machine['bandwidth'] / 1e9:.0f} GB/s in a copy. Every peer in its own process, calls in "
        "turn, medians."
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _label(m: Measurement) -> str:
    return m.work if m.dtype == "float32" else f"{m.work} {m.dtype}"


def _ratio_bars(results: Sequence[Measurement]) -> str:
    left, width, row = 230, 560, 22
    longest = max(2.0, *(m.ratio() or 0 for m in results))
    scale = width / longest
    height = row * len(results) + 24
    parts = [f"<svg viewBox='0 0 {left + width + 150} {height}' role=img>"]
    for i, m in enumerate(results):
        ratio, best, y = m.ratio() or 0.0, m.best_peer(), i * row + 4
        colour = _COLOURS["fastseg"] if ratio >= 1 else "#b0413e"
        parts.append(
            f"<text x='{left - 8}' y='{y + 12}' text-anchor=end>{escape(_label(m))}</text>"
            f"<rect x='{left}' y='{y}' width='{ratio * scale:.1f}' height='{row - 7}' "
            f"fill='{colour}'/><text x='{left + ratio * scale + 6:.1f}' y='{y + 12}'>"
            f"{ratio:.2f} x {escape(best.peer if best else '')}</text>"
        )
    x = left + scale
    parts.append(
        f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height - 18}' stroke='#222'/>"
        f"<text x='{x:.1f}' y='{height - 5}' text-anchor=middle>1</text></svg>"
    )
    return "".join(parts)


def _roofline(results: Sequence[Measurement], machine: dict[str, Any]) -> str:
    width, height, margin = 860, 380, 50
    points = [
        (m.flops / m.bytes, m.flops / entry.median, entry.peer, _label(m))
        for m in results
        for entry in (m.entry("fastseg"), m.best_peer())
        if entry
    ]
    ridge = machine["flops"] / machine["bandwidth"]
    xs = [math.log10(p[0]) for p in points] + [math.log10(ridge)]
    ys = [math.log10(p[1]) for p in points] + [math.log10(machine["flops"])]
    x0, x1 = min(xs) - 0.2, max(xs) + 0.2
    y0, y1 = min(ys) - 0.2, max(ys) + 0.2

    def at(intensity: float, rate: float) -> tuple[float, float]:
        x = margin + (math.log10(intensity) - x0) / (x1 - x0) * (width - 2 * margin)
        y = height - margin - (math.log10(rate) - y0) / (y1 - y0) * (height - 2 * margin)
        return x, y

    start = max(10**x0, 10**y0 / machine["bandwidth"])
    roof = [at(start, start * machine["bandwidth"]), at(ridge, machine["flops"])]
    roof.append(at(10**x1, machine["flops"]))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in roof)
    parts = [
        f"<svg viewBox='0 0 {width} {height}' role=img>",
        f"<polyline points='{path}' fill=none stroke='#222' stroke-width=1.5 />",
        f"<text x='{width / 2}' y='{height - 8}' text-anchor=middle>flops per byte</text>",
        f"<text x='14' y='{height / 2}' text-anchor=middle transform='rotate(-90 14 {height / 2})'>"
        "GFLOP/s</text>",
    ]
    for tick in _ticks(x0, x1):
        x, _ = at(tick, 10**y0)
        parts.append(f"<text x='{x:.1f}' y='{height - 28}' text-anchor=middle>{tick:g}</text>")
    for tick in _ticks(y0, y1):
        _, y = at(10**x0, tick)
        parts.append(f"<text x='46' y='{y + 4:.1f}' text-anchor=end>{tick / 1e9:g}</text>")
    for intensity, rate, peer, label in points:
        x, y = at(intensity, rate)
        colour = _COLOURS.get(peer, "#888")
        parts.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{colour}'>"
            f"<title>{escape(label)}, {escape(peer)}: {rate / 1e9:.0f} GFLOP/s</title></circle>"
        )
    for i, peer in enumerate(dict.fromkeys(p[2] for p in points)):
        y = 14 + 16 * i
        parts.append(
            f"<circle cx='{margin + 12}' cy='{y}' r='4.5' fill='{_COLOURS.get(peer, '#888')}'/>"
            f"<text x='{margin + 22}' y='{y + 4}'>{escape(peer)}</text>"
        )
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between 10^low and 10^high."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    ticks = [step * 10.0**exponent for exponent in exponents for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _table(results: Sequence[Measurement], machine: dict[str, Any]) -> str:
    rows = [
        "<table><tr><th>work, peer<th>median, ms<th>smallest<th>calls<th>slower by<th>GFLOP/s"
        "<th>error<th>peak MiB"
    ]
    for m in results:
        floor = _ms(floor_seconds(m, machine))
        rows.append(
            f"<tr class=work><td colspan=8>{escape(_label(m))} "
            f"<span class=muted>floor of a direct computation {floor} ms</span>"
        )
        ours = m.entry("fastseg")
        rows += [_row(m, entry, ours) for entry in m.entries]
    return "\n".join([*rows, "</table>"])


def _row(m: Measurement, entry: Entry, ours: Entry | None) -> str:
    if entry.reason:
        return f"<tr><td>{escape(entry.peer)}<td colspan=7 class=muted>{escape(entry.reason)}"
    slower = f"{entry.median / ours.median:.2f}" if ours else ""
    rate = f"{m.flops / entry.median / 1e9:.0f}" if m.flops else ""
    return (
        f"<tr><td>{escape(entry.peer)}<td>{_ms(entry.median)}<td>{_ms(entry.minimum)}"
        f"<td>{entry.runs}<td>{slower}<td>{rate}<td>{entry.error:.0e}<td>{entry.rss >> 20}"
    )
