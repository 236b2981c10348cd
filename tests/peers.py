"""Other libraries of segmentation networks, or a skip with the reason."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

_LIBRARY: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """torchvision, also beside a torch that its compiled operators do not load in."""
    if not _LIBRARY:
        library = torch.library.Library("torchvision", "DEF")
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            try:
                library.define(name + arguments)
            except RuntimeError:  # it is there
                break
        _LIBRARY.append(library)
    return pytest.importorskip("torchvision")


def segmentation_models() -> ModuleType:
    torchvision()
    return pytest.importorskip("segmentation_models_pytorch")
