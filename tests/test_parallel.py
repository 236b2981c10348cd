"""Work sharing of the CPU kernels (csrc/common/parallel.h): every task once, and one that throws
neither hangs the others nor is lost."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
CXX = shutil.which(os.environ.get("CXX", "g++"))
PHASES, TASKS = 3, 50


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if CXX is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("parallel") / "parallel.so"
    command = [CXX, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{HERE.parent / 'csrc'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command += [str(HERE / "parallel.cpp"), "-o", str(target)]
    for path in cpp_extension.library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
    return ctypes.CDLL(str(target))


def run(function, tasks, count, bad=-1):
    """Whether the caller saw an exception, and how often each task ran."""
    done = (ctypes.c_int64 * count)()
    caught = function(ctypes.c_int64(tasks), ctypes.c_int64(bad), done)
    return bool(caught), list(done)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_task_once(library, count, threads):
    threads(count)
    assert run(library.run_tasks, TASKS, TASKS) == (False, [1] * TASKS)
    assert run(library.run_phases, TASKS, PHASES * TASKS) == (False, [1] * PHASES * TASKS)
    assert run(library.run_tasks, 0, 0) == (False, [])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("bad", [0, 30, TASKS - 1])
def test_a_task_that_throws(library, bad, count, threads):
    threads(count)
    for _ in range(20):  # who takes which task differs from run to run
        caught, done = run(library.run_tasks, TASKS, TASKS, bad)
        assert caught
        assert done[bad] == 0
        assert max(done) <= 1


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("bad", [0, 30, TASKS + 7, PHASES * TASKS - 1])
def test_a_phase_that_throws(library, bad, count, threads):
    threads(count)
    for _ in range(20):
        caught, done = run(library.run_phases, TASKS, PHASES * TASKS, bad)
        assert caught
        assert done[bad] == 0
        assert max(done) <= 1
        assert done[: bad // TASKS * TASKS] == [1] * (bad // TASKS * TASKS)  # earlier phases
    assert torch.get_num_threads() == count
    assert run(library.run_phases, TASKS, PHASES * TASKS) == (False, [1] * PHASES * TASKS)
