"""Builds fastseg._C: every csrc/*/*_cpu.cpp and, where nvcc is wanted, every csrc/*/*_cuda.cu.

Environment: FASTSEG_CUDA=auto|0|1, FASTSEG_CUDA_ARCHS="80;90a", FASTSEG_DEBUG=1, CUDA_HOME,
MAX_JOBS, FASTSEG_CXXFLAGS (after the flags below).
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
except ImportError:
    # pip builds in isolation, but with the interpreter of the target environment: use the torch
    # installed there, because an extension must be compiled against the torch it will run with.
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    try:
        import torch
    except ImportError:
        sys.exit(
            "fastseg builds against your PyTorch and found none: run `pip install torch` first."
        )

import pybind11
from torch.utils import cpp_extension

DEBUG = os.environ.get("FASTSEG_DEBUG") == "1"
TORCH_TARGET = "0x020b000000000000"  # stable ABI of torch 2.11; the library loads in 2.11 and later


def find_cuda_home() -> str | None:
    """The CUDA toolkit to build with, or None for a CPU-only build."""
    wanted = os.environ.get("FASTSEG_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FASTSEG_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0" or (wanted == "auto" and torch.version.cuda is None):
        return None
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        nvcc and str(Path(nvcc).resolve().parents[1]),
    ]
    for home in filter(None, candidates):
        if (Path(home) / "bin" / "nvcc").exists():
            return home
    if wanted == "1":
        sys.exit(
            "FASTSEG_CUDA=1 needs nvcc: set CUDA_HOME to the CUDA toolkit or put nvcc on PATH."
        )
    return None


cuda_home = find_cuda_home()
archs = os.environ.get("FASTSEG_CUDA_ARCHS", "80;86;89;90a;100;120").split(";") if cuda_home else []
sources = ["csrc/module.cpp", *sorted(map(str, Path("csrc").glob("*/*_cpu.cpp")))]
# -ffp-contract=off: the same bits from every instruction set; kernels that want FMA say so.
cxx = ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
cxx += [
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    f"-ffile-prefix-map={os.getcwd()}/csrc=csrc",  # the same library from any folder
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # GCC 12 says it of its own intrinsics, two thousand times
    *os.environ.get("FASTSEG_CXXFLAGS", "").split(),
]
defines = [
    ("TORCH_TARGET_VERSION", TORCH_TARGET + "ULL"),
    ("FASTSEG_CUDA_ARCHS", f'"{";".join(archs)}"'),
]
nvcc_args: list[str] = []
# `torch` brings libtorch_cuda in where there is one; nothing refers to it by symbol at link time.
link = ["-Wl,--no-as-needed", "-ltorch"]
if cuda_home:
    cpp_extension.CUDA_HOME = cuda_home  # a CPU-only torch leaves it unset
    sources += sorted(map(str, Path("csrc").glob("*/*_cuda.cu")))
    nvcc_args = [
        "-DUSE_CUDA",
        "-O3",
        "--threads=2",
        "-Xcompiler=-fvisibility=hidden",
        "-DCCCL_IGNORE_DEPRECATED_CPP_DIALECT",
    ]
    nvcc_args += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    newest = max((a for a in archs if a.isdigit()), key=int, default=None)
    nvcc_args += [f"-gencode=arch=compute_{newest},code=compute_{newest}"] if newest else []
    link += [f"-L{cuda_home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

setup(
    ext_modules=[
        Extension(
            "fastseg._C",
            sources,
            language="c++",
            include_dirs=[
                os.path.abspath("csrc"),
                pybind11.get_include(),
                *cpp_extension.include_paths(),
            ],
            define_macros=defines,
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu", "c10"],
            extra_compile_args={"cxx": cxx, "nvcc": nvcc_args},
            extra_link_args=link,
        )
    ],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
