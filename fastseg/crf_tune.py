"""Search for dense-CRF parameters that suit a network and a kind of photograph.

The right widths and weights depend on how sure and how sharp the network's probabilities are:
textbook values make some networks worse. :func:`tune` measures them on examples with labels.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .nn.crf import DenseCRF

# Tried values, weakest first. A weight of 0 leaves the term out.
LEVELS: dict[str, tuple[float, ...]] = {
    "bilateral_weight": (0, 0.5, 1, 2, 3, 5, 10),
    "bilateral_rgb": (3, 5, 8, 13, 20),
    "bilateral_xy": (5, 10, 20, 40, 60),
    "gaussian_weight": (0, 0.5, 1, 2, 3),
    "gaussian_xy": (1, 2, 3),
}
START = {
    "bilateral_weight": 3.0,
    "bilateral_rgb": 5.0,
    "bilateral_xy": 10.0,
    "gaussian_weight": 1.0,
    "gaussian_xy": 1.0,
}


@dataclass
class Example:
    """Probabilities (L, H, W), image (3, H, W) and labels (H, W); labels of L or more are void."""

    probs: Tensor
    image: Tensor
    labels: Tensor


@dataclass
class Score:
    """Fractions over all pixels of all examples that have a label."""

    miou: float
    accuracy: float
    border_accuracy: float  # within `border` pixels of a change of label


@dataclass
class Trial:
    parameters: dict[str, float]
    score: Score

    def preset(self, iters: int) -> dict[str, Any]:
        """Keyword arguments of :class:`fastseg.nn.DenseCRF`."""
        p = self.parameters
        return {
            "iters": iters,
            "gaussian": [p["gaussian_xy"], p["gaussian_weight"]] if p["gaussian_weight"] else None,
            "bilateral": [p["bilateral_xy"], p["bilateral_rgb"], p["bilateral_weight"]]
            if p["bilateral_weight"]
            else None,
        }


def load_examples(folder: str | Path, limit: int | None = None) -> list[Example]:
    """The ``.npz`` files of a folder in the order of their names, or ``limit`` evenly spaced ones.

    Each holds ``p`` (L, H, W) probabilities, uint8 ones out of 255, ``im`` (H, W, 3) uint8 and
    ``gt`` (H, W) labels; labels of L or more are void.

    Raises:
        ValueError: there are none, or one of them holds something else.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"crf tune: limit must be at least 1, got {limit}")
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        raise ValueError(f"crf tune: the folder must hold .npz files, got {folder}")
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    examples: list[Example] = []
    for file in files:
        arrays = load_arrays(file, "p", "im", "gt")
        probs, image, labels = as_probabilities(arrays["p"], file), arrays["im"], arrays["gt"]
        size = tuple(probs.shape[1:])
        if image.shape != (*size, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"crf: im in {file} must be uint8 of shape {(*size, 3)} as p is, "
                f"got {image.dtype} of shape {image.shape}"
            )
        if labels.shape != size or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise ValueError(
                f"crf: gt in {file} must be integers from 0 of shape {size} as p is, "
                f"got {labels.dtype} of shape {labels.shape}"
            )
        if examples and len(examples[0].probs) != len(probs):
            raise ValueError(
                f"crf: p in {file} must have {len(examples[0].probs)} labels as in {files[0]}, "
                f"got {len(probs)}"
            )
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        examples.append(Example(probs, pixels, torch.from_numpy(labels.astype(np.int64))))
    return examples


