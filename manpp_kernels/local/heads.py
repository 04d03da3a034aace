"""Local classifiers, built from the measured shape of the features they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor, autograd, nn

from manpp_kernels.local.features import VectorMap, linear_head, require
from manpp_kernels.models.cifar_resnet import init_weights


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class _BlockMean(autograd.Function):
    """Average pooling over k x k blocks that keeps nothing for backward (PyTorch's keeps its input, only to read the
    shape of it: in a local block that would be one more full-size activation). The gradient comes in the memory format
    of the input, as what produced the input is slow on a mixture of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, int]) -> Tensor:
        ctx.kernel, ctx.format = kernel, _format(x)
        return F.avg_pool2d(x, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        kh, kw = ctx.kernel
        grad = grad / (kh * kw)
        if ctx.format is torch.channels_last:
            spread = grad.permute(0, 2, 3, 1).repeat_interleave(kw, 2).repeat_interleave(kh, 1)
            return spread.permute(0, 3, 1, 2), None
        return grad.repeat_interleave(kw, 3).repeat_interleave(kh, 2), None


class _ChannelsLast(autograd.Function):
    """The same values in the channels-last format; the gradient goes back in the format that they came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.format = _format(x)
        return x.clone(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=ctx.format)


class AveragePool(nn.Module):
    """Adaptive average pooling of (N, C, H, W) to (N, C, size, size), for any H and W."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        if h % self.size or w % self.size:
            return F.adaptive_avg_pool2d(x, self.size)
        return x if h == w == self.size else _BlockMean.apply(x, (h // self.size, w // self.size))


class HeadPool(AveragePool):
    """Average pooling in front of 1x1 convolutions. On a CPU these and their batch normalisations take a fifth less
    time in the channels-last format, and pooled maps are so small that changing the format costs next to nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.device.type != "cpu" or y.is_contiguous(memory_format=torch.channels_last):
            return y
        return _ChannelsLast.apply(y)


class GlobalAveragePool(nn.Module):
    """The mean of every channel, (N, C, H, W) to (N, C), whose gradient comes in the memory format of the features:
    that of PyTorch's own pooling is contiguous, and the backward passes that it meets are slow on a mixture."""

    def forward(self, x: Tensor) -> Tensor:
        if _format(x) is torch.channels_last:
            return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
        return x.mean((2, 3))


def _conv_layers(in_channels: int, channels: int, count: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [
            nn.Conv2d(in_channels if i == 0 else channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    return layers


def _linear_layers(in_features: int, features: int, count: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [
            nn.Linear(in_features if i == 0 else features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
        ]
    return layers


Width = Literal["narrow", "wide", "linear"]


def _narrow(channels: int, side: int, num_classes: int) -> list[nn.Module]:
    quarter = math.ceil(side / 4)
    size = min(2, quarter)
    return [
        HeadPool(quarter),
        *_conv_layers(channels, channels, 3),
        AveragePool(size),
        nn.Flatten(),
        *_linear_layers(channels * size * size, 4 * channels, 2),
        nn.Linear(4 * channels, num_classes),
    ]


def _wide(channels: int, side: int, num_classes: int) -> list[nn.Module]:
    return [
        HeadPool(min(8, side)),
        *_conv_layers(channels, 128, 3),
        GlobalAveragePool(),
        *_linear_layers(128, 512, 3),
        nn.Linear(512, num_classes),
    ]


def _linear(channels: int, side: int, num_classes: int) -> list[nn.Module]:
    return [GlobalAveragePool(), nn.Linear(channels, num_classes)]


_LAYERS = {"narrow": _narrow, "wide": _wide, "linear": _linear}


def dgl_head(features: Size, num_classes: int, width: Width) -> nn.Sequential:
    """The classifier of DGL (Belilovsky et al., "Decoupled Greedy Learning of CNNs", ICML 2020).

    Args:
        features: the shape of what it takes: (N, C, H, W); (N, D), which is taken as a map of one pixel; or tokens
            (N, T, C), whose head is layer normalisation and one linear layer on the class token, as in MAN++ for
            vision transformers, whatever the width.
        num_classes: of the logits (N, num_classes) it gives.
        width: ``"narrow"`` as in DGL: average pool to a quarter of the side, three 1x1 conv-BN-ReLU of C, average pool
            to 2x2, two linear-BN-ReLU of 4C, linear. ``"wide"`` as the host of MAN++: average pool to 8x8, three 1x1
            conv-BN-ReLU of 128, global average pool, three linear-BN-ReLU of 512, linear. ``"linear"``: global average
            pool and one linear layer, where what stands in front is deep enough. Pooling never enlarges.

    Raises:
        ValueError: the width is unknown, or the features have not 2 to 4 dimensions.
    """
    if width not in _LAYERS:
        raise ValueError(f"the width of the DGL head has to be one of {', '.join(_LAYERS)}, and is {width!r}")
    require("the DGL head", features)
    if len(features) == 3:
        return linear_head(features, num_classes)
    side = min(features[2:], default=1)
    layers = _LAYERS[width](features[1], side, num_classes)
    head = nn.Sequential(*([] if len(features) == 4 else [VectorMap()]), *layers)
    init_weights(head)
    return head


# How many channels a pixel's classifier has between the features and the classes; none is one layer.
_PIXEL_CHANNELS: dict[Width, Callable[[int], int | None]] = {
    "narrow": lambda channels: max(1, channels // 4),
    "wide": lambda channels: 128,
    "linear": lambda channels: None,
}


def pixel_head(features: Size, num_classes: int, width: Width) -> nn.Sequential:
    """A light fully convolutional head, for models that classify pixels (Long et al., "Fully Convolutional Networks for
    Semantic Segmentation", CVPR 2015; in the form of torchvision's ``FCNHead``).

    Args:
        features: the shape of what it takes, (N, C, H, W).
        num_classes: of the logits (N, num_classes, H, W) it gives.
        width: ``"narrow"``: 3x3 conv-BN-ReLU to C / 4 and a 1x1 convolution; ``"wide"``: the same by way of 128
            channels; ``"linear"``: the 1x1 convolution alone, where what stands in front is deep enough.

    Raises:
        ValueError: the features are no maps.
    """
    require("a head for pixels", features, (4,))
    channels = _PIXEL_CHANNELS[width](features[1])
    layers: list[nn.Module] = []
    if channels is not None:
        convolution = nn.Conv2d(features[1], channels, 3, padding=1, bias=False)
        layers = [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    head = nn.Sequential(*layers)
    init_weights(head)
    # By PyTorch's own initial values: those of the other layers, for few classes, would give logits far too large.
    head.append(nn.Conv2d(channels or features[1], num_classes, 1))
    return head
