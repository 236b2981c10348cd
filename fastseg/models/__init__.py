"""Every architecture of classic semantic segmentation, one file per paper, and a registry."""

from .common import SegmentationModel
from .cost import count_macs, count_parameters
from .deeplabv1 import (
    DeepLabV1,
    deeplabv1_4x4_vgg16,
    deeplabv1_7x7_vgg16,
    deeplabv1_largefov_vgg16,
)
from .deeplabv2 import DeepLabV2, deeplabv2_vgg16
from .dilated import ContextModule, Dilated, dilated8_vgg16, dilated_frontend_vgg16
from .fcn import FCN, fcn8s_vgg16, fcn16s_vgg16, fcn32s_vgg16
from .registry import ModelInfo, Paper, create_model, list_models, model_info, register
from .u2net import U2Net, u2net, u2netp
from .vgg import VGG16

__all__ = [
    "FCN",
    "VGG16",
    "ContextModule",
    "DeepLabV1",
    "DeepLabV2",
    "Dilated",
    "ModelInfo",
    "Paper",
    "SegmentationModel",
    "U2Net",
    "count_macs",
    "count_parameters",
    "create_model",
    "deeplabv1_4x4_vgg16",
    "deeplabv1_7x7_vgg16",
    "deeplabv1_largefov_vgg16",
    "deeplabv2_vgg16",
    "dilated8_vgg16",
    "dilated_frontend_vgg16",
    "fcn8s_vgg16",
    "fcn16s_vgg16",
    "fcn32s_vgg16",
    "list_models",
    "model_info",
    "register",
    "u2net",
    "u2netp",
]
