import pytest
import torch
from torch import nn

from fastseg.models import ResNet

from .reference import (
    DEPTH,
    STRIDE_8,
    STRIDE_8_FULL,
    STRIDE_16,
    STRIDE_32,
    assert_same_network,
    resnet,
)


class Trunk(nn.Module):
    """Gives the maps names, so that a trunk can be compared like a network."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = ResNet(DEPTH, 2, width=4, **options)

    def forward(self, x):
        return {f"c{i}": y for i, y in enumerate(self.backbone(x), 2)}


def rates(first_three, grid):
    return [*first_three[:3], [(1 if b else first_three[3][0][0], d) for b, d in enumerate(grid)]]


CASES = {
    "32": ({"output_stride": 32}, STRIDE_32, {}),
    "16": ({"output_stride": 16}, STRIDE_16, {}),
    "8": ({"output_stride": 8}, STRIDE_8, {}),
    "8 full": ({"output_stride": 8, "dilation": "full"}, STRIDE_8_FULL, {}),
    "deep128": ({"stem": "deep128"}, STRIDE_32, {"deep": True}),
    "v1c": ({"stem": "v1c"}, STRIDE_32, {"deep": True}),
    "caffe": (
        {"output_stride": 8, "dilation": "full", "stride_in": "1x1", "ceil_pool": True},
        STRIDE_8_FULL,
        {"ceil": True, "stride_in": 1},
    ),
    "grid 32": ({"multi_grid": (1, 2, 4)}, rates(STRIDE_32, (1, 2, 4)), {}),
    "grid 16": (
        {"output_stride": 16, "multi_grid": (1, 2, 4)},
        rates(STRIDE_16, (2, 4, 8)),
        {},
    ),
    "grid 8": ({"output_stride": 8, "multi_grid": (1, 2, 1)}, rates(STRIDE_8, (4, 8, 4)), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_restatement(case):
    options, blocks, forms = CASES[case]

    def restatement(w, x):
        return {f"c{i}": y for i, y in enumerate(resnet(w, x, *blocks, **forms), 2)}

    assert_same_network(Trunk(**options), restatement, (2, 2, 64, 64), (1, 2, 45, 70))


def test_change_of_output_stride():
    trunk = ResNet(DEPTH, width=4, output_stride=16, multi_grid=(1, 2, 4)).eval()
    other = ResNet(DEPTH, width=4, output_stride=8, multi_grid=(1, 2, 4)).eval()
    other.load_state_dict(trunk.state_dict())
    x = torch.randn(1, 3, 65, 65)
    coarse = trunk(x)[-1]
    trunk.set_output_stride(8)
    assert trunk.output_stride == 8
    assert [y.shape[-1] for y in (coarse, trunk(x)[-1])] == [5, 9]
    torch.testing.assert_close(trunk(x), other(x), rtol=0, atol=0)
    trunk.set_output_stride(16)
    torch.testing.assert_close(trunk(x)[-1], coarse, rtol=0, atol=0)


def test_bad_options():
    for options, message in {
        "depth": ({"depth": 18}, "depth must be 50, 101 or 152, got 18"),
        "stride": ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        "stem": ({"stem": "5x5"}, "stem must be 7x7, deep128 or v1c, got '5x5'"),
        "dilation": ({"dilation": "half"}, "dilation must be contract or full, got 'half'"),
        "position": ({"stride_in": "2x2"}, "stride_in must be 3x3 or 1x1, got '2x2'"),
        "grid": ({"multi_grid": (1, 2)}, "one rate for each of the 3 blocks of layer4, got"),
    }.values():
        with pytest.raises(ValueError, match=message), torch.device("meta"):
            ResNet(**options)
