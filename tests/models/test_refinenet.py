import pytest
import torch.nn.functional as F

from fastseg.models.refinenet import refinenet

from .reference import DEPTH, SMALL_RESNET, STRIDE_32, Weights, assert_same_network, resnet, up


def rcu(w: Weights, x, name):
    y = w.conv(F.relu(x), name + ".conv1", padding=1)
    return w.conv(F.relu(y), name + ".conv2", padding=1) + x


def restatement(w: Weights, x, pools, conv_first):
    y = None
    for i, c in enumerate(reversed(resnet(w, x, *STRIDE_32))):
        z = w.conv(c, f"refine.{i}.reduce", padding=1)
        z = rcu(w, rcu(w, z, f"refine.{i}.adapt.0"), f"refine.{i}.adapt.1")
        if y is not None:
            low = w.conv(y, f"refine.{i}.fuse_low", padding=1)
            z = w.conv(z, f"refine.{i}.fuse_high", padding=1) + up(low, z, True)
        total = path = F.relu(z)
        for j in range(pools):
            name = f"refine.{i}.crp.convs.{j}"
            if conv_first:
                path = F.max_pool2d(w.conv(path, name, padding=1), 5, 1, 2)
            else:
                path = w.conv(F.max_pool2d(path, 5, 1, 2), name, padding=1)
            total = total + path
        for j in range(3):
            total = rcu(w, total, f"refine.{i}.out.{j}")
        y = total
    return {"out": up(w.conv(y, "classifier", padding=1), x, True)}


@pytest.mark.parametrize(("pools", "order"), [(4, "pool_conv"), (2, "conv_pool")])
def test_restatement(pools, order):
    model = refinenet(DEPTH, **SMALL_RESNET, pools=pools, crp_order=order)
    assert_same_network(
        model,
        lambda w, x: restatement(w, x, pools, order == "conv_pool"),
        (2, 2, 64, 64),
        (1, 2, 37, 70),
    )


def test_bad_order():
    with pytest.raises(ValueError, match="crp_order must be pool_conv or conv_pool, got 'x'"):
        refinenet(DEPTH, **SMALL_RESNET, crp_order="x")
