"""Drop-in layers over fastseg.ops."""

from .aspp import ASPP
from .conv_bn import ConvBNReLU2d, convert_sync_batchnorm
from .crf import DenseCRF
from .crfrnn import CRFRNN
from .global_conv import GlobalConv2d
from .pooling import MaxPool2d, MaxUnpool2d
from .pyramid_pooling import PyramidConv2d, PyramidPooling

__all__ = [
    "ASPP",
    "CRFRNN",
    "ConvBNReLU2d",
    "DenseCRF",
    "GlobalConv2d",
    "MaxPool2d",
    "MaxUnpool2d",
    "PyramidConv2d",
    "PyramidPooling",
    "convert_sync_batchnorm",
]
