"""Drop-in layers over fastseg.ops."""

from .aspp import ASPP
from .conv_bn import ConvBNReLU2d
from .crf import DenseCRF
from .pooling import MaxPool2d, MaxUnpool2d
from .pyramid_pooling import PyramidPooling

__all__ = [
    "ASPP",
    "ConvBNReLU2d",
    "DenseCRF",
    "MaxPool2d",
    "MaxUnpool2d",
    "PyramidPooling",
]
