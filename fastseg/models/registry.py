"""The networks by name, with what their papers published."""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar, cast

from torch import nn

from .checkpoint import shipped_path

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Paper:
    """Where an architecture comes from."""

    title: str
    authors: str
    venue: str
    year: int
    url: str


@dataclass(frozen=True)
class ModelInfo:
    """One entry of the registry.

    Attributes:
        name: what :func:`create_model` takes.
        build: the builder function; its docstring describes the network.
        paper: the paper that introduced it.
        stride: input size over the size of the map that is classified.
        voc2012: published mean IoU on the VOC 2012 test set in percent, None where there is none.
        conditions: what that figure was measured with; its meaning stands and falls with this.
        options: the keyword arguments that :func:`create_model` passes on.
    """

    name: str
    build: Callable[..., nn.Module]
    paper: Paper
    stride: int
    voc2012: float | None
    conditions: str
    options: tuple[str, ...]


_MODELS: dict[str, ModelInfo] = {}


def register(
    paper: Paper,
    *,
    stride: int,
    voc2012: float | None = None,
    conditions: str = "",
    family: Callable[..., nn.Module] | None = None,
) -> Callable[[Builder], Builder]:
    """Decorator that enters a builder under its function's name.

    A builder without an argument ``weights`` gets one: a file or a state dict, of ours or of a
    layout that :func:`fastseg.convert.load` knows, which also fills a trunk alone, or "shipped":
    those that come with fastseg.

    ``family`` is the function that a builder with ``**options`` passes them on to; what the builder
    itself decides is positional-only there.
    """

    def enter(build: Builder) -> Builder:
        options = dict(inspect.signature(build).parameters)
        if family is not None:
            options |= inspect.signature(family).parameters
        skipped = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        names = [n for n, p in options.items() if p.kind not in skipped]
        if "weights" not in names:
            build = _with_weights(build)
            names.append("weights")
        name = build.__name__
        _MODELS[name] = ModelInfo(name, build, paper, stride, voc2012, conditions, tuple(names))
        return build

    return enter


def _with_weights(build: Builder) -> Builder:
    """The builder with one more argument, ``weights``: what :func:`fastseg.convert.load` takes, or
    "shipped"."""

    signature = inspect.signature(build)

    @functools.wraps(build)
    def builder(*args: Any, weights: Any = None, **options: Any) -> nn.Module:
        given = {**signature.bind_partial(*args, **options).arguments, **options}
        for name in ("num_classes", "in_channels"):
            value = given.get(name, 1)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(
                    f"{build.__name__}: {name} must be a positive integer, got {value!r}"
                )
        model = build(*args, **options)
        if weights is not None:
            from ..convert import load  # which knows the networks

            load(shipped_path(build.__name__) if weights == "shipped" else weights, model)
        return model

    weights = inspect.Parameter("weights", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    signature = signature.replace(parameters=[*parameters[:at], weights, *parameters[at:]])
    builder.__signature__ = signature  # type: ignore[attr-defined]
    return cast(Builder, builder)


def list_models(pattern: str = "*") -> list[str]:
    """Names of all networks that match a shell pattern such as ``"*_resnet101"``, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_info(name: str) -> ModelInfo:
    """What is known of a network.

    Raises:
        ValueError: there is no network of this name.
    """
    if name not in _MODELS:
        import difflib

        near = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}" if near else "`fastseg models` lists them"
        raise ValueError(f"create_model: no network is called {name!r}; {hint}")
    return _MODELS[name]


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a network by name: ``create_model("pspnet_resnet50", num_classes=19)``.

    Args:
        name: one of :func:`list_models`.
        **options: what the builder takes: ``num_classes``, ``in_channels``, ``weights`` and the
            options of the paper, such as ``output_stride`` or ``aux``.

    Raises:
        ValueError: there is no such network or it has no such option.
    """
    info = model_info(name)
    for option in options:
        if option not in info.options:
            raise ValueError(
                f"create_model: {name} has no option {option!r}; it has {', '.join(info.options)}"
            )
    return info.build(**options)
