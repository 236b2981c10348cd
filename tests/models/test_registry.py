import inspect

import pytest
import torch
from safetensors.torch import save_file

from fastseg import models


def test_names_and_patterns():
    assert models.list_models("fcn*_vgg16") == ["fcn16s_vgg16", "fcn32s_vgg16", "fcn8s_vgg16"]
    for name in models.list_models():
        info = models.model_info(name)
        assert info.build is getattr(models, name)
        assert name in models.__all__
        assert info.build.__doc__
        assert info.paper.url.startswith("https://")
        assert bool(info.conditions) == (info.voc2012 is not None)


def test_create_model_passes_options_on():
    model = models.create_model(
        "fcn16s_vgg16", num_classes=4, in_channels=1, width=2, hidden=3, upsample="grouped"
    )
    assert model.head.score.out_channels == 4
    assert model.backbone.stages[0].conv1_1.in_channels == 1
    assert model.upscore.deconv.groups == 4


def test_weights(tmp_path):
    small = {"num_classes": 3, "width": 2, "hidden": 3}
    saved = models.fcn8s_vgg16(**small)
    path = tmp_path / "fcn.safetensors"
    save_file(saved.state_dict(), path)
    for weights in (path, str(path), saved.state_dict()):
        loaded = models.create_model("fcn8s_vgg16", **small, weights=weights)
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    assert "weights" in inspect.signature(models.fcn8s_vgg16).parameters
    with pytest.raises(ValueError, match=r"head.fc6.weight \(3, 16, 7, 7\) in the source"):
        models.create_model("fcn8s_vgg16", num_classes=3, width=2, hidden=4, weights=path)


def test_unknown_names():
    with pytest.raises(ValueError, match="'fcn8_vgg16'; did you mean fcn8s_vgg16"):
        models.create_model("fcn8_vgg16")
    with pytest.raises(ValueError, match="fastseg models"):
        models.create_model("qqqq")
    with pytest.raises(ValueError, match=r"no option 'output_stride'; it has num_classes, in_chan"):
        models.create_model("fcn8s_vgg16", output_stride=8)
    with pytest.raises(ValueError, match="no option 'stride'"):
        models.create_model("fcn8s_vgg16", stride=8)
