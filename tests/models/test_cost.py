import pytest
import torch
from torch import nn

from fastseg import models

# (name, options, size or 512) -> parameters, GMACs, with 21 classes and 3 channels
PUBLISHED = {
    ("fcn32s_vgg16", ()): (134_346_581, 110.8),
    ("fcn16s_vgg16", ()): (134_357_354, 110.8),
    ("fcn8s_vgg16", ()): (134_362_751, 110.8),
    ("dilated_frontend_vgg16", ()): (134_346_581, 750.2),
    ("dilated_frontend_vgg16", (("padding", "same"),)): (134_346_581, 591.9),
    ("dilated8_vgg16", ()): (141_149_720, 778.1),
    ("dilated8_vgg16", (("padding", "same"),)): (141_149_720, 619.8),
    ("deeplabv1_largefov_vgg16", (), 513): (20_505_429, 128.6),
    ("deeplabv1_largefov_vgg16", (), 321): (20_505_429, 50.9),
    ("deeplabv1_largefov_vgg16", (("multi_scale", True),), 513): (21_711_550, 147.3),
    ("deeplabv1_7x7_vgg16", (), 513): (134_346_581, 609.5),
    ("deeplabv1_4x4_vgg16", (), 514): (65_140_565, 318.5),
    ("deeplabv2_vgg16", (), 513): (37_877_652, 202.0),
    ("deeplabv2_vgg16", (("rates", (2, 4, 8, 12)),), 513): (37_877_652, 202.0),
}


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_size_of_the_papers(case):
    parameters, gmacs = PUBLISHED[case]
    name, options, *size = case
    with torch.device("meta"):
        model = models.create_model(name, **dict(options))
    assert models.count_parameters(model) == parameters
    macs = models.count_macs(model, size * 2 or (512, 512))
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.06)


@pytest.mark.parametrize(
    ("num_classes", "options", "parameters"),
    [
        (21, {"width": "basic"}, 28_392),
        (21, {"width": "large"}, 6_803_139),
        (19, {"width": "basic", "layers": 10}, 29_792),
    ],
)
def test_size_of_the_context_module(num_classes, options, parameters):
    assert models.count_parameters(models.ContextModule(num_classes, **options)) == parameters


def test_count_macs_by_hand():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),  # 6 * 2 * 9 per output pixel
        nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1),  # 5 * 16 * 6 per input pixel
        nn.BatchNorm2d(5),
    )
    expected = 6 * 2 * 9 * (4 * 5) + 5 * 16 * 6 * (4 * 5)
    assert models.count_macs(model, (8, 10), in_channels=4) == expected
    assert model.training
