"""Who computes a work. Each peer prepares a module once and returns the call that is timed.

A peer gets the module and its inputs in float32, the precision to compute in and the number of
threads; preparation (folding, packing, compiling) is not timed. Peers are imported when they are
asked for: one that is not installed raises ImportError and is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastseg

Call = Callable[[], Tensor]
Prepare = Callable[[nn.Module, Sequence[Tensor], torch.dtype, int], Call]


def exact(module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int) -> Call:
    """float64, torch's own layers: what every output is compared with."""
    module = module.double()
    return lambda: module(*(x.double() for x in inputs))


def ours(module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int) -> Call:
    if not isinstance(module, fastseg.nn.DenseCRF):
        module = fastseg.optimize(module, dtype=dtype)
        inputs = [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in inputs]
    return lambda: module(*inputs)


def _torch(module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int) -> Call:
    module = module.to(dtype)
    x = inputs[0].to(dtype)
    return lambda: module(x)


def _channels_last(
    module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int
) -> Call:
    module = module.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = inputs[0].to(dtype).contiguous(memory_format=torch.channels_last)
    return lambda: module(x)


def _compile(module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int) -> Call:
    import torch._inductor.config as inductor

    inductor.freezing = True
    module = module.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = inputs[0].to(dtype).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(module)
    return lambda: compiled(x)


def _onnxruntime(
    module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int
) -> Call:
    import onnxruntime

    if dtype != torch.float32:
        raise NotImplementedError("has no bfloat16 convolution")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(module, (inputs[0],), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs[0].numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(
    module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int
) -> Call:
    import openvino

    model = openvino.convert_model(module, example_input=inputs[0])
    model.reshape(list(inputs[0].shape))
    compiled = openvino.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        },
    )
    x = inputs[0].numpy()
    return lambda: torch.from_numpy(compiled(x)[0])


def _ncnn(module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int) -> Call:
    import ncnn
    import pnnx

    if dtype != torch.float32 or inputs[0].shape[0] != 1:
        raise NotImplementedError("takes one image in float32")
    net = ncnn.Net()
    net.opt.num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        pnnx.export(module, f"{folder}/m.pt", inputs[0], fp16=False)
        net.load_param(f"{folder}/m.ncnn.param")
        net.load_model(f"{folder}/m.ncnn.bin")
    x = ncnn.Mat(inputs[0][0].numpy()).clone()

    def call() -> Tensor:
        with net.create_extractor() as extractor:
            extractor.input("in0", x)
            return torch.from_numpy(np.array(extractor.extract("out0")[1]))[None]

    return call


def _pydensecrf(
    module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int
) -> Call:
    import pydensecrf.densecrf as dcrf

    assert isinstance(module, fastseg.nn.DenseCRF)
    logits, image = inputs
    N, L, H, W = logits.shape
    energies = [e.flatten(1).numpy() for e in -torch.log_softmax(logits, 1)]
    pixels = [np.ascontiguousarray(i.permute(1, 2, 0).numpy()) for i in image]

    def call() -> Tensor:
        beliefs = []
        for n in range(N):
            crf = dcrf.DenseCRF2D(W, H, L)
            crf.setUnaryEnergy(energies[n])
            for sigma, weight in zip(module.gaussian_widths, module.gaussian_weight, strict=True):
                crf.addPairwiseGaussian(sigma, float(weight))
            for (xy, rgb), weight in zip(
                module.bilateral_widths, module.bilateral_weight, strict=True
            ):
                crf.addPairwiseBilateral(xy, rgb, pixels[n], float(weight))
            beliefs.append(torch.from_numpy(np.array(crf.inference(module.iters))))
        return torch.stack(beliefs).view(N, L, H, W)

    return call


NETWORKS: dict[str, Prepare] = {
    "fastseg": ours,
    "torch": _torch,
    "torch channels-last": _channels_last,
    "torch.compile": _compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ncnn": _ncnn,
}
CRF: dict[str, Prepare] = {"fastseg": ours, "pydensecrf": _pydensecrf}


def peers_of(group: str) -> dict[str, Prepare]:
    """The peers that can compute works of this group, fastseg first."""
    return CRF if group == "crf" else NETWORKS
