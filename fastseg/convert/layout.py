"""A layout: how one library names and orders the tensors of a network, as rules to our names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .files import unwrap

# A source name (regular expression), our name for it (a template or a function of the match; None:
# not needed), a change of the tensor.
Target = str | Callable[[re.Match[str]], str] | None
Change = Callable[[Tensor], Tensor]
Rule = tuple[str, Target] | tuple[str, Target, Change]
RGB = tuple[float, float, float]

# Convolutions that see the image, in any of our networks.
IMAGE_CONVS = re.compile(
    r"(fcn\.)?backbone\.stages\.0\.conv1_1(\.conv)?\.weight|backbone\.stem\.0\.conv\.weight|"
    r"branches\.0\.conv\.weight|encoder\.0\.0(\.conv)?\.weight"
)
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass
class Converted:
    """A state dict under our names.

    Attributes:
        tensors: our names to tensors.
        sources: our names to the names in the source.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


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
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD

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
                ours = target(found) if callable(target) else target and found.expand(target)
                return ours, change[0] if change else None
        return None


def choose(layouts: Sequence[Layout], state_dict: Mapping[str, Tensor]) -> Layout:
    """The first of these layouts that a state dict has.

    Raises:
        ValueError: it has none of them.
    """
    for layout in layouts:
        if layout.matches(state_dict):
            return layout
    some = ", ".join(list(state_dict)[:8])
    raise ValueError(
        f"convert: no known layout has the names {some}{' ...' if len(state_dict) > 8 else ''}; "
        f"the layouts are {', '.join(layout.name for layout in layouts)}"
    )


def renamed(
    layouts: Sequence[Layout], state_dict: Mapping[str, Any], bgr: bool | None = None
) -> dict[str, Tensor]:
    """A state dict of one of these layouts, or a checkpoint that contains it, under our names."""
    tensors = unwrap(state_dict)
    return choose(layouts, tensors).convert(tensors, bgr).tensors
