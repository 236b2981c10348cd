"""Builds the library with its CUDA kernels for sm_80 and sm_90a and checks what ptxas made of them.

    python tests/check_cuda_build.py [--update] [--all]

--all: for all architectures of a wheel, which takes three times as long.

No kernel may spill registers, and none may use more registers or static shared memory than
tests/cuda_kernels.txt allows; --update writes that table anew. The machine code must hold the
instructions that a kernel is there for and no access to local memory. The library must then load in
this torch, with or without CUDA, and register each CUDA kernel. Needs nvcc, no GPU; for the machine
code cuobjdump and nvdisasm, from the toolkit or nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "cuda_kernels.txt"
ARCHS = "80;90a"  # of the table
ALL_ARCHS = "80;86;89;90a;100;120"

# Beginnings of instructions that kernels, by what their name begins with, must have: tensor cores,
# asynchronous copies and matrix loads; for passes over channels-last memory 16-byte accesses.
REQUIRED = {
    r"conv_forward<": ("HMMA", "LDGSTS", "LDSM", "STG.E.128"),
    r"conv_weight_gradient<": ("HMMA", "LDGSTS", "LDSM", "STG.E.128"),
    r"second_stage<(BFloat16|Half)": ("HMMA",),
    r"(normalize|backward_apply)<\w+, true": ("LDG.E.128", "STG.E.128"),
    r"(backward_reduce|moments_kernel)<\w+, true": ("LDG.E.128",),
}
REQUIRED_90A = {"conv_wgmma<": ("HGMMA", "UTMALDG", "SYNCS", "USETMAXREG", "STG.E.128")}
FORBIDDEN = ("LDL", "STL")  # local memory
# What may have it: arrays of as many elements as there are features, which is known at run time.
LOCAL_ARRAYS = ("locate_points<0", "plan_keys<")

# name of one kernel on one architecture -> (registers, bytes of static shared memory, barriers)
Usage = dict[str, tuple[int, int, int]]


def compile_library(target: Path, archs: str) -> str:
    """Builds into `target`; returns what the compilers printed."""
    environment = {
        **os.environ,
        "FASTSEG_CUDA": "1",
        "FASTSEG_CUDA_ARCHS": archs,
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
    }
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(target), "--build-temp", str(target / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def parse(log: str) -> tuple[Usage, list[str]]:
    """The usage of each kernel and the kernels that spill."""
    usage: Usage = {}
    spills = []
    name = ""
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name = f"{found[2]} {found[1]}"
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if name and (int(found[1]) or int(found[2])):
                spills.append(name)
        elif found := re.search(r"Used (\d+) registers", line):
            barriers = re.search(r"used (\d+) barriers", line)
            shared = re.search(r"(\d+) bytes smem", line)
            usage[name] = (
                int(found[1]),
                int(shared[1]) if shared else 0,
                int(barriers[1]) if barriers else 0,
            )
            name = ""
    return usage, spills


def demangle(names: list[str]) -> list[str]:
    """Readable names without return type, parameters and the namespaces that all share."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    readable = []
    for line in done.stdout.splitlines():
        arch, _, name = line.partition(" ")
        name = name.replace("(anonymous namespace)::", "").replace("fastseg::", "")
        name = name.removeprefix("void ").replace("torch::headeronly::", "").replace("c10::", "")
        depth = 0  # cut the parameter list: the first "(" outside template brackets
        for i, c in enumerate(name):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                name = name[:i]
                break
        readable.append(f"{arch} {name}")
    return readable


def read_table() -> Usage:
    table: Usage = {}
    for line in TABLE.read_text().splitlines():
        if line and not line.startswith("#"):
            registers, shared, barriers, name = line.split(maxsplit=3)
            table[name] = (int(registers), int(shared), int(barriers))
    return table


def nvcc_version() -> str:
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True)
    return re.search(r"release [\d.]+, V([\d.]+)", done.stdout)[1]


