"""The emulator sees every kind of bug that it is there for: each is planted and must be caught."""

import ctypes
import os
import re
import subprocess
import sys

import pytest

from . import build

pytestmark = pytest.mark.skipif(build.cxx() is None, reason="no C++ compiler")


def run(kernel: str, bug: int, sanitizer: str = "", seed: int = 0) -> str:
    """What running a planted kernel printed, sanitizer reports included."""
    library = build.build([build.HERE / "planted_bugs.cu"], "planted", sanitizer)
    environment = {**os.environ, **(build.preload(sanitizer) if sanitizer else {})}
    command = [sys.executable, build.HERE / "run_planted.py", library, kernel, str(bug), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "kernel", ["block_sum", "staged_sum", "global_sum", "relayed_sum", "pipelined_product"]
)
@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
def test_right_kernels_pass(kernel, sanitizer):
    for seed in range(1 if sanitizer else 4):
        assert run(kernel, 0, sanitizer, seed).strip() == "right"


@pytest.mark.parametrize(
    ("kernel", "bug", "sanitizer", "report"),
    [
        pytest.param("block_sum", 1, "", "wrong result", id="missing barrier, by its result"),
        pytest.param("block_sum", 1, "thread", "data race", id="missing barrier, as a race"),
        pytest.param("block_sum", 2, "", "wrong result: .*nan", id="overrun, by its result"),
        pytest.param("block_sum", 2, "address", "heap-buffer-overflow", id="overrun, by address"),
        pytest.param(
            "block_sum", 6, "", "past the end of a 1024-byte", id="overwrite, by its guard"
        ),
        pytest.param("block_sum", 6, "address", "heap-buffer-overflow", id="overwrite, by address"),
        pytest.param("block_sum", 3, "", "mask 0x0000ffff", id="lanes disagree on the mask"),
        pytest.param("block_sum", 4, "", "wrong result: .*nan", id="read before any write"),
        pytest.param("block_sum", 5, "", "deadlock.*__syncthreads", id="a thread skips a barrier"),
        pytest.param("staged_sum", 1, "", "wrong result: .*nan", id="copy not waited for"),
        pytest.param("staged_sum", 2, "thread", "data race", id="copy waited for by one thread"),
        pytest.param("staged_sum", 3, "", "multiples of 16", id="misaligned copy"),
        pytest.param("staged_sum", 4, "thread", "data race", id="stage overwritten too early"),
        pytest.param("global_sum", 1, "thread", "data race", id="blocks race in global memory"),
        pytest.param("relayed_sum", 1, "", "flag stands before it is set", id="flag not cleared"),
        pytest.param("relayed_sum", 2, "thread", "data race", id="flag not waited for"),
        pytest.param("relayed_sum", 3, "thread", "data race", id="flag set too early"),
        *(
            pytest.param("pipelined_product", bug, "", report, id=name)
            for bug, report, name in (
                (1, "without fence_mbarrier_init", "barriers not fenced"),
                (2, "deadlock.*mbarrier_wait", "producer waits for the wrong parity"),
                (3, "wrong result|deadlock", "fewer bytes announced than loaded"),
                (4, "wrong result: .*nan|more arrivals", "consumer waits for the wrong parity"),
                (5, "no wgmma_fence", "registers of a product not fenced"),
                (6, "wrong result: .*nan", "stage given back before the product has read it"),
                (7, "ended before .*products", "product not waited for"),
                (8, "without fence_proxy_async", "plain stores not fenced before a bulk store"),
                (9, "ended before .*bulk store", "bulk store not waited for"),
            )
        ),
    ],
)
def test_planted_bug_is_caught(kernel, bug, sanitizer, report):
    # ThreadSanitizer sees the races that happen: on a busy machine one run in ten has none.
    seeds = range(6 if sanitizer == "thread" else 1)
    assert any(re.search(report, run(kernel, bug, sanitizer, seed)) for seed in seeds)


@pytest.mark.parametrize("seed", range(3))
def test_primitives_equal_plain_loops(seed):
    """The same program tests the PTX on a CUDA machine."""
    library = ctypes.CDLL(str(build.build([build.HERE / "primitives.cu"], "primitives")))
    library.test_primitives.restype = ctypes.c_char_p
    library.fastseg_emulation_seed(ctypes.c_uint64(seed))
    report = library.test_primitives(ctypes.c_uint(seed), True).decode()
    assert len(re.findall("^ok ", report, re.MULTILINE)) == 16, report
    assert "WRONG" not in report, report


def test_layers_and_networks_wait_for_nothing_on_fake_cuda_tensors():
    library = build.build([build.HERE / "fake_cuda.cpp"], "fake_cuda")
    command = [sys.executable, "-m", "tests.cuda_emulation.run_fake_cuda", library]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("ok ") >= 40
