"""Every network on a GPU gives what it gives on the CPU, trained and in inference."""

import copy

import pytest
import torch

from fastseg import _C
from fastseg.bench.works import unfused

from .reference import randomize
from .test_contract import NAMES, _shallow, image, small  # noqa: F401  shallow ResNets here too

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not _C.build_info()["cuda_archs"],
    reason="needs a CUDA device and fastseg built for it",
)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    """float32 as on the CPU, without TensorFloat-32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def logits(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out["out"]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def error(fast, exact):
    return ((fast.cpu().double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_on_cuda(name, dtype):
    if name == "segnet_basic" and dtype == torch.bfloat16:
        pytest.skip("torch's local response norm has no bfloat16 on the CPU")
    model = randomize(small(name)).eval()
    x = image(2, 4, 97, 131)
    with torch.inference_mode():
        exact = logits(copy.deepcopy(model).double(), x.double())
        on_cpu = logits(copy.deepcopy(model).to(dtype), x.to(dtype))
        out = logits(model.to("cuda", dtype), x.to("cuda", dtype))
    assert out.dtype == dtype
    assert error(out, exact) <= 2 * error(on_cpu, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
def test_training_on_cuda(name):
    model = randomize(small(name)).train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout | torch.nn.Dropout2d):
            m.p = 0.0
    x = image(2, 4, 97, 131)
    exact, fast = copy.deepcopy(model).double(), model.cuda()
    logits(exact, x.double()).square().mean().backward()
    logits(fast, x.cuda()).square().mean().backward()
    assert error(gradient(fast), gradient(exact)) <= 5e-2


def test_unfused_network_on_cuda():
    """Its ASPP has no layers to run in one launch."""
    model = randomize(small("deeplabv3_resnet50")).eval()
    plain = unfused(copy.deepcopy(model)).cuda()
    x = image(2, 4, 97, 131)
    with torch.inference_mode():
        exact = logits(model.double(), x.double())
        assert error(logits(plain, x.cuda()), exact) <= 1e-5
