"""``fastseg segment``: photographs in, masks and pictures of them out."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from fastseg import __version__
from fastseg.cli import sentence
from fastseg.image import PICTURE_NAME
from fastseg.predict import Predictor
from fastseg.result import Segmentation, output_path


def segment(
    photos: Annotated[
        list[Path], typer.Argument(metavar="PHOTO...", help="Pictures, or folders of pictures.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")],
    model: Annotated[str | None, typer.Option(help="Network; default: u2netp.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File: .safetensors, .pth or .pt.")] = None,
    crf: Annotated[
        str | None,
        typer.Option(metavar="[=PRESET]", help="Refine with a dense CRF; alone: =default."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Cut photos into tiles of this side, in pixels.")
    ] = None,
    overlap: Annotated[float, typer.Option(help="The part of a tile shared with the next.")] = 0.25,
    tta: Annotated[str, typer.Option(help="Average over flip (mirrored), ms (three sizes).")] = "",
    save: Annotated[
        str, typer.Option(help="What to write: mask, overlay, compare, probs.")
    ] = "mask,overlay",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also photos done before.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Report failures only.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON object per photo.")] = False,
) -> None:
    """Segment photographs: masks as palette PNGs, overlays, comparisons, probabilities.

    A photo that cannot be read is reported and the rest goes on; the exit status is then 1. Run
    again to go on after an interruption: photos whose results are complete and were made with the
    same options are skipped.
    """
    kinds, views = _names(save), _names(tta)
    jobs = _jobs(photos, out, kinds)
    predictor = Predictor(
        model or (None if weights else "u2netp"),
        weights=weights,
        crf=crf,
        device=device,
        tile=tile,
        overlap=overlap,
        tta=views,
    )
    options = {
        "fastseg": __version__,
        "model": predictor.card.arch,
        "weights": str(weights) if weights else None,
        "crf": crf,
        "tile": [tile, overlap] if tile else None,
        "tta": sorted(views),
    }
    note = json.dumps({key: value for key, value in options.items() if value})
    # A photo of 90 to 180 million pixels is no attack here; above, it is refused as damaged.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    failed = 0
    for photo, stem in _progress(jobs, show=not quiet and not jsonl):
        outputs = {kind: output_path(out, stem, kind) for kind in kinds}
        record: dict[str, Any] = {"photo": str(photo)}
        if not overwrite and all(_is_done(path, photo, note) for path in outputs.values()):
            record |= {"status": "skipped", "outputs": {k: str(p) for k, p in outputs.items()}}
            line = f"{photo}: done before"
        else:
            try:
                result = predictor(photo)
                result.save(out, stem, kinds, note)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch: no memory
                failed += 1
                reason = sentence(error)
                record |= {"status": "failed", "error": reason}
                line = reason if str(photo) in reason else f"{photo}: {reason}"
            else:
                record |= _facts(result) | {"outputs": {k: str(p) for k, p in outputs.items()}}
                line = f"{photo}: {_summary(result)} -> {', '.join(map(str, outputs.values()))}"
        if jsonl:
            print(json.dumps(record), flush=True)
        elif record["status"] == "failed":
            print(f"fastseg: {line}", file=sys.stderr, flush=True)
        elif not quiet and not sys.stdout.isatty():
            print(line, flush=True)
    if failed:
        print(f"fastseg: {failed} of {len(jobs)} photos failed", file=sys.stderr)
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    """ "mask, overlay" -> ["mask", "overlay"]"""
    return [name.strip() for name in text.split(",") if name.strip()]


def _jobs(photos: list[Path], out: Path, kinds: list[str]) -> list[tuple[Path, str]]:
    """Each photo and the stem of its results, which is unique."""
    if not kinds:
        raise ValueError("segment: --save must name something to write")
    if out.exists() and not out.is_dir():
        raise ValueError(f"segment: --out must be a folder, got the file {out}")
    for kind in kinds:
        output_path(out, "", kind)  # a bad name is reported before the work
    files: list[Path] = []
    for photo in photos:
        if photo.is_dir():
            inside = sorted(
                p for p in photo.iterdir() if PICTURE_NAME.search(p.name) and not p.is_dir()
            )
            if not inside:
                raise ValueError(f"segment: there are no pictures in folder {photo}")
            files += inside
        else:
            files.append(photo)
    files = list(dict.fromkeys(files))
    stems = Counter(file.stem for file in files)
    # a.jpg and a.png write a.jpg_mask.png and a.png_mask.png
    named = [(file, file.stem if stems[file.stem] == 1 else file.name) for file in files]
    twice = [stem for stem, count in Counter(stem for _, stem in named).items() if count > 1]
    if twice:
        raise ValueError(
            f"segment: several photos are called {', '.join(twice)}; use one output folder for each"
        )
    return named


def _is_done(path: Path, photo: Path, note: str) -> bool:
    """Whether a result is there, is no older than its photo and was made with these options."""
    try:
        if path.stat().st_mtime < photo.stat().st_mtime:
            return False
        if path.suffix == ".npz":
            with np.load(path) as file:
                return str(file["fastseg"]) == note
        with Image.open(path) as picture:
            return picture.info.get("fastseg") == note
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return False


def _facts(result: Segmentation) -> dict[str, Any]:
    H, W = result.mask.shape
    return {
        "status": "ok",
        "size": [W, H],
        "shares": {name: round(share, 6) for name, share in result.shares.items()},
        "seconds": {stage: round(t, 6) for stage, t in result.timings.items()},
    }


def _summary(result: Segmentation) -> str:
    H, W = result.mask.shape
    shares = ", ".join(f"{name} {share:.1%}" for name, share in list(result.shares.items())[:4])
    return f"{W}x{H}, {shares}, {sum(result.timings.values()):.2f} s"


def _progress(jobs: list[tuple[Path, str]], show: bool) -> Iterator[tuple[Path, str]]:
    """The jobs, behind a progress bar on a terminal."""
    if not (show and sys.stdout.isatty()):
        yield from jobs
        return
    from rich.progress import track

    yield from track(jobs, description="segment")
