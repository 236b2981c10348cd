"""PSPNet's head on the 60 x 60 map of a 473 x 473 crop: 68 of the network's 156 GMACs."""

import pytest
import torch
from torch import nn

import fastseg
from fastseg.models.pspnet import PSPHead

HEAD = PSPHead(2048, 21).eval()


class Plain(nn.Module):
    """The head as the paper draws it, and as every library computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.ppm, self.bottleneck, self.score = HEAD.ppm, HEAD.bottleneck, HEAD.score

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.bottleneck(self.ppm(x)))


VARIANTS = {
    "torch": Plain().eval(),
    "fastseg": HEAD,
    "torch, packed convolutions": fastseg.optimize(Plain().eval()),
    "fastseg, optimized": fastseg.optimize(HEAD),
}


@pytest.mark.parametrize("variant", VARIANTS)
def bench_pspnet_head(time_op, benchmark, variant):
    benchmark.group = "PSPNet head (1, 2048, 60, 60)"
    x = torch.randn(1, 2048, 60, 60, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, out = VARIANTS["torch"](x), VARIANTS[variant](x)
        assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()
    time_op(lambda: VARIANTS[variant](x))
