import pytest
import torch
import torch.nn.functional as F

from fastseg import models

from .reference import Weights, assert_same_network

TINY = {"num_classes": 3, "in_channels": 2, "width": 4}


def segnet(w: Weights, x, ceil_mode=True):
    memory = []
    for s, count in enumerate((2, 2, 3, 3, 3)):
        for i in range(count):
            x = w.conv_bn_relu(x, f"backbone.stages.{s}.conv{s + 1}_{i + 1}", padding=1)
        size = x.shape[-2:]
        x, indices = F.max_pool2d(x, 2, 2, ceil_mode=ceil_mode, return_indices=True)
        memory.append((indices, size))
    for s, count in enumerate((3, 3, 3, 2, 1)):
        indices, (H, W) = memory.pop()
        full = x.new_zeros(*x.shape[:2], H * W)
        x = full.scatter(2, indices.flatten(2), x.flatten(2)).unflatten(2, (H, W))
        for i in range(count):
            x = w.conv_bn_relu(x, f"decoder.{s}.{i}", padding=1)
    return {"out": w.conv(x, "classifier", padding=1)}


def segnet_basic(w: Weights, x):
    square = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
    neighbours = sum(square[:, i : i + x.shape[1]] for i in range(5))
    x = x / (1 + 1e-4 / 5 * neighbours) ** 0.75
    memory = []
    for i in range(4):
        x = w.conv_bn_relu(x, f"encoder.{i}", padding=3)
        size = x.shape[-2:]
        x, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
        memory.append((indices, size))
    for i in range(4):
        indices, (H, W) = memory.pop()
        full = x.new_zeros(*x.shape[:2], H * W)
        x = full.scatter(2, indices.flatten(2), x.flatten(2)).unflatten(2, (H, W))
        x = w.conv_bn(x, f"decoder.{i}", padding=3)
    return {"out": w.conv(x, "classifier")}


@pytest.mark.parametrize("ceil_pool", [True, False])
@pytest.mark.parametrize("conv_bias", [True, False])
def test_segnet(ceil_pool, conv_bias):
    model = models.segnet_vgg16(**TINY, ceil_pool=ceil_pool, conv_bias=conv_bias)
    assert_same_network(model, lambda w, x: segnet(w, x, ceil_pool), (2, 2, 32, 64), (1, 2, 45, 61))


def test_segnet_basic():
    assert_same_network(models.segnet_basic(**TINY), segnet_basic, (2, 2, 32, 48), (1, 2, 23, 30))


def test_dropout_is_on_the_inner_stages():
    model = models.segnet_vgg16(**TINY, dropout=0.5).eval()
    calls = []
    model.dropout.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    model(torch.randn(1, 2, 32, 32))
    assert calls == [16, 32, 32, 32, 16, 8]
