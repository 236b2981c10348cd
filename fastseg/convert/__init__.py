"""Checkpoints of other libraries in our networks.

model = fastseg.models.fcn8s_vgg16(padding="caffe")
print(convert.load("fcn8s_from_caffe.pth", model))          # finds the layout, loads, reports

weights = convert.read("deeplabv3_resnet50_coco.pth")       # or step by step
print(convert.detect(weights).title)
model = fastseg.models.deeplabv3_resnet50(aux=True)
model.load_state_dict(convert.torchvision(weights))
"""

from .files import read, unwrap
from .layout import Layout
from .layouts import LAYOUTS, detect
from .layouts.caffe import caffe
from .layouts.deeplab_pytorch import deeplab_pytorch
from .layouts.mmseg import mmseg
from .layouts.semseg import semseg
from .layouts.smp import smp
from .layouts.torchvision import torchvision
from .load import Loaded, load

__all__ = [
    "LAYOUTS",
    "Layout",
    "Loaded",
    "caffe",
    "deeplab_pytorch",
    "detect",
    "load",
    "mmseg",
    "read",
    "semseg",
    "smp",
    "torchvision",
    "unwrap",
]
