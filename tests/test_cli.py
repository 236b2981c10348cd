"""The command line: `fastseg info`."""

import json
import subprocess
import sys

import pytest
import torch

import fastseg
from fastseg import _C
from fastseg.cli import info, main


def run_cli(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `fastseg ARGS`."""
    monkeypatch.setattr(sys, "argv", ["fastseg", *args])
    code: int | str | None = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    if isinstance(code, str):  # sys.exit(message): the interpreter prints it and exits with 1
        code, err = 1, err + code
    return code or 0, out, err


def test_info_names_what_runs_and_why_the_rest_does_not(monkeypatch, capsys):
    code, out, _ = run_cli(monkeypatch, capsys, "info")
    assert code == 0
    assert fastseg.__version__ in out
    assert torch.__version__ in out
    assert f"{_C.cpu_isa():<12} in use" in out
    if not _C.build_info()["cuda_archs"]:
        assert "will not run: not built" in out


def test_info_json(monkeypatch, capsys):
    code, out, _ = run_cli(monkeypatch, capsys, "info", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["cpu"]["kernels"][_C.cpu_isa()] == "in use"
    assert all("cpu" in devices for devices in report["ops"].values())


def test_info_follows_the_chosen_instruction_set(monkeypatch, capsys, cpu_isa):
    _, out, _ = run_cli(monkeypatch, capsys, "info")
    assert f"{cpu_isa:<12} in use" in out


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["80", "90a"], (8, 0), True),
        (["80", "90a"], (8, 9), True),  # machine code of an older minor version
        (["80", "90a"], (9, 0), True),
        (["80", "90a"], (7, 5), False),
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),  # sm_90a code runs on 9.0 alone and has no PTX
        (["80", "90a", "100"], (12, 0), True),  # PTX of the newest plain architecture
    ],
)
def test_cuda_code_matches_devices_as_nvidia_defines(archs, capability, runs):
    assert info._runs_on(archs, capability) is runs


def test_no_cuda_reasons(monkeypatch):
    assert "not built" in info._why_no_cuda([])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in info._why_no_cuda(["80"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in info._why_no_cuda(["80"])


def test_info_works_without_the_cli_extra():
    """`pip install .` alone brings no typer; info must still tell what was built."""
    program = (
        "import sys; sys.modules['typer'] = None\n"
        "import fastseg.cli; sys.argv = ['fastseg', *sys.argv[1:]]; fastseg.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "info"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert fastseg.__version__ in done.stdout
    other = subprocess.run(
        [sys.executable, "-c", program, "segment"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "fastseg-kernels[cli]" in other.stderr
    assert "Traceback" not in other.stderr
