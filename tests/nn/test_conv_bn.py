"""ConvBNReLU2d against Conv2d + BatchNorm2d + ReLU: state, statistics, folding, compile, export."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import fastseg
import fastseg.nn.conv_bn as conv_bn
from fastseg.nn import ConvBNReLU2d
from tests.conftest import assert_as_accurate

pytestmark = pytest.mark.usefixtures("smallest_fused")


def make(**options):
    layer = ConvBNReLU2d(4, 6, 3, padding=2, dilation=2, **options)
    with torch.no_grad():
        for t in (layer.bn.weight, layer.bn.running_var):
            t.uniform_(0.5, 1.5)
        for t in (layer.bn.bias, layer.bn.running_mean):
            t.normal_()
    return layer


def plain_copy(layer):
    return copy.deepcopy(layer).unfuse()


def test_constructor_and_state_dict():
    layer = ConvBNReLU2d(
        4, 6, (3, 1), 2, (1, 0), (2, 1), 2, True, eps=1e-3, momentum=0.2, dtype=torch.float64
    )
    plain = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, (3, 1), 2, (1, 0), (2, 1), 2, True, dtype=torch.float64),
            "bn": nn.BatchNorm2d(6, 1e-3, 0.2, dtype=torch.float64),
        }
    )
    assert repr(layer.conv) == repr(plain["conv"])
    assert repr(layer.bn) == repr(plain["bn"])
    shapes = {k: (v.shape, v.dtype) for k, v in layer.state_dict().items()}
    assert shapes == {k: (v.shape, v.dtype) for k, v in plain.state_dict().items()}
    assert list(layer.unfuse().state_dict()) == list(layer.state_dict())
    assert "activation='relu'" in repr(layer)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0, None])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
def test_training_steps(momentum, activation, track, device):
    layer = make(momentum=momentum, activation=activation, bias=True)
    if not track:
        layer.bn = nn.BatchNorm2d(6, momentum=momentum, track_running_stats=False)
    layer = layer.to(device)
    plain, exact = plain_copy(layer), plain_copy(layer).double()
    x, residual = torch.randn(2, 4, 9, 8, device=device), torch.randn(2, 6, 9, 8, device=device)
    for _ in range(3):
        outputs = []
        for m in (layer, plain, exact):
            dtype = m.conv.weight.dtype
            z = m(x.to(dtype), residual.to(dtype))
            m.zero_grad()
            z.square().mean().backward()
            with torch.no_grad():
                for p in m.parameters():
                    p -= 0.1 * p.grad
            outputs.append(z.detach())
        assert_as_accurate(*outputs, factor=4)  # the steps before it add their rounding
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(
            value.double(), exact.state_dict()[key].double(), rtol=1e-5, atol=1e-6, msg=key
        )
    for m in (layer, plain, exact):
        m.eval()
    assert_as_accurate(layer(x), plain(x), exact(x.double()), factor=4)


def test_frozen_batch_norm_trains_the_rest():
    layer = make()
    layer.bn.eval()
    plain = plain_copy(layer)
    x = torch.randn(2, 4, 9, 8)
    for m in (layer, plain):
        m(x).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert layer.bn.num_batches_tracked == 0


def test_folded_weights_follow_every_change():
    layer = make(bias=True).eval()
    x = torch.randn(1, 4, 7, 7)

    def check():
        torch.testing.assert_close(layer(x), layer.unfuse()(x), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        check()
        kept = layer._folded
        check()
        assert layer._folded is kept  # not folded again
        changes = [
            lambda: layer.conv.weight.mul_(2),
            lambda: layer.conv.bias.add_(1),
            lambda: layer.bn.weight.add_(1),
            lambda: layer.bn.bias.sub_(3),
            lambda: layer.bn.running_mean.add_(1),
            lambda: layer.bn.running_var.mul_(2),
            lambda: setattr(layer.bn, "eps", 0.5),
            lambda: setattr(layer.conv, "weight", nn.Parameter(torch.randn(6, 4, 3, 3))),
            lambda: setattr(layer.bn.weight, "data", torch.rand(6)),
            lambda: layer.load_state_dict(make(bias=True).state_dict()),
            lambda: layer.load_state_dict(make(bias=True).state_dict(), assign=True),
            lambda: layer.train()(x) is layer.eval(),
        ]
        for change in changes:
            change()
            check()
            assert layer._folded is not kept
            kept = layer._folded
    layer.double()
    x = x.double()
    with torch.inference_mode():
        check()
    x.requires_grad_()  # what inference mode folded serves outside of it too
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None


def test_folding_under_autocast_and_inference_parameters():
    layer = make().eval()
    x = torch.randn(1, 4, 7, 7)
    with torch.no_grad():
        full = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = layer(x)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), full, rtol=0.05, atol=0.05)
        torch.testing.assert_close(layer(x), full)
    with torch.inference_mode():  # such parameters have no versions: folded at each call
        layer = make().eval()
        before = layer(x)
        layer.conv.weight.mul_(0.5)
        layer.bn.running_mean.zero_()
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), layer.unfuse()(x), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_leave_the_cache_behind():
    layer = make().eval()
    x = torch.randn(1, 4, 7, 7)
    with torch.no_grad():
        expected = layer(x)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert other._folded is None
            assert torch.equal(other(x), expected)


def test_children_that_are_more_than_plain_are_called():
    x = torch.randn(2, 4, 7, 7)
    seen = []
    layer = make()
    layer.conv.register_forward_hook(lambda *args: seen.append(args[2].shape))
    layer(x)
    assert seen == [(2, 6, 7, 7)]
    layer = make()
    prune.l1_unstructured(layer.conv, "weight", 0.5)
    torch.testing.assert_close(layer(x), layer.unfuse()(x))
    layer = make().eval()
    parametrizations.weight_norm(layer.conv)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.unfuse()(x), rtol=1e-4, atol=1e-5)
        layer.conv.parametrizations.weight.original0.mul_(2)
        torch.testing.assert_close(layer(x), layer.unfuse()(x), rtol=1e-4, atol=1e-5)
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(make()).eval()
    assert isinstance(layer.bn, nn.SyncBatchNorm)
    torch.testing.assert_close(layer(x), layer.unfuse()(x))


def runs_packed(layer, *args):
    layer._folded = None
    layer(*args)
    packed = layer._folded and layer._folded.packed
    return packed is not None and bool(packed._packed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(19, 22), (33, 40), (33, 9)])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
def test_inference_is_packed(activation, size, layout, monkeypatch):
    monkeypatch.setattr(conv_bn, "SMALLEST_PACKED", 0)
    layer = ConvBNReLU2d(16, 24, 3, padding=2, dilation=2, activation=activation).eval()
    layer.bn.running_mean.normal_()
    layer.bn.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 16, *size).contiguous(memory_format=layout)
    residual = torch.randn(2, 24, *size)
    plain, exact = plain_copy(layer), plain_copy(layer).double()
    keys = list(layer.state_dict())
    with torch.inference_mode():
        for args in ((x,), (x, residual)):
            y = layer(*args)
            assert layer._folded.packed._packed
            assert y.is_contiguous(memory_format=layout)
            reference = exact(*(t.double() for t in args))
            assert (y - reference).abs().max() <= 1e-5 * reference.abs().max()  # of F(4, 3)
            torch.testing.assert_close(y, plain(*args), rtol=1e-4, atol=1e-4)
        layer(x[:0])  # no images
    assert list(layer.state_dict()) == keys
    with torch.no_grad():
        layer(x)
        packed = layer._folded.packed
        layer(x)
        assert layer._folded.packed is packed
        layer.conv.weight.mul_(2)
        layer.conv.padding = (1, 1)
        layer.conv.dilation = (1, 1)  # read at every call
        torch.testing.assert_close(layer(x), layer.unfuse()(x), rtol=1e-4, atol=1e-4)


def test_what_inference_leaves_to_torch(monkeypatch):
    x = torch.randn(1, 16, 17, 17).contiguous(memory_format=torch.channels_last)
    layer = ConvBNReLU2d(16, 16, 3, padding=1).eval()
    with torch.no_grad():
        assert not runs_packed(layer, x)  # too small
        assert runs_packed(layer, torch.randn(2, 16, 96, 96))
        monkeypatch.setattr(conv_bn, "SMALLEST_PACKED", 0)
        assert runs_packed(layer, x)
        assert not runs_packed(ConvBNReLU2d(16, 16, 3, padding=1, accuracy="strict").eval(), x)
        assert runs_packed(ConvBNReLU2d(16, 16, 3, groups=2).eval(), x)
        assert not runs_packed(ConvBNReLU2d(16, 16, 1).eval(), x)
        assert not runs_packed(ConvBNReLU2d(16, 16, 3, 2).eval(), x)
        assert not runs_packed(copy.deepcopy(layer).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not runs_packed(layer, x)
        with FlopCounterMode(display=False):  # follows the operators
            assert not runs_packed(layer, x)
        with pytest.raises(ValueError, match="channels must be"):
            layer(x[:, :4])
        with pytest.raises(ValueError, match="residual must"):
            layer(x, torch.zeros(1, 16, 1, 1))  # a residual does not broadcast
    layer.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


class Two(nn.Module):
    """A block with a skip connection, as in a residual network."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.first = make(momentum=momentum)
        self.second = ConvBNReLU2d(6, 4, 3, padding="same", activation="leaky_relu")

    def forward(self, x):
        return self.second(self.first(x), residual=x)


