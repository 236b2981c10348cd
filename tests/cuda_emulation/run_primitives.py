"""Compiles primitives.cu with nvcc for the GPU at hand and runs it.

python tests/cuda_emulation/run_primitives.py [ARCH] [--compile-only]
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]


def main(arch: str = "90a", *options: str) -> int:
    library = cpp_extension.library_paths()[0]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "primitives"
        command = ["nvcc", "-std=c++17", "-O2", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DUSE_CUDA"]
        command += [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
        command += [str(ROOT / "tests" / "cuda_emulation" / "primitives.cu"), "-o", str(program)]
        command += [f"-L{library}", "-ltorch_cpu", "-lc10"]
        command += ["-Xlinker=--allow-shlib-undefined"]  # what a CUDA torch itself links to
        subprocess.run(command, check=True)
        if "--compile-only" in options:
            return 0
        environment = {**os.environ, "LD_LIBRARY_PATH": library}
        return subprocess.run([program], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
