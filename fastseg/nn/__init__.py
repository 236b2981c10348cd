"""Drop-in layers over fastseg.ops."""

from .conv_bn import ConvBNReLU2d

__all__ = ["ConvBNReLU2d"]
