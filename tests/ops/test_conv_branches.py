"""conv_branches against plain PyTorch."""

import pytest
import torch
from torch.library import opcheck

from fastseg.nn import ASPP
from fastseg.ops import conv_branches, conv_branches_reference
from tests.conftest import assert_as_accurate


def inputs(device, dtype=torch.float32, channels_last=False, tail=True):
    x = torch.randn(2, 8, 9, 7)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = [
        torch.randn(k, 8, *size) * 0.2 for k, size in ((5, (1, 1)), (4, (3, 3)), (3, (1, 5)))
    ]
    tensors = [x, weights, [torch.randn(k) for k in (5, 4, 3)], torch.randn(2, 6, 1, 1)]
    x, weights, biases, last = torch.utils._pytree.tree_map(lambda t: t.to(device, dtype), tensors)
    return x, weights, biases, [1, 2, 6], last if tail else None


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_forward(dtype, channels_last, device):
    for tail, activation in ((True, "relu"), (False, "leaky_relu"), (True, "none")):
        arguments = inputs(device, dtype, channels_last, tail)
        fast = conv_branches(*arguments, activation=activation)
        plain = conv_branches_reference(*arguments, activation=activation)
        wide = torch.utils._pytree.tree_map(
            lambda t: t.double() if isinstance(t, torch.Tensor) else t, arguments
        )
        exact = conv_branches_reference(*wide, activation=activation)
        if dtype == torch.float64:
            torch.testing.assert_close(fast, exact)
        else:
            assert_as_accurate(fast, plain, exact)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert fast.is_contiguous(memory_format=layout)


def test_autocast_and_empty_batch(device):
    x, weights, biases, dilations, tail = inputs(device)
    with torch.autocast(device, torch.bfloat16):
        got = conv_branches(x, weights, biases, dilations, tail)
    assert got.dtype == torch.bfloat16
    assert conv_branches(x[:0], weights, biases, dilations, tail[:0]).shape == (0, 18, 9, 7)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_operator_registration(channels_last, device):
    for tail in (False, True):
        arguments = inputs(device, channels_last=channels_last, tail=tail)
        opcheck(torch.ops.fastseg.conv_branches.default, (*arguments, 0.0))
        compiled = torch.compile(conv_branches, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), conv_branches(*arguments))


def test_aspp_in_one_launch(monkeypatch, device):
    module = ASPP(6, 4, (2, 3), project_kernel=3).to(device).eval()
    x = torch.randn(2, 6, 7, 8, device=device)
    expected = module(x)  # with gradients: branch by branch
    monkeypatch.setattr("fastseg.nn.aspp._in_one_launch", lambda x, branches: True)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected.detach())


def test_errors():
    x, weights, biases, dilations, tail = inputs("cpu")

    def call(x=x, weights=weights, biases=biases, dilations=dilations, tail=tail):
        return conv_branches(x, weights, biases, dilations, tail)

    for message, arguments in {
        "every branch needs": {"dilations": [1, 2]},
        r"weights must be \(K, 8, R, S\)": {"weights": [w[:, :4] for w in weights]},
        "kernel sizes must be odd": {"weights": [torch.zeros(5, 8, 2, 2), *weights[1:]]},
        "dilations at least 1": {"dilations": [1, 0, 2]},
        "of equal channels": {"biases": [b[:2] for b in biases]},
        "weight and bias must be torch.float32": {"weights": [w.double() for w in weights]},
        r"tail must be \(N, K, 1, 1\)": {"tail": tail[:1]},
        "computes no gradients": {"x": x.clone().requires_grad_()},
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**arguments)
