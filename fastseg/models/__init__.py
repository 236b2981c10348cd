"""Every architecture of classic semantic segmentation, one file per paper, and a registry."""

from .checkpoint import ModelCard, read_card, save_checkpoint, shipped_weights
from .common import SegmentationModel, SimpleSegmentationModel
from .cost import count_macs, count_parameters
from .crfrnn import FCNWithCRF, crfrnn_fcn8s_vgg16
from .deeplabv1 import (
    DeepLabV1,
    deeplabv1_4x4_vgg16,
    deeplabv1_7x7_vgg16,
    deeplabv1_largefov_vgg16,
)
from .deeplabv2 import DeepLabV2, deeplabv2_resnet101, deeplabv2_vgg16
from .deeplabv3 import (
    DeepLabV3,
    DeepLabV3Cascade,
    deeplabv3_cascade_resnet50,
    deeplabv3_cascade_resnet101,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
)
from .dilated import ContextModule, Dilated, dilated8_vgg16, dilated_frontend_vgg16
from .fcn import (
    FCN,
    fcn8s_resnet50,
    fcn8s_resnet101,
    fcn8s_vgg16,
    fcn16s_resnet50,
    fcn16s_resnet101,
    fcn16s_vgg16,
    fcn32s_resnet50,
    fcn32s_resnet101,
    fcn32s_vgg16,
    fcn_resnet50,
    fcn_resnet101,
)
from .flow import Layer, trace
from .gcn import GCN, gcn_resnet50, gcn_resnet101, gcn_resnet152
from .pspnet import pspnet_resnet50, pspnet_resnet101
from .refinenet import RefineNet, refinenet_resnet50, refinenet_resnet101, refinenet_resnet152
from .registry import ModelInfo, Paper, create_model, list_models, model_info, register
from .resnet import ResNet
from .segnet import SegNet, SegNetBasic, segnet_basic, segnet_vgg16
from .u2net import U2Net, u2net, u2netp
from .unet import UNet, unet
from .vgg import VGG16

__all__ = [
    "FCN",
    "GCN",
    "VGG16",
    "ContextModule",
    "DeepLabV1",
    "DeepLabV2",
    "DeepLabV3",
    "DeepLabV3Cascade",
    "Dilated",
    "FCNWithCRF",
    "Layer",
    "ModelCard",
    "ModelInfo",
    "Paper",
    "RefineNet",
    "ResNet",
    "SegNet",
    "SegNetBasic",
    "SegmentationModel",
    "SimpleSegmentationModel",
    "U2Net",
    "UNet",
    "count_macs",
    "count_parameters",
    "create_model",
    "crfrnn_fcn8s_vgg16",
    "deeplabv1_4x4_vgg16",
    "deeplabv1_7x7_vgg16",
    "deeplabv1_largefov_vgg16",
    "deeplabv2_resnet101",
    "deeplabv2_vgg16",
    "deeplabv3_cascade_resnet50",
    "deeplabv3_cascade_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "dilated8_vgg16",
    "dilated_frontend_vgg16",
    "fcn8s_resnet50",
    "fcn8s_resnet101",
    "fcn8s_vgg16",
    "fcn16s_resnet50",
    "fcn16s_resnet101",
    "fcn16s_vgg16",
    "fcn32s_resnet50",
    "fcn32s_resnet101",
    "fcn32s_vgg16",
    "fcn_resnet50",
    "fcn_resnet101",
    "gcn_resnet50",
    "gcn_resnet101",
    "gcn_resnet152",
    "list_models",
    "model_info",
    "pspnet_resnet50",
    "pspnet_resnet101",
    "read_card",
    "refinenet_resnet50",
    "refinenet_resnet101",
    "refinenet_resnet152",
    "register",
    "save_checkpoint",
    "segnet_basic",
    "segnet_vgg16",
    "shipped_weights",
    "trace",
    "u2net",
    "u2netp",
    "unet",
]
