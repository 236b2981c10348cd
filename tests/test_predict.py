"""Predictor on networks whose answer is known, and the shipped network on drawn pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fastseg
from fastseg import predict
from fastseg.models.checkpoint import ModelCard, save_checkpoint
from fastseg.predict import Predictor


class Brighter(nn.Module):
    """A network that knows three classes: dark, grey and bright pixels; exact at every pixel."""

    def forward(self, x):
        y = x.mean(1)
        return {"out": 40 * torch.stack([0.25 - y, 0.1 - (y - 0.5).abs(), y - 0.75], 1)}


BRIGHTER = {
    "classes": ("dark", "grey", "bright"),
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}


def steps(H: int, W: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of three grey levels in blocks, and its classes."""
    blocks = np.random.default_rng(0).integers(0, 3, (-(-H // 16), -(-W // 16)))
    mask = blocks.repeat(16, 0).repeat(16, 1)[:H, :W].astype(np.uint8)
    levels = np.array([20, 128, 230], np.uint8)
    return levels[mask][:, :, None].repeat(3, 2), mask


@pytest.mark.parametrize("size", [(100, 130), (1, 1), (1, 300), (300, 1), (63, 64), (5, 70)])
def test_mask_probs_and_shares(size):
    image, mask = steps(*size)
    r = Predictor(Brighter(), **BRIGHTER)(image)
    assert r.mask.dtype == np.uint8
    np.testing.assert_array_equal(r.mask, mask)
    np.testing.assert_array_equal(r.image, image)
    assert r.probs.shape == (3, *size)
    assert r.probs.dtype == np.float32
    np.testing.assert_allclose(r.probs.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(r.probs.argmax(0), mask)
    assert sum(r.shares.values()) == pytest.approx(1)
    assert r.shares["grey"] == pytest.approx((mask == 1).mean()) if (mask == 1).any() else True
    assert list(r.shares.values()) == sorted(r.shares.values(), reverse=True)
    assert set(r.timings) == {"read", "network", "upsample"}


@pytest.mark.parametrize(("tile", "overlap"), [(64, 0.25), (64, 0), (100, 0.5), (999, 0)])
def test_tiles_give_what_the_whole_gives(tile, overlap):
    image, mask = steps(150, 211)
    whole = Predictor(Brighter(), **BRIGHTER)(image)
    tiled = Predictor(Brighter(), tile=tile, overlap=overlap, **BRIGHTER)(image)
    np.testing.assert_array_equal(tiled.mask, mask)
    np.testing.assert_allclose(tiled.probs, whole.probs, atol=1e-5)


def test_large_photos_are_tiled_by_themselves(monkeypatch):
    monkeypatch.setattr(predict, "_WHOLE_PIXELS", 100 * 100)
    monkeypatch.setattr(predict, "_TILE", 80)
    seen = []

    class Watched(Brighter):
        def forward(self, x):
            seen.append(tuple(x.shape[-2:]))
            return super().forward(x)

    image, mask = steps(90, 200)
    np.testing.assert_array_equal(Predictor(Watched(), **BRIGHTER)(image).mask, mask)
    assert len(seen) > 1
    assert max(map(max, seen)) == 80
    seen.clear()
    Predictor(Watched(), **BRIGHTER)(image[:, :110])
    assert seen == [(90, 110)]


class TileMean(nn.Module):
    """A network whose answer is the mean brightness of what it sees."""

    def forward(self, x):
        mean = x.mean((1, 2, 3), keepdim=True).expand(-1, 1, *x.shape[2:])
        return torch.cat([-mean, mean], 1)


def test_tiles_blend_alike_from_both_sides():
    image = np.broadcast_to(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], (64, 96, 3))
    predictor = Predictor(TileMean(), tile=64, overlap=0.5)
    there, back = (predictor(np.ascontiguousarray(a)).probs for a in (image, image[:, ::-1]))
    assert np.ptp(there[1, 0]) > 0.1  # two tiles that differ
    np.testing.assert_allclose(there, back[:, :, ::-1], atol=1e-5)


@pytest.mark.parametrize("tta", [["flip"], ["ms"], ["flip", "ms"]])
def test_augmented_views_agree_on_what_is_plain(tta):
    image, mask = steps(96, 128)
    r = Predictor(Brighter(), tta=tta, **BRIGHTER)(image)
    np.testing.assert_allclose(r.probs.sum(0), 1, atol=1e-5)
    inside = np.zeros(mask.shape, bool)  # away from the borders of the blocks, which blur
    inside.reshape(6, 16, 8, 16)[:, 4:12, :, 4:12] = True
    np.testing.assert_array_equal(r.mask[inside], mask[inside])


def test_flip_is_undone():
    class LeftHalf(nn.Module):
        def forward(self, x):
            ramp = torch.linspace(1, -1, x.shape[-1]).expand(x.shape[0], 1, *x.shape[-2:])
            return torch.cat([0 * ramp, ramp], 1)

    image = np.zeros((64, 64, 3), np.uint8)
    plain = Predictor(LeftHalf())(image)
    both = Predictor(LeftHalf(), tta="flip")(image)
    np.testing.assert_allclose(both.probs, (plain.probs + plain.probs[..., ::-1]) / 2, atol=1e-6)


def test_coarse_logits_are_interpolated():
    """A network that scores at 1/8: its map is brought to the photo bilinearly."""

    class Coarse(nn.Module):
        def forward(self, x):
            return nn.functional.avg_pool2d(x, 8)

    image, _ = steps(64, 96)
    r = Predictor(Coarse(), mean=(0, 0, 0), std=(1, 1, 1))(image)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    want = nn.functional.interpolate(Coarse()(x), (64, 96), mode="bilinear").softmax(1)[0]
    np.testing.assert_allclose(r.probs, want.numpy(), atol=1e-5)
    assert r.classes == ("0", "1", "2")


def test_one_logit_is_two_classes():
    class Sign(nn.Module):
        def forward(self, x):
            return x.mean(1, keepdim=True)

    image, mask = steps(80, 70)
    r = Predictor(Sign(), mean=(0.3,) * 3, std=(0.01,) * 3, classes=("background", "object"))(image)
    np.testing.assert_array_equal(r.mask, mask > 0)
    assert r.probs.shape == (2, 80, 70)


def test_fixed_input_size():
    seen = []

    class Watched(Brighter):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return super().forward(x)

    r = Predictor(Watched(), size=(48, 32), **BRIGHTER)(np.full((300, 7, 3), 230, np.uint8))
    assert seen == [(1, 3, 48, 32)]
    assert r.mask.shape == (300, 7)
    assert r.mask.min() == 2


class Recorder(nn.Module):
    """Stands where a CRF stands: notes what it is given and turns the classes around."""

    def forward(self, p, image):
        self.p, self.image = p, image
        return p.flip(1)


def test_crf_gets_probabilities_and_the_photo():
    image, mask = steps(80, 100)
    crf = Recorder()
    r = Predictor(Brighter(), crf=crf, **BRIGHTER)(image)
    assert crf.p.shape == (1, 3, 80, 100)
    torch.testing.assert_close(crf.p.sum(1), torch.ones(1, 80, 100))
    assert crf.image.dtype == torch.float32
    np.testing.assert_array_equal(crf.image[0].permute(1, 2, 0).numpy(), image)
    np.testing.assert_array_equal(r.mask, 2 - mask)
    assert "crf" in r.timings


def test_crf_presets(tmp_path):
    """By name; "default" takes what the model card says."""
    network = fastseg.models.create_model("u2netp")
    card = ModelCard("u2netp", size=(32, 32), crf={"iters": 7, "bilateral": [[9, 8, 7.0]]})
    save_checkpoint(tmp_path / "w.safetensors", network.state_dict(), card)
    weights = tmp_path / "w.safetensors"
    own = Predictor(weights=weights, crf="default").crf
    assert own.iters == 7
    assert own.unary == "probs"
    assert own.bilateral_widths == [(9, 8)]
    other = Predictor(weights=weights, crf="krahenbuhl").crf
    assert other.iters == 10
    assert other.bilateral_widths == [(80, 13)]
    assert Predictor(Brighter(), crf="default").crf.bilateral_widths == [(50, 5)]


def test_crf_cleans_what_the_colours_contradict():
    """A network that is wrong about single pixels of a photo of two plain halves."""

    class Noisy(Brighter):
        def forward(self, x):
            y = super().forward(x)["out"] / 20
            y[:, 1, 20, 10::12] += 2
            return y

    image = np.full((64, 64, 3), 30, np.uint8)
    image[:, 32:] = 230
    halves = np.zeros((64, 64))
    halves[:, 32:] = 2
    assert (Predictor(Noisy(), **BRIGHTER)(image).mask == 1).sum() == 5
    refined = Predictor(Noisy(), crf="default", **BRIGHTER)(image)
    np.testing.assert_array_equal(refined.mask, halves)
    np.testing.assert_allclose(refined.probs.sum(0), 1, atol=1e-5)


def test_crf_on_small_padded_photos_sees_the_photo_only():
    crf = Recorder()
    Predictor(Brighter(), crf=crf, **BRIGHTER)(steps(9, 30)[0])
    assert crf.p.shape == (1, 3, 9, 30)
    assert crf.image.shape == (1, 3, 9, 30)


def test_crf_of_large_photos_works_at_a_bounded_size(monkeypatch):
    monkeypatch.setattr(predict, "_CRF_PIXELS", 64 * 64)
    crf = Recorder()
    r = Predictor(Brighter(), crf=crf, **BRIGHTER)(np.full((256, 128, 3), 20, np.uint8))
    H, W = crf.image.shape[-2:]
    assert 60 * 60 < H * W <= 64 * 64
    assert crf.p.shape[-2:] == (H, W)
    assert r.mask.shape == (256, 128)
    assert r.mask.min() == r.mask.max() == 2


def test_pictures(tmp_path):
    image, mask = steps(40, 60)
    r = Predictor(Brighter(), **BRIGHTER)(image)
    assert r.overlay().size == (60, 40)
    assert r.compare().height == 40
    assert r.compare().width >= 180
    paths = r.save(tmp_path / "new", "a", ("mask", "overlay", "compare", "probs"), note="how")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "a_compare.png",
        "a_mask.png",
        "a_overlay.png",
        "a_probs.npz",
    ]
    saved = Image.open(paths["mask"])
    assert saved.mode == "P"
    assert saved.info["fastseg"] == "how"
    np.testing.assert_array_equal(np.asarray(saved), mask)
    with np.load(paths["probs"]) as file:
        np.testing.assert_allclose(file["probs"], r.probs, atol=1e-3)
        assert list(file["classes"]) == ["dark", "grey", "bright"]
    with pytest.raises(ValueError, match="must be among mask, overlay, compare, probs, got 'gif'"):
        r.save(tmp_path, "a", ("gif",))


def test_overlay_tints_classes_and_darkens_background():
    class Sign(nn.Module):
        def forward(self, x):
            return x.mean(1, keepdim=True)

    image, mask = steps(64, 64)
    r = Predictor(Sign(), mean=(0.3,) * 3, std=(0.01,) * 3, classes=("background", "object"))(image)
    picture = np.asarray(r.overlay(alpha=0.5)).astype(int)
    assert set(picture[~r._outline() & (mask == 0)].ravel()) == {10}  # half of 20
    red, green, _ = picture[~r._outline() & (mask == 1)][0]
    assert (red, green) == (128, 64)  # half of 128 plus half of the colour (128, 0, 0)
    assert (picture[r._outline()] == 255).all()


def test_named_network_with_weights_file(tmp_path):
    with torch.device("cpu"):
        network = fastseg.models.create_model("u2netp", num_classes=4)
    card = ModelCard("u2netp", {"num_classes": 4}, ("a", "b", "c", "d"), size=(32, 64))
    save_checkpoint(tmp_path / "w.safetensors", network.state_dict(), card)
    image, _ = steps(50, 40)
    by_card = Predictor(weights=str(tmp_path / "w.safetensors"))(image)
    assert by_card.classes == ("a", "b", "c", "d")
    by_hand = Predictor(network, size=(32, 64))(image)
    np.testing.assert_allclose(by_card.probs, by_hand.probs, atol=1e-6)


def test_weights_of_another_library_bring_their_normalisation(tmp_path):
    """Files without a card go through convert.load, which knows what each layout was trained on."""
    network = fastseg.models.create_model("u2netp", num_classes=2)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    p = Predictor("u2netp", weights=tmp_path / "w.safetensors", classes=("a", "b"), size=(32, 32))
    image, _ = steps(64, 64)
    want = Predictor(network, classes=("a", "b"), size=(32, 32))(image)
    np.testing.assert_allclose(p(image).probs, want.probs, atol=1e-6)


@pytest.mark.parametrize("size", [(200, 300), (1, 9), (700, 30)])
def test_shipped_network_finds_the_disk(size):
    """A red disk on a grey ramp, at any size; the mask is the disk up to the network's 1/320."""
    H, W = size
    y, x = np.mgrid[:320, :320]
    disk = (x - 150) ** 2 + (y - 160) ** 2 < 90**2
    picture = np.stack([120 + x // 8, 120 + x // 8, 110 + y // 8], 2).astype(np.uint8)
    picture[disk] = (220, 30, 30)
    photo = Image.fromarray(picture).resize((W, H), Image.Resampling.BOX)
    r = Predictor("u2netp")(photo)
    assert r.mask.shape == size
    assert r.classes == ("background", "object")
    if min(size) > 9:
        want = np.asarray(Image.fromarray(disk).resize((W, H), Image.Resampling.NEAREST))
        both, either = (r.mask & want).sum(), (r.mask | want).sum()
        assert both / either > 0.95


def test_shipped_network_is_the_same_every_time():
    image, _ = steps(90, 120)
    predictor = Predictor("u2netp")
    first, second = predictor(image), predictor(image)
    np.testing.assert_array_equal(first.mask, second.mask)
    np.testing.assert_array_equal(first.probs, second.probs)


def test_results_do_not_change_when_the_next_photo_comes():
    network = fastseg.models.create_model("u2netp", num_classes=3)
    predictor = Predictor(network, size=(64, 64))
    image, _ = steps(80, 96)
    first = predictor(image)
    second = predictor(255 - image)
    alone = Predictor(network, size=(64, 64))(image)
    np.testing.assert_array_equal(first.probs, alone.probs)
    assert not np.array_equal(first.probs, second.probs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device must be auto, cpu or cuda, got 'gpu'"),
        ({"tile": 8}, "tile must be at least 64 pixels, got 8"),
        ({"overlap": 1}, "overlap must be from 0 to below 1, got 1"),
        ({"tta": ["spin"]}, "tta must be of flip, ms, got 'spin'"),
        ({"tta": "spin"}, "tta must be of flip, ms, got 'spin'"),
        ({"device": "meta"}, "device must be auto, cpu or cuda, got 'meta'"),
        ({"model": 3}, "model must be a network or the name of one, got 3"),
        ({"crf": 3}, "crf must be a preset's name or a module, got 3"),
        ({"mean": (0, 0)}, "mean must be three numbers"),
        ({"std": (1, 1, float("nan"))}, "std must be three numbers"),
        ({"std": (1, 0, 1)}, "std must be positive"),
        ({"size": 64}, r"size must be \(H, W\) in pixels, got 64"),
        ({"size": (0, 64)}, r"size must be \(H, W\) in pixels"),
        ({"model": "u2nett"}, "no weights ship for 'u2nett', only for u2netp"),
        ({"model": None}, "model must be given"),
        ({"model": "u2netp", "weights": "F"}, "holds weights of segnet, got model u2netp"),
        ({"model": None, "weights": "G"}, "has no model card, so model must be given"),
        ({"model": "u2netp", "weights": "G"}, "must fit U2Net; missing from the source"),
    ],
)
def test_bad_arguments(options, message, tmp_path):
    tensors = {"fuse.bias": torch.ones(1)}
    save_file(tensors, tmp_path / "F.safetensors", metadata={"arch": '"segnet"'})
    save_file(tensors, tmp_path / "G.safetensors")
    options = {"model": Brighter()} | options
    if "weights" in options:
        options["weights"] = tmp_path / f"{options['weights']}.safetensors"
    with pytest.raises(ValueError, match=message):
        Predictor(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence():
    with pytest.raises(ValueError, match="torch must find a GPU for device cuda"):
        Predictor(Brighter(), device="cuda")


def test_wrong_number_of_class_names():
    with pytest.raises(ValueError, match=r"one name for each .* got 2 names for 3 classes"):
        Predictor(Brighter(), classes=("a", "b"))(steps(64, 64)[0])


@pytest.mark.parametrize(
    ("forward", "got"),
    [
        (lambda self, x: (x, x), "got tuple"),
        (lambda self, x: {"logits": x}, "got dict"),
        (lambda self, x: x.mean((2, 3)), r"got shape \(1, 3\)"),
    ],
)
def test_networks_that_return_something_else(forward, got):
    network = type("Network", (torch.nn.Module,), {"forward": forward})()
    with pytest.raises(ValueError, match=rf"must return logits \(N, L, h, w\), or a dict .* {got}"):
        Predictor(network)(steps(64, 64)[0])


def test_a_bad_photo_is_one_sentence(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 not really")
    with pytest.raises(ValueError, match=r"bad\.jpg: cannot be read as a picture"):
        Predictor(Brighter(), **BRIGHTER)(tmp_path / "bad.jpg")
