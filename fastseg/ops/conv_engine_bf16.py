"""Which algorithm the convolution engine takes for bfloat16 images.

Two kinds of products compete. Multiplied in float32, every algorithm is as accurate as the rounding
of the result, and the weights keep their float32 values. Processors with fast dot products of
bfloat16 multiply twice as many a cycle, but weights and transformed input are rounded before.

Largest error over largest output against float64, unit-variance data rounded to bfloat16 and
rounded once more at the end, which alone is up to 4e-3 (half a step), as in torch's convolution:

===================  ========  ===========================
algorithm            products  error
===================  ========  ===========================
all                  float32   4e-3
GEMM                 bfloat16  4e-3
bordered, to 2       bfloat16  1e-2
bordered, to 3       bfloat16  1.5e-2
F(2, 3)              bfloat16  8e-3
F(4, 3)              bfloat16  2.5e-2, points 0, +-sqrt(1/2), +-sqrt(2), infinity
===================  ========  ===========================

F(6, 3) and F(5, 5) lose too much to be multiplied in bfloat16. In whole networks the rounding of
the activations is the larger part. Random weights with the statistics of random images, root mean
square error of the logits against float64, relative to that of torch's eager bfloat16 network, for
float32 products and for the three values of ``accuracy`` with bfloat16 products (three seeds):

==================  ========  =====================  ========  =========  ======
network             autocast  float32 products       "strict"  "default"  "fast"
==================  ========  =====================  ========  =========  ======
deeplabv3_resnet50  0.91      0.61                   0.90      0.88       1.02
fcn_resnet50        0.93      0.67                   0.80      0.81       1.01
pspnet_resnet50     0.80      0.61                   0.69      0.66       0.97
segnet_vgg16        0.97      0.81                   0.86      0.91       1.19
==================  ========  =====================  ========  =========  ======

U2-Net-p with its trained weights, on 13 photos: 0.006 to 0.014 of the root mean square logit by
each of these but "fast" (up to 0.022), torch's eager network 0.10 to 0.24, under autocast 0.17 to
0.39, OpenVINO 0.09 to 0.19. There a large constant was rounded, which ``fastseg.optimize`` keeps
float32; with it rounded ours were off by 0.13 to 0.30.
"""

from collections.abc import Sequence

import torch

from .. import _C
from .conv_engine import LINE, choose_tile, output_size, winograd_products

# The tiles whose products are in bfloat16 where those are fast.
ROUNDED = {"strict": (), "default": (1, 2), "fast": (1, 2, 3, 4)}


def choose_algorithm(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    accuracy: str = "default",
) -> tuple[int, torch.dtype]:
    """``tile`` and ``products`` of ``pack_conv`` for a bfloat16 image of this size (H, W).

    Where bfloat16 dot products are not fast, those of float32 and the tile that float32 images
    get: nothing rounds more than the result itself, so ``accuracy`` makes no difference. Fast they
    are on AMD's processors with avx512_bf16, twice as fast as float32 (on Intel's without AMX they
    are half as fast). There a bfloat16 product costs half of a float32 one, and ``accuracy`` says
    how far transforms may go: "strict" not to bfloat16, "default" as far as whole networks stay
    within the errors of torch's own, "fast" to F(4, 3), with up to 1.3 times those errors.
    """
    shape = (in_channels, out_channels, kernel_size, size, stride, padding, dilation)
    tile = choose_tile(*shape)
    if not _C.bf16_products() or tile == LINE:
        return tile, torch.float32
    if tile == 0:
        return 0, torch.bfloat16
    C, K = in_channels, out_channels
    Ho, Wo = output_size(size, kernel_size, stride, padding, dilation)
    cost = {(0, torch.bfloat16): 9 * Ho * Wo * C * K / 2}
    for m in {tile, 2, 4}:
        products = winograd_products((Ho, Wo), dilation, m)[0] * (1.5 if m == 6 else 1)
        cost[m, torch.float32] = products * (C * K + 12 * (C + K))
        if m in ROUNDED[accuracy]:
            cost[m, torch.bfloat16] = products * (C * K / 2 + 12 * (C + K))
    return min(cost, key=cost.__getitem__)