@pytest.mark.parametrize("mode", ["eval", "train", "average"])
def test_compile(mode, device):
    model = Two(None if mode == "average" else 0.1).to(device).train(mode != "eval")
    graph = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for size in (9, 12):
        x = torch.randn(2, 4, size, 7, device=device)
        outputs = [m(x) for m in (graph, model)]
        torch.testing.assert_close(*outputs)
        for z in outputs:
            z.sum().backward()
    for a, b in zip(graph.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(graph.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_export():
    model = Two().eval()
    x = torch.randn(2, 4, 9, 7)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("N", max=8)},))
    more = torch.randn(3, 4, 9, 7)
    torch.testing.assert_close(program.module()(more), model(more))


def test_small_steps(smallest_fused):
    """They run unfused, and give the same."""
    torch.manual_seed(0)
    smallest_fused(2 * 9 * 8 * 6 * 4 * 9 + 1)
    x = torch.randn(2, 4, 9, 8)
    for activation in ("relu", "leaky_relu", "none"):
        layer = make(activation=activation)
        plain = plain_copy(layer)
        fastseg._C.reset_kernel_counts()
        outputs = [layer(x), plain(x)]
        assert not any(fastseg._C.kernel_counts().values())
        assert torch.equal(*outputs)
        assert torch.equal(layer.bn.running_var, plain.bn.running_var)
        layer(torch.randn(2, 4, 9, 9))
        assert any(fastseg._C.kernel_counts().values())
        torch.use_deterministic_algorithms(True)
        try:
            torch.testing.assert_close(layer(x), outputs[0])
        finally:
            torch.use_deterministic_algorithms(False)
        with pytest.raises(ValueError, match="channels must be"):
            layer(torch.zeros(1, 3, 9, 8))


