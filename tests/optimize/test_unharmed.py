"""Networks that a graph cannot hold: the same outputs, and the reason why they stay as they are."""

import copy
import pickle
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import fastseg
from fastseg.nn.packed import PackedConv2d


def block(channels=8):
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
    )


class Net(nn.Module):
    """A block and whatever a test does with it."""

    def __init__(self):
        super().__init__()
        self.block = block()

    def forward(self, x):
        return self.block(x)


class LooksAtValues(Net):
    def forward(self, x):
        return self.block(x) if x.mean() < 1e9 else x


class LooksAtSizes(Net):
    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return self.block(x)


class LooksAtTypes(Net):
    def forward(self, x):
        y = x.relu()
        return self.block(y if isinstance(y, torch.Tensor) else torch.cat(y, 1))


class SetsAttributes(Net):
    def forward(self, x):
        self.last = self.block(x)
        return self.last


class TakesAnything(Net):
    def forward(self, *xs):
        return self.block(torch.cat(xs, 1))


class ViewsAndLooks(Net):
    """``view`` needs the layout that torch makes by default."""

    def forward(self, x):
        y = self.block(x)
        return y.view(y.shape[0], -1)


class HelperViews(Net):
    def forward(self, x):
        return _flatten(self.block(x)) if x.shape[0] else x


def _flatten(y):
    return y.view(y.shape[0], -1)


class Indexes(Net):
    def forward(self, x):
        for layer in self.block[:2]:
            x = layer(x) if x.shape[0] else x
        return x * self.block[0].out_channels * self.block[0].weight.mean()


class UsesLayerAttributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv(x) if len(x) else x
        return F.conv2d(y, self.conv.weight, self.conv.bias, self.conv.stride, self.conv.padding)


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(x).float()


class Caught(Net):
    """An exception inside ``forward`` is part of what it does."""

    def forward(self, x):
        try:
            return self.block(x) if x.sum() < 1e9 else x
        except ZeroDivisionError:
            return x


KEEPS_ITS_FORWARD = {
    LooksAtValues: "its forward looks at values or sizes",
    LooksAtTypes: "its forward looks at the type of a tensor",
    SetsAttributes: "its forward sets last",
    HelperViews: "its forward looks at values or sizes",
    Indexes: "its forward looks at values or sizes",
    UsesLayerAttributes: "torch.fx does not trace it",
    Autocast: "its forward uses autocast",
    Caught: "its forward looks at values or sizes",
}


def randomise(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1)
    return model.eval()


@torch.no_grad()
def check(model, *inputs):
    """Outputs of the optimised network equal the network's own, which stays as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    layers = [type(m) for m in model.modules()]
    expected = model(*copy.deepcopy(inputs))
    fast = fastseg.optimize(model)
    out = fast(*copy.deepcopy(inputs))
    assert type(out) is type(expected)
    tolerance = 0.02 if any(isinstance(m, Autocast) for m in model.modules()) else 1e-4
    values = [t for t in tree_leaves(expected) if isinstance(t, torch.Tensor)]
    largest = max([1.0, *(t.abs().max().item() for t in values)])
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * largest)
    assert [type(m) for m in model.modules()] == layers
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    return fast


@pytest.mark.parametrize("network", KEEPS_ITS_FORWARD)
def test_keeps_its_forward(network):
    model = nn.Sequential(OrderedDict(first=nn.Conv2d(8, 8, 1), inner=randomise(network()))).eval()
    fast = check(model, torch.randn(2, 8, 9, 11))
    text = fastseg.explain(fast)
    assert f"inner: keeps its forward, {KEEPS_ITS_FORWARD[network]}" in text
    assert "first: convolution engine" in text
    alone = check(randomise(network()), torch.randn(2, 8, 9, 11))
    assert f"the model: keeps its forward, {KEEPS_ITS_FORWARD[network]}" in fastseg.explain(alone)


@pytest.mark.parametrize("network", [LooksAtValues, LooksAtTypes, SetsAttributes, TakesAnything])
def test_its_parts_are_optimised(network):
    fast = check(randomise(network()), torch.randn(2, 8, 9, 11))
    assert any(isinstance(m, PackedConv2d) for m in fast.block.modules())
    assert "the model: keeps its forward" in fastseg.explain(fast)


def test_views():
    """In a graph ``view`` becomes ``reshape``; elsewhere the layer before keeps torch's layout."""
    x = torch.randn(2, 8, 9, 11)
    fast = check(randomise(ViewsAndLooks()), x)
    assert any(isinstance(m, PackedConv2d) for m in fast.modules())
    fast = check(randomise(HelperViews()), x)
    assert "its forward depends on the memory layout" in fastseg.explain(fast)
    check(nn.Sequential(nn.Conv2d(8, 8, 1), randomise(HelperViews())).eval(), x)


