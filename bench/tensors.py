"""The lists of tensors that the EMA is measured on, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Shapes = list[tuple[int, ...]]

# An update of the EMA units of ResNet-32 at K = 16 has about this many tensors of about this size.
BLOCKS = 16


def _from_torchvision(name: str) -> Shapes:
    from torchvision import models

    with torch.device("meta"):
        return [tuple(p.shape) for p in models.get_model(name).parameters()]


def yolo_like() -> Shapes:
    """1,188 tensors as a detector has them: each convolution followed by three vectors of its channels (16 to 512)."""
    widths = (16, 32, 64, 128, 256)
    shapes: Shapes = []
    for i in range(297):
        channels, side = widths[i * len(widths) // 297], (1, 3)[i % 2]
        shapes.append((channels, channels, side, side))
        shapes += [(channels * (1 + i % 2),)] * 3
    return shapes


SIZES: dict[str, Callable[[], Shapes]] = {
    "96 x 4,800": lambda: [(4800,)] * 96,
    "600 x 40,000": lambda: [(40000,)] * 600,
    "ResNet-50, 161 tensors": lambda: _from_torchvision("resnet50"),
    "ViT-B, 152 tensors": lambda: _from_torchvision("vit_b_16"),
    "YOLO-like, 1,188 tensors": yolo_like,
    "4 x 8 M": lambda: [(8 << 20,)] * 4,
    "4 x 25 M": lambda: [(25 << 20,)] * 4,
}


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)
