"""Compiles CUDA sources with g++ against the emulator, with or without sanitizers.

``emulated_library()`` holds every csrc/*/*_cuda.cu; loading it registers their kernels as
fastseg_emulated::<op> for CPU tensors. ``emulated_ops()`` puts those kernels in the place of the
CPU kernels of fastseg::<op>, so that the tests of the ops run them.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from fastseg.ops import conv_bn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_emulation"  # objects by content: a second run compiles nothing

FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-terminate"]
FLAGS += ["-fno-strict-aliasing"]  # kernels view shared memory as several types, as nvcc lets them
FLAGS += ["-DFASTSEG_EMULATE", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
if os.uname().machine == "x86_64":
    FLAGS += ["-mavx2", "-mfma", "-mf16c"]
SANITIZE = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-DFASTSEG_TSAN"],
}


def cxx() -> str | None:
    """The C++ compiler of the emulation, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def preload(sanitizer: str) -> dict[str, str]:
    """What a Python process needs in its environment to load a library built with `sanitizer`."""
    names = {"address": ["libasan.so"], "thread": ["libtsan.so"]}[sanitizer] + ["libstdc++.so.6"]
    paths = [
        subprocess.run([cxx(), f"-print-file-name={name}"], capture_output=True, text=True)
        for name in names
    ]
    return {
        "LD_PRELOAD": " ".join(path.stdout.strip() for path in paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


@functools.cache
def _headers() -> str:
    files = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *HERE.glob("*.h")]
    text = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files))
    return hashlib.sha256((text + torch.__version__).encode()).hexdigest()


def _compile(source: Path, sanitizer: str) -> Path:
    flags = [*FLAGS, *SANITIZE[sanitizer]]
    if source.name == "scheduler.cpp" and sanitizer == "thread":
        # It announces what is ordered; its own switching would look like order where there is none.
        flags.remove("-fsanitize=thread")
    key = hashlib.sha256("\0".join([*flags, _headers(), source.read_text()]).encode()).hexdigest()
    target = CACHE / f"{source.stem}-{key[:20]}.o"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
        include += [f"-isystem{path}" for path in cpp_extension.include_paths()]
        partial = target.with_suffix(f".{os.getpid()}.o")
        _run([cxx(), "-x", "c++", "-c", *flags, *include, str(source), "-o", str(partial)])
        partial.rename(target)
    return target


def build(sources: Sequence[Path], name: str, sanitizer: str = "") -> Path:
    """Compiles `sources` and the scheduler into a shared library, with a sanitizer of SANITIZE."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda source: _compile(source, sanitizer), [HERE / "scheduler.cpp", *sources])
        )
    key = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()
    target = CACHE / f"{name}-{key[:20]}.so"
    if not target.exists():
        library = cpp_extension.library_paths()
        link = [f"-L{path}" for path in library] + [f"-Wl,-rpath,{path}" for path in library]
        link += ["-Wl,--as-needed", "-ltorch_cpu", "-lc10", "-lpthread", "-shared"]
        partial = target.with_suffix(f".{os.getpid()}")
        flags = [flag for flag in SANITIZE[sanitizer] if flag.startswith("-f")]
        _run([cxx(), *flags, *map(str, objects), *link, "-o", str(partial)])
        partial.rename(target)
    return target


class Emulator:
    """A loaded emulated library: fiber order, counters."""

    COUNTERS = (
        *("launches", "mma", "wgmma", "ldmatrix", "bank_conflicts"),
        *("requests", "sectors", "ideal_sectors"),
    )

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.fastseg_emulation_replay.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """Chooses the order in which the threads of each block run; 0 is by thread number."""
        self.library.fastseg_emulation_seed(ctypes.c_uint64(seed))

    @contextlib.contextmanager
    def compute_capability(self, major: int) -> Iterator[None]:
        """Inside the with block, kernels are chosen as for devices of this capability (else 8)."""
        self.library.fastseg_emulation_compute_capability(major)
        try:
            yield
        finally:
            self.library.fastseg_emulation_compute_capability(8)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Callable[[], None]]:
        """Inside the with block a graph is captured: copies to the host fail. Yields what replays
        it, on the memory that it was given, until the next capture."""
        self.library.fastseg_emulation_keep_memory(True)
        self.library.fastseg_emulation_capturing(True)
        try:
            yield self._replay
        finally:
            self.library.fastseg_emulation_capturing(False)
            self.library.fastseg_emulation_keep_memory(False)

    def _replay(self) -> None:
        if error := self.library.fastseg_emulation_replay():
            raise RuntimeError(error.decode())

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Counts events inside the with block; the dict is filled at its end."""
        values = (ctypes.c_uint64 * len(self.COUNTERS))()
        self.library.fastseg_emulation_counters(values, True)
        self.library.fastseg_emulation_count_accesses(True)
        counts: dict[str, int] = {}
        try:
            yield counts
        finally:
            self.library.fastseg_emulation_count_accesses(False)
            self.library.fastseg_emulation_counters(values, True)
            counts.update(zip(self.COUNTERS, values, strict=True))


def _mm_dtype_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """aten::mm.dtype_out, which torch has on CUDA only, with the checks that it makes there."""
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    assert out.dtype == out_dtype, (out.dtype, out_dtype)
    assert out_dtype == torch.float32, out_dtype
    return torch.mm(a.float(), b.float(), out=out)


@functools.cache
def emulated_library() -> Emulator:
    """All CUDA kernels of the project as fastseg_emulated::<op>, with the schemas of fastseg::<op>.

    FASTSEG_SANITIZE=address|thread builds it with that sanitizer, for a process started with
    ``preload(...)`` in its environment.
    """
    sources = [HERE / "memory.cpp", *sorted(ROOT.glob("csrc/*/*_cuda.cu"))]
    emulator = Emulator(build(sources, "fastseg_emulated", os.environ.get("FASTSEG_SANITIZE", "")))
    emulator.ops = [
        name.removeprefix("fastseg_emulated::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
        if name.startswith("fastseg_emulated::")
    ]
    emulator.aten = torch.library.Library("aten", "IMPL")
    emulator.aten.impl("mm.dtype_out", _mm_dtype_out, "CPU")
    emulator.schemas = torch.library.Library("fastseg_emulated", "FRAGMENT")
    for name in emulator.ops:
        schema = str(getattr(torch.ops.fastseg, name).default._schema)
        emulator.schemas.define(schema.removeprefix("fastseg::"))
    return emulator


@contextlib.contextmanager
def emulated_ops() -> Iterator[Emulator]:
    """fastseg::<op> on CPU tensors runs the emulated CUDA kernel wherever there is one."""
    emulator = emulated_library()
    library = torch.library.Library("fastseg", "IMPL")
    for name in emulator.ops:
        kernel = getattr(torch.ops.fastseg_emulated, name).default
        library.impl(name, kernel, "CPU", allow_override=True)
    training_kernels = conv_bn.training_kernels
    conv_bn.training_kernels = lambda *_: None  # as on CUDA: no training by the CPU's engine
    conv_bn._plans.clear()
    try:
        yield emulator
    finally:
        conv_bn.training_kernels = training_kernels
        conv_bn._plans.clear()
        library._destroy()
