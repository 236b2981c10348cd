"""Runs op tests on CPU kernels that are built with AddressSanitizer and UBSan.

    python tests/sanitize.py                      # all CPU op tests
    python tests/sanitize.py tests/ops/test_dense_crf.py -k mask

The library goes to build/sanitize beside links to the Python files; the next run builds only what
changed. Most of the time to build goes to the convolution engine: minutes each for its matrix
products, Winograd's and the grouped ones.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
# Loads and stores of kernels go through memcpy; what is cast is meant to be.
FLAGS += " -fno-sanitize=alignment"


def build() -> Path:
    """The folder to import the sanitized fastseg from."""
    library = BUILD / "lib"
    package = library / "fastseg"
    package.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "fastseg").iterdir():
        link = package / path.name
        if not path.name.startswith(("_C", "__pycache__")) and not link.exists():
            link.symlink_to(path)
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(library), "--build-temp", str(BUILD / "temp")]
    # At -O3 the checks take ten minutes to compile.
    flags = {"FASTSEG_CXXFLAGS": f"{FLAGS} -O1 -g1", "LDFLAGS": FLAGS, "FASTSEG_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, check=True)
    return library


def main(arguments: list[str]) -> int:
    library = build()
    sys.path.insert(0, str(ROOT))
    from tests.cuda_emulation.build import preload

    environment = {**os.environ, **preload("address"), "PYTHONPATH": str(library)}
    environment["ASAN_OPTIONS"] += ":detect_odr_violation=0"
    # -P and append: the sanitized package comes before the one in the working directory.
    command = [sys.executable, "-P", "-m", "pytest", "--import-mode=append"]
    command += arguments or ["tests/ops", "tests/nn", "tests/compat"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
