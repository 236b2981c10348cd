"""Search for dense-CRF parameters that suit a network and a kind of photograph.

The right widths and weights depend on how sure and how sharp the network's probabilities are:
textbook values make some networks worse. :func:`tune` measures them on examples with labels.
"""

from __future__ import annotations

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
    ``gt`` (H, W) labels.
    """
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        raise ValueError(f"crf tune: the folder must hold .npz files, got {folder}")
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    examples = []
    for file in files:
        with np.load(file) as data:
            missing = {"p", "im", "gt"} - set(data.files)
            if missing:
                raise ValueError(f"crf tune: {file} must hold p, im and gt, {missing} are missing")
            p, image, labels = data["p"], data["im"], data["gt"]
        if p.ndim != 3 or image.shape != (*p.shape[1:], 3) or labels.shape != p.shape[1:]:
            raise ValueError(
                f"crf tune: {file} must hold p (L, H, W), im (H, W, 3) and gt (H, W), got "
                f"{p.shape}, {image.shape} and {labels.shape}"
            )
        probs = torch.from_numpy(p).float()
        examples.append(
            Example(
                probs / 255 if p.dtype == np.uint8 else probs,
                torch.from_numpy(image).permute(2, 0, 1),
                torch.from_numpy(labels.astype(np.int64)),
            )
        )
    return examples


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
