"""What prediction returns: a mask, its probabilities, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from .image import atomic_write, mask_image, voc_palette

SAVE_KINDS = ("mask", "overlay", "compare", "probs")


class Segmentation:
    """What :class:`fastseg.Predictor` found in one photograph.

    Attributes:
        image: the photograph, (H, W, 3) uint8 RGB, upright.
        mask: (H, W) uint8, the class of each pixel.
        classes: the names of the classes; ``mask`` holds positions in it.
        timings: seconds spent on "read", "network", "upsample" and "crf".
    """

    def __init__(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        probs: Callable[[], np.ndarray],
        classes: Sequence[str],
        timings: dict[str, float],
    ):
        self.image = image
        self.mask = mask
        self.classes = tuple(classes)
        self.timings = timings
        self._compute_probs = probs

    @cached_property
    def probs(self) -> np.ndarray:
        """(L, H, W) float32, the probability of each class at each pixel; made when asked for."""
        return self._compute_probs()

    @cached_property
    def shares(self) -> dict[str, float]:
        """The part of the picture that each class covers, of those that occur, largest first."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        return {self.classes[i]: float(counts[i] / self.mask.size) for i in order if counts[i]}

    def overlay(self, alpha: float = 0.4) -> Image.Image:
        """The photograph, each class tinted in its VOC colour and outlined in white.

        A class called "background" is darkened instead.

        Args:
            alpha: strength of the tint, from 0 to 1.
        """
        tint = voc_palette().astype(np.float32) * alpha
        keep = np.full(256, 1 - alpha, np.float32)
        if "background" in self.classes:
            background = self.classes.index("background")
            tint[background], keep[background] = 0, 0.5
        picture = self.image * keep[self.mask][:, :, None] + tint[self.mask]
        picture[self._outline()] = 255
        return Image.fromarray(np.rint(picture).astype(np.uint8))

    def _outline(self) -> np.ndarray:
        """(H, W) bool: where the class changes, in lines about 1/400 of the photo wide."""
        width = max(1, min(self.mask.shape) // 400)
        edge = np.zeros(self.mask.shape, bool)
        edge[:-width] |= self.mask[:-width] != self.mask[width:]
        edge[:, :-width] |= self.mask[:, :-width] != self.mask[:, width:]
        return edge

    def compare(self, alpha: float = 0.4) -> Image.Image:
        """The photograph, the mask in VOC colours and the overlay side by side."""
        mask = Image.fromarray(voc_palette()[self.mask])
        tiles = [Image.fromarray(self.image), mask, self.overlay(alpha)]
        width, height = mask.size
        gap = max(2, width // 100)
        sheet = Image.new("RGB", (3 * width + 2 * gap, height), "white")
        for i, tile in enumerate(tiles):
            sheet.paste(tile, (i * (width + gap), 0))
        return sheet

    def save(
        self,
        folder: str | Path,
        stem: str,
        kinds: Iterable[str] = ("mask",),
        note: str = "",
    ) -> dict[str, Path]:
        """Write pictures; each appears under its name only when it is complete.

        Args:
            folder: made if it does not exist.
            stem: the names are ``STEM_mask.png``, ``STEM_overlay.png``, ``STEM_compare.png`` and
                ``STEM_probs.npz`` (``probs``: (L, H, W) float16, and ``classes``).
            kinds: of "mask", "overlay", "compare", "probs". A mask is a palette PNG whose pixel
                values are the classes.
            note: stored in each file, under "fastseg".

        Returns:
            The path of each kind.
        """
        paths = {kind: output_path(folder, stem, kind) for kind in kinds}
        for kind, path in paths.items():
            with atomic_write(path) as unfinished:
                if kind == "probs":
                    np.savez_compressed(
                        unfinished,
                        probs=self.probs.astype(np.float16),
                        classes=np.array(self.classes),
                        fastseg=np.array(note),
                    )
                else:
                    text = PngImagePlugin.PngInfo()
                    text.add_text("fastseg", note)
                    self._picture(kind).save(unfinished, pnginfo=text, compress_level=1)
        return paths

    def _picture(self, kind: str) -> Image.Image:
        if kind == "mask":
            return mask_image(self.mask)
        return self.overlay() if kind == "overlay" else self.compare()


def output_path(folder: str | Path, stem: str, kind: str) -> Path:
    """Where :meth:`Segmentation.save` puts one kind of result.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in SAVE_KINDS:
        raise ValueError(f"save: must be among {', '.join(SAVE_KINDS)}, got {kind!r}")
    return Path(folder) / f"{stem}_{kind}.{'npz' if kind == 'probs' else 'png'}"
