"""The emulator sees every kind of bug that it is there for: each is planted and must be caught."""

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


@pytest.mark.parametrize("kernel", ["block_sum", "staged_sum", "global_sum"])
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
    ],
)
def test_planted_bug_is_caught(kernel, bug, sanitizer, report):
    assert re.search(report, run(kernel, bug, sanitizer))
