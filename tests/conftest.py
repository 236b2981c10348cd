"""Fixtures and the accuracy rule shared by all tests."""

import os

import pytest
import torch
from torch import Tensor

from fastseg import _C
from fastseg.ops import conv_bn, conv_train


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate",
        action="store_true",
        help="run the CUDA kernels, emulated, in the place of the CPU kernels",
    )
    parser.addoption(
        "--poison",
        action="store_true",
        help="fill the fresh memory of every tensor with NaN or a largest number",
    )


@pytest.fixture(scope="session", autouse=True)
def _emulate(request: pytest.FixtureRequest):
    if not request.config.getoption("--emulate"):
        yield
        return
    from .cuda_emulation.build import emulated_ops

    os.environ.setdefault("FASTSEG_CONV", "own")  # small layers are cuDNN's otherwise
    with emulated_ops():
        yield


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest):
    """A kernel that leaves part of its output unwritten then gives a wrong result."""
    if not request.config.getoption("--poison"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each device the op tests run on; CUDA is skipped with its reason where it cannot run. float32
    is exact on both: TensorFloat-32, which is torch's default, has its tests in cuda_emulation."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not _C.build_info()["cuda_archs"]:
            pytest.skip("fastseg was built without CUDA kernels")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


@pytest.fixture(params=_C.supported_cpu_isas())
def cpu_isa(request: pytest.FixtureRequest):
    """Runs the test once per instruction set of this CPU."""
    best = _C.cpu_isa()
    if request.config.getoption("--emulate") and request.param != best:
        pytest.skip("emulated CUDA kernels have no instruction sets")
    inherited = request.param in ("avx512_bf16", "amx")
    if inherited and "conv_engine" not in request.node.nodeid:
        pytest.skip("runs the kernels of avx512: only the convolution engine has its own")
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(best)


@pytest.fixture
def not_emulated(request: pytest.FixtureRequest) -> None:
    """For tests of what only the CPU kernels can do."""
    if request.config.getoption("--emulate"):
        pytest.skip("the CUDA kernels do not have this")


@pytest.fixture
def smallest_fused(monkeypatch: pytest.MonkeyPatch):
    """Fuses training steps of any size; smallest_fused(n): those from n multiplications on."""

    def fuse(least: int) -> None:
        monkeypatch.setattr(conv_train, "SMALLEST_FUSED", least)
        monkeypatch.setattr(conv_train, "SMALLEST_NORM", 0)
        conv_train._choose_once.cache_clear()
        conv_bn._plans.clear()

    fuse(0)
    yield fuse
    monkeypatch.undo()
    conv_train._choose_once.cache_clear()
    conv_bn._plans.clear()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets torch's thread count for one test: threads(1)."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_as_accurate(fast: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """`fast` may be at most `factor` times as far from the exact answer as plain PyTorch is in the
    same dtype, plus one rounding step of that dtype at the largest exact value."""
    assert fast.shape == plain.shape == exact.shape
    assert fast.dtype == plain.dtype
    if exact.numel() == 0:
        return
    step = torch.finfo(fast.dtype).eps * exact.abs().max().item()
    allowed = factor * (plain.double() - exact).abs().max().item() + step
    error = (fast.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"
