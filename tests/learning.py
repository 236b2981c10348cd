"""Small real tasks to learn: nuclei in a photograph, textures in a mosaic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
Batch = tuple[Tensor, Tensor]  # images (N, 1, H, W), labels (N, H, W)


def picture(name: str) -> Tensor:
    return torch.from_numpy(np.array(Image.open(DATA / name)))


def nuclei() -> Batch:
    """A photograph (1, 1, 512, 512) of 125 nuclei and where they are (1, 512, 512)."""
    return picture("nuclei.png")[None, None].float(), (picture("nuclei_labels.png") > 0)[
        None
    ].long()


def crops(image: Tensor, label: Tensor, size: int, count: int) -> Batch:
    """Random squares, turned and mirrored."""
    H, W = label.shape[-2:]
    images, labels = [], []
    for _ in range(count):
        top, left, turns, mirror = (
            int(torch.randint(n, ())) for n in (H - size + 1, W - size + 1, 4, 2)
        )
        both = torch.cat([image[0], label.float()])[:, top : top + size, left : left + size]
        both = both.rot90(turns, (1, 2))
        both = both.flip(1) if mirror else both
        images.append(both[:1])
        labels.append(both[1].long())
    return torch.stack(images), torch.stack(labels)


def mosaics(held_out: bool, size: int, count: int) -> Batch:
    """Squares of brick, grass and gravel in random polygons, from one half of each texture.

    Every texture is brought to mean 0 and deviation 1, so that brightness tells nothing.
    """
    half = slice(128, 256) if held_out else slice(0, 128)
    textures = picture("textures.png").float().reshape(256, 3, 256).permute(1, 0, 2)[:, :, half]
    textures = (textures - textures.mean((1, 2), keepdim=True)) / textures.std((1, 2), keepdim=True)
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), -1)
    images, labels = [], []
    for _ in range(count):
        centers = torch.rand(5, 2) * size
        classes = torch.tensor([0, 1, 2, 0, 1])[torch.randperm(5)]
        label = classes[torch.cdist(grid.reshape(-1, 2).float(), centers).argmin(1)]
        label = label.reshape(size, size)
        tiles = []
        for texture in textures:
            top, left = (int(torch.randint(n - size + 1, ())) for n in texture.shape)
            tiles.append(texture[top : top + size, left : left + size])
        images.append(torch.stack(tiles).gather(0, label[None]))
        labels.append(label)
    return torch.stack(images), torch.stack(labels)


def train(model: nn.Module, batch: Callable[[], Batch], steps: int, lr: float) -> nn.Module:
    """AdamW and one cycle of the learning rate; the auxiliary head's loss counts 0.4."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    for _ in range(steps):
        x, y = batch()
        scores = model(x)
        loss = F.cross_entropy(scores["out"], y)
        if "aux" in scores:
            loss = loss + 0.4 * F.cross_entropy(scores["aux"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def iou(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Intersection over union of each class over all pixels."""
    predicted = model(x)["out"]
    classes = range(predicted.shape[1])
    predicted = predicted.argmax(1)
    both = torch.stack([((predicted == c) & (y == c)).sum() for c in classes])
    either = torch.stack([((predicted == c) | (y == c)).sum() for c in classes])
    return both / either
