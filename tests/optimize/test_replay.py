"""Recorded calls: the same results as those of the modules, whatever happens in between."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastseg
from fastseg.optimize.replay import SHAPES, Recorder, Replayed, Tape

SIZE = (2, 3, 20, 28)


class Net(nn.Module):
    """Skips, pools, a resize, a concatenation with a fresh tensor in it, a pyramid, two results."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, padding=1)
        self.skip = nn.Conv2d(16, 16, 1)
        self.merge = nn.Conv2d(48, 16, 3, padding=1)
        self.score = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        fine = F.relu(self.stem(x))
        y = F.max_pool2d(fine, 2, ceil_mode=True)
        y = F.relu(self.down(y)) + y
        means = [F.adaptive_avg_pool2d(y, b) for b in (1, 2)]
        y = y + F.interpolate(means[1], y.shape[-2:], mode="bilinear") + means[0]
        y = F.interpolate(self.skip(y), fine.shape[-2:], mode="bilinear")
        y = self.merge(torch.cat([fine, y, fine.sigmoid()], 1))
        return {"score": self.score(y), "map": y.mean((2, 3)), "size": y.shape[-1]}


@pytest.fixture
def fast():
    torch.manual_seed(0)
    fast = fastseg.optimize(Net().eval())
    assert isinstance(fast, Replayed)
    return fast


def same(fast, x):
    """Calls it, and compares with the modules."""
    y, expected = fast(x), fast.held[0](x)
    assert y.keys() == expected.keys()
    assert y["size"] == expected["size"]
    assert all(torch.equal(y[name], expected[name]) for name in ("score", "map"))
    return y


def tapes(fast):
    return [tape for tape in fast.memory.tapes.values() if isinstance(tape, Tape)]


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], autouse=True)
def without_gradients(request):
    with request.param():
        yield


def test_calls_are_repeated_without_modules(fast, monkeypatch):
    for _ in range(3):
        same(fast, torch.randn(SIZE))
    (tape,) = tapes(fast)
    x = torch.randn(SIZE)
    expected = fast.held[0](x)["score"]
    monkeypatch.setattr(fastseg.nn.packed.PackedConv2d, "forward", None)
    assert torch.equal(fast(x)["score"], expected)
    assert len(tape.steps) < 40


def test_results_and_inputs_stay_the_callers(fast):
    x = torch.randn(SIZE)
    results = [same(fast, x)["score"] for _ in range(5)]
    assert len({y.data_ptr() for y in results}) == 5
    other = torch.randn(SIZE)
    kept = other.clone()
    same(fast, other)
    assert torch.equal(other, kept)
    assert all(torch.equal(y, results[0]) for y in results)


def test_shapes_layouts_and_their_number(fast):
    for size in ((1, 3, 8, 8), (2, 3, 33, 17), (0, 3, 8, 8), (1, 3, 8, 8)) * 3:
        same(fast, torch.randn(size))
        same(fast, torch.randn(size).contiguous(memory_format=torch.channels_last))
        same(fast, torch.randn(*size[:3], size[3] + 5)[..., 2:-3])
    for n in range(2 * SHAPES):
        for _ in range(3):
            same(fast, torch.randn(1, 3, 8, 8 + n))
    assert len(fast.memory.tapes) == SHAPES
    for _ in range(4):  # the buffers grow: what was recorded would hold the old ones
        same(fast, torch.randn(2, 3, 64, 64))
    assert len(tapes(fast)) == 1


def test_threads_copies_and_pickles(fast):
    inputs = [torch.randn(SIZE) for _ in range(24)]
    expected = [fast.held[0](x)["score"] for x in inputs]
    inference = torch.is_inference_mode_enabled()

    def call(x):
        with torch.inference_mode(inference), torch.no_grad():
            return fast(x)["score"]

    with ThreadPoolExecutor(3) as pool:
        for y, alone in zip(pool.map(call, inputs), expected, strict=True):
            assert torch.equal(y, alone)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert isinstance(other, Replayed)
        assert [n for n, _ in other.named_modules()] == [n for n, _ in fast.named_modules()]
        for x, y in zip(inputs[:4], expected, strict=False):
            assert torch.equal(same(other, x)["score"], y)


def test_hooks_and_replaced_layers_are_seen(fast):
    x = torch.randn(SIZE)
    for _ in range(4):
        same(fast, x)
    seen = []
    handle = fast.score.register_forward_hook(lambda m, args, y: seen.append(y))
    y = fast(x)
    assert len(seen) == 1
    assert torch.equal(y["score"], seen[0])
    handle.remove()
    same(fast, x)
    assert len(seen) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(y))
    fast(x)
    handle.remove()
    assert len(seen) > 5
    fast.score = nn.Identity()
    assert fast(x)["score"].shape[1] == 16


def test_errors_leave_it_usable(fast):
    for _ in range(4):
        same(fast, torch.randn(SIZE))
        with pytest.raises(ValueError, match="x must be"):
            fast(torch.randn(2, 4, 20, 28))
    same(fast, torch.randn(SIZE))


def test_modes_see_every_call(fast):
    x = torch.randn(SIZE)
    for _ in range(4):
        same(fast, x)
    with Recorder([x]) as recorder:
        fast(x)
    assert len(recorder.calls) >= len(tapes(fast)[0].steps)  # not past the mode
    with torch.autocast("cpu", torch.bfloat16):
        same(fast, x)


def test_values_that_python_looks_at_are_not_recorded():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = self.b(self.a(x))
            return y * y.amax().item()

    fast = fastseg.optimize(Looks().eval())
    for _ in range(4):
        x = torch.randn(SIZE)
        torch.testing.assert_close(fast(x), fast.held[0](x))
    assert not tapes(fast)


def test_the_same_tensor_twice():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x, y):
            return self.b(self.a(x) + self.a(y))

    fast = fastseg.optimize(Two().eval())
    for _ in range(4):
        x, y = torch.randn(SIZE), torch.randn(SIZE)
        for pair in ((x, x), (x, y), (y, y)):
            assert torch.equal(fast(*pair), fast.held[0](*pair))


def test_compiled_and_traced(fast):
    if torch.is_inference_mode_enabled():
        pytest.skip("torch.compile is called under no_grad here")
    x = torch.randn(SIZE)
    for _ in range(3):
        expected = same(fast, x)["score"]
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)["score"], expected)
    traced = make_fx(lambda x: fast(x)["score"])(x)
    other = torch.randn(SIZE)
    torch.testing.assert_close(traced(other), same(fast, other)["score"])


def test_recording_loads_no_compiler():
    """It takes a second or two, which the second call would."""
    program = """
import sys
import torch
import fastseg

layers = [torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
fast = fastseg.optimize(torch.nn.Sequential(*layers).eval())
with torch.no_grad():
    for _ in range(3):
        fast(torch.randn(1, 4, 8, 8))
assert any(fast.memory.tapes.values())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
