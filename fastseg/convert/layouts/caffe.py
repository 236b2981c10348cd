"""VGG16 and the networks on it under the layer names of Caffe's definitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layout import Layout, Rule, renamed
from .rules import as_conv, vgg_convs

TRUNK: tuple[Rule, ...] = tuple(
    (rf"conv{s}_{i}\.(weight|bias)", rf"backbone.stages.{s - 1}.conv{s}_{i}.\1")
    for s, i, _ in vgg_convs()
)
FULLY_CONNECTED: tuple[Rule, ...] = (
    (r"(fc[67])\.weight", r"head.\1.weight", as_conv),
    (r"(fc[67])\.bias", r"head.\1.bias"),
)
# Red, green, blue; the networks themselves take the channels the other way round.
MEAN, DILATION_MEAN, STD = (122.679, 116.669, 104.007), (116.52, 111.36, 102.93), (1.0, 1.0, 1.0)

FCN = Layout(
    "fcn_caffe",
    "FCN of Long et al. and its ports",
    marks=(r"conv1_1\.weight", r"score_fr\.weight"),
    rules=(
        *TRUNK,
        *FULLY_CONNECTED,
        (r"score_fr\.(\w+)", r"head.score.\1"),
        (r"score_pool4\.(\w+)", r"score_skips.0.\1"),
        (r"score_pool3\.(\w+)", r"score_skips.1.\1"),
        (r"upscore2\.(\w+)", r"upscores.0.deconv.\1"),
        (r"upscore_pool4\.(\w+)", r"upscores.1.deconv.\1"),
        (r"upscore(?:8|16)?\.(\w+)", r"upscore.deconv.\1"),
    ),
    bgr=True,
    mean=MEAN,
    std=STD,
)
FCN_INSIDE: Any = ((name, f"fcn.{ours}", *change) for name, ours, *change in FCN.rules)
CRFRNN = Layout(
    "crfrnn",
    "CRF-RNN of Zheng et al. in the PyTorch port of sadeepj",
    marks=(*FCN.marks, r"crfrnn\.compatibility_matrix"),
    rules=(
        *FCN_INSIDE,
        (r"crfrnn\.spatial_ker_weights", "crf.spatial_weight"),
        (r"crfrnn\.bilateral_ker_weights", "crf.bilateral_weight"),
        (r"crfrnn\.compatibility_matrix", "crf.compatibility"),
    ),
    bgr=True,
    mean=(123.68, 116.779, 103.939),
    std=STD,
)
FRONTEND = Layout(
    "dilation_frontend",
    "front end of Yu and Koltun",
    marks=(r"conv1_1\.weight", r"(fc-)?final\.weight"),
    rules=(*TRUNK, *FULLY_CONNECTED, (r"(?:fc-)?final\.(\w+)", r"head.score.\1")),
    bgr=True,
    mean=DILATION_MEAN,
    std=STD,
)
CONTEXT = ("conv1_1", "conv1_2", "conv2_1", "conv3_1", "conv4_1", "conv5_1", "fc1")
DILATION8 = Layout(
    "dilation8",
    "front end and context module of Yu and Koltun",
    marks=(*FRONTEND.marks, r"ctx?_final\.weight"),
    rules=(
        *FRONTEND.rules,
        *((rf"ctx?_{name}\.(\w+)", rf"context.convs.{i}.\1") for i, name in enumerate(CONTEXT)),
        (r"ctx?_final\.(\w+)", r"context.final.\1"),
    ),
    bgr=True,
    mean=DILATION_MEAN,
    std=STD,
)
DEEPLABV1 = Layout(
    "deeplabv1_caffe",
    "DeepLab v1 of Chen et al.",
    marks=(r"conv1_1\.weight", r"fc6\.weight", r"fc8_[a-zA-Z0-9]+\.weight"),
    rules=(*TRUNK, *FULLY_CONNECTED, (r"fc8_[a-zA-Z0-9]+\.(\w+)", r"head.score.\1")),
    bgr=True,
    mean=MEAN,
    std=STD,
)
DEEPLABV2 = Layout(
    "deeplabv2_caffe",
    "DeepLab v2 of Chen et al. on VGG16",
    marks=(r"conv1_1\.weight", r"fc6_1\.weight", r"fc8_[a-zA-Z0-9]+_1\.weight"),
    rules=(
        *TRUNK,
        *(
            rule
            for i in range(4)
            for rule in (
                (rf"(fc[67])_{i + 1}\.(\w+)", rf"branches.{i}.\1.\2"),
                (rf"fc8_[a-zA-Z0-9]+_{i + 1}\.(\w+)", rf"branches.{i}.score.\1"),
            )
        ),
    ),
    bgr=True,
    mean=MEAN,
    std=STD,
)
VGG16 = Layout(
    "vgg16_caffe",
    "ImageNet classifier VGG16, with or without its fully connected layers",
    marks=(r"conv1_1\.weight", r"conv5_3\.weight"),
    rules=(*TRUNK, *FULLY_CONNECTED, (r"fc8\.\w+", None)),
    bgr=True,
    trunk=True,
    mean=MEAN,
    std=STD,
)
LAYOUTS = (CRFRNN, FCN, DILATION8, FRONTEND, DEEPLABV2, DEEPLABV1, VGG16)


def caffe(state_dict: Mapping[str, Any], *, bgr: bool | None = None) -> dict[str, Tensor]:
    """Networks that keep Caffe's layer names (``conv1_1.weight``, ``fc6.weight``) under ours.

    VGG16; FCN of Long et al. and wkentaro/pytorch-fcn, which needs ``padding="caffe"``; the front
    end and context module of Yu and Koltun, whose released form is
    ``dilated8_vgg16(context_padding="first")``; DeepLab v1 and v2 on VGG16.

    Args:
        state_dict: names to tensors, or a checkpoint that contains them.
        bgr: whether the source takes images in the order blue, green, red; then the first
            convolution is turned, so that the result takes RGB. None: as the released weights,
            which do. The mean they want subtracted is ``detect(state_dict).mean``.

    Raises:
        ValueError: the names are not of these networks, or there are more than there should be.
    """
    return renamed(LAYOUTS, state_dict, bgr)
