"""Photographs of any kind in, palette masks out.

Everything that reads or writes a picture goes through here, so that a photograph means the same
array to prediction, training and evaluation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# What a folder of photographs is searched for.
PICTURE_NAME = re.compile(r"\.(avif|bmp|gif|jp2|jpe?g|png|ppm|tiff?|webp)$", re.IGNORECASE)
Photo = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor


def read_image(source: Photo) -> np.ndarray:
    """A photograph as upright 8-bit RGB.

    Grey, palette, CMYK and 16-bit pictures are converted, the EXIF orientation is applied, and
    transparent pixels are put on white, as a viewer shows them.

    Args:
        source: a path; a PIL image; a NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a
            tensor (H, W), (C, H, W) or (1, C, H, W) with those channels. Arrays and tensors hold
            uint8, uint16, bool, or floats from 0 to 1.

    Returns:
        (H, W, 3) uint8, C-contiguous.

    Raises:
        ValueError: the source is no picture, is damaged, or has another shape or range.
        OSError: the file cannot be opened.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source))
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, torch.Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise ValueError(
        "read_image: a photo must be a path, PIL image, array or tensor, "
        f"got {type(source).__name__}"
    )


def _from_file(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        try:
            with Image.open(file) as image:
                return _from_pil(image)
        except UnidentifiedImageError as error:
            raise ValueError(f"{path}: cannot be read as a picture (unknown format)") from error
        except Exception as error:  # decoders raise almost anything on a damaged file
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path}: cannot be read as a picture ({reason})") from error


def _from_pil(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel
        return _from_array(_to_8_bit(np.asarray(image), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Pixels of PIL's integer and float modes, whose range is a matter of who wrote the file."""
    top = values.max(initial=0)
    if mode == "F" and top <= 1:
        return values
    if mode.startswith("I;16") or 255 < top <= 65535:
        return values.clip(0, 65535).astype(np.uint16)
    if top > 65535:
        raise ValueError(f"grey values must fit in 16 bits, got up to {top:g}")
    return values.clip(0, 255).astype(np.uint8)


def _from_tensor(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dim() == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.dim() == 2:
        tensor = tensor[None]
    if tensor.dim() != 3 or tensor.shape[0] not in (1, 3, 4):
        raise ValueError(
            "read_image: a tensor must be one photo (H, W), (C, H, W) or (1, C, H, W) with C = 1, "
            f"3 or 4, got shape {tuple(tensor.shape)}"
        )
    if tensor.is_floating_point():
        tensor = tensor.float()  # NumPy has no bfloat16
    return _from_array(tensor.permute(1, 2, 0).numpy())


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            "read_image: an array must be one photo (H, W) or (H, W, C) with C = 1, 3 or 4, "
            f"got shape {array.shape}"
        )
    if array.size == 0:
        raise ValueError(f"read_image: a photo must have pixels, got shape {array.shape}")
    if array.dtype == np.uint16:
        array = (array + np.uint32(128)) // 257
    elif array.dtype == np.bool_:
        array = array * 255
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails
            raise ValueError(
                f"read_image: floats must be from 0 to 1, got {low:g} to {high:g}; "
                "divide by 255 or pass uint8"
            )
        array = np.rint(array.clip(0, 1) * 255)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"read_image: values must be uint8, uint16, bool or float, got {array.dtype}"
        )
    array = array.astype(np.uint8, order="C")  # always a copy: the result is the caller's
    if array.shape[2] == 4:
        return _from_pil(Image.fromarray(array))
    return array if array.shape[2] == 3 else np.repeat(array, 3, 2)


def voc_palette() -> np.ndarray:
    """(256, 3) uint8: the colours of PASCAL VOC, whose bits are those of the class number."""
    number = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((number >> channel & 1) << (7 - bit)).astype(np.uint8)
        number >>= 3
    return palette


def mask_image(mask: np.ndarray) -> Image.Image:
    """A (H, W) uint8 mask as a palette picture: mode P, pixel value = class, VOC colours."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    return image


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name to write to that becomes ``path`` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
