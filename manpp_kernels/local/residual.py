"""Residual blocks of any width, for auxiliary networks that follow the shape of layers further down."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from manpp_kernels.models.cifar_resnet import BasicBlock, init_weights


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut: (N, in_channels, H, W) to (N, channels, H / stride, W / stride).

    He et al., CVPR 2016; the 3x3 convolution has a ``channels / expansion`` and the stride.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        narrow = max(1, channels // expansion)
        self.conv1 = nn.Conv2d(in_channels, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class LinearBlock(nn.Module):
    """Linear, batch normalisation, ReLU: (N, in_features) to (N, features), with a shortcut where they are equal."""

    def __init__(self, in_features: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, features, bias=False)
        self.norm = nn.BatchNorm1d(features)
        self.shortcut = in_features == features

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.linear(x)))
        return x + y if self.shortcut else y


def residual_block(in_channels: int, channels: int, stride: int, like: nn.Module) -> nn.Module:
    """A basic block, or a bottleneck where ``like`` is one (by its attribute ``expansion``, as in torchvision)."""
    expansion = getattr(like, "expansion", 1)
    block: nn.Module
    if isinstance(expansion, int) and expansion > 1:
        block = Bottleneck(in_channels, channels, stride, expansion)
    else:
        block = BasicBlock(in_channels, channels, stride)
    init_weights(block)
    return block
