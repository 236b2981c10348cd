"""Two packed 1x1 convolutions whose results are added, for inference on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.conv_choice import Algorithm, choose_algorithm
from ..ops.conv_sum import PackedConvSum, conv_sum, pack_conv_sum
from .packed import SIZES, PackedConv2d


class PackedConvSum2d(nn.Module):
    """``first(x, second(other))`` as one matrix product: ``second(other)`` is not stored.

    Args:
        first, second: convolutions for which :func:`summable` holds. ``first`` has the activation.

    Shapes: x (N, C, H, W), other (N, C2, H2, W2) -> (N, K, Ho, Wo), channels last.
    """

    def __init__(self, first: PackedConv2d, second: PackedConv2d) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.place: Any = None  # where results go, as in PackedConv2d
        self._packed: dict[Algorithm, PackedConvSum] = {}
        self._prepared: dict[tuple, tuple[PackedConvSum, tuple[int, ...]] | None] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def weight(self) -> Tensor:  # whose first size is that of the results
        return self.first.weight

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if x.dim() == 3 or other.dim() == 3:  # one image without a batch
            return self.first(x, self.second(other))
        x, other = (
            t if t.dtype == self.dtype else t.to(self.dtype, memory_format=torch.channels_last)
            for t in (x, other)
        )
        prepared = self.prepare(x, other)
        if prepared is None:
            return self.first(x, self.second(other))
        packed, shape = prepared
        return conv_sum(x, other, packed, None if self.place is None else self.place.image(shape))

    def prepare(self, x: Tensor, other: Tensor) -> tuple[PackedConvSum, tuple[int, ...]] | None:
        """The packed weights for images of these shapes and the shape of the result; None where
        the results are not added pixel by pixel."""
        sizes = (tuple(x.shape), tuple(other.shape))
        known = not torch.compiler.is_compiling() and all(
            type(n) is int for size in sizes for n in size
        )
        if known and sizes in self._prepared:
            return self._prepared[sizes]
        prepared = None
        C, C2 = self.first.weight.shape[1], self.second.weight.shape[1]
        if (x.shape[1], other.shape[1]) == (C, C2):
            shape = self.first.output_shape(x)
            if shape == self.second.output_shape(other):
                prepared = self._pack(self.algorithm(shape[2:])), shape
        if known and len(self._prepared) < SIZES:
            self._prepared[sizes] = prepared
        return prepared

    def algorithm(self, size: Sequence[int]) -> Algorithm:
        """The one for results of this size (Ho, Wo)."""
        (K, C, *kernel), C2 = self.first.weight.shape, self.second.weight.shape[1]
        algorithm = choose_algorithm(
            C + C2, K, kernel, size, dtype=self.dtype, accuracy=self.first.accuracy
        )
        return Algorithm(0) if C % 32 or C2 % 32 else algorithm

    def _pack(self, algorithm: Algorithm) -> PackedConvSum:
        if algorithm not in self._packed:
            first, second = self.first, self.second
            biases = [b for b in (first.bias, second.bias) if b is not None]
            with torch.inference_mode(False):
                self._packed[algorithm] = pack_conv_sum(
                    first.weight,
                    second.weight,
                    sum(biases[1:], biases[0]) if biases else None,
                    stride=first.options["stride"],
                    other_stride=second.options["stride"],
                    activation=first.options["activation"],
                    negative_slope=first.options["negative_slope"],
                    products=algorithm.products,
                    strassen=algorithm.strassen,
                )
        return self._packed[algorithm]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": {}, "_prepared": {}}  # copies pack anew


def summable(first: PackedConv2d, second: PackedConv2d) -> bool:
    """Whether ``first(x, second(other))`` is one product."""
    pointwise = all(
        layer.groups == 1
        and tuple(layer.weight.shape[2:]) == (1, 1)
        and tuple(layer.options["padding"]) == (0, 0)
        for layer in (first, second)
    )
    return (
        pointwise
        and not first.options["residual_last"]
        and second.options["activation"] == "none"
        and first.weight.shape[0] == second.weight.shape[0]
        and (first.dtype, first.accuracy) == (second.dtype, second.accuracy)
    )
