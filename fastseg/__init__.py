"""Fast kernels and complete networks for classic semantic segmentation in PyTorch."""

import torch  # noqa: F401  loads the libraries that fastseg._C links to

from . import _C, convert, models, nn, ops  # loading _C registers torch.ops.fastseg.*
from .optimize import explain, optimize
from .predict import Predictor
from .result import Segmentation

__version__ = "0.1.0"
__all__ = [
    "_C",
    "Predictor",
    "Segmentation",
    "convert",
    "explain",
    "models",
    "nn",
    "ops",
    "optimize",
]