@pytest.mark.parametrize("where", ["root", "sequential", "conv", "relu"])
def test_hooks_run(where):
    seen = []

    def hook(module, args, out):
        seen.append(out.shape)
        return out + 1

    model = randomise(Net())
    names = {"root": "", "sequential": "block", "conv": "block.0", "relu": "block.2"}
    model.get_submodule(names[where]).register_forward_hook(hook)
    fast = check(model, torch.randn(1, 8, 5, 6))
    assert len(seen) == 2
    assert "it has hooks" in fastseg.explain(fast) or where == "relu"


class Options(Net):
    """What is left out and what is given need not be the same graph."""

    def forward(self, x, mask=None, *, scale=1.0):
        y = self.block(x) * scale
        return y if mask is None else y * mask


@torch.no_grad()
def test_arguments_with_defaults():
    model, x, mask = randomise(Options()), torch.randn(1, 8, 5, 6), torch.rand(1, 8, 5, 6)
    fast = check(model, x)
    for args, options in (((), {}), ((mask,), {}), ((), {"mask": mask}), ((), {"scale": 2.0})):
        torch.testing.assert_close(fast(x, *args, **options), model(x, *args, **options))
    torch.testing.assert_close(fast(x=x), model(x))
    with pytest.raises(TypeError):
        fast()


Pair = namedtuple("Pair", "a b")


class Returns(Net):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(self.block(x), x)


class OwnDict(dict):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda y, x: (y, x),
        lambda y, x: [y, {"x": x}],
        lambda y, x: {"out": y, "aux": [x, None]},
        lambda y, x: OrderedDict(out=y, aux=x),
        lambda y, x: Pair(y, x),
        lambda y, x: OwnDict(out=y),
        lambda y, x: None,
    ],
)
def test_returns(make):
    check(randomise(Returns(make)), torch.randn(1, 8, 5, 6))


def test_takes_a_dict_and_a_list():
    class Named(Net):
        def forward(self, batch):
            return self.block(batch["image"]) + batch["others"][0]

    x = torch.randn(1, 8, 5, 6)
    check(randomise(Named()), {"image": x, "others": [x, 2]})


class MutatesItsInput(Net):
    def forward(self, x):
        x += self.block(x)
        return x * 2


class MutatesLater(Net):
    """The convolution may not wait for the addition: its input changes in between."""

    def forward(self, x):
        y = self.block[0](x)
        z = F.relu(x)
        x.mul_(2)
        return torch.relu(y + z) + x


class SharesMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.a(x)
        skip = y
        y = self.relu(y)  # and so changes skip
        z = self.b(y)
        part = z[:, :4]
        part.add_(1)
        skip += z
        return skip + y


@pytest.mark.parametrize("network", [MutatesItsInput, MutatesLater, SharesMemory])
@torch.no_grad()
def test_in_place(network):
    model = randomise(network())
    fast = fastseg.optimize(model)
    x = torch.randn(1, 8, 5, 6)
    a, b = x.clone(), x.clone()
    torch.testing.assert_close(fast(a), model(b), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a, b)  # the inputs are changed alike


