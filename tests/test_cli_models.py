"""`fastseg models`."""

import json

from fastseg.models import list_models

from .test_cli import run_cli


def test_table(monkeypatch, capsys):
    code, out, _ = run_cli(monkeypatch, capsys, "models", "fcn*_vgg16")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list_models("fcn*_vgg16")
    row = next(line for line in lines if line.startswith("fcn8s_vgg16"))
    assert row.split()[1:6] == ["2015", "134.36", "110.8", "8", "67.2"]


def test_table_as_json(monkeypatch, capsys):
    _, out, _ = run_cli(
        monkeypatch, capsys, "models", "segnet_*", "--json", "-O", "num_classes=11", "--size", "64"
    )
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["segnet_basic"]["parameters"] == 1_416_587
    assert rows["segnet_basic"]["macs"] > 0


def test_layers(monkeypatch, capsys):
    code, out, _ = run_cli(
        monkeypatch, capsys, "models", "fcn_resnet50", "-O", "stem=v1c", "-O", "aux=true",
        "--size", "33x65",
    )  # fmt: skip
    assert code == 0
    assert "https://arxiv.org/abs/1411.4038" in out
    assert "2048 x 5 x 9" in out
    assert "21 x 33 x 65" in out
    assert "-> aux" in out
    _, out, _ = run_cli(monkeypatch, capsys, "models", "unet", "--json", "--size", "32")
    assert json.loads(out)[-1]["outputs"] == ["out"]


def test_mistakes(monkeypatch, capsys):
    for arguments, sentence in (
        (("models", "fcn"), "no network is called 'fcn'"),
        (("models", "x*"), "the pattern must match a network, got 'x*'"),
        (("models", "unet", "--size", "axb"), "such as 480x640, got 'axb'"),
        (("models", "unet", "-O", "width"), "an option must be KEY=VALUE, got 'width'"),
        (("models", "unet", "-O", "depth=3"), "unet has no option 'depth'"),
        (("models", "unet", "-O", "num_classes=0"), "num_classes must be a positive integer"),
        (("models", "fcn_resnet50", "-O", "in_channels=rgb"), "in_channels must be a positive"),
    ):
        code, _, err = run_cli(monkeypatch, capsys, *arguments)
        assert code == 1
        assert sentence in err
        assert "Traceback" not in err
