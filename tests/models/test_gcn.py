import pytest
import torch.nn.functional as F

from fastseg.models.gcn import gcn
from fastseg.nn import GlobalConv2d

from .reference import DEPTH, SMALL_RESNET, STRIDE_32, Weights, assert_same_network, resnet, up


def restatement(w: Weights, x, k, mode):
    def refine(y, name):
        z = F.relu(w.conv(y, name + ".conv1", padding=1))
        return y + w.conv(z, name + ".conv2", padding=1)

    def larger(y, i, like):
        if mode == "bilinear":
            return up(y, like, True)
        groups = 3 if mode == "grouped" else 1
        y = F.conv_transpose2d(y, w[f"up.{i}.deconv.weight"], stride=2, padding=1, groups=groups)
        return y[:, :, : like.shape[2], : like.shape[3]]

    y = None
    for i, c in enumerate(reversed(resnet(w, x, *STRIDE_32))):
        p = k // 2
        left = w.conv(c, f"gcn.{i}.l1", padding=(p, 0))
        left = w.conv(left, f"gcn.{i}.l2", padding=(0, p))
        right = w.conv(c, f"gcn.{i}.r1", padding=(0, p))
        right = w.conv(right, f"gcn.{i}.r2", padding=(p, 0))
        score = refine(left + right, f"refine.{i}")
        y = score if y is None else refine(larger(y, i - 1, score) + score, f"fuse.{i - 1}")
    half = F.max_pool2d(x, 2, ceil_mode=True)  # of the size wanted
    y = refine(larger(y, 3, half), "last.0")
    return {"out": refine(larger(y, 4, x), "last.1")}


@pytest.mark.parametrize(("k", "mode"), [(15, "dense"), (7, "grouped"), (3, "bilinear")])
def test_restatement(k, mode):
    model = gcn(DEPTH, **SMALL_RESNET, kernel_size=k, upsample=mode)
    assert_same_network(
        model, lambda w, x: restatement(w, x, k, mode), (2, 2, 64, 64), (1, 2, 37, 70)
    )


def test_bad_upsampling():
    with pytest.raises(ValueError, match="upsample must be dense, grouped or bilinear, got 'x'"):
        gcn(DEPTH, **SMALL_RESNET, upsample="x")


def test_even_kernel():
    with pytest.raises(ValueError, match="GlobalConv2d: kernel_size must be odd, got 14"):
        gcn(DEPTH, **SMALL_RESNET, kernel_size=14)


def test_parameters_of_the_layer():
    """Section 3.1: 782 thousand for k = 9 on 2048 channels, where dense 9 x 9 has 3484 thousand."""
    assert sum(p.numel() for p in GlobalConv2d(2048, 21, 9).parameters()) == 782_166