def load_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file by name, or the one array of an ``.npy`` file.

    Raises:
        ValueError: the file is of another kind or damaged, or lacks one of them.
        OSError: the file cannot be opened.
    """
    try:
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            return dict.fromkeys(names, loaded)
        with loaded:
            return {name: loaded[name] for name in names}
    except KeyError:
        raise ValueError(
            f"crf: {path} must hold {' and '.join(names)}, got {', '.join(loaded.files)}"
        ) from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"crf: {path} must be an .npy or .npz file of numbers") from error


def as_probabilities(p: np.ndarray, path: Path) -> Tensor:
    """An array of a file as (L, H, W) float32 probabilities; uint8 ones are out of 255.

    Raises:
        ValueError: it has other axes or another dtype, or values that are no probabilities.
    """
    if p.ndim != 3 or 0 in p.shape or not (p.dtype == np.uint8 or p.dtype.kind == "f"):
        raise ValueError(
            f"crf: p in {path} must be floats or uint8 (L, H, W), got {p.dtype} of shape {p.shape}"
        )
    if p.dtype == np.uint8:
        return torch.from_numpy(p).float() / 255
    low, high = p.min(), p.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails
        raise ValueError(
            f"crf: p in {path} must be probabilities from 0 to 1, got {low:g} to {high:g}; "
            "for logits take their softmax first"
        )
    return torch.from_numpy(p.astype(np.float32))


def near_border(labels: Tensor, classes: int, distance: int) -> Tensor:
    """Pixels of (H, W) labels at most ``distance`` from a change between two labels below
    ``classes``, measured along rows and columns."""
    known = labels < classes
    change = torch.zeros_like(known)
    down = (labels[1:] != labels[:-1]) & known[1:] & known[:-1]
    right = (labels[:, 1:] != labels[:, :-1]) & known[:, 1:] & known[:, :-1]
    change[1:] |= down
    change[:-1] |= down
    change[:, 1:] |= right
    change[:, :-1] |= right
    near = F.max_pool2d(change[None].float(), 2 * distance - 1, 1, distance - 1)
    return near[0] > 0


def evaluate(
    examples: Sequence[Example], refine: Callable[[Tensor, Tensor], Tensor] | None, border: int = 4
) -> Score:
    """Scores of the refined probabilities, or of the network's own if ``refine`` is None."""
    classes = examples[0].probs.shape[0]
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    right = total = 0
    for example in examples:
        q = example.probs[None]
        if refine is not None:
            q = refine(q, example.image[None])
        best = q[0].argmax(0)
        known = example.labels < classes
        pairs = example.labels[known] * classes + best[known]
        confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        near = near_border(example.labels, classes, border) & known
        right += int((best == example.labels)[near].sum())
        total += int(near.sum())
    correct = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    present = confusion.sum(1) > 0
    return Score(
        miou=(correct / union.clamp_min(1))[present].mean().item(),
        accuracy=(correct.sum() / confusion.sum()).item(),
        border_accuracy=right / max(1, total),
    )


def tune(
    examples: Sequence[Example],
    *,
    iters: int = 5,
    border: int = 4,
    sweeps: int = 1,
    report: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Score, list[Trial]]:
    """Coordinate search over ``LEVELS`` for the best accuracy near label borders.

    Trials that lower the mean IoU below the network's own rank last. Deterministic.

    Returns:
        The score without a CRF, and all trials, best first.
    """
    without = evaluate(examples, None, border)
    trials: dict[str, Trial] = {}

    def rank(trial: Trial) -> tuple[bool, float, float]:
        s = trial.score
        return s.miou >= without.miou, s.border_accuracy, s.miou

    def attempt(parameters: dict[str, float]) -> Trial:
        trial = Trial(parameters, without)
        preset = trial.preset(iters)
        key = str(preset)  # the widths of a term without weight do not matter
        if key not in trials:
            trial.score = evaluate(examples, DenseCRF(unary="probs", **preset), border)
            trials[key] = trial
            report(trial)
        return trials[key]

    best = attempt(dict(START))
    for _ in range(sweeps):
        before = best
        for name, levels in LEVELS.items():
            best = max((attempt({**best.parameters, name: float(v)}) for v in levels), key=rank)
        if best is before:
            break
    return without, sorted(trials.values(), key=rank, reverse=True)


def table(without: Score, trials: Iterable[Trial]) -> str:
    """One line per trial in percent, the network alone first."""
    lines = ["gaussian xy/weight  bilateral xy/rgb/weight    mIoU  accuracy  near borders"]

    def row(name: str, s: Score) -> str:
        return (
            f"{name:44}{100 * s.miou:7.2f}{100 * s.accuracy:10.2f}{100 * s.border_accuracy:14.2f}"
        )

    lines.append(row("network alone", without))
    for trial in trials:
        p = {k: f"{v:g}" for k, v in trial.parameters.items()}
        gaussian = f"{p['gaussian_xy']}/{p['gaussian_weight']}"
        bilateral = f"{p['bilateral_xy']}/{p['bilateral_rgb']}/{p['bilateral_weight']}"
        lines.append(row(f"{gaussian:20}{bilateral}", trial.score))
    return "\n".join(lines)
