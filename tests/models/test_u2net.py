"""U2-Net: the paper's sizes, and the shipped weights against ONNX Runtime on the original file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseg.models import count_parameters, create_model, u2net, u2netp
from fastseg.models.u2net import RSU

REFERENCE = Path(__file__).with_name("u2netp_onnxruntime.npz")


def drawn_picture() -> Tensor:
    """(1, 3, 320, 320) normalised RGB: a shaded disk on a gradient, the same on every machine."""
    y, x = np.mgrid[:320, :320]
    disk = (x - 190) ** 2 + (y - 140) ** 2 < 80**2
    picture = np.stack([x * 3 // 8, 90 + y // 4, 130 - x // 4], 2)
    picture[disk] = np.stack([250 - x // 4, 40 + y // 4, 30 + 0 * x], 2)[disk]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = (picture / 255 - mean) / std
    return torch.from_numpy(normalised.transpose(2, 0, 1)[None].astype(np.float32))


@pytest.fixture(scope="module")
def shipped():
    return u2netp(weights="shipped").eval()


@torch.inference_mode()
def test_shipped_weights_compute_what_the_original_file_does(shipped):
    """All seven maps, every 8th pixel. Tolerance: float32 sums in another order, through 119
    convolutions; measured 3e-5, where the maps span 0 to 1."""
    reference = np.load(REFERENCE)["probabilities"]
    assert reference.min() < 0.01
    assert reference.max() > 0.99
    maps = torch.cat(list(shipped(drawn_picture()).values()), 1).sigmoid()
    assert maps.shape == (1, 7, 320, 320)
    assert np.abs(maps[0, :, ::8, ::8].numpy() - reference).max() < 1e-4


@pytest.mark.parametrize(("build", "published"), [(u2net, 44_009_869), (u2netp, 1_131_181)])
def test_parameter_count_of_the_authors_code(build, published):
    """Theirs also has a bias in each of the 112 convolutions that a batch norm follows."""
    with torch.device("meta"):
        model = build()
    biases = sum(
        m.conv.out_channels for m in model.modules() if hasattr(m, "conv") and hasattr(m, "bn")
    )
    assert count_parameters(model) + biases == published


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (33, 47), (96, 64)])
@torch.inference_mode()
def test_any_size(size):
    y = u2netp(num_classes=3).eval()(torch.randn(2, 3, *size))
    assert list(y) == ["out", "side1", "side2", "side3", "side4", "side5", "side6"]
    assert all(t.shape == (2, 3, *size) for t in y.values())


def test_every_parameter_gets_a_gradient():
    model = u2netp(num_classes=2)
    sum(y.square().mean() for y in model(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("levels", [4, None])
@torch.inference_mode()
def test_block_compiles_to_one_graph(levels):
    block = RSU(levels, 3, 4, 5).eval()
    x = torch.randn(1, 3, 21, 18)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.slow  # 119 convolutions to trace
@torch.inference_mode()
def test_compiles_to_one_graph():
    model = u2netp().eval()
    x = torch.randn(1, 3, 40, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)["out"], model(x)["out"])


def test_create_model_takes_shipped_weights(shipped):
    model = create_model("u2netp", weights="shipped")
    assert torch.equal(model.fuse.weight, shipped.fuse.weight)


def test_weights_that_do_not_fit():
    with pytest.raises(ValueError, match="must fit U2Net"):
        u2netp(num_classes=5, weights="shipped")
    with pytest.raises(ValueError, match="no weights ship for 'u2net', only for u2netp"):
        u2net(weights="shipped")
