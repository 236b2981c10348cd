"""The layouts of other libraries, one file each. To add one, write its file and list it here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..layout import Layout, choose
from . import caffe, deeplab_pytorch, mmseg, semseg, smp, torchvision

# The more specific first.
LIBRARIES = (caffe, mmseg, smp, deeplab_pytorch, semseg, torchvision)
LAYOUTS = {layout.name: layout for library in LIBRARIES for layout in library.LAYOUTS}


def detect(state_dict: Mapping[str, Tensor]) -> Layout:
    """The layout of a state dict, from its names.

    Raises:
        ValueError: no layout has such names.
    """
    return choose(list(LAYOUTS.values()), state_dict)
