"""Tensors by name out of a checkpoint file, without running any code that it may contain."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Where training scripts put the weights, and what they put in front of the names.
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``.pth``, ``.pt``, ``.tar`` or ``.bin`` file.

    The latter go through ``torch.load(weights_only=True)``. Tensors land on the CPU; the container
    of a training script and prefixes such as ``module.`` are taken off (:func:`unwrap`).

    Raises:
        ValueError: the file is of another kind or damaged, or holds Python objects that only
            running code of the file could restore.
        OSError: the file cannot be read.
    """
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        try:
            return unwrap(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"convert: {path} must be a safetensors file: {error}") from None
    if not path.endswith((".pth", ".pt", ".tar", ".bin")):
        raise ValueError(
            f"convert: a checkpoint must be .safetensors, .pth, .pt, .pth.tar or .bin, got {path}"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises almost anything on a file of another kind
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # the class that it does not restore
        if foreign is None:
            raise ValueError(
                f"convert: {path} must be a complete file of torch.save, and no TorchScript"
            ) from error
        raise ValueError(
            f"convert: {path} must hold tensors and plain containers only, so that it can be read "
            f"without running its code, but holds {foreign[1]}; where you trust it, load it "
            "yourself and save its state dict as .safetensors"
        ) from None
    return unwrap(checkpoint)


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: ``{"state_dict": {"module.conv.weight": ...}}`` becomes
    ``{"conv.weight": ...}``."""
    while isinstance(checkpoint, Mapping):
        inner = [checkpoint[k] for k in CONTAINERS if isinstance(checkpoint.get(k), Mapping)]
        if not inner:
            break
        checkpoint = inner[0]
    tensors = {}
    if isinstance(checkpoint, Mapping):
        tensors = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(
            "convert: a checkpoint must map names to tensors, or hold such a mapping under "
            f"{', '.join(CONTAINERS)}; got {type(checkpoint).__name__}"
        )
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors
