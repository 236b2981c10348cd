"""``fastseg models``: the networks, what their papers published, and the layers of one."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from fastseg.models import count_macs, count_parameters, create_model, list_models, model_info
from fastseg.models.flow import Layer, trace


def models(
    name: Annotated[
        str, typer.Argument(help="A network, or a pattern such as '*_resnet50'.")
    ] = "*",
    size: Annotated[str, typer.Option(help="Image size in pixels, HxW.")] = "512x512",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="KEY=VALUE for the builder; may be repeated."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the networks, or the layers of one with the shapes of their results.

    MACs are those of the convolutions for one RGB image of --size.
    """
    image = parse_size(size)
    options = dict(parse_option(text) for text in option or ())
    if any(character in name for character in "*?["):
        names = list_models(name)
        if not names:
            raise ValueError(f"models: the pattern must match a network, got {name!r}")
        rows = [summary(n, image, options) for n in names]
        print(json_module.dumps(rows, indent=2) if json else table(rows))
        return
    with torch.device("meta"):
        model = create_model(name, **options)
    layers = trace(model, image, options.get("in_channels", 3))
    if json:
        print(json_module.dumps([asdict(layer) for layer in layers], indent=2))
        return
    info = model_info(name)
    paper = info.paper
    print(f"{name}: {paper.title}\n{paper.authors}; {paper.venue} {paper.year}; {paper.url}\n")
    about = (info.build.__doc__ or "").partition("\n\n")[0].partition(" Options: see")[0]
    print(" ".join(about.split()))
    if info.voc2012 is not None:
        print(f"VOC 2012 test: {info.voc2012} mean IoU ({info.conditions})")
    print(f"Options: {', '.join(info.options)}\n")
    print(layer_table(layers))


def parse_size(text: str) -> tuple[int, int]:
    """``"512x512"`` or ``"512"`` as (H, W)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"models: size must be HxW in pixels, such as 480x640, got {text!r}")
    return int(sides[0]), int(sides[-1])


def parse_option(text: str) -> tuple[str, Any]:
    """``"aux=true"`` as ("aux", True); what is no JSON is a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"models: an option must be KEY=VALUE, got {text!r}")
    try:
        return key, json_module.loads(value)
    except json_module.JSONDecodeError:
        return key, value


def summary(name: str, size: tuple[int, int], options: dict[str, Any]) -> dict[str, Any]:
    """One row of the table of networks."""
    info = model_info(name)
    known = {key: value for key, value in options.items() if key in info.options}
    with torch.device("meta"):
        model = create_model(name, **known)
    return {
        "name": name,
        "year": info.paper.year,
        "parameters": count_parameters(model),
        "macs": count_macs(model, size, known.get("in_channels", 3)),
        "stride": info.stride,
        "voc2012": info.voc2012,
        "conditions": info.conditions,
        "paper": info.paper.url,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The networks as text, one line each."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'network':<{width}}  year  params M   GMACs  stride  VOC test  measured with"]
    for row in rows:
        voc = "" if row["voc2012"] is None else f"{row['voc2012']:.1f}"
        lines.append(
            f"{row['name']:<{width}}  {row['year']}  {row['parameters'] / 1e6:8.2f}  "
            f"{row['macs'] / 1e9:6.1f}  {row['stride']:6}  {voc:>8}  {row['conditions']}".rstrip()
        )
    return "\n".join(lines)


def layer_table(layers: list[Layer]) -> str:
    """The layers as text, one line each, and their totals."""
    label = [layer.name or f"({layer.what})" for layer in layers]
    width = max(map(len, label))
    what = [layer.what if layer.name else "" for layer in layers]
    wide = max(map(len, what))
    lines = [f"{'layer':<{width}}  {'':<{wide}}  {'C x H x W':>15}     params   GMACs"]
    for layer, name, text in zip(layers, label, what, strict=True):
        shape = " x ".join(map(str, layer.shape))
        macs = f"{layer.macs / 1e9:.2f}" if layer.macs else ""
        lines.append(
            f"{name:<{width}}  {text:<{wide}}  {shape:>15} {layer.parameters or '':>10}  {macs:>6}"
            f"{''.join(f'  -> {key}' for key in layer.outputs)}".rstrip()
        )
    total = sum(layer.parameters for layer in layers), sum(layer.macs for layer in layers) / 1e9
    lines.append(f"{'':<{width}}  {'':<{wide}}  {'':>15} {total[0]:>10}  {total[1]:6.2f}")
    return "\n".join(lines)
