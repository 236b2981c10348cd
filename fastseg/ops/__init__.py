"""Functional operators: one file per op with its checks, reference, fake kernel and gradient."""

from .conv_bn import conv_act, conv_bn_act, conv_bn_act_reference, fold_bn
from .conv_engine import PackedConv, conv_engine, pack_conv
from .max_unpool import from_torch_indices, max_pool2d, max_unpool2d, to_torch_indices

__all__ = [
    "PackedConv",
    "conv_act",
    "conv_bn_act",
    "conv_bn_act_reference",
    "conv_engine",
    "fold_bn",
    "from_torch_indices",
    "max_pool2d",
    "max_unpool2d",
    "pack_conv",
    "to_torch_indices",
]
