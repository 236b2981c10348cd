"""Weights files and their model cards."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastseg.models.checkpoint import (
    ModelCard,
    read_card,
    save_checkpoint,
    shipped_path,
    shipped_weights,
)


def test_round_trip(tmp_path):
    card = ModelCard(
        "segnet",
        {"num_classes": 3},
        ("sky", "road", "tree"),
        (0.0,) * 3,
        (1.0,) * 3,
        (360, 480),
        {"iters": 3},
    )
    state = {"a.weight": torch.randn(4, 3).t(), "n": torch.tensor(7)}
    save_checkpoint(tmp_path / "w.safetensors", state, card)
    assert read_card(tmp_path / "w.safetensors") == card
    torch.testing.assert_close(load_file(tmp_path / "w.safetensors"), state)


def test_a_file_without_card(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert read_card(tmp_path / "w.safetensors") is None


def test_bad_files(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match=r"w\.safetensors: must be a safetensors file"):
        read_card(tmp_path / "w.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "card.safetensors", metadata={"arch": "{"})
    with pytest.raises(ValueError, match="its model card is damaged"):
        read_card(tmp_path / "card.safetensors")
    with pytest.raises(OSError, match="nowhere"):
        read_card(tmp_path / "nowhere.safetensors")


def test_every_shipped_file_names_its_network():
    assert "u2netp" in shipped_weights()
    for name in shipped_weights():
        card = read_card(shipped_path(name))
        assert card is not None
        assert card.arch == name
        assert card.source
