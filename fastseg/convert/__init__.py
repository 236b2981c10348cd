"""Checkpoints of other libraries in our networks.

model = fastseg.models.fcn8s_vgg16(padding="caffe")
print(convert.load("fcn8s_from_caffe.pth", model))          # finds the layout, loads, reports

weights = convert.read("fcn8s_from_caffe.pth")              # or step by step
print(convert.detect(weights).title)
model.load_state_dict(convert.caffe(weights), strict=False)
"""

from .files import read, unwrap
from .layout import Layout
from .layouts import LAYOUTS, caffe, detect, torchvision
from .load import Loaded, load

__all__ = [
    "LAYOUTS",
    "Layout",
    "Loaded",
    "caffe",
    "detect",
    "load",
    "read",
    "torchvision",
    "unwrap",
]
