"""``pydensecrf.densecrf``: a dense CRF that is set up term by term."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from numbers import Number
from typing import Any

import numpy as np
import torch

from ...ops.dense_crf import PairwiseTerm
from ...ops.gaussian_features import gaussian_lattice
from ...ops.permutohedral import NORMALIZATIONS, PermutohedralLattice
from .eigen import MatrixXf, typed_array


class KernelType(IntEnum):
    """How a kernel's features could be scaled in learning; inference is the same for all."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(IntEnum):
    """Which side of the kernel matrix is divided by its row sums."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType


class Unary:
    """A unary term. The CRF it is given to takes it over: a second CRF finds nothing in it."""

    _energy: np.ndarray | None = None

    def _move(self) -> np.ndarray | None:
        energy, self._energy = self._energy, None
        return energy


class ConstUnary(Unary):
    """Energies (nlabels, nvar)."""

    def __init__(self, u: Any) -> None:
        self._energy = typed_array(u, "u", 2).copy()


class LogisticUnary(Unary):
    """Energies L f from weights L (nlabels, d) and features f (d, nvar)."""

    def __init__(self, L: Any, f: Any) -> None:
        self._energy = typed_array(L, "L", 2) @ typed_array(f, "f", 2)


class DenseCRF:
    """A CRF over ``nvar`` points with ``nlabels`` labels."""

    _nvar: int
    _nlabel: int
    _grid: tuple[int, int] | None

    def __new__(cls, nvar: int, nlabels: int, *_: Any, **__: Any) -> DenseCRF:
        self = super().__new__(cls)
        self._setup(_integer(nvar), _integer(nlabels))
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _setup(self, nvar: int, nlabels: int) -> None:
        if nvar < 1 or nlabels < 1:
            raise ValueError(f"A CRF needs points and labels, got {nvar} and {nlabels}")
        self._nvar, self._nlabel = nvar, nlabels
        self._grid = None
        self._energy: np.ndarray | None = None
        self._terms: list[PairwiseTerm] = []

    def __reduce__(self) -> str:
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")

    def setUnary(self, u: Unary) -> None:
        if not isinstance(u, Unary):
            raise TypeError(
                f"Argument 'u' has incorrect type (expected Unary, got {type(u).__name__})"
            )
        energy = u._move()
        if energy is not None:
            self._check_unary(energy.shape)
        self._energy = energy

    def setUnaryEnergy(self, u: Any, f: Any = None) -> None:
        energy = typed_array(u, "u", 2)
        self._check_unary(energy.shape)
        if f is not None:
            features = typed_array(f, "f", 2)
            if features.shape != (self._nvar, self._nvar):
                raise ValueError(
                    "Bad shape for logistic features (Need "
                    f"{(self._nvar, self._nvar)}, got {features.shape})"
                )
            energy = energy @ features
        self._energy = energy.copy()

    def _check_unary(self, shape: tuple[int, ...]) -> None:
        if shape != (self._nlabel, self._nvar):
            raise ValueError(
                f"Bad shape for unary energy (Need {(self._nlabel, self._nvar)}, got {shape})"
            )

    def addPairwiseEnergy(
        self,
        features: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        f = typed_array(features, "features", 2)
        if f.shape[1] != self._nvar:
            raise ValueError(
                f"Bad shape for pairwise energy (Need (?, {self._nvar}), got {f.shape})"
            )
        if self._grid is None:
            self._grid = _guess_grid(f)
        self._add(f, compat, kernel, normalization)

    def _add(self, features: np.ndarray, compat: Any, kernel: int, normalization: int) -> None:
        compatibility = self._compatibility(compat)
        mode = _mode(kernel, normalization)
        if not features.flags.writeable:
            features = features.copy()
        points = torch.from_numpy(features.reshape(1, len(features), *(self._grid or (-1,))))
        self._terms.append(PairwiseTerm(PermutohedralLattice(points, mode), compatibility))

    def _compatibility(self, compat: Any) -> float | torch.Tensor:
        if isinstance(compat, Number):
            return float(compat)  # type: ignore[arg-type]
        ndim = memoryview(compat).ndim
        if ndim not in (1, 2):
            raise ValueError("LabelCompatibility of dimension >2 not meaningful.")
        values = typed_array(compat, "compat", ndim)
        if set(values.shape) != {self._nlabel}:
            raise ValueError(
                f"Bad shape for label compatibility (Need {(self._nlabel,) * ndim}, "
                f"got {values.shape})"
            )
        return torch.from_numpy(values.copy())

    def inference(self, niter: int) -> MatrixXf:
        return self._beliefs(max(0, _integer(niter)), None)

    def startInference(self) -> tuple[MatrixXf, MatrixXf, MatrixXf]:
        if self._energy is None:
            q = MatrixXf()
            q.source = np.zeros((self._nlabel, self._nvar), np.float32, order="F")
        else:
            q = self._beliefs(0, None)
        return q, MatrixXf(), MatrixXf()

    def stepInference(self, Q: MatrixXf, tmp1: MatrixXf, tmp2: MatrixXf) -> None:
        start = torch.from_numpy(np.ascontiguousarray(self._matrix(Q)))
        np.asarray(Q)[...] = np.asarray(self._beliefs(1, start.unsqueeze(0)))

    def klDivergence(self, Q: MatrixXf) -> float:
        """The objective of mean field, up to a constant and with the pairwise part not halved."""
        q = torch.from_numpy(np.ascontiguousarray(self._matrix(Q)))
        kl = (q.double() * q.clamp_min(1e-20).double().log()).sum()
        if self._energy is not None:
            kl += (q.double() * torch.from_numpy(self._energy).double()).sum()
        for term in self._terms:
            message = term.lattice().filter(q)
            c = term.coefficients(q.unsqueeze(0))
            kl -= (q * (c[:, None] * message if c.dim() == 1 else c @ message)).double().sum()
        return kl.item()

    def _matrix(self, Q: Any) -> np.ndarray:
        if Q is None:
            raise TypeError("Argument 'Q' must not be None")
        q = np.asarray(memoryview(Q))
        if q.shape != (self._nlabel, self._nvar):
            raise ValueError(f"Bad shape for Q (Need {(self._nlabel, self._nvar)}, got {q.shape})")
        return q

    def _beliefs(self, iterations: int, start: torch.Tensor | None) -> MatrixXf:
        energy = self._energy
        if energy is None:
            energy = np.zeros((self._nlabel, self._nvar), np.float32)
        unary = torch.from_numpy(energy).unsqueeze(0)
        lattices = [term.lattice() for term in self._terms]
        q = torch.ops.fastseg.dense_crf(
            unary,
            start,
            [tensor for lattice in lattices for tensor in lattice.tensors],
            [1] * len(lattices),
            [term.coefficients(unary).contiguous() for term in self._terms],
            *(self._grid or (1, self._nvar)),
            iterations,
            True,
            False,
        )
        matrix = MatrixXf()
        matrix.source = q[0].numpy().T
        return matrix


class DenseCRF2D(DenseCRF):
    """A CRF over the pixels of an image of width ``w`` and height ``h``, row by row."""

    def __new__(cls, w: int, h: int, nlabels: int, *_: Any, **__: Any) -> DenseCRF2D:
        self = object.__new__(cls)
        self._setup(_integer(w) * _integer(h), _integer(nlabels))
        self._grid = (_integer(h), _integer(w))
        return self

    def addPairwiseGaussian(
        self,
        sxy: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        assert self._grid is not None
        compatibility = self._compatibility(compat)
        lattice = gaussian_lattice(self._grid, _widths(sxy, 2), _mode(kernel, normalization))
        self._terms.append(PairwiseTerm(lattice, compatibility))

    def addPairwiseBilateral(
        self,
        sxy: Any,
        srgb: Any,
        rgbim: Any,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        assert self._grid is not None
        image = typed_array(rgbim, "rgbim", 3, "B")
        height, width = self._grid
        if image.shape[:2] != self._grid:
            raise ValueError(
                f"Bad shape for pairwise bilateral (Need {(height, width, 3)}, got {image.shape})"
            )
        if image.shape[2] != 3:
            raise ValueError(
                "addPairwiseBilateral only works for RGB images. For other types, use "
                "`utils.create_pairwise_bilateral` to build the features and add them with "
                "`addPairwiseEnergy`."
            )
        sx, sy = _widths(sxy, 2)
        features = np.empty((5, height, width), np.float32)
        features[0] = np.arange(width, dtype=np.float32) / np.float32(sx)
        features[1] = (np.arange(height, dtype=np.float32) / np.float32(sy))[:, None]
        for channel, sigma in enumerate(_widths(srgb, 3)):
            np.divide(image[..., channel], np.float32(sigma), out=features[2 + channel])
        self._add(features, compat, kernel, normalization)


def _widths(sigma: Any, count: int) -> Sequence[float]:
    given: Any = [sigma] * count if isinstance(sigma, Number) else sigma[:count]
    values = [float(s) for s in given]
    if len(values) < count:
        raise IndexError(f"Needs one standard deviation or {count} of them, got {sigma}")
    if not all(0 < s < float("inf") for s in values):
        raise ValueError(f"Standard deviations must be positive and finite, got {sigma}")
    return values


def _mode(kernel: int, normalization: int) -> str:
    KernelType(_integer(kernel))
    return NORMALIZATIONS[NormalizationType(_integer(normalization))]


def _integer(value: Any) -> int:
    if not isinstance(value, Number):
        raise TypeError(f"an integer is required, got {type(value).__name__}")
    return int(value)  # type: ignore[call-overload]


def _guess_grid(features: np.ndarray) -> tuple[int, int]:
    """The rows and columns of pixels behind the features of ``utils``, whose first feature is the
    row divided by its width. Only the order of work depends on the guess."""
    points = features.shape[1]
    changes = np.flatnonzero(features[0] != features[0, 0]) if len(features) else features[:0]
    width = int(changes[0]) if len(changes) else points
    return (points // width, width) if width > 1 and points % width == 0 else (1, points)
