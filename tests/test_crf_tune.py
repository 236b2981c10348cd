"""fastseg crf and fastseg crf tune on small made-up examples."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastseg.crf_tune import Example, Score, evaluate, load_examples, near_border, table, tune
from fastseg.nn import DenseCRF

typer_testing = pytest.importorskip("typer.testing")


def write_examples(folder, count=2, size=(24, 32)):
    """A bright square on dark ground; the probabilities are blurred and noisy."""
    generator = np.random.RandomState(0)
    for i in range(count):
        labels = np.zeros(size, np.uint8)
        labels[6 + i : 16 + i, 8:22] = 1
        image = np.where(labels[..., None] == 1, 200, 40) + generator.randint(0, 9, (*size, 3))
        logit = 1.5 * (2.0 * labels - 1) + generator.randn(*size) * 2
        p = 1 / (1 + np.exp(-logit))
        p = (np.stack([1 - p, p]) * 255).round().astype(np.uint8)
        labels[0, :4] = 2  # void
        np.savez(folder / f"{i}.npz", p=p, im=image.astype(np.uint8), gt=labels)
    return folder


def test_tuning_raises_accuracy_near_borders(tmp_path):
    examples = load_examples(write_examples(tmp_path, 3))
    assert len(load_examples(tmp_path, limit=2)) == 2
    seen = []
    with torch.inference_mode():
        without, trials = tune(examples, report=seen.append)
        again = tune(examples)[1]
    assert len(seen) == len(trials) > 10
    assert len({str(t.preset(5)) for t in trials}) == len(trials)  # none is measured twice
    assert [t.parameters for t in again] == [t.parameters for t in trials]
    assert trials[0].score.border_accuracy > without.border_accuracy
    assert trials[0].score.miou >= without.miou
    best = DenseCRF(unary="probs", **trials[0].preset(5))
    assert evaluate(examples, best).border_accuracy == trials[0].score.border_accuracy
    assert len(table(without, trials).splitlines()) == len(trials) + 2


def test_limit_takes_evenly_spaced_files(tmp_path):
    every = load_examples(write_examples(tmp_path, 5))
    some = load_examples(tmp_path, limit=2)
    assert len(some) == 2
    for example, i in zip(some, (0, 2), strict=True):
        assert torch.equal(example.labels, every[i].labels)


def test_settings_that_lower_the_mean_iou_rank_last(monkeypatch):
    def scored(examples, refine, border):
        if refine is None:
            return Score(0.5, 0.5, 0.5)
        best_at_borders = refine.bilateral_weight.tolist() == [10.0]
        return Score(0.4, 0.9, 0.9) if best_at_borders else Score(0.6, 0.6, 0.6)

    monkeypatch.setattr("fastseg.crf_tune.evaluate", scored)
    trials = tune([])[1]
    assert trials[0].score.miou == 0.6
    assert trials[-1].score.border_accuracy == 0.9


def test_scores_by_hand():
    labels = torch.tensor([[0, 0, 1, 1, 2]])  # 2 is void
    probs = torch.tensor([[[0.9, 0.4, 0.4, 0.2, 0.9]], [[0.1, 0.6, 0.6, 0.8, 0.1]]])
    score = evaluate([Example(probs, torch.zeros(3, 1, 5), labels)], None, border=1)
    assert score.accuracy == 0.75
    assert score.miou == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert score.border_accuracy == 0.5  # of the two pixels at the border
    near = near_border(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), 2, 2)
    assert near.tolist() == [[False, True, True, True, True, False, False, False]]


def test_command_line(tmp_path):
    from fastseg.cli.app import app

    run = typer_testing.CliRunner().invoke
    data = write_examples(tmp_path)
    preset, photo, mask = tmp_path / "crf.json", tmp_path / "photo.png", tmp_path / "mask.png"
    result = run(app, ["crf", "tune", "--data", str(data), "-o", str(preset), "--show", "3"])
    assert result.exit_code == 0, result.output
    assert "network alone" in result.output
    assert set(json.loads(preset.read_text())) == {"iters", "gaussian", "bilateral"}
    with np.load(data / "0.npz") as example:
        Image.fromarray(example["im"]).save(photo)
        truth = example["gt"]
    arguments = ["crf", str(photo), "--probs", str(data / "0.npz"), "-o", str(mask)]
    result = run(app, [*arguments, "--preset", str(preset)])
    assert result.exit_code == 0, result.output
    written = Image.open(mask)
    assert written.mode == "P"
    known = truth < 2
    assert (np.asarray(written) == truth)[known].mean() > 0.9


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match=r"must hold \.npz files"):
        load_examples(tmp_path)
    np.savez(tmp_path / "a.npz", p=np.zeros((2, 3, 4)), im=np.zeros((3, 4, 3)))
    with pytest.raises(ValueError, match=r"a\.npz must hold p and im and gt, got p, im"):
        load_examples(tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load_examples(tmp_path, limit=0)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("p", np.zeros((3, 4)), r"floats or uint8 \(L, H, W\), got float64 of shape \(3, 4\)"),
        ("p", np.zeros((0, 3, 4)), r"got float64 of shape \(0, 3, 4\)"),
        ("p", np.full((2, 3, 4), "a"), "floats or uint8"),
        ("p", np.full((2, 3, 4), np.nan), "from 0 to 1, got nan to nan"),
        ("p", np.full((2, 3, 4), 7.0), "from 0 to 1, got 7 to 7; for logits take their softmax"),
        ("p", np.zeros((3, 3, 4)), "must have 2 labels as in .*0.npz, got 3"),
        ("im", np.zeros((3, 4)), r"im in .* must be uint8 of shape \(3, 4, 3\)"),
        ("gt", np.zeros((4, 3), np.uint8), r"gt in .* of shape \(3, 4\) .* of shape \(4, 3\)"),
        ("gt", np.zeros((3, 4)), "gt in .* must be integers from 0 .* got float64"),
        ("gt", np.full((3, 4), -1), "must be integers from 0"),
    ],
)
def test_bad_arrays(tmp_path, name, array, message):
    good = {
        "p": np.zeros((2, 3, 4)),
        "im": np.zeros((3, 4, 3), np.uint8),
        "gt": np.zeros((3, 4), np.int64),
    }
    np.savez(tmp_path / "0.npz", **good)
    np.savez(tmp_path / "1.npz", **{**good, name: array})
    with pytest.raises(ValueError, match=message):
        load_examples(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 damaged"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz must be an \.npy or \.npz file of numbers"):
        load_examples(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"widths": 3}', '{"iters": "many"}'])
def test_damaged_presets(tmp_path, text):
    (tmp_path / "crf.json").write_text(text)
    with pytest.raises(ValueError, match=r"crf\.json must hold arguments of DenseCRF"):
        DenseCRF.from_preset(str(tmp_path / "crf.json"))
