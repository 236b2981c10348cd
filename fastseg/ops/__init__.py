"""Functional operators: one file per op with its checks, reference, fake kernel and gradient."""

from .conv_act import conv_act, fold_bn
from .conv_bn import conv_bn_act, conv_bn_act_reference
from .conv_branches import conv_branches, conv_branches_reference
from .conv_engine import PackedConv, conv_engine, conv_engine_reference, pack_conv
from .conv_transposed import (
    PackedConvTransposed,
    conv_transposed,
    conv_transposed_reference,
    pack_conv_transposed,
)
from .crf_memory import estimate_memory
from .dense_crf import (
    PairwiseTerm,
    dense_crf,
    dense_crf_reference,
    kl_divergence,
)
from .gaussian_features import bilateral_features, gaussian_features, gaussian_lattice
from .gcn_conv import (
    PackedGlobalConv,
    global_conv2d,
    global_conv2d_packed,
    global_conv2d_reference,
    pack_global_conv2d,
)
from .max_unpool import (
    from_torch_indices,
    max_pool2d,
    max_pool2d_reference,
    max_unpool2d,
    max_unpool2d_reference,
    to_torch_indices,
)
from .permutohedral import (
    PermutohedralLattice,
    permutohedral_filter,
    permutohedral_filter_reference,
)
from .sync_bn import sync_conv_bn_act
from .upsample import (
    upsample_argmax,
    upsample_argmax_reference,
    upsample_softmax,
    upsample_softmax_reference,
)

__all__ = [
    "PackedConv",
    "PackedConvTransposed",
    "PackedGlobalConv",
    "PairwiseTerm",
    "PermutohedralLattice",
    "bilateral_features",
    "conv_act",
    "conv_bn_act",
    "conv_bn_act_reference",
    "conv_branches",
    "conv_branches_reference",
    "conv_engine",
    "conv_engine_reference",
    "conv_transposed",
    "conv_transposed_reference",
    "dense_crf",
    "dense_crf_reference",
    "estimate_memory",
    "fold_bn",
    "from_torch_indices",
    "gaussian_features",
    "gaussian_lattice",
    "global_conv2d",
    "global_conv2d_packed",
    "global_conv2d_reference",
    "kl_divergence",
    "max_pool2d",
    "max_pool2d_reference",
    "max_unpool2d",
    "max_unpool2d_reference",
    "pack_conv",
    "pack_conv_transposed",
    "pack_global_conv2d",
    "permutohedral_filter",
    "permutohedral_filter_reference",
    "sync_conv_bn_act",
    "to_torch_indices",
    "upsample_argmax",
    "upsample_argmax_reference",
    "upsample_softmax",
    "upsample_softmax_reference",
]