def test_steps_of_several_sizes(smallest_fused):
    """One layer, in one graph small enough for torch's operators and not: as heads share it."""
    torch.manual_seed(0)
    smallest_fused(9 * 8 * 6 * 4 * 9 + 1)
    layer = make()
    plain = plain_copy(layer)
    images = [torch.randn(1, 4, 9, 8), torch.randn(1, 4, 18, 16), torch.randn(1, 4, 9, 8)]
    for module in (layer, plain):
        sum(module(x).square().mean() for x in images).backward()
    for one, two in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    for one, two in zip(layer.bn.buffers(), plain.bn.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_plain_average_after_momentum(smallest_fused):
    """The momentum is a tensor then, of which torch's batch norm would know nothing."""
    smallest_fused(10**9)
    layer, x = make(), torch.randn(2, 4, 9, 8)
    plain = plain_copy(layer)
    for module in (layer, plain):
        module(x)
        module.bn.momentum = None
        module(x + 1)
    torch.testing.assert_close(layer.bn.running_var, plain.bn.running_var)


@pytest.mark.parametrize("least", [0, 10**9])
def test_folds_anew_after_a_step(least, smallest_fused):
    """Also where that changed nothing but the running statistics."""
    smallest_fused(least)
    layer, x = make(), torch.randn(1, 4, 9, 8)
    with torch.no_grad():
        layer.eval()(x)
        layer.train()(x + 1)
        torch.testing.assert_close(layer.eval()(x), plain_copy(layer)(x))


def test_errors():
    with pytest.raises(ValueError, match="activation must be one of"):
        ConvBNReLU2d(1, 1, 1, activation="swish")
    with pytest.raises(ValueError, match="negative_slope must be at least 0"):
        ConvBNReLU2d(1, 1, 1, negative_slope=-1.0)
    with pytest.raises(ValueError, match="channels must be"):
        ConvBNReLU2d(4, 6, 1)(torch.zeros(1, 3, 2, 2))
