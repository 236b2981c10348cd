#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, a CUDA build of torch and nvcc; on 16 cores, with
# pytest-xdist, under 9 minutes after the build:
#
#     benchmarks/gpu_check.sh [--plan]
#
# Builds for the GPU at hand (FASTSEG_PREBUILT=1: uses the fastseg that is there; FASTSEG_WHEEL=x.whl:
# takes its library from a wheel built beforehand), then runs the program that tests each primitive,
# every test on CUDA, compute-sanitizer on small shapes, the ceilings and the benchmark table, and ncu
# where it is installed. Writes benchmarks/results/<date>-<gpu>.json and the table of
# benchmarks/README.md. Clocks, power and compute mode stay as they are. A step that fails does not
# stop the others; the exit status then is 1. --plan prints the commands and needs no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python}
command -v "$PYTHON" >/dev/null || PYTHON=python3
plan=0
[ "${1:-}" = --plan ] && plan=1
failed=()
current=
mkdir -p build

step() {
  current=$1
  if [ $plan = 1 ]; then printf '== %s\n' "$1"; else printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; fi
}

# Runs a command within a number of seconds, or prints it.
run() {
  local limit=$1
  shift
  if [ $plan = 1 ]; then
    printf '%q ' "$@"
    printf '  # at most %d s\n' "$limit"
    return
  fi
  timeout "$limit" "$@" || failed+=("$current: exit status $?")
}

# Whether a tool is there; in a plan it always is.
have() {
  [ $plan = 1 ] || command -v "$1" >/dev/null || {
    echo "skipped: $1 is not installed"
    return 1
  }
}

step "build"
arch=90a
if [ $plan = 0 ]; then
  arch=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))') || {
    echo "gpu_check.sh needs a GPU that torch can use (--plan prints what it would do)"
    exit 2
  }
fi
if [ -n "${FASTSEG_WHEEL:-}" ]; then
  run 20 "$PYTHON" -m zipfile -e "$FASTSEG_WHEEL" build/wheel
  run 10 bash -c 'cp build/wheel/fastseg/_C*.so fastseg/'
elif [ "${FASTSEG_PREBUILT:-0}" != 1 ]; then
  run 600 env FASTSEG_CUDA=1 FASTSEG_CUDA_ARCHS="$arch" "$PYTHON" setup.py -q build_ext --inplace
fi
run 20 "$PYTHON" -m fastseg info
SECONDS=0

step "primitives"
have nvcc && run 40 "$PYTHON" tests/cuda_emulation/run_primitives.py "$arch"

workers=() # most of the tests' time goes by on the host
"$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)

step "every code path against the CPU kernels"
# Deterministic mode, which these tests switch on, fills fresh memory with NaN.
run 60 "$PYTHON" -m pytest -q tests/cuda_emulation -k on_cuda "${workers[@]}"

step "the tests on CUDA"
run 120 "$PYTHON" -m pytest -q tests/ops tests/nn tests/models/test_cuda.py -k cuda --poison "${workers[@]}"
# Small layers are cuDNN's unless ours are asked for.
run 60 env FASTSEG_CONV=own "$PYTHON" -m pytest -q tests/ops/test_conv_{bn,branches}.py -k cuda --poison "${workers[@]}"

step "compute-sanitizer"
if have compute-sanitizer; then
  # Side by side: most of their time goes by on the host. initcheck must see every kernel that
  # writes, the others look at ours; torch asks the driver for what some drivers lack, which memcheck
  # would report. Without torch's cache of memory no graph can be captured.
  processes=()
  for tool in memcheck racecheck synccheck initcheck; do
    command=(timeout 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool")
    command+=(--error-exitcode 1)
    [ "$tool" = memcheck ] && command+=(--report-api-errors no)
    [ "$tool" = initcheck ] || command+=(--kernel-regex kns=fastseg)
    command+=("$PYTHON" -m pytest -q -x -p no:cacheprovider tests/cuda_emulation -k "on_cuda and not graphs")
    if [ $plan = 1 ]; then
      run 110 "${command[@]}"
    else
      "${command[@]}" >"build/$tool.log" 2>&1 &
      processes+=("$tool=$!")
    fi
  done
  for process in "${processes[@]}"; do
    tool=${process%=*}
    wait "${process#*=}" || failed+=("compute-sanitizer: $tool: exit status $?, see build/$tool.log")
    echo "$tool: $(tail -n 1 "build/$tool.log")"
  done
fi

step "ceilings and benchmark table"
if [ $plan = 1 ]; then "$PYTHON" -m benchmarks.gpu_table --plan || exit 2; fi
seconds=$((470 - SECONDS)) # what the steps before have left, to end well within 9 minutes
run $((seconds + 25)) "$PYTHON" -m benchmarks.gpu_table --seconds "$seconds"

step "ncu on the two slowest kernels"
if have ncu; then
  # First the durations of all launches of ours, then everything about the two slowest.
  if [ $plan = 0 ]; then
    timeout 25 ncu --clock-control none --kernel-name-base demangled --kernel-name 'regex:fastseg' \
      --metrics gpu__time_duration.sum --csv "$PYTHON" -m benchmarks.gpu_table --once \
      'N=1$' >build/ncu.csv || failed+=("$current: exit status $?")
    slowest=$("$PYTHON" -m benchmarks.gpu_slowest build/ncu.csv 2)
  else
    slowest='first|second'
  fi
  run 20 ncu --clock-control none --kernel-name-base demangled --kernel-name "regex:$slowest" \
    --set full --launch-count 2 "$PYTHON" -m benchmarks.gpu_table --once 'N=1$'
fi

[ $plan = 1 ] && exit 0
printf '\n== done (after %d s)\n' "$SECONDS"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED  %s\n' "${failed[@]}"
  exit 1
fi
