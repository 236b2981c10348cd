"""Float matrices as pydensecrf returns them: buffers that NumPy reads without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._C import BufferView

_C_NAMES = {
    "?": "bool",
    "b": "signed char",
    "B": "unsigned char",
    "h": "short",
    "H": "unsigned short",
    "i": "int",
    "I": "unsigned int",
    "l": "long",
    "L": "unsigned long",
    "q": "long long",
    "Q": "unsigned long long",
    "f": "float",
    "d": "double",
    "g": "long double",
}


def typed_array(value: Any, name: str, ndim: int, code: str = "f") -> np.ndarray:
    """The buffer of ``value`` as an array, held to the rules of a C-contiguous memory view."""
    if value is None:
        raise TypeError(f"Argument '{name}' must not be None")
    view = memoryview(value)
    if view.ndim != ndim:
        raise ValueError(
            f"Buffer has wrong number of dimensions (expected {ndim}, got {view.ndim})"
        )
    if view.format.lstrip("@=<") != code:
        got = _C_NAMES.get(view.format.lstrip("@=<"), view.format)
        raise ValueError(f"Buffer dtype mismatch, expected '{_C_NAMES[code]}' but got '{got}'")
    if not view.c_contiguous:
        raise ValueError("ndarray is not C-contiguous")
    return np.asarray(view)


class VectorXf(BufferView):
    """A float32 vector; ``numpy.array(v)`` reads it."""

    def __init__(self) -> None:
        super().__init__(np.zeros(0, np.float32))


class MatrixXf(BufferView):
    """A float32 matrix stored column by column; ``numpy.array(m)`` has its shape."""

    def __init__(self) -> None:
        super().__init__(np.zeros((0, 0), np.float32))


def vectorXf(arr: Any) -> VectorXf:
    vector = VectorXf()
    vector.source = typed_array(arr, "arr", 1).copy()
    return vector


def matrixXf(arr: Any) -> MatrixXf:
    matrix = MatrixXf()
    matrix.source = np.array(typed_array(arr, "arr", 2), order="F")
    return matrix
