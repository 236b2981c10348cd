"""What benchmarks/gpu_check.sh can be tried on without a GPU: its plan, and the writing of results
(with made-up numbers, into a folder that is thrown away)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_table
from benchmarks.gpu_cases import Case, cases

ROOT = Path(__file__).resolve().parents[1]


def made_up() -> dict:
    limits = {"copy GB/s": 1000.0, "bf16 TFLOP/s": 100.0}
    case = Case("a case", 1.5, 2e9, 1e6, ("eager", "cudnn", "fastseg"), dict)
    us = {"eager": 90.0, "cudnn": 60.0, "fastseg": 40.0, "fastseg 2-bit": 44.0}
    alone = Case("alone", None, 0, 3e6, ("fastseg",), dict)
    return {
        "date": "2001-02-03",
        "gpu": "NVIDIA Test 1 (80GB)",
        "commit": "0123456789abcdef",
        "torch": "2.11",
        "cuda": "13.0",
        "cudnn": 91000,
        "driver": "580.1",
        "ceilings": limits,
        "rows": [
            gpu_table.row_of(case, us, limits),
            gpu_table.row_of(alone, {"fastseg": 7.0}, limits),
            {"case": "broken", "error": "out of memory"},
        ],
    }


def test_row_states_floor_best_peer_and_ratio():
    first, alone, _ = made_up()["rows"]
    assert first["floor us"] == pytest.approx(20.0)  # 2 GFLOP at 100 TFLOP/s, not 1 MB at 1 TB/s
    assert (first["best peer"], first["ratio"]) == ("cudnn", 1.5)
    assert alone["floor us"] == pytest.approx(3.0)
    assert (alone["best peer"], alone["ratio"]) == (None, None)


def test_results_are_written_and_written_again(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n")
    for _ in range(2):
        path = gpu_table.write(made_up(), tmp_path)
    assert path.name == "2001-02-03-NVIDIA-Test-1-80GB.json"
    assert json.loads(path.read_text()) == made_up()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| a case | 20.0 | 40.0 / 44.0 | 60.0 (cudnn) | 1.50 | 1.5 |" in text
    assert "| alone | 3.0 | 7.0 | none |  |  |" in text
    assert "| broken | | failed: out of memory | | | |" in text
    assert "NVIDIA Test 1 (80GB), 2001-02-03, commit 0123456789, torch 2.11, cuDNN 91000" in text


def test_readme_has_the_marks_and_no_made_up_numbers():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert gpu_table.insert(text, "x") != text
    with pytest.raises(ValueError, match="lacks its marks"):
        gpu_table.insert("no marks", "x")


def test_a_run_that_is_cut_has_written_what_it_measured(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"{gpu_table.BEGIN}\nold\n{gpu_table.END}\n")
    facts = {key: value for key, value in made_up().items() if key not in ("rows", "ceilings")}
    case = Case(
        "a case", 1.5, 2e9, 1e6, ("eager", "fastseg"), lambda: {"eager": 9.0, "fastseg": 6.0}
    )

    def killed():
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_table, "facts", lambda: facts)
    monkeypatch.setattr(gpu_table, "ceilings", lambda: made_up()["ceilings"])
    monkeypatch.setattr(gpu_table, "medians", lambda times: times)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    broken = Case("broken", None, 0, 0, ("fastseg",), lambda: {}["no such variant"])
    last = Case("last", None, 0, 0, ("fastseg",), killed)
    monkeypatch.setattr(gpu_table, "cases", lambda: [case, broken, last])
    with pytest.raises(KeyboardInterrupt):
        gpu_table.measure(1e9, lambda results: gpu_table.write(results, tmp_path))
    (path,) = (tmp_path / "results").iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["a case", "broken"]
    assert rows[0]["ratio"] == 1.5
    assert "no such variant" in rows[1]["error"]
    assert "| a case | 20.0 | 6.0 | 9.0 (eager) | 1.50 | 1.5 |" in readme.read_text()


def test_cases_are_named_once_and_measure_fastseg():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    assert all("fastseg" in case.variants for case in cases())


def test_plan_of_the_check():
    script = ROOT / "benchmarks" / "gpu_check.sh"
    subprocess.run(["bash", "-n", script], check=True)
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [script, "--plan"], env=environment, capture_output=True, text=True, check=True
    )
    steps = re.findall(r"^== (.*)$", done.stdout, re.MULTILINE)
    assert steps == [
        "build",
        "primitives",
        "every code path against the CPU kernels",
        "the tests on CUDA",
        "compute-sanitizer",
        "ceilings and benchmark table",
        "ncu on the two slowest kernels",
    ]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert f"compute-sanitizer --tool {tool}" in done.stdout
    assert "dense CRF 21 labels, 500x375, 10 updates, N=8: fastseg" in done.stdout
