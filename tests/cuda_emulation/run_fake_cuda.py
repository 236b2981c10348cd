"""Layers and networks on fake CUDA tensors: their shapes, and that nothing waits for the GPU.

    python -m tests.cuda_emulation.run_fake_cuda LIBRARY

A fake tensor has no values: what needs one (`.item()`, a branch on a tensor) fails here, as it does
while a CUDA graph is captured. What moves tensors between host and GPU fails, too. A process of its
own, because LIBRARY (fake_cuda.cpp) tells torch that there is CUDA; autograd would find out.
"""

import ctypes
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastseg
from fastseg import ops
from fastseg.nn import ASPP, CRFRNN, ConvBNReLU2d, DenseCRF, GlobalConv2d, MaxPool2d, MaxUnpool2d

from . import build
from .test_kernels import CASES

CONVOLUTIONS = ("conv_act", "conv_stats", "conv_bn_act")
NETWORKS = ("deeplabv3_resnet50", "segnet_vgg16", "pspnet_resnet50", "unet")


class OnOneDevice(TorchDispatchMode):
    """Fails where one call has tensors of the host and of the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            raise AssertionError(f"{func} moves a tensor between host and GPU")
        return result


def fake(t: Any) -> Any:
    """t on a GPU, without values."""
    if not isinstance(t, Tensor):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


def run(module: nn.Module, *inputs: Tensor) -> Any:
    """What the module on a GPU returns for inputs on the GPU."""
    state = [*module.named_parameters(), *module.named_buffers()]
    on_gpu = {name: fake(t) for name, t in state}
    return torch.func.functional_call(module, on_gpu, tuple(map(fake, inputs)))


class Compared:
    """The emulated kernels, and whether the fake ones foretell shape, type and strides; not the
    strides of convolutions, which depend on what libraries torch is built with."""

    def __getattr__(self, name: str) -> Callable:
        def call(*arguments):
            results = getattr(torch.ops.fastseg_emulated, name)(*arguments)
            if name == "permutohedral_build":  # its size depends on the features
                return results
            with FakeTensorMode(), torch.inference_mode():
                foretold = getattr(torch.ops.fastseg, name)(*tree_map(fake, arguments))
            for a, b in zip(tree_leaves(results), tree_leaves(foretold), strict=True):
                assert b.is_cuda
                assert (a.shape, a.dtype) == (b.shape, b.dtype), name
                assert a.stride() == b.stride() or name in CONVOLUTIONS, name
            return results

        return call


def layers() -> Iterator[tuple[str, Callable[[], Any]]]:
    image, logits = torch.rand(2, 3, 20, 24), torch.rand(2, 5, 20, 24)
    maps = torch.rand(2, 16, 20, 24)
    half = maps.half().contiguous(memory_format=torch.channels_last)
    modules: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (DenseCRF(), (logits, image)),
        (DenseCRF(compatibility=1 - torch.eye(5), kernel="diag"), (logits, image)),
        (CRFRNN(5), (logits, image)),
        (ConvBNReLU2d(16, 8, 3, padding=2, dilation=2).eval(), (maps,)),
        (ConvBNReLU2d(16, 8, 3, padding=2, dilation=2), (maps,)),
        (ConvBNReLU2d(16, 8, 3).half().eval(), (half,)),
        (ASPP(16, 8, (2, 4)).half().eval(), (half,)),
        (ASPP(16, 8, (2, 4)), (maps,)),
        (GlobalConv2d(16, 5, 7), (maps,)),
        (GlobalConv2d(16, 5, 7).bfloat16(), (maps.bfloat16(),)),
    ]
    for module, inputs in modules:
        kind = f"{type(module).__name__}, {'training' if module.training else 'evaluation'}"
        yield f"{kind}, {inputs[0].dtype}", lambda m=module, i=inputs: run(m, *i)

    def pooled() -> Tensor:
        y, indices = MaxPool2d(2)(fake(half))
        return MaxUnpool2d(2)(y, indices)

    def mean_field() -> Tensor:
        return ops.dense_crf(fake(logits), [ops.PairwiseTerm(fake(logits), 3.0)])

    yield "MaxPool2d, MaxUnpool2d", pooled
    yield "dense_crf, a number as compatibility", mean_field
    yield "upsample_argmax", lambda: ops.upsample_argmax(fake(logits), (41, 47))
    yield "upsample_softmax", lambda: ops.upsample_softmax(fake(logits), (41, 47))
    for name in NETWORKS:
        network = getattr(fastseg.models, name)(weights=None).eval()
        yield name, lambda m=network: run(m, torch.rand(1, 3, 96, 96))


def main(library: str) -> int:
    ctypes.CDLL(library)
    failed = 0

    def attempt(name: str, call: Callable[[], Any]) -> None:
        nonlocal failed
        try:
            call()
            print("ok", name)
        except Exception:
            failed += 1
            print("FAILED", name)
            traceback.print_exc(limit=-4)

    for name, call in layers():

        def traced(call: Callable[[], Any] = call) -> None:
            with FakeTensorMode(shape_env=ShapeEnv()), torch.inference_mode(), OnOneDevice():
                results = [t for t in tree_leaves(call()) if isinstance(t, Tensor)]
            assert results
            assert all(t.is_cuda for t in results)

        attempt(name, traced)
    build.emulated_library()
    for name, case in CASES.items():
        attempt(f"shapes: {name}", lambda case=case: case(Compared()))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
