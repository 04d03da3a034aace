"""ResNets for small images: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

A 3x3 stem of 16 channels and three stages of basic blocks of 16, 32 and 64 channels; the second and third stage halve
the side. ResNet-(6n + 2) has n blocks a stage. Any image side of 4 or more works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["A", "B"]


class _PaddedShortcut(nn.Module):
    """Option A: take every ``stride``-th pixel and fill the new channels with zeros; no parameters."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: Shortcut = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            if shortcut == "A":
                self.downsample = _PaddedShortcut(stride, channels - in_channels)
            else:
                self.downsample = nn.Sequential(
                    nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
                )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


def init_weights(module: nn.Module) -> None:
    """He-normal convolutions (fan out), batch normalisation at weight 1 and bias 0, PyTorch's default for the rest."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.modules.batchnorm._NormBase | nn.Linear | nn.LayerNorm | nn.GroupNorm):
            m.reset_parameters()


class CifarResNet(nn.Module):
    """A ResNet for small images.

    Args:
        units: basic blocks a stage; one number for each stage.
        num_classes: size of the output.
        in_channels: of the images.
        widths: channels of each stage; the stem has those of the first.
        shortcut: where a unit changes the shape. ``"B"`` is a strided 1x1 convolution with batch normalisation, as the
            networks of the local-learning papers (InfoPro, MAN++) have; ``"A"`` is without parameters, as in He et al.
            for CIFAR.

    ``forward`` takes images (N, in_channels, H, W) and returns logits (N, num_classes).
    """

    def __init__(
        self,
        units: tuple[int, ...],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        widths: tuple[int, ...] = (16, 32, 64),
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut has to be 'A' or 'B', and is {shortcut!r}")
        if len(units) != len(widths) or not units or min(units) < 1:
            raise ValueError(f"units {units} and widths {widths} have to give 1 or more units for every stage")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        channels = widths[0]
        self.stages = [f"layer{i + 1}" for i in range(len(units))]
        for i, (name, count, width) in enumerate(zip(self.stages, units, widths, strict=True)):
            stage = []
            for j in range(count):
                stage.append(BasicBlock(channels, width, 2 if i > 0 and j == 0 else 1, shortcut))
                channels = width
            self.add_module(name, nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def _resnet(depth: int, num_classes: int, in_channels: int, shortcut: Shortcut) -> CifarResNet:
    return CifarResNet(((depth - 2) // 6,) * 3, num_classes, in_channels, shortcut=shortcut)


def resnet20(num_classes: int = 10, in_channels: int = 3, *, shortcut: Shortcut = "B") -> CifarResNet:
    """3 x 3 basic blocks."""
    return _resnet(20, num_classes, in_channels, shortcut)


def resnet32(num_classes: int = 10, in_channels: int = 3, *, shortcut: Shortcut = "B") -> CifarResNet:
    """3 x 5 basic blocks."""
    return _resnet(32, num_classes, in_channels, shortcut)


def resnet44(num_classes: int = 10, in_channels: int = 3, *, shortcut: Shortcut = "B") -> CifarResNet:
    """3 x 7 basic blocks."""
    return _resnet(44, num_classes, in_channels, shortcut)


def resnet56(num_classes: int = 10, in_channels: int = 3, *, shortcut: Shortcut = "B") -> CifarResNet:
    """3 x 9 basic blocks."""
    return _resnet(56, num_classes, in_channels, shortcut)


def resnet110(num_classes: int = 10, in_channels: int = 3, *, shortcut: Shortcut = "B") -> CifarResNet:
    """3 x 18 basic blocks."""
    return _resnet(110, num_classes, in_channels, shortcut)


MODELS: dict[str, Callable[..., CifarResNet]] = {
    f.__name__: f for f in (resnet20, resnet32, resnet44, resnet56, resnet110)
}
