"""The comparison with peers: processes, errors of outputs, and the pages."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fastseg.bench import Entry, Measurement, find, html, list_works, markdown, measure
from fastseg.bench.measure import check_accuracy

from .test_cli import run_cli

MACHINE = {
    "processor": "A <fast> one",
    "isa": "avx2",
    "threads": 2,
    "torch": "2.13.0",
    "fastseg": "0.1.0",
    "flops": 400e9,
    "bandwidth": 40e9,
}


def measured(work: str, ours: float, other: float) -> Measurement:
    entries = [
        Entry("fastseg", median=ours, minimum=ours, runs=9, error=1e-6, rss=2**28),
        Entry("torch", median=other, minimum=other, runs=9, error=2e-6, rss=2**28),
        Entry("ncnn", reason="No module named 'ncnn'"),
    ]
    return Measurement(work, "ops", "float32", 2, 4 * 10**9, 10**7, entries)


def test_works_have_costs():
    work = find("conv3x3-256-d2-65")
    assert work.flops() == 2 * 9 * 256 * 256 * 65 * 65
    assert work.bytes() == 4 * (2 * 256 * 65 * 65 + 9 * 256 * 256 + 2 * 256)
    assert len({w.name for w in list_works()}) == len(list_works())
    assert {w.group for w in list_works(pattern="crf-*")} == {"crf"}


@pytest.fixture(scope="module")
def small() -> Measurement:
    return measure(find("gcn15-2048-16"), ["fastseg", "torch"], threads=1, seconds=0)


def test_measure_times_every_peer_and_compares(small):
    assert [e.peer for e in small.entries] == ["fastseg", "torch"]
    for entry in small.entries:
        assert entry.reason == ""
        assert entry.runs >= 9  # three turns of three calls
        assert 0 < entry.minimum <= entry.median
        assert 0 < entry.error < 1e-4  # float32 is never float64
        assert entry.rss > 50 * 2**20
    assert small.ratio() == pytest.approx(small.entries[1].median / small.entries[0].median)


def test_an_output_that_is_too_far_off_is_an_error():
    work = replace(find("gcn15-2048-16"), tolerance=1e-12)
    with pytest.raises(ValueError, match="must be within 1e-12 of exact"):
        measure(work, ["fastseg"], threads=1, seconds=0, rounds=1)


def test_a_peer_that_cannot_is_left_out_with_its_reason():
    # max-unpooling has no ONNX form; where onnxruntime is missing, that is the reason.
    result = measure(find("pool-unpool-256-90x120"), ["onnxruntime"], threads=1, seconds=0)
    assert result.entries[0].reason
    assert result.ratio() is None
    assert result.best_peer() is None


def test_bad_arguments():
    work = find("gcn15-2048-16")
    with pytest.raises(ValueError, match=r"peers must be among fastseg, torch.*\['cudnn'\]"):
        measure(work, ["cudnn"])
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got 'int8'"):
        measure(work, dtype="int8")
    with pytest.raises(ValueError, match="no work is named 'conv'"):
        find("conv")


def test_command(monkeypatch, capsys, tmp_path):
    code, out, _ = run_cli(monkeypatch, capsys, "bench", "all", "--list", "--only", "gcn15-*")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        work.name for work in list_works("ops", "gcn15-*")
    ]
    page, figures = tmp_path / "r.html", tmp_path / "r.json"
    code, out, _ = run_cli(
        monkeypatch, capsys, "bench", "ops", "--only", "gcn15-2048-16", "--peers", "fastseg",
        "--seconds", "0.01", "--threads", "1", "--html", str(page), "--json", str(figures),
    )  # fmt: skip
    assert code == 0
    assert "| gcn15-2048-16 | float32 |" in out
    assert "gcn15-2048-16" in page.read_text()
    result = json.loads(figures.read_text())
    assert result["machine"]["flops"] > 1e9
    assert result["results"][0]["entries"][0]["median"] > 0
    for arguments, message in (
        (["nets"], "group must be ops, models, crf or all, got 'nets'"),
        (["ops", "--only", "x*"], "--only must match a work of 'ops', got 'x*'"),
        (["ops", "--dtype", "float32,half"], "--dtype must be float32 or bfloat16, got 'half'"),
    ):
        code, _, err = run_cli(monkeypatch, capsys, "bench", *arguments)
        assert code == 1
        assert message in err


def test_markdown_has_floor_and_ratio():
    text = markdown([measured("a", 0.02, 0.05)], MACHINE)
    # 4 GFLOP at 400 GFLOP/s is 10 ms.
    assert "| a | float32 | 10 | 20 | 1e-06 | torch 50 | 2e-06 | 2.50 |" in text
    assert "A <fast> one" in text


def test_html_is_whole_and_escaped():
    page = html([measured("a & b", 0.02, 0.05), measured("slow", 0.04, 0.02)], MACHINE)
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

    Reader().feed(page)
    assert sum(tag == "circle" for tag, _ in seen) == 4 + 2  # two points a work, and the legend
    bars = [attrs for tag, attrs in seen if tag == "rect"]
    assert float(bars[0]["width"]) == pytest.approx(5 * float(bars[1]["width"]), rel=0.01)
    assert bars[0]["fill"] != bars[1]["fill"]  # a loss is shown as one
    assert "A &lt;fast&gt; one" in page
    assert "a &amp; b" in page
    assert "<fast>" not in page
    assert "No module named" in page
    assert not any("src" in attrs or "href" in attrs for _, attrs in seen)


def test_networks_must_be_as_accurate_as_the_peers():
    entries = [
        Entry("fastseg", median=1, rms=1.2e-2),
        Entry("torch", median=1, rms=1e-2),
        Entry("openvino", median=1, rms=5e-3),
        Entry("ncnn", reason="absent", rms=1.0),
    ]
    result = Measurement("net", "models", "bfloat16", 2, 1, 1, entries)
    check_accuracy(result)
    with pytest.raises(ValueError, match=r"at most 1\.1 times the peers' 1\.0e-02, got 1\.2e-02"):
        check_accuracy(result, slack=1.1)
    check_accuracy(replace(result, entries=entries[:2]), slack=1.1)  # one peer is no measure
