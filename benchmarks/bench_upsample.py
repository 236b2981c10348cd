"""upsample_argmax and upsample_softmax against F.interpolate and the reduction."""

import pytest
import torch

from fastseg.ops import (
    upsample_argmax,
    upsample_argmax_reference,
    upsample_softmax,
    upsample_softmax_reference,
)

CASES = [
    ((1, 19, 128, 256), (1024, 2048)),  # Cityscapes, output stride 8
    ((1, 21, 65, 65), (513, 513)),  # VOC, DeepLab's crop
]
VARIANTS = {
    "argmax": {"fastseg": upsample_argmax, "torch": upsample_argmax_reference},
    "softmax": {"fastseg": upsample_softmax, "torch": upsample_softmax_reference},
}


@pytest.mark.parametrize("variant", ["fastseg", "torch"])
@pytest.mark.parametrize("op", VARIANTS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def bench_upsample(time_op, benchmark, shape, size, channels_last, op, variant):
    benchmark.group = f"upsample_{op} {shape} -> {size} {'nhwc' if channels_last else 'nchw'}"
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    expected, out = (VARIANTS[op][name](logits, size) for name in ("torch", variant))
    assert torch.allclose(out.float(), expected.float(), rtol=1e-4, atol=1e-5)
    fn = VARIANTS[op][variant]
    out_bytes = out.numel() * out.element_size()
    time_op(lambda: fn(logits, size), bytes_moved=logits.numel() * 4 + out_bytes)
