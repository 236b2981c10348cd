"""Drop-in layers over fastseg.ops."""

from .conv_bn import ConvBNReLU2d
from .pooling import MaxPool2d, MaxUnpool2d

__all__ = ["ConvBNReLU2d", "MaxPool2d", "MaxUnpool2d"]
