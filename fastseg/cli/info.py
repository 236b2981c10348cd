"""``fastseg info``: what was built, which kernels will run here, and why the rest will not."""

import importlib.metadata
import json as json_module
import platform
from typing import Any

import torch

import fastseg
from fastseg import _C

# What each instruction-set level asks of the CPU (csrc/common/isa.h).
_ISA_NEEDS = {
    "baseline": "nothing",
    "avx2": "AVX2, FMA and F16C",
    "avx512": "AVX-512 F, BW, DQ and VL",
    "avx512_bf16": "AVX-512 BF16",
    "amx": "AMX with BF16, or Linux does not let this process use it",
}
# Names of GPUs that the steps of benchmarks/gpu_check.sh have passed on.
_CHECKED_ON: tuple[str, ...] = ("NVIDIA H200",)
_EXTRAS = {
    "cli": ("typer", "rich"),
    "bench": ("pytest", "pytest_benchmark"),
}


def _cpu() -> dict[str, Any]:
    supported, used = _C.supported_cpu_isas(), _C.cpu_isa()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    kernels = {}
    for name in _ISA_NEEDS if x86 else ("baseline",):
        if name == used:
            kernels[name] = "in use"
        elif name in supported:
            kernels[name] = f"runs here; {used} was chosen"
        else:
            kernels[name] = f"will not run: this CPU lacks {_ISA_NEEDS[name]}"
    return {"kernels": kernels, "threads": torch.get_num_threads()}


def _why_no_cuda(archs: list[str]) -> str | None:
    """Why no CUDA kernel will run, or None where they can (each device is judged by itself)."""
    if not archs:
        return "not built: needs nvcc when fastseg is installed, and a CUDA torch or FASTSEG_CUDA=1"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU or driver"
    return None


def _runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a library with code for `archs` ("80", "90a") has some for a device.

    Machine code of sm_XY runs on X.Z with Z >= Y, that of sm_XYa on X.Y alone; the newest plain
    architecture is also there as PTX, which any later device compiles for itself.
    """
    plain = [divmod(int(a), 10) for a in archs if a.isdigit()]
    exact = [divmod(int(a[:-1]), 10) for a in archs if not a.isdigit()]
    major, minor = capability
    return (
        capability in exact
        or any(x == major and y <= minor for x, y in plain)
        or (bool(plain) and capability >= max(plain))
    )


def _cuda() -> dict[str, Any]:
    archs = [a for a in str(_C.build_info()["cuda_archs"]).split(";") if a]
    why = _why_no_cuda(archs)
    devices = {}
    for i in range(0 if why else torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        runs = _runs_on(archs, capability)
        devices[f"{i}: {torch.cuda.get_device_name(i)}"] = (
            "in use" if runs else f"will not run: no kernels for sm_{capability[0]}{capability[1]}"
        )
    return {
        "architectures": archs,
        "will_not_run": why,
        "devices": devices,
        "checked_on": list(_CHECKED_ON),
    }


def _ops() -> dict[str, list[str]]:
    """Each registered op and the devices that have a kernel for it; "any": PyTorch code."""
    names = sorted(
        {n.split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "fastseg::" in n}
    )
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        n.removeprefix("fastseg::"): [k.lower() for k in ("CPU", "CUDA") if has(n, k)] or ["any"]
        for n in names
    }


def _installed(module: str) -> bool:
    try:
        importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def report() -> dict[str, Any]:
    """Everything ``fastseg info`` prints, ready for JSON."""
    return {
        "fastseg": fastseg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "build": _C.build_info(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "ops": _ops(),
        "extras": {
            extra: [m for m in modules if not _installed(m)] for extra, modules in _EXTRAS.items()
        },
    }


def info(json: bool = False) -> None:
    """What was built, which kernels will run here, and why the rest will not."""
    r = report()
    if json:
        print(json_module.dumps(r, indent=2))
        return
    build, cuda = r["build"], r["cuda"]
    compiler = build["compiler"]
    if compiler[0].isdigit():
        compiler = f"GCC {compiler}"  # clang names itself
    print(f"fastseg {r['fastseg']}, torch {r['torch']}, Python {r['python']}, {r['machine']}")
    print(
        f"built     with {compiler}, C++{build['cpp_standard']}, for torch >= "
        f"{build['torch_target']}{', unoptimised (FASTSEG_DEBUG=1)' if build['debug'] else ''}"
    )
    print(f"CPU       {r['cpu']['threads']} threads")
    for name, state in r["cpu"]["kernels"].items():
        print(f"  {name:<12} {state}")
    built_for = " ".join(f"sm_{a}" for a in cuda["architectures"])
    print(f"CUDA      {f'built for {built_for}' if built_for else 'no kernels'}")
    if cuda["will_not_run"]:
        print(f"  will not run: {cuda['will_not_run']}")
    print(f"  checked on {', '.join(cuda['checked_on'])}; for other GPUs emulated on a CPU")
    for name, state in cuda["devices"].items():
        print(f"  {name}  {state}")
    print(f"ops       {len(r['ops'])}")
    for name, devices in r["ops"].items():
        print(f"  {name:<28} {' '.join(devices)}")
    for extra, missing in r["extras"].items():
        state = f"pip install 'fastseg-kernels[{extra}]' ({', '.join(missing)} missing)"
        print(f"extra     {extra:<8} {state if missing else 'installed'}")
