"""Draw the pictures of docs/dense_crf.md: where the CRF helps and where it does not.

    python tools/draw_crf.py [FOLDER]      # docs by default; writes crf_*.jpg

U2-Net-p segments photographs of examples/; the CRF then refines its probabilities.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastseg import Predictor
from fastseg.image import read_image
from fastseg.nn import DenseCRF

ROOT = Path(__file__).resolve().parent.parent
WIDTH, GAP = 360, 6  # pixels of a column, and between columns
TINT = np.array([255, 60, 60])


class Keep(nn.Module):
    """In the place of a CRF: remembers the network's probabilities."""

    probs: Tensor

    def forward(self, probs: Tensor, photo: Tensor) -> Tensor:
        self.probs = probs
        return probs


def coarse(probs: Tensor, stride: int) -> Tensor:
    """The probabilities that a network of this output stride would have given."""
    height, width = probs.shape[2:]
    small = F.interpolate(
        probs, (height // stride, width // stride), mode="bilinear", antialias=True
    )
    return F.interpolate(small, (height, width), mode="bilinear")


def overlay(photo: np.ndarray, probs: Tensor) -> np.ndarray:
    """The photo, dimmed outside of the object, with a line around it."""
    inside = (probs[0, 1] > probs[0, 0]).numpy()
    grown = F.max_pool2d(torch.from_numpy(inside)[None].float(), 3, 1, 1)[0].numpy() > 0
    picture = np.where(inside[..., None], photo, photo // 3)
    return np.where((grown & ~inside)[..., None], TINT, picture).astype(np.uint8)


def row(name: str, stride: int, crf: DenseCRF, window: tuple[int, int, int, int]) -> Image.Image:
    """Photo, the network's mask and the refined mask in a window (left, top, right, bottom)."""
    photo = read_image(ROOT / "examples" / f"{name}.jpg")
    keep = Keep()
    Predictor("u2netp", crf=keep)(photo)
    probs = coarse(keep.probs, stride) if stride > 1 else keep.probs
    refined = crf(probs, torch.from_numpy(photo).permute(2, 0, 1)[None])
    columns = [photo, overlay(photo, probs), overlay(photo, refined)]
    left, top, right, bottom = window
    height = round(WIDTH * (bottom - top) / (right - left))
    picture = Image.new("RGB", (3 * WIDTH + 2 * GAP, height), "white")
    for i, column in enumerate(columns):
        part = Image.fromarray(column).crop(window)
        part = part.resize((WIDTH, height), Image.Resampling.LANCZOS)
        picture.paste(part, (i * (WIDTH + GAP), 0))
    return picture


@torch.inference_mode()
def main(folder: Path) -> None:
    textbook = DenseCRF.from_preset("default", unary="probs")
    row("astronaut", 32, textbook, (0, 0, 512, 400)).save(folder / "crf_helps.jpg", quality=85)
    row("chelsea", 1, textbook, (30, 150, 255, 300)).save(folder / "crf_hurts.jpg", quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