class Shared(nn.Module):
    """One layer in two places, one batch norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = self.a
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Sequential(self.a, self.bn)

    def forward(self, x):
        return self.bn(self.a(x)) + torch.relu(self.bn(self.b(x))) + self.inner(x)


class SharedAndOpaque(Shared):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("network", [Shared, SharedAndOpaque])
def test_shared_layers(network):
    check(randomise(network()), torch.randn(1, 8, 5, 6))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x):
        y = F.conv2d(x, self.weight, padding=1)
        y = F.relu(F.batch_norm(y, self.mean, self.var, eps=1e-3))
        return F.conv2d(y, self.weight * 2, padding=1)


def test_functional_layers():
    fast = check(Functional().eval(), torch.randn(1, 8, 5, 6))
    assert sum(isinstance(m, PackedConv2d) for m in fast.modules()) == 1


LAYERS = {
    "transposed dilation": lambda: nn.ConvTranspose2d(8, 8, 4, 2, padding=1, dilation=2),
    "transposed gaps": lambda: nn.ConvTranspose2d(8, 8, 1, 2),
    "reflect": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "uneven same": lambda: nn.Conv2d(8, 8, 2, padding="same"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.PReLU])
def test_layers_left_to_torch(layer, activation):
    """Their batch norms still fold."""
    model = nn.Sequential(
        LAYERS[layer](),
        nn.BatchNorm2d(8),
        activation(inplace=False) if activation is not nn.PReLU else activation(),
        nn.Conv2d(8, 4, 1),
    )
    fast = check(randomise(model), torch.randn(2, 8, 7, 9))
    text = fastseg.explain(fast)
    assert "0: left to torch, " in text
    assert "with its batch norm folded in" in text
    assert "3: convolution engine" in text


def test_parametrised_weights():
    conv = parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    check(nn.Sequential(conv, nn.ReLU()).eval(), torch.randn(1, 8, 5, 6))
    with pytest.warns(FutureWarning):
        hooked = nn.utils.weight_norm(nn.Conv2d(8, 8, 3))
    fast = check(nn.Sequential(hooked, nn.ReLU()).eval(), torch.randn(1, 8, 5, 6))
    assert "0: left to torch, it has hooks" in fastseg.explain(fast)


def test_other_dtypes():
    fast = check(randomise(Net()).double(), torch.randn(1, 8, 5, 6, dtype=torch.float64))
    assert "weights are torch.float64" in fastseg.explain(fast)
    mixed = nn.Sequential(block(), nn.Conv2d(8, 4, 1).bfloat16()).eval()
    assert "weights are torch.bfloat16" in fastseg.explain(mixed)


def test_submodules_in_training():
    """A batch norm and a dropout that were left in training mode stay in it."""
    model = randomise(block())
    model[1].train()
    x = torch.randn(4, 8, 9, 9)
    with torch.no_grad():
        out = fastseg.optimize(model)(x)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    model = randomise(nn.Sequential(block(), nn.Dropout(0.5), nn.Conv2d(8, 8, 1)))
    model[1].train()
    fast = fastseg.optimize(model)
    with torch.no_grad():
        assert not torch.equal(fast(x), fast(x))
    assert any(isinstance(m, nn.Dropout) and m.training for m in fast.modules())


def test_unbatched_image():
    check(nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(2)).eval(), torch.randn(8, 6, 6))


def test_wrappers():
    x = torch.randn(2, 8, 5, 6)
    fast = check(nn.DataParallel(randomise(Net())).eval(), x)
    assert any(isinstance(m, PackedConv2d) for m in fast.modules())
    scripted = torch.jit.script(randomise(Net()))
    for model in (scripted, nn.Sequential(scripted, nn.Conv2d(8, 8, 1)).eval()):
        assert "it is a TorchScript module" in fastseg.explain(check(model, x))
    check(torch.jit.trace(randomise(Net()), x), x)


def test_quantised():
    conv = torch.ao.nn.quantized.dynamic.Linear(6, 6)
    check(nn.Sequential(block(), conv).eval(), torch.randn(1, 8, 5, 6))


def test_replaced_forward():
    model = randomise(Net())
    model.block[2].forward = lambda x: x * 2
    model.forward = lambda x: Net.forward(model, x) + 1
    x = torch.randn(1, 8, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(fastseg.optimize(model)(x), model(x))


@torch.no_grad()
def test_copies_pickles_and_threads():
    x = torch.randn(1, 8, 9, 6)
    for network in (Net, LooksAtSizes, Options):
        model = randomise(network())
        fast = fastseg.optimize(model)
        expected = fast(x)
        for same in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(same(x), expected)
            assert fastseg.explain(same) == fastseg.explain(fast)
        with ThreadPoolExecutor(4) as pool:
            for y in pool.map(fast, [x] * 8):
                assert torch.equal(y, expected)


class Annotated(Net):
    def forward(self, x: "torch.Tensor") -> "dict[str, torch.Tensor]":
        return {"out": super().forward(x)}


def test_annotated_networks_are_pickled():
    fast, x = fastseg.optimize(randomise(Annotated())), torch.randn(1, 8, 9, 6)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x)["out"], fast(x)["out"])


@pytest.mark.parametrize("groups", [1, 4])
def test_batch_norm_behind_a_transposed_convolution(groups):
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, groups=groups), nn.BatchNorm2d(8))
    fast = check(randomise(model), torch.randn(1, 8, 5, 6))
    assert ("convolution engine" in fastseg.explain(fast)) == (groups == 1)


def test_no_gradients_of_what_is_left_to_torch():
    """A transposed convolution stays torch's; a caller may forget torch.no_grad()."""
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3)).eval()
    fast, x = fastseg.optimize(model), torch.randn(1, 3, 9, 6)
    y = fast(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"no gradients, call it under torch\.no_grad"):
        fast(x.requires_grad_())


def test_threads_that_optimise_and_run():
    """``torch.fx`` patches nn.Module while it traces; other threads must not notice."""
    model, x = randomise(nn.Sequential(*(block() for _ in range(8)))), torch.randn(1, 8, 9, 9)
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = model(x)
        running = [pool.submit(torch.no_grad()(model), x) for _ in range(64)]
        made = [pool.submit(fastseg.optimize, model) for _ in range(8)]
        for future in running:
            assert torch.equal(future.result(), expected)
        for future in made:
            torch.testing.assert_close(future.result()(x), expected, rtol=1e-4, atol=1e-4)


def test_explain_before():
    """What would be done, without doing it."""
    model = randomise(LooksAtSizes())
    assert "block.0: convolution engine" in fastseg.explain(model)
    assert not any(isinstance(m, PackedConv2d) for m in model.modules())
    assert fastseg.explain(nn.Sequential(nn.ReLU()).eval()) == ""
