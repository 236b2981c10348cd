"""Photograph in, mask out: the whole job around a network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _C, convert
from .image import Photo, read_image
from .models import SegmentationModel, create_model
from .models.checkpoint import ModelCard, PathLike, read_card, shipped_path
from .models.common import resize
from .nn import DenseCRF
from .ops import upsample_argmax, upsample_softmax
from .optimize import optimize
from .result import Segmentation

TTA_KINDS = ("flip", "ms")
_SCALES = (0.75, 1.0, 1.25)  # what "ms" averages over
_WHOLE_PIXELS = 4_000_000  # larger photos go through a network without a fixed input size in tiles
_TILE = 1024  # side of those tiles
_CRF_PIXELS = 4_000_000  # larger photos are segmented at this size where a CRF refines
_MIN_SIDE = 64  # smaller photos are padded, so that the coarsest feature map has some pixels


class _Scores(nn.Module):
    """The logits of a network at the resolution it computes them in, where it can tell."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        if isinstance(network, SegmentationModel) and (
            type(network).forward is SegmentationModel.forward  # scores(), then a resize
        ):
            y: Any = network.scores(x)
        else:
            y = network(x)
        return y.get("out", y) if isinstance(y, Mapping) else y


class Predictor:
    """Segments photographs: ``Predictor("u2netp", crf="default")("photo.jpg").mask``.

    Reads, resizes and normalises the photo, runs the network, brings its scores to the size of the
    photo, refines them with a dense CRF if asked, and takes the most probable class. Deterministic.

    Args:
        model: the name of a network whose weights ship (``models.shipped_weights()``) or, with
            ``weights``, of any network; or a module that maps (N, 3, H, W) to logits (N, L, h, w),
            or to a dict with those under "out". One logit means two classes: the second where it
            is positive.
        weights: a file that :func:`fastseg.convert.load` can load into the network; if it holds a
            :class:`ModelCard`, ``model`` may be left out.
        crf: refines the probabilities: "default", with the parameters that the model card gives;
            a preset of :class:`fastseg.nn.DenseCRF`; or a module that maps probabilities
            (1, L, H, W) and the photo (1, 3, H, W), 0 to 255, to probabilities. Photos of more
            than 4 million pixels are then segmented at that size.
        device: "auto" takes the GPU if torch and fastseg both have kernels for it.
        classes, mean, std, size: override what the model card says (:class:`ModelCard`).
        tile: side in pixels of square windows that the photo is cut into, whose probabilities are
            blended. None: the whole photo at once, except that networks without a fixed input size
            see photos of more than 4 million pixels in tiles of 1024.
        overlap: the part of a tile that it shares with the next, from 0 to below 1.
        tta: test-time augmentation, the mean of several predictions: "flip" mirrors, "ms" resizes
            by 0.75, 1 and 1.25; one name or several.

    Raises:
        ValueError: an argument is out of range, or weights and network do not fit.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        *,
        weights: PathLike | None = None,
        crf: str | nn.Module | None = None,
        device: str | torch.device = "auto",
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
        overlap: float = 0.25,
        tta: Collection[str] = (),
    ):
        if tile is not None and tile < _MIN_SIDE:
            raise ValueError(f"Predictor: tile must be at least {_MIN_SIDE} pixels, got {tile}")
        if not 0 <= overlap < 1:
            raise ValueError(f"Predictor: overlap must be from 0 to below 1, got {overlap:g}")
        tta = (tta,) if isinstance(tta, str) else tta
        for name in tta:
            if name not in TTA_KINDS:
                raise ValueError(f"Predictor: tta must be of {', '.join(TTA_KINDS)}, got {name!r}")
        self.device = _device(device)
        network, card = _load(model, weights, classes)
        self.card = replace(
            card,
            classes=tuple(card.classes if classes is None else classes),
            mean=tuple(card.mean if mean is None else mean),
            std=tuple(card.std if std is None else std),
            size=card.size if size is None else size,
        )
        _check_card(self.card)
        if crf is not None and not isinstance(crf, str | nn.Module):
            raise ValueError(f"Predictor: crf must be a preset's name or a module, got {crf!r}")
        self.model = network.eval().to(self.device)
        self._run: nn.Module = _Scores(network).eval()
        if self.device.type == "cpu":
            self._run = optimize(self._run)
        self._align_corners = bool(getattr(network, "align_corners", False))
        self._mean, self._std = (
            torch.tensor(v, device=self.device).mul(255).view(1, 3, 1, 1)
            for v in (self.card.mean, self.card.std)
        )
        if isinstance(crf, str):
            given = self.card.crf if crf == "default" else {}
            crf = DenseCRF.from_preset(crf, unary="probs", **given)
        self.crf = None if crf is None else crf.to(self.device)
        self.tile, self.overlap = tile, overlap
        scales = _SCALES if "ms" in tta else (1.0,)
        self._views = list(product(scales, (False, True) if "flip" in tta else (False,)))

    @torch.inference_mode()
    def __call__(self, photo: Photo) -> Segmentation:
        """Segments one photograph; see :func:`fastseg.image.read_image` for what it may be.

        Raises:
            ValueError: it is no picture or is damaged, or the network does not fit ``classes``.
            OSError: the file cannot be opened.
        """
        timings: dict[str, float] = {}
        with self._timed(timings, "read"):
            image = read_image(photo)
        H, W = image.shape[:2]
        x = self._to_batch(image)
        size = x.shape[2], x.shape[3]  # of the photo, or more where it has a border
        if self.crf is not None:
            x = _at_most(x, _CRF_PIXELS)
        tile = self._tile_side(x)
        probs: Callable[[], Tensor]
        if tile or self.crf is not None or len(self._views) > 1:
            p = self._in_tiles(x, tile, timings) if tile else self._mean_of_views(x, timings)
            if self.crf is not None:
                with self._timed(timings, "crf"):
                    p = self._refine(p[..., :H, :W], x[..., :H, :W])
                size = H, W
            maps, corners = p, False
            probs = lambda: resize(p, size, False)  # noqa: E731
        else:  # labels straight from the scores, probabilities only when somebody asks for them
            maps = scores = self._scores(x, timings)
            corners = self._align_corners
            probs = lambda: upsample_softmax(scores, size, corners)  # noqa: E731
        with self._timed(timings, "upsample"):
            labels = upsample_argmax(maps, size, corners)
            assert isinstance(labels, Tensor)
        names = self.card.classes or tuple(map(str, range(maps.shape[1])))
        if len(names) != maps.shape[1] or len(names) > 256:
            raise ValueError(
                "Predictor: classes must be one name for each of at most 256 classes, "
                f"got {len(names)} names for {maps.shape[1]} classes"
            )
        return Segmentation(
            image,
            labels[0, :H, :W].cpu().numpy(),
            lambda: probs()[0, :, :H, :W].cpu().numpy(),
            names,
            timings,
        )

    def _to_batch(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> (1, 3, H, W) uint8, channels-last; small photos get a border."""
        H, W = image.shape[:2]
        if self.card.size is None and min(H, W) < _MIN_SIDE:
            pad = (0, max(0, _MIN_SIDE - H)), (0, max(0, _MIN_SIDE - W)), (0, 0)
            image = np.pad(image, pad, mode="edge")
        return torch.from_numpy(image).permute(2, 0, 1)[None]

    def _tile_side(self, x: Tensor) -> int | None:
        """Side of the tiles that x (1, 3, H, W) is cut into, None where it is seen whole."""
        H, W = x.shape[-2:]
        tile = self.tile
        if tile is None and self.card.size is None and H * W > _WHOLE_PIXELS:
            tile = _TILE
        return tile if tile and tile < max(H, W) else None

    def _in_tiles(self, x: Tensor, tile: int, timings: dict[str, float]) -> Tensor:
        """x (1, 3, H, W) uint8 -> (1, L, H, W) probabilities, blended where tiles overlap."""
        H, W = x.shape[-2:]
        total, weights = torch.zeros(()), torch.zeros(H, W)
        for top, left in product(*(_starts(n, tile, self.overlap) for n in (H, W))):
            at = (..., slice(top, top + tile), slice(left, left + tile))
            p = self._mean_of_views(x[at], timings).cpu()
            if total.dim() == 0:
                total = torch.zeros(1, p.shape[1], H, W)
            ramps = [_ramp(n, tile, self.overlap) for n in p.shape[-2:]]
            weight = ramps[0][:, None] * ramps[1]
            total[at] += p * weight
            weights[at] += weight
        return total.div_(weights)

    def _mean_of_views(self, x: Tensor, timings: dict[str, float]) -> Tensor:
        """x (1, 3, h, w) uint8 -> (1, L, h, w) probabilities, mean over the augmentations."""
        total: Tensor | None = None
        for scale, flip in self._views:
            scores = self._scores(x, timings, scale, flip)
            with self._timed(timings, "upsample"):
                p = upsample_softmax(scores, (x.shape[2], x.shape[3]), self._align_corners)
                p = p.flip(-1) if flip else p
                total = p if total is None else total.add_(p)
        assert total is not None
        return total.div_(len(self._views))

    def _scores(
        self, x: Tensor, timings: dict[str, float], scale: float = 1.0, flip: bool = False
    ) -> Tensor:
        """x (1, 3, h, w) uint8 -> (1, L, h', w') logits at the network's own resolution."""
        with self._timed(timings, "network"):
            base = self.card.size or x.shape[-2:]
            size = [max(1, round(side * scale)) for side in base]
            if size != list(x.shape[-2:]):  # on 8-bit values: the fast path of the CPU
                x = F.interpolate(x, size, mode="bilinear", antialias=True)
            x = x.to(self.device).float()
            x = (x.flip(-1) if flip else x).sub_(self._mean).div_(self._std)
            y = self._run(x)
            if not isinstance(y, Tensor) or y.dim() != 4:
                got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(
                    "Predictor: the network must return logits (N, L, h, w), or a dict with those "
                    f'under "out", got {got}'
                )
            return F.pad(y, (0, 0, 0, 0, 1, 0)) if y.shape[1] == 1 else y  # logits (0, y)

    def _refine(self, p: Tensor, x: Tensor) -> Tensor:
        """p (1, L, H, W) probabilities refined on the photo x (1, 3, H, W) uint8."""
        assert self.crf is not None
        return self.crf(p.to(self.device), x.to(self.device).float())

    @contextmanager
    def _timed(self, timings: dict[str, float], stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start


def _device(name: str | torch.device) -> torch.device:
    """What ``device=`` means here.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        built = bool(_C.build_info()["cuda_archs"])
        name = "cuda" if built and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # torch does not know the word
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Predictor: device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("Predictor: torch must find a GPU for device cuda; use cpu or auto")
    return device


def _check_card(card: ModelCard) -> None:
    """Raise ValueError where what is said of inputs cannot be."""
    for name, values in (("mean", card.mean), ("std", card.std)):
        if len(values) != 3 or not all(math.isfinite(v) for v in values):
            raise ValueError(f"Predictor: {name} must be three numbers, R, G and B, got {values}")
    if min(card.std) <= 0:
        raise ValueError(f"Predictor: std must be positive, got {card.std}")
    size = card.size
    if size is not None and (not isinstance(size, Sequence) or len(size) != 2 or min(size) < 1):
        raise ValueError(f"Predictor: size must be (H, W) in pixels, got {size}")


def _load(
    model: str | nn.Module | None, weights: PathLike | None, classes: Sequence[str] | None
) -> tuple[nn.Module, ModelCard]:
    """The network with its weights, and what is known of it."""
    if not isinstance(model, str | nn.Module | None):
        raise ValueError(f"Predictor: model must be a network or the name of one, got {model!r}")
    if model is None and weights is None:
        raise ValueError("Predictor: model must be given, or weights that have a model card")
    card = None
    if isinstance(model, str) and weights is None:
        weights = shipped_path(model)
    if weights is not None and str(weights).endswith(".safetensors"):
        card = read_card(weights)
    if isinstance(model, nn.Module):
        network, card = model, card or ModelCard(type(model).__name__)
    elif card is not None:
        if model not in (None, card.arch):
            raise ValueError(
                f"Predictor: {weights} holds weights of {card.arch}, got model {model}"
            )
        network = create_model(card.arch, **card.options)
    elif model is None:
        raise ValueError(f"Predictor: {weights} has no model card, so model must be given")
    else:
        options = {"num_classes": len(classes)} if classes else {}
        network, card = create_model(model, **options), ModelCard(model, options)
    if weights is not None:
        loaded = convert.load(weights, network)
        if loaded.layout != "fastseg":
            mean, std = (tuple(v / 255 for v in values) for values in (loaded.mean, loaded.std))
            card = replace(card, mean=mean, std=std)
    return network, card


def _at_most(x: Tensor, pixels: int) -> Tensor:
    """x (1, 3, H, W) uint8, shrunk to this many pixels if it has more."""
    H, W = x.shape[-2:]
    shrink = (pixels / (H * W)) ** 0.5
    if shrink >= 1:
        return x
    small = [max(1, int(side * shrink)) for side in (H, W)]
    return F.interpolate(x, small, mode="bilinear", antialias=True)


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Evenly spaced first pixels of tiles that cover ``length`` with at least this overlap."""
    if length <= tile:
        return [0]
    count = 1 + math.ceil((length - tile) / max(1, tile * (1 - overlap)))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, tile: int, overlap: float) -> Tensor:
    """Weight of each pixel along a tile: rises over the overlap, 1 in the middle, falls again."""
    distance = torch.arange(length) + 0.5
    distance = torch.minimum(distance, length - distance)
    return (distance / max(1.0, tile * overlap)).clamp(max=1)
