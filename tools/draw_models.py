"""Draw each network's data flow and print its layers into the pages of docs/models.

    python tools/draw_models.py            # writes docs/models/*.svg and the tables in *.md
    python tools/draw_models.py --check    # exit status 1 where a page is out of date

Both come from running the network on the meta device (fastseg.models.trace), not from a drawing.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections import defaultdict
from html import escape
from pathlib import Path

import torch

from fastseg.cli.models import layer_table
from fastseg.models import Layer, create_model, trace

PAGES = Path(__file__).parent.parent / "docs" / "models"
# A page asks for a network by: <!-- layers NAME KEY=VALUE ... -->, the block, <!-- end -->.
BLOCK = re.compile(r"<!-- layers (\S+)((?: \S+)*) -->\n.*?<!-- end -->", re.DOTALL)
SIZE = (512, 512)
BOX, GAP, LINE, PAD = 150, 14, 13, 8  # pixels


def block(name: str, options: dict[str, object]) -> tuple[str, str]:
    """The generated part of a page and the picture that it shows."""
    with torch.device("meta"):
        model = create_model(name, **options)
    layers = trace(model, SIZE)
    arguments = "".join(f" -O {key}={str(value).lower()}" for key, value in options.items())
    marker = "".join(f" {key}={value}" for key, value in options.items())
    text = (
        f"<!-- layers {name}{marker} -->\n"
        f"![Data flow of {name}]({name}.svg)\n\n"
        f"`fastseg models {name}{arguments}` prints the layers:\n\n"
        f"```\n{layer_table(layers)}\n```\n<!-- end -->"
    )
    return text, picture(layers)


def picture(layers: list[Layer]) -> str:
    """Boxes, one column per stride, downwards in the order of computation."""
    stride = [stride_of(layer, layers[0].shape) for layer in layers]
    for i, layer in enumerate(layers):  # 1x1 maps and the like stay beside their source
        if layer.inputs and stride[i] > 64:
            stride[i] = stride[layer.inputs[0]]
    rank = [0] * len(layers)
    for i, layer in enumerate(layers):
        rank[i] = 1 + max((rank[j] for j in layer.inputs), default=-1)
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in range(len(layers)):
        cells[rank[i], stride[i]].append(i)

    left, x = {}, GAP
    for s in sorted(set(stride)):
        width = max(len(members) for (_, t), members in cells.items() if t == s)
        left[s], x = (x, width), x + width * (BOX + GAP) + GAP
    texts = [caption(layer) for layer in layers]
    heights = [len(lines) * LINE + PAD for lines in texts]
    top, y = {}, 2 * LINE + GAP
    for r in range(max(rank) + 1):
        top[r] = y
        y += max(heights[i] for i in range(len(layers)) if rank[i] == r) + 2 * GAP

    where = {}
    for (r, s), members in cells.items():
        start, width = left[s]
        start += (width - len(members)) * (BOX + GAP) // 2
        for k, i in enumerate(members):
            where[i] = (start + k * (BOX + GAP), top[r])
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x} {y}" width="{x}" '
        f'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
    ]
    for s, (start, width) in left.items():
        middle = start + (width * (BOX + GAP) - GAP) / 2
        label = "full size" if s == 1 else f"1/{s}"
        svg.append(f'<text x="{middle:g}" y="18" text-anchor="middle" fill="#555">{label}</text>')
    for i, layer in enumerate(layers):
        for j in layer.inputs:
            (x0, y0), (x1, y1) = where[j], where[i]
            x0, y0, x1 = x0 + BOX / 2, y0 + heights[j], x1 + BOX / 2
            bend = min((y1 - y0) / 2, 40)
            if x0 == x1 and rank[i] - rank[j] > 1:  # past boxes of the same column
                x0 = x1 = x0 - BOX / 2
                y0, y1 = y0 - heights[j] / 2, y1 + heights[i] / 2
                svg.append(
                    f'<path d="M{x0:g} {y0:g}C{x0 - GAP:g} {y0:g} {x1 - GAP:g} {y1:g} {x1:g} '
                    f'{y1:g}" fill="none" stroke="#777" marker-end="url(#tip)"/>'
                )
                continue
            svg.append(
                f'<path d="M{x0:g} {y0:g}C{x0:g} {y0 + bend:g} {x1:g} {y1 - bend:g} {x1:g} {y1:g}" '
                'fill="none" stroke="#777" marker-end="url(#tip)"/>'
            )
    for i, layer in enumerate(layers):
        x0, y0 = where[i]
        fill = "#dbe9fb" if layer.parameters else "#f1f1f1"
        svg.append(
            f'<rect x="{x0}" y="{y0}" width="{BOX}" height="{heights[i]}" rx="4" fill="{fill}" '
            f'stroke="{"#c33" if layer.outputs else "#889"}"/>'
        )
        for k, line in enumerate(texts[i], 1):
            svg.append(
                f'<text x="{x0 + BOX / 2:g}" y="{y0 + k * LINE:g}" text-anchor="middle">'
                f"{escape(line)}</text>"
            )
    return "\n".join([*svg, "</svg>"]) + "\n"


def stride_of(layer: Layer, image: tuple[int, ...]) -> int:
    """Input size over the size of the map, as a power of two."""
    return 2 ** round(math.log2(image[1] / layer.shape[1]))


def caption(layer: Layer) -> list[str]:
    """What, in short lines, the shape, and under which key the network returns it."""
    lines = textwrap.wrap(layer.what, 26)
    lines.append(" x ".join(map(str, layer.shape)))
    return lines + [f'"{key}"' for key in layer.outputs]


def main() -> int:
    stale = []
    for page in sorted(PAGES.glob("*.md")):
        wanted = {page: page.read_text()}

        def fill(found: re.Match[str], wanted: dict[Path, str] = wanted) -> str:
            options = dict(pair.split("=") for pair in found[2].split())
            text, svg = block(found[1], options)
            wanted[PAGES / f"{found[1]}.svg"] = svg
            return text

        wanted[page] = BLOCK.sub(fill, wanted[page])
        for path, content in wanted.items():
            if not path.exists() or path.read_text() != content:
                stale.append(path.name)
                if "--check" not in sys.argv:
                    path.write_text(content)
    print(f"{'out of date' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'none'}")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
