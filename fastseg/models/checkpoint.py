"""Weights files that say what they are: safetensors with a model card in the header."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PathLike = str | os.PathLike[str]
_SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class ModelCard:
    """What the user of a weights file must know to run it on a photograph.

    Attributes:
        arch: the name that ``create_model`` takes.
        options: keyword arguments of ``create_model``, such as ``{"num_classes": 11}``.
        classes: the name of each label, in order. A network with one output channel has two:
            label 1 is where its logit is positive.
        mean, std: RGB statistics that inputs were normalised with, of values from 0 to 1.
        size: (H, W) that photographs are resized to, or None: the network takes them as they are.
        crf: arguments of :class:`fastseg.nn.DenseCRF` that suit its probabilities, terms as lists
            of lists; empty for the defaults.
        source: where the weights come from and under which licence.
    """

    arch: str
    options: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: tuple[int, int] | None = None
    crf: dict[str, Any] = field(default_factory=dict)
    source: str = ""


def shipped_weights() -> list[str]:
    """Networks whose weights come with fastseg: ``create_model(name, weights="shipped")``."""
    return sorted(path.stem for path in _SHIPPED.glob("*.safetensors"))


def shipped_path(name: str) -> Path:
    """The weights file of one of :func:`shipped_weights`.

    Raises:
        ValueError: none ships for this network.
    """
    if name not in shipped_weights():
        raise ValueError(
            f"no weights ship for {name!r}, only for {', '.join(shipped_weights())}; "
            "train some or give a weights file"
        )
    return _SHIPPED / f"{name}.safetensors"


def save_checkpoint(
    path: str | os.PathLike[str], state: dict[str, Tensor], card: ModelCard
) -> None:
    """Write a state dict and its card. The file is not written atomically."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {key: json.dumps(value) for key, value in asdict(card).items()}
    save_file(state, path, metadata=header)


def read_card(path: PathLike) -> ModelCard | None:
    """The card of a safetensors file, None where it has none.

    Raises:
        ValueError: this is no safetensors file, or its card is damaged.
        OSError: the file cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: must be a safetensors file ({error})") from error
    if "arch" not in header:
        return None
    try:
        known = {key: json.loads(header[key]) for key in ModelCard.__annotations__ if key in header}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its model card is damaged ({error})") from error
    lists_as_tuples: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in known.items()
    }
    return ModelCard(**lists_as_tuples)
