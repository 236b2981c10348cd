"""All that happens to one graph, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..memory_plan import plan_memory
from .constants import keep_float32
from .fusion import Fusion, Report
from .grids import pool_grids
from .lift import lift
from .max_pools import pool
from .pooling import pool_results, unpool_inputs
from .pyramids import convolve_pixels, pyramid, spread_single_values
from .resizes import resize_and_choose, resize_maps
from .scales import scale_inputs
from .spelling import reshape_views, respell, skip_contiguous
from .sums import sum_convolutions


def optimize_graph(
    traced: fx.GraphModule, settings: dict[str, Any], values: Mapping[fx.Node, Tensor]
) -> tuple[Report, list[Tensor]]:
    """Rewrite a graph for inference.

    Args:
        traced: the graph and its modules; changed in place.
        settings: keyword arguments of PackedConv2d that are the same in a whole network.
        values: nodes whose values are weights.

    Returns:
        What was done and what was left, and those of the values that are now part of the graph.
    """
    report: Report = []
    held = lift(traced, values, report)
    respell(traced)
    fusion = Fusion(traced, settings, report)
    reshape_views(fusion)
    fusion.run()
    skip_contiguous(fusion)
    pool(traced, report)
    pyramid(traced, settings, report)
    spread_single_values(traced, report)
    convolve_pixels(traced, settings, report)
    resize_and_choose(traced, report)
    if settings.get("dtype") == torch.bfloat16:
        keep_float32(traced, report)
    sum_convolutions(fusion)
    scale_inputs(fusion)
    resize_maps(traced, report)
    pool_grids(traced, report)
    pool_results(traced, report)
    unpool_inputs(traced, report)
    traced.delete_all_unused_submodules()
    traced.recompile()
    plan_memory(traced, settings.get("dtype", torch.float32))
    return report, held
