"""Every architecture of classic semantic segmentation, one file per paper, and a registry."""

from .common import SegmentationModel
from .cost import count_macs, count_parameters
from .fcn import FCN, fcn8s_vgg16, fcn16s_vgg16, fcn32s_vgg16
from .registry import ModelInfo, Paper, create_model, list_models, model_info, register
from .vgg import VGG16

__all__ = [
    "FCN",
    "VGG16",
    "ModelInfo",
    "Paper",
    "SegmentationModel",
    "count_macs",
    "count_parameters",
    "create_model",
    "fcn8s_vgg16",
    "fcn16s_vgg16",
    "fcn32s_vgg16",
    "list_models",
    "model_info",
    "register",
]
