import pytest
import torch
from torch import nn

from fastseg import models

# (name, options) -> parameters, GMACs at 512 x 512, with 21 classes
PUBLISHED = {
    ("fcn32s_vgg16", ()): (134_346_581, 110.8),
    ("fcn16s_vgg16", ()): (134_357_354, 110.8),
    ("fcn8s_vgg16", ()): (134_362_751, 110.8),
}


@pytest.mark.parametrize(("name", "options"), PUBLISHED, ids=str)
def test_size_of_the_papers(name, options):
    parameters, gmacs = PUBLISHED[name, options]
    with torch.device("meta"):
        model = models.create_model(name, **dict(options))
    assert models.count_parameters(model) == parameters
    assert models.count_macs(model) / 1e9 == pytest.approx(gmacs, abs=0.06)


def test_count_macs_by_hand():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),  # 6 * 2 * 9 per output pixel
        nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1),  # 5 * 16 * 6 per input pixel
        nn.BatchNorm2d(5),
    )
    expected = 6 * 2 * 9 * (4 * 5) + 5 * 16 * 6 * (4 * 5)
    assert models.count_macs(model, (8, 10), in_channels=4) == expected
    assert model.training
