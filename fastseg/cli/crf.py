"""``fastseg crf``: refine given probabilities with a dense CRF, or tune its parameters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer.core import TyperGroup

from fastseg.crf_tune import Trial, as_probabilities, load_arrays, load_examples, table, tune
from fastseg.image import atomic_write, mask_image, read_image
from fastseg.nn import DenseCRF


class _RefineByDefault(TyperGroup):
    """``fastseg crf PHOTO`` means ``fastseg crf refine PHOTO``."""

    def parse_args(self, ctx, args):
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["refine", *args]
        return super().parse_args(ctx, args)


crf = typer.Typer(
    cls=_RefineByDefault,
    help="""Refine probabilities with a dense CRF, or tune it.

    `fastseg crf PHOTO ...` is short for `fastseg crf refine PHOTO ...`.""",
    no_args_is_help=True,
)


@crf.command()
def refine(
    photo: Annotated[Path, typer.Argument(help="The photograph.")],
    probs: Annotated[Path, typer.Option(help=".npy or .npz (array p): (L, H, W), 0..1 or uint8.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Palette PNG to write.")],
    preset: Annotated[str, typer.Option(help="A preset's name, or a .json file.")] = "default",
) -> None:
    """Write the mask of most probable classes after the CRF."""
    image = read_image(photo)
    x = as_probabilities(load_arrays(probs, "p")["p"], probs)[None]
    if x.shape[-2:] != image.shape[:2]:
        raise ValueError(
            f"crf: probs must have shape (L, {image.shape[0]}, {image.shape[1]}) to match "
            f"{photo.name}, got {tuple(x.shape[1:])}"
        )
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.inference_mode():
        q = DenseCRF.from_preset(preset, unary="probs")(x, pixels)
    with atomic_write(out) as path:
        mask_image(q[0].argmax(0).to(torch.uint8).numpy()).save(path, format="PNG")


@crf.command("tune")
def tune_command(
    data: Annotated[Path, typer.Option(help="Folder of .npz files with p, im and gt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Preset to write.")] = Path("crf.json"),
    iters: Annotated[int, typer.Option(help="Mean-field updates.", min=1)] = 5,
    limit: Annotated[int | None, typer.Option(help="Use this many files.", min=1)] = None,
    show: Annotated[int, typer.Option(help="Lines of the table.", min=0)] = 10,
) -> None:
    """Search the parameters that are most accurate near label borders on labelled examples."""
    examples = load_examples(data, limit)
    done = 0

    def report(trial: Trial) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            accuracy = 100 * trial.score.border_accuracy
            print(f"\rtrial {done}: {accuracy:.2f} % near borders ", end="", file=sys.stderr)

    with torch.inference_mode():
        without, trials = tune(examples, iters=iters, report=report)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(table(without, trials[:show]))
    with atomic_write(out) as path:
        path.write_text(json.dumps(trials[0].preset(iters), indent=2) + "\n")
    print(f"best of {len(trials)} written to {out}: fastseg crf PHOTO --preset {out} ...")
