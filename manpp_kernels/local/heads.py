"""Local classifiers, built from the measured shape of the features they take."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch.nn.functional as F
from torch import Size, Tensor, autograd, nn

from manpp_kernels.local.features import VectorMap, linear_head, require
from manpp_kernels.models.cifar_resnet import init_weights


class _BlockMean(autograd.Function):
    """Average pooling over k x k blocks that keeps nothing for backward (PyTorch's keeps its input, only to read the
    shape of it: in a local block that would be one more full-size activation)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, int]) -> Tensor:
        ctx.kernel = kernel
        return F.avg_pool2d(x, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        n, c, h, w = grad.shape
        kh, kw = ctx.kernel
        spread = (grad / (kh * kw))[:, :, :, None, :, None].expand(n, c, h, kh, w, kw)
        return spread.reshape(n, c, h * kh, w * kw), None


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


Width = Literal["narrow", "wide"]


def _narrow(channels: int, side: int, num_classes: int) -> list[nn.Module]:
    quarter = math.ceil(side / 4)
    size = min(2, quarter)
    return [
        AveragePool(quarter),
        *_conv_layers(channels, channels, 3),
        AveragePool(size),
        nn.Flatten(),
        *_linear_layers(channels * size * size, 4 * channels, 2),
        nn.Linear(4 * channels, num_classes),
    ]


def _wide(channels: int, side: int, num_classes: int) -> list[nn.Module]:
    return [
        AveragePool(min(8, side)),
        *_conv_layers(channels, 128, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *_linear_layers(128, 512, 3),
        nn.Linear(512, num_classes),
    ]


_WIDTHS = {"narrow": _narrow, "wide": _wide}


def dgl_head(features: Size, num_classes: int, width: Width) -> nn.Sequential:
    """The classifier of DGL (Belilovsky et al., "Decoupled Greedy Learning of CNNs", ICML 2020).

    Args:
        features: the shape of what it takes: (N, C, H, W); (N, D), which is taken as a map of one pixel; or tokens
            (N, T, C), whose head is layer normalisation and one linear layer on the class token, as in MAN++ for
            vision transformers, whatever the width.
        num_classes: of the logits (N, num_classes) it gives.
        width: ``"narrow"`` as in DGL: average pool to a quarter of the side, three 1x1 conv-BN-ReLU of C, average pool
            to 2x2, two linear-BN-ReLU of 4C, linear. ``"wide"`` as the host of MAN++: average pool to 8x8, three 1x1
            conv-BN-ReLU of 128, global average pool, three linear-BN-ReLU of 512, linear. Pooling never enlarges.

    Raises:
        ValueError: the width is unknown, or the features have not 2 to 4 dimensions.
    """
    if width not in _WIDTHS:
        raise ValueError(f"the width of the DGL head has to be one of {', '.join(_WIDTHS)}, and is {width!r}")
    require("the DGL head", features)
    if len(features) == 3:
        return linear_head(features, num_classes)
    side = min(features[2:], default=1)
    layers = _WIDTHS[width](features[1], side, num_classes)
    head = nn.Sequential(*([] if len(features) == 4 else [VectorMap()]), *layers)
    init_weights(head)
    return head