def find_disassembler() -> str | None:
    """The folder of cuobjdump and nvdisasm, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [*os.environ["PATH"].split(":"), f"{home}/bin", *map(str, packages.glob("*/bin"))]
    for folder in folders:
        if all(shutil.which(tool, path=folder) for tool in ("cuobjdump", "nvdisasm")):
            return folder
    return None


def instructions(library: Path, folder: str) -> dict[str, set[str]]:
    """The operations in the machine code of each kernel on each architecture."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["cuobjdump", "-sass", str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    found: dict[str, set[str]] = {}
    arch = name = ""
    operation = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
    for line in done.stdout.splitlines():
        if match := re.match(r"\s*(?:code for|arch =)\s*(sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            name = f"{arch} {match[1]}"
            found[name] = set()
        elif match := operation.match(line):
            found[name].add(match[1])
    return found


def check_instructions(library: Path) -> str:
    """What was checked, in a sentence; exits with the kernels that have too little or too much."""
    folder = find_disassembler()
    if folder is None:
        return "machine code not checked: no cuobjdump and nvdisasm on this machine"
    found = instructions(library, folder)
    wrong, checked = [], 0
    for readable, have in zip(demangle(list(found)), found.values(), strict=True):
        kernel = readable.partition(" ")[2]
        if "cub::" in kernel:
            continue
        checked += 1
        local = sorted(i for i in have if i.startswith(FORBIDDEN))
        local = [] if kernel.startswith(LOCAL_ARRAYS) else local
        wrong += [f"{readable}: accesses local memory, {local}"] if local else []
        table = REQUIRED | (REQUIRED_90A if readable.startswith("sm_90a") else {})
        required = next((r for k, r in table.items() if re.match(k, kernel)), ())
        wrong += [
            f"{readable}: has no {operation}"
            for operation in required
            if not any(i.startswith(operation) for i in have)
        ]
    if wrong:
        sys.exit("\n".join(wrong))
    return f"machine code of {checked} kernels: required instructions there, no local memory"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        raw, spills = parse(compile_library(target, ALL_ARCHS if "--all" in sys.argv else ARCHS))
        names = dict(zip(raw, demangle(list(raw)), strict=True))
        ours = [name for name in raw if "cub::" not in names[name]]
        in_table = tuple(f"sm_{arch} " for arch in ARCHS.split(";"))
        usage = {names[name]: raw[name] for name in ours if name.startswith(in_table)}
        spills = [name for name in spills if name in ours]
        if spills:
            sys.exit("kernels that spill registers:\n" + "\n".join(names[s] for s in spills))
        if "--update" in sys.argv:
            head = f"# nvcc {nvcc_version()}: registers, static shared memory, barriers, kernel\n"
            rows = [f"{r:4d} {s:6d} {b:2d}  {n}" for n, (r, s, b) in sorted(usage.items())]
            TABLE.write_text(head + "\n".join(rows) + "\n")
            print(f"wrote {len(rows)} kernels")
        table = read_table()
        wrong = [f"not in the table: {name}" for name in sorted(usage.keys() - table.keys())]
        wrong += [f"no longer compiled: {name}" for name in sorted(table.keys() - usage.keys())]
        if nvcc_version() in TABLE.read_text().splitlines()[0]:  # other compilers, other numbers
            wrong += [
                f"{name}: (registers, shared bytes, barriers) {usage[name]}, allowed {table[name]}"
                for name in sorted(usage.keys() & table.keys())
                if any(a > b for a, b in zip(usage[name], table[name], strict=True))
            ]
        if wrong:
            sys.exit("\n".join(wrong) + "\nIf this is meant: tests/check_cuda_build.py --update")
        check = (
            "import torch; torch.ops.load_library(__import__('sys').argv[1]);"
            "d = torch._C._dispatch_get_registrations_for_dispatch_key;"
            "cpu, cuda = ({n for n in d(k) if n.startswith('fastseg::')} for k in ('CPU', 'CUDA'));"
            "print(len(cuda), 'of', len(cpu), 'ops have CUDA kernels; without:', *sorted(cpu-cuda))"
        )
        library = next(target.glob("fastseg/_C*.so"))
        subprocess.run([sys.executable, "-c", check, str(library)], check=True)
        print(f"{len(ours)} kernels, none spills")
        print(check_instructions(library))


if __name__ == "__main__":
    main()
