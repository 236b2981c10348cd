import pytest
import torch
from torch import nn

from fastseg import models
from fastseg.models.deeplabv3 import deeplabv3
from fastseg.models.flow import describe, trace
from fastseg.nn import ConvBNReLU2d


def by_name(layers):
    return {layer.name: i for i, layer in enumerate(layers)}


def test_the_flow_of_fcn():
    """Each map goes where the paper sends it."""
    layers = trace(models.fcn8s_vgg16(num_classes=3, width=2, hidden=4), (64, 96))
    at = by_name(layers)
    assert layers[0].what == "image"
    assert layers[0].shape == (3, 64, 96)
    assert layers[at["backbone.stages.2"]].what == "3 x conv 3x3 + ReLU"
    assert layers[at["backbone.pools.2"]].shape == (8, 8, 12)
    assert layers[at["head"]].inputs == [at["backbone.pools.4"]]
    assert layers[at["score_skips.0"]].inputs == [at["backbone.pools.3"]]
    assert layers[at["score_skips.1"]].inputs == [at["backbone.pools.2"]]
    sums = [layer for layer in layers if layer.what == "sum"]
    assert sums[0].inputs == [at["score_skips.0"], at["upscores.0"]]
    assert sums[1].inputs == [at["score_skips.1"], at["upscores.1"]]
    assert layers[-1].name == "upscore"
    assert layers[-1].shape == (3, 64, 96)
    assert [layer.outputs for layer in layers if layer.outputs] == [["out"]]


def test_unpooling_reads_the_indices_of_its_stage():
    layers = trace(models.segnet_vgg16(num_classes=3, width=2), (64, 64))
    at = by_name(layers)
    unpools = [layer for layer in layers if layer.what == "max unpool"]
    for i, layer in enumerate(unpools):
        assert at[f"backbone.pools.{4 - i}"] in layer.inputs


def test_parallel_branches_and_auxiliary_output():
    layers = trace(deeplabv3((1, 1, 1, 1), 3, width=8, aux=True), (33, 41))
    at = by_name(layers)
    c5 = at["backbone.layer4"]
    for i in range(4):
        assert layers[at[f"classifier.aspp.branches.{i}"]].inputs == [c5]
    joined = next(layer for layer in layers if layer.what == "concatenation")
    assert len(joined.inputs) == 5
    assert layers[at["classifier.aspp.pool"]].shape == (32, 1, 1)
    assert layers[at["aux_classifier.convs"]].inputs == [at["backbone.layer3"]]
    assert [layer.outputs for layer in layers if layer.outputs] == [["out"], ["aux"]]


@pytest.mark.parametrize(
    "name", ["gcn_resnet50", "pspnet_resnet50", "unet", "u2netp", "crfrnn_fcn8s_vgg16"]
)
def test_totals_are_those_of_the_network(name):
    with torch.device("meta"):
        model = models.create_model(name)
    model.train()
    layers = trace(model, (65, 97))
    assert sum(layer.parameters for layer in layers) == models.count_parameters(model)
    assert sum(layer.macs for layer in layers) == models.count_macs(model, (65, 97))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_descriptions():
    assert describe(nn.Conv2d(1, 1, (3, 1), stride=2, dilation=4)) == (
        "conv 3x1, stride 2, dilation 4"
    )
    assert describe(ConvBNReLU2d(1, 1, 1, activation="none")) == "conv 1x1 + BN"
    assert describe(nn.AvgPool2d(3, 1)) == "average pool 3x3"
    chain = nn.Sequential(
        nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)
    )
    assert describe(chain) == "2 x conv 3x3 + ReLU, max pool 2x2, stride 2"
