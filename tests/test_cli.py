"""The command line: `fastseg info` and `fastseg segment`."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastseg
from fastseg import _C
from fastseg.cli import info, main
from fastseg.models.checkpoint import read_card, save_checkpoint, shipped_path


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
    assert "cpu" in report["ops"]["max_pool2d"]
    assert all({"cpu", "any"} & set(devices) for devices in report["ops"].values())


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


def test_info_says_which_gpus_the_kernels_ran_on(capsys):
    assert info.report()["cuda"]["checked_on"] == ["NVIDIA H200"]
    info.info()
    assert "checked on NVIDIA H200; for other GPUs emulated" in capsys.readouterr().out


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


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """The shipped weights, to be run at 64 x 64 pixels."""
    path = tmp_path_factory.mktemp("weights") / "quick.safetensors"
    card = replace(read_card(shipped_path("u2netp")), size=(64, 64))
    save_checkpoint(path, load_file(shipped_path("u2netp")), card)
    return f"--weights={path}"


@pytest.fixture
def photos(tmp_path):
    """Two pictures of a red disk, and a damaged one."""
    y, x = np.mgrid[:60, :80]
    picture = np.full((60, 80, 3), 150, np.uint8)
    picture[(x - 40) ** 2 + (y - 30) ** 2 < 400] = (220, 20, 20)
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray(picture).convert("L").save(folder / "b.jpg")
    (folder / "c.jpg").write_bytes(b"damaged")
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    return folder


def test_segment_reports_a_bad_photo_and_goes_on(monkeypatch, capsys, photos, tmp_path):
    out = tmp_path / "out"
    everything = "mask,overlay,compare,probs"
    args = ("segment", str(photos), "-o", str(out), "--save", everything, "--tta", "flip")
    code, stdout, stderr = run_cli(monkeypatch, capsys, *args)
    assert code == 1
    assert "c.jpg: cannot be read as a picture" in stderr
    assert "1 of 3 photos failed" in stderr
    lines = stdout.splitlines()
    assert len(lines) == 2
    assert "a.png: 80x60" in lines[0]
    assert "a_mask.png" in lines[0]
    kinds = ["compare.png", "mask.png", "overlay.png", "probs.npz"]
    assert sorted(p.name for p in out.iterdir()) == [f"{s}_{k}" for s in "ab" for k in kinds]
    mask = Image.open(out / "a_mask.png")
    assert mask.mode == "P"
    assert mask.size == (80, 60)
    assert mask.getpixel((40, 30)) == 1
    assert mask.getpixel((2, 2)) == 0


def test_segment_goes_on_where_it_was_interrupted(monkeypatch, capsys, photos, quick, tmp_path):
    out = tmp_path / "out"
    (photos / "c.jpg").unlink()

    def states(*args):
        code, stdout, _ = run_cli(
            monkeypatch, capsys, "segment", str(photos), "-o", str(out), "--jsonl", quick, *args
        )
        assert code == 0
        return [json.loads(line)["status"] for line in stdout.splitlines()]

    assert states() == ["ok", "ok"]
    assert states() == ["skipped", "skipped"]
    (out / "b_overlay.png").unlink()
    assert states() == ["skipped", "ok"]
    (out / "a_mask.png").write_bytes((out / "a_mask.png").read_bytes()[:40])
    assert states() == ["ok", "skipped"]
    assert states("--tta", "flip") == ["ok", "ok"]  # other options, other results
    assert states("--tta", "flip", "--overwrite") == ["ok", "ok"]
    assert states("--tile", "64") == ["ok", "ok"]
    assert states("--tile", "64", "--overlap", "0.5") == ["ok", "ok"]
    assert states("--tta", "flip") == ["ok", "ok"]
    later = (out / "a_mask.png").stat().st_mtime + 10
    os.utime(photos / "a.png", (later, later))  # the photo has changed since
    assert states("--tta", "flip") == ["ok", "skipped"]


def test_segment_jsonl(monkeypatch, capsys, photos, quick, tmp_path):
    code, stdout, _ = run_cli(
        monkeypatch, capsys, "segment", str(photos), "-o", str(tmp_path), "--jsonl", quick
    )
    assert code == 1
    first, _, bad = (json.loads(line) for line in stdout.splitlines())
    assert first["status"] == "ok"
    assert first["size"] == [80, 60]
    assert sum(first["shares"].values()) == pytest.approx(1, abs=1e-4)
    assert set(first["outputs"]) == {"mask", "overlay"}
    assert first["seconds"]["network"] > 0
    assert bad["status"] == "failed"
    assert "cannot be read" in bad["error"]


def test_segment_quiet(monkeypatch, capsys, photos, quick, tmp_path):
    run = ("segment", str(photos / "a.png"), "-o", str(tmp_path), "--quiet", quick)
    assert run_cli(monkeypatch, capsys, *run) == (0, "", "")


def test_segment_crf_stands_alone(monkeypatch, capsys, photos, quick, tmp_path):
    """--crf does not take the photo for its value."""
    out = tmp_path / "out"
    code, stdout, _ = run_cli(
        monkeypatch,
        capsys,
        "segment",
        "--crf",
        str(photos / "a.png"),
        "-o",
        str(out),
        "--jsonl",
        quick,
    )
    assert code == 0
    assert json.loads(stdout)["seconds"]["crf"] > 0


def test_segment_photos_of_one_name(monkeypatch, capsys, photos, quick, tmp_path):
    Image.new("RGB", (9, 9)).save(photos / "a.jpg")
    out = tmp_path / "out"
    args = ("segment", str(photos / "a.jpg"), str(photos / "a.png"), "--save", "mask", quick)
    assert run_cli(monkeypatch, capsys, *args, "-o", str(out))[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.jpg_mask.png", "a.png_mask.png"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg: No such file or directory"),
        (["PHOTO", "--save", "mask,gif"], "must be among mask, overlay, compare, probs, got 'gif'"),
        (["PHOTO", "--save", ","], "--save must name something to write"),
        (["PHOTO", "--tta", "spin"], "tta must be of flip, ms, got 'spin'"),
        (["PHOTO", "--tile", "3"], "tile must be at least 64 pixels, got 3"),
        (["PHOTO", "--model", "nope"], "no weights ship for 'nope'"),
        (["PHOTO", "--weights", "PHOTO"], "has no model card, so model must be given"),
        (["PHOTO", "--crf=nope"], "name must be one of"),
        (["EMPTY"], "there are no pictures in folder"),
        (["PHOTO", "SAME"], "several photos are called a.png"),
        (["PHOTO", "--device", "mps"], "device must be auto, cpu or cuda, got 'mps'"),
        (["PHOTO", "-o", "PHOTO"], "--out must be a folder, got the file"),
        (["PHOTO", "--weights", "nowhere.pth", "--model", "unet"], "nowhere.pth: No such file"),
    ],
)
def test_segment_mistakes_are_one_sentence(monkeypatch, capsys, photos, tmp_path, args, message):
    empty, same = tmp_path / "empty", tmp_path / "same"
    empty.mkdir()
    same.mkdir()
    Image.new("RGB", (9, 9)).save(same / "a.png")
    places = {"PHOTO": photos / "a.png", "EMPTY": empty, "SAME": same / "a.png"}
    args = [str(places.get(a, a)) for a in args]
    code, stdout, stderr = run_cli(
        monkeypatch, capsys, "segment", "-o", str(tmp_path / "out"), *args, "--jsonl"
    )
    assert code == 1
    assert message in stderr + stdout
    assert "Traceback" not in stderr
    assert not list((tmp_path / "out").glob("*"))
