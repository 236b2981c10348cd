"""Functional operators: one file per op with its checks, reference, fake kernel and gradient."""

from .conv_engine import PackedConv, conv_engine, pack_conv

__all__ = ["PackedConv", "conv_engine", "pack_conv"]
