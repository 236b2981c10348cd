"""Rules that every CUDA source keeps, so that a call can be captured in a graph, runs on any device
and stream, and can be emulated."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
SOURCES = [*KERNELS, *ROOT.glob("csrc/*/*.cuh"), *ROOT.glob("csrc/**/*cuda*.h")]

FORBIDDEN = {
    r"<<<": "launches go through launch()",
    r"cuda(Device|Stream|Event)Synchronize|cudaMemcpy|cudaEventQuery": "only copy_to_host may wait",
    r"cuda(Malloc|Free|HostAlloc)\w*\(": "memory comes from torch, on the current stream",
    r"cudaStreamLegacy|cudaStreamPerThread|cudaMemset": "work goes to torch's current stream",
    r"\b__shared__\b": "shared memory comes from FASTSEG_SHARED or FASTSEG_DYNAMIC_SHARED",
    r"\bcudaSetDevice\b": "DeviceGuard chooses the device",
}


def code(path: Path) -> str:
    """The file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_forbidden(pattern):
    macros = ROOT / "csrc" / "common" / "cuda.h"
    found = [path.name for path in SOURCES if path != macros and re.search(pattern, code(path))]
    assert not found, FORBIDDEN[pattern]


def test_assembly_is_in_one_file():
    assert [path.name for path in SOURCES if re.search(r"\basm\b", code(path))] == ["ptx.cuh"]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_ops_run_on_the_device_of_their_input(path):
    """What is registered makes that device the current one before it allocates or launches."""
    text = code(path)
    for name in re.findall(r"TORCH_BOX\(&(\w+)\)", text):
        start = re.search(rf"\n[^\n;]+ {name}\(", text).end()
        body = text[start : text.index("\n}\n", start)]
        before, guard, _ = body.partition("const DeviceGuard guard(")
        assert guard, f"{name} has no DeviceGuard"
        work = re.search(
            r"launch\(|current_stream\(|new_empty\(|empty_like\(|empty_image\(", before
        )
        assert work is None, f"{name} works before its DeviceGuard"


def test_nothing_waits_for_the_host_while_a_graph_is_captured():
    """What copies to the host has looked before whether it may."""
    for path in KERNELS:
        text = code(path)
        if "copy_to_host(" in text:
            returns = re.findall(r"if \(is_capturing\([^)]*\)+ return", text)
            assert len(returns) == 1, path.name
