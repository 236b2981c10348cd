#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, a CUDA build of torch and nvcc, under 9 minutes:
# builds for the GPU at hand (or uses a build made beforehand: FASTSEG_PREBUILT=1), runs every test on
# CUDA, then compute-sanitizer on small shapes, the ceilings and the benchmark table, and ncu where it
# is installed. Writes benchmarks/results/<date>-<gpu>.json. Clocks and power limits stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
step() { printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; }

step "build"
if [ "${FASTSEG_PREBUILT:-0}" != 1 ]; then
  arch=$($python -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
  FASTSEG_CUDA=1 FASTSEG_CUDA_ARCHS=$arch $python setup.py -q build_ext --inplace
fi
$python -m fastseg info

step "every code path against the CPU kernels; fresh memory is NaN"
kernels=tests/cuda_emulation
$python -m pytest -q "$kernels" -k on_cuda

step "the tests of the ops on CUDA"
$python -m pytest -q tests/ops -k cuda

step "compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-regex kns=fastseg "$python" -m pytest -q -x "$kernels" -k on_cuda
  done
else
  echo "skipped: compute-sanitizer is not installed"
fi

step "ceilings and benchmark table"
$python -m benchmarks.gpu_table

step "ncu on the two slowest kernels"
if command -v ncu >/dev/null; then
  timeout 90 ncu --clock-control none --kernel-name-base demangled --kernel-name 'regex:fastseg' \
    --set full --launch-count 40 "$python" -m benchmarks.gpu_table --once |
    grep -E 'fastseg::|Duration|DRAM Throughput|Registers Per Thread|Achieved Occupancy' || true
else
  echo "skipped: ncu is not installed"
fi
step "done"
