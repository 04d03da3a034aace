"""The feature maps that the mix and the copy are measured on."""

from __future__ import annotations

import math

import torch
from common import DEVICE
from torch import Tensor

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

# By name: what stands between two blocks of ResNet-32 at batch 128, and maps larger than any cache.
MAPS: dict[str, tuple[int, int, int, int]] = {
    "128 x 16 x 32 x 32": (128, 16, 32, 32),
    "128 x 64 x 8 x 8": (128, 64, 8, 8),
    "64 x 64 x 56 x 56": (64, 64, 56, 56),
    "256 x 64 x 112 x 112": (256, 64, 112, 112),
}
SMALL = ("128 x 16 x 32 x 32", "128 x 64 x 8 x 8")
LARGE = "256 x 64 x 112 x 112" if DEVICE.type == "cuda" else "64 x 64 x 56 x 56"


def elements(name: str) -> int:
    return math.prod(MAPS[name])


def draw(name: str, dtype: torch.dtype, layout: str) -> Tensor:
    return torch.randn(MAPS[name], device=DEVICE, dtype=dtype).contiguous(memory_format=FORMATS[layout])


def backends() -> list[str]:
    import manpp_kernels

    return [b for b in manpp_kernels.available() if b != "eager" and (b == "cpu") == (DEVICE.type == "cpu")]
