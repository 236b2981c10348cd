"""The layouts of other libraries, most specific first. To add one, write its rules and list it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..models.vgg import CONVS
from .files import unwrap
from .layout import Layout, Rule


def vgg_convs(batch_norm: bool = False) -> Iterator[tuple[int, int, int]]:
    """(stage, number in the stage, index in torchvision's ``features``) of VGG16's convolutions."""
    index = 0
    for s, count in enumerate(CONVS, 1):
        for i in range(1, count + 1):
            yield s, i, index
            index += 3 if batch_norm else 2  # convolution, batch norm, ReLU
        index += 1  # pooling


def as_conv(weight: Tensor) -> Tensor:
    """A fully connected layer over 512 x 7 x 7 features, or over 1 x 1, as a convolution."""
    if weight.dim() == 4:
        return weight
    outs, ins = weight.shape
    k = 1 if ins == outs else 7
    return weight.reshape(outs, ins // k**2, k, k)


# --- Caffe's names on VGG16 ---------------------------------------------------------------------

CAFFE_VGG: tuple[Rule, ...] = tuple(
    (rf"conv{s}_{i}\.(weight|bias)", rf"backbone.stages.{s - 1}.conv{s}_{i}.\1")
    for s, i, _ in vgg_convs()
)
CAFFE_HEAD: tuple[Rule, ...] = (
    (r"(fc[67])\.weight", r"head.\1.weight", as_conv),
    (r"(fc[67])\.bias", r"head.\1.bias"),
)
VGG_MEAN = (122.67892, 116.66877, 104.00699)
NO_STD = (1.0, 1.0, 1.0)

FCN_CAFFE = Layout(
    "fcn_caffe",
    "FCN's Caffe networks and their PyTorch ports",
    marks=(r"conv1_1\.weight", r"score_fr\.weight"),
    rules=(
        *CAFFE_VGG,
        *CAFFE_HEAD,
        (r"score_fr\.(\w+)", r"head.score.\1"),
        (r"score_pool4\.(\w+)", r"score_skips.0.\1"),
        (r"score_pool3\.(\w+)", r"score_skips.1.\1"),
        (r"upscore2\.(\w+)", r"upscores.0.deconv.\1"),
        (r"upscore_pool4\.(\w+)", r"upscores.1.deconv.\1"),
        (r"upscore(?:8|16)?\.(\w+)", r"upscore.deconv.\1"),
    ),
    bgr=True,
    mean=VGG_MEAN,
    std=NO_STD,
)

CONTEXT = ("conv1_1", "conv1_2", "conv2_1", "conv3_1", "conv4_1", "conv5_1", "fc1")
DILATION_FRONTEND = Layout(
    "dilation_frontend",
    "front end of the Caffe networks of Yu and Koltun",
    marks=(r"conv1_1\.weight", r"(fc-)?final\.weight"),
    rules=(*CAFFE_VGG, *CAFFE_HEAD, (r"(?:fc-)?final\.(\w+)", r"head.score.\1")),
    bgr=True,
    mean=(116.52, 111.36, 102.93),
    std=NO_STD,
)
DILATION8 = Layout(
    "dilation8",
    "front end and context module of the Caffe networks of Yu and Koltun",
    marks=(*DILATION_FRONTEND.marks, r"ctx?_final\.weight"),
    rules=(
        *DILATION_FRONTEND.rules,
        *((rf"ctx?_{name}\.(\w+)", rf"context.convs.{i}.\1") for i, name in enumerate(CONTEXT)),
        (r"ctx?_final\.(\w+)", r"context.final.\1"),
    ),
    bgr=True,
    mean=DILATION_FRONTEND.mean,
    std=NO_STD,
)

DEEPLAB_CAFFE = Layout(
    "deeplab_caffe",
    "Caffe networks of DeepLab v1 on VGG16",
    marks=(r"conv1_1\.weight", r"fc6\.weight", r"fc8_[a-zA-Z0-9]+\.weight"),
    rules=(*CAFFE_VGG, *CAFFE_HEAD, (r"fc8_[a-zA-Z0-9]+\.(\w+)", r"head.score.\1")),
    bgr=True,
    mean=VGG_MEAN,
    std=NO_STD,
)
DEEPLABV2_VGG_CAFFE = Layout(
    "deeplabv2_vgg_caffe",
    "Caffe network of DeepLab v2 on VGG16",
    marks=(r"conv1_1\.weight", r"fc6_1\.weight", r"fc8_\w+_1\.weight"),
    rules=(
        *CAFFE_VGG,
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
    mean=VGG_MEAN,
    std=NO_STD,
)
VGG16_CAFFE = Layout(
    "vgg16_caffe",
    "ImageNet classifier VGG16 under Caffe's names, with or without its fully connected layers",
    marks=(r"conv1_1\.weight", r"conv5_3\.weight"),
    rules=(*CAFFE_VGG, *CAFFE_HEAD, (r"fc8\.\w+", None)),
    bgr=True,
    trunk=True,
    mean=VGG_MEAN,
    std=NO_STD,
)

# --- torchvision --------------------------------------------------------------------------------

TORCHVISION_FC: tuple[Rule, ...] = (
    (r"classifier\.0\.weight", "head.fc6.weight", as_conv),
    (r"classifier\.3\.weight", "head.fc7.weight", as_conv),
    (r"classifier\.0\.bias", "head.fc6.bias"),
    (r"classifier\.3\.bias", "head.fc7.bias"),
    (r"classifier\.6\.\w+", None),
)
VGG16 = Layout(
    "vgg16",
    "ImageNet classifier VGG16 of torchvision",
    marks=(r"features\.0\.weight", r"features\.28\.weight"),
    rules=(
        *(
            (rf"features\.{n}\.(\w+)", rf"backbone.stages.{s - 1}.conv{s}_{i}.\1")
            for s, i, n in vgg_convs()
        ),
        *TORCHVISION_FC,
    ),
    trunk=True,
)

LAYOUTS = {
    layout.name: layout
    for layout in (
        FCN_CAFFE,
        DILATION8,
        DILATION_FRONTEND,
        DEEPLABV2_VGG_CAFFE,
        DEEPLAB_CAFFE,
        VGG16_CAFFE,
        VGG16,
    )
}


def detect(state_dict: Mapping[str, Tensor]) -> Layout:
    """The layout of a state dict, from its names.

    Raises:
        ValueError: no layout has such names.
    """
    for layout in LAYOUTS.values():
        if layout.matches(state_dict):
            return layout
    some = ", ".join(list(state_dict)[:8])
    raise ValueError(
        f"convert: no known layout has these names: {some}{' ...' if len(state_dict) > 8 else ''}; "
        f"the layouts are {', '.join(LAYOUTS)}"
    )


def family(names: tuple[str, ...], state_dict: Mapping[str, Tensor]) -> Layout:
    """The one of these layouts that a state dict has.

    Raises:
        ValueError: it has another.
    """
    layout = detect(state_dict)
    if layout.name not in names:
        raise ValueError(
            f"convert: the state dict must have one of the layouts {', '.join(names)}, got "
            f"{layout.name} ({layout.title})"
        )
    return layout


def _renamed(
    names: tuple[str, ...], state_dict: Mapping[str, Tensor], bgr: bool | None
) -> dict[str, Tensor]:
    tensors = unwrap(state_dict)
    return family(names, tensors).convert(tensors, bgr).tensors


def torchvision(state_dict: Mapping[str, Tensor], *, bgr: bool | None = None) -> dict[str, Tensor]:
    """torchvision's ImageNet trunks under our names; see :func:`caffe` for ``bgr``."""
    return _renamed(("vgg16",), state_dict, bgr)


def caffe(state_dict: Mapping[str, Tensor], *, bgr: bool | None = None) -> dict[str, Tensor]:
    """Networks that keep Caffe's layer names (``conv1_1.weight``, ``fc6.weight``) under ours.

    VGG16, FCN (Long et al. and wkentaro/pytorch-fcn), Dilated, DeepLab v1 and v2 on VGG16.

    Args:
        state_dict: names to tensors, or a checkpoint that contains them.
        bgr: whether the source takes images in the order blue, green, red; then the first
            convolution is turned, so that the result takes RGB. None: as the released weights
            (True for Caffe). Their mean is in ``detect(state_dict).mean``.

    Raises:
        ValueError: the layout is another one or has names that it should not have.
    """
    names = tuple(n for n in LAYOUTS if n.endswith("_caffe") or n.startswith("dilation"))
    return _renamed(names, state_dict, bgr)
