"""Reading photographs of every kind, and writing masks."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastseg.image import atomic_write, mask_image, read_image, voc_palette


@pytest.fixture
def rgb() -> np.ndarray:
    """5 x 7 random colours."""
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_every_kind_of_source_gives_the_same_pixels(rgb, tmp_path):
    Image.fromarray(rgb).save(tmp_path / "photo.png")
    chw = torch.from_numpy(rgb).permute(2, 0, 1)
    sources = [
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        Image.fromarray(rgb),
        rgb,
        rgb[::-1].copy()[::-1],  # negative stride
        rgb / 255,
        (rgb / 255).astype(np.float16),
        rgb.astype(np.uint16) * 257,
        chw,
        chw[None],
        chw.double() / 255,
        np.dstack([rgb, np.full((5, 7), 255, np.uint8)]),
    ]
    for source in sources:
        image = read_image(source)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.flags.writeable
        assert not np.shares_memory(image, rgb)
        np.testing.assert_array_equal(image, rgb)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]
)
def test_every_mode_of_a_picture(mode):
    """A grey ramp stays the same ramp; 3 levels of slack for the conversions' rounding."""
    ramp = np.repeat(np.linspace(0, 255, 16).round().astype(np.uint8)[None], 4, 0)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(ramp).convert(mode)
    else:
        grey = Image.fromarray(ramp)
        image = (grey if mode == "P" else grey.convert("RGB")).convert(mode)
    got = read_image(image)
    want = np.repeat(ramp[:, :, None], 3, 2)
    if mode == "1":
        assert set(np.unique(got)) == {0, 255}
    else:
        assert np.abs(got.astype(int) - want).max() <= 3


def test_sixteen_bit_png(tmp_path):
    values = np.array([[0, 257 * 7, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png")[0, :, 0], [0, 7, 255])


def test_float_tiff_from_0_to_1(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "float.tif")[0, :, 0], [0, 128, 255])


def test_transparent_pixels_are_white(tmp_path):
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0, 1, 3] = 255
    np.testing.assert_array_equal(read_image(rgba)[0], [[255] * 3, [0] * 3])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 0, 0, 0])
    palette.save(tmp_path / "clear.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png")[0], [[255] * 3, [0] * 3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(rgb, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    upright = {1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1]}
    upright |= {
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: np.rot90(rgb, 2).transpose(1, 0, 2),
        8: np.rot90(rgb, 1),
    }
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), upright[orientation])


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_thin_pictures(size, tmp_path):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    assert read_image(tmp_path / "thin.png").shape == (size[1], size[0], 3)


def damaged_files(folder):
    good = folder / "good.png"
    Image.effect_noise((40, 40), 90).save(good)
    data = good.read_bytes()
    Image.open(good).convert("RGB").save(folder / "good.jpg")
    jpeg = (folder / "good.jpg").read_bytes()
    return {
        "empty.png": b"",
        "text.jpg": b"this is no picture",
        "cut.png": data[: len(data) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "flipped.png": data[:60] + bytes(255 - b for b in data[60:90]) + data[90:],
        "header.png": data[:20],
    }


@pytest.mark.parametrize(
    "name", ["empty.png", "text.jpg", "cut.png", "cut.jpg", "flipped.png", "header.png"]
)
def test_damaged_files_are_one_sentence(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(damaged_files(tmp_path)[name])
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as a picture \(.+\)"):
        read_image(path)


def test_picture_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"huge\.png: cannot be read as a picture"):
        read_image(tmp_path / "huge.png")


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        read_image("nowhere.jpg")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"with C = 1, 3 or 4, got shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"must have pixels, got shape \(0, 4, 3\)"),
        (np.full((2, 2), 200.0), "from 0 to 1, got 200 to 200; divide by 255 or pass uint8"),
        (np.full((2, 2), np.nan), "from 0 to 1, got nan"),
        (np.zeros((2, 2), np.int64), "must be uint8, uint16, bool or float, got int64"),
        (torch.zeros(2, 3, 4, 4), r"must be one photo .*, got shape \(2, 3, 4, 4\)"),
        (None, "must be a path, PIL image, array or tensor, got NoneType"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "must fit in 16 bits, got up to 70000"),
    ],
)
def test_other_bad_input(source, message):
    with pytest.raises(ValueError, match=message):
        read_image(source)


def test_mask_image_keeps_class_numbers_and_has_the_voc_colours(tmp_path):
    mask = np.array([[0, 1, 2], [15, 20, 255]], np.uint8)
    mask_image(mask).save(tmp_path / "mask.png")
    image = Image.open(tmp_path / "mask.png")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), mask)
    colours = np.asarray(image.convert("RGB"))
    # Background, aeroplane, bicycle, person, tv/monitor, void of the VOC development kit.
    np.testing.assert_array_equal(colours[0], [[0, 0, 0], [128, 0, 0], [0, 128, 0]])
    np.testing.assert_array_equal(colours[1], [[192, 128, 128], [0, 64, 128], [224, 224, 192]])
    assert len(np.unique(voc_palette(), axis=0)) == 256


def test_atomic_write_leaves_nothing_half_done(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as unfinished:
        unfinished.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def interrupted():
        with atomic_write(path) as unfinished:
            unfinished.write_text("tw")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_32_bit_integers_of_16_bits():
    image = Image.fromarray(np.array([[0, 32896, 65535]], np.int32))
    assert image.mode == "I"
    assert read_image(image)[0, :, 0].tolist() == [0, 128, 255]
