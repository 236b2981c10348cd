"""A layout: how one library names and orders the tensors of a network, as rules to our names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# A source name (regular expression), our name for it (None: not needed), a change of the tensor.
Change = Callable[[Tensor], Tensor]
Rule = tuple[str, str | None] | tuple[str, str | None, Change]

# Convolutions that see the image, in any of our networks.
IMAGE_CONVS = re.compile(
    r"backbone\.stages\.0\.conv1_1(\.conv)?\.weight|backbone\.stem\.0\.conv\.weight|"
    r"branches\.0\.conv\.weight|encoder\.0\.conv1(\.conv)?\.weight"
)
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass
class Converted:
    """A state dict under our names.

    Attributes:
        tensors: our names to tensors.
        sources: our names to the names in the source.
        unused: source names that our networks have no use for.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """How one library stores one network.

    Attributes:
        name: what :func:`fastseg.convert.load` takes as ``layout``.
        title: library and network, for people.
        marks: regular expressions; a state dict is of this layout if each matches some name.
        rules: every name is renamed by the first rule that matches all of it.
        bgr: the released weights take images in the order blue, green, red.
        trunk: an ImageNet classifier or the like: fills a network's trunk and leaves its head.
        mean: what the released weights want subtracted from an RGB image of 0 .. 255.
        std: what they want it divided by after that.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    bgr: bool = False
    trunk: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def matches(self, names: Iterable[str]) -> bool:
        names = list(names)
        return all(any(re.fullmatch(mark, name) for name in names) for mark in self.marks)

    def convert(self, state_dict: Mapping[str, Tensor], bgr: bool | None = None) -> Converted:
        """Rename every tensor.

        Args:
            state_dict: names to tensors.
            bgr: the source takes BGR images; its first convolution is turned to take RGB. None:
                as the released weights of this layout.

        Raises:
            ValueError: a name that no rule knows; all of them are listed.
        """
        result, unknown = Converted(), []
        for name, tensor in state_dict.items():
            found = self._rule(name)
            if found is None:
                unknown.append(name)
                continue
            ours, change = found
            if ours is None:
                result.unused.append(name)
                continue
            if change is not None:
                tensor = change(tensor)
            if (self.bgr if bgr is None else bgr) and IMAGE_CONVS.fullmatch(ours):
                tensor = tensor.flip(1)
            result.tensors[ours], result.sources[ours] = tensor, name
        if unknown:
            raise ValueError(
                f"convert: every name must be known to the layout {self.name} ({self.title}), "
                f"got also {', '.join(unknown)}"
            )
        return result

    def _rule(self, name: str) -> tuple[str | None, Change | None] | None:
        """Our name for a source's (None: not needed) and the change; None where no rule applies."""
        for pattern, target, *change in self.rules:
            if found := re.fullmatch(pattern, name):
                return target and found.expand(target), change[0] if change else None
        return None
