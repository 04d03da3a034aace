"""InfoPro: Wang et al., "Revisiting Locally Supervised Learning: an Alternative to End-to-end Training", ICLR 2021.

A block's loss keeps information about the input, by reconstruction, while it learns the classes::

    L_j = a_j BCE(decoder_j(x_j), image) + b_j loss(head_j(x_j), target)

with cross-entropy or the supervised contrastive loss, and weights that move linearly over the blocks. The paper's
splits of equal memory are those of ``TrainerConfig(blocks=K, balance="memory")``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Size, Tensor, nn

from manpp_kernels.local.auxiliary import Auxiliary, Site
from manpp_kernels.local.decoder import Decoder
from manpp_kernels.local.features import to_vector
from manpp_kernels.local.losses import supervised_contrastive
from manpp_kernels.local.options import check_choices, check_finite, check_positive, check_weight
from manpp_kernels.local.rules import Rule, register
from manpp_kernels.local.targets import Criterion, ignored_label
from manpp_kernels.models.cifar_resnet import init_weights

Weight = float | tuple[float, float]

EMBEDDING = 128  # the width of the head's hidden layer, and of what the contrastive loss compares


@dataclass(frozen=True)
class InfoProOptions:
    """Options of InfoPro.

    Attributes:
        loss: of the head, ``"cross-entropy"`` (the trainer's criterion) or ``"contrastive"`` (supervised contrastive).
        temperature: of the contrastive loss.
        decoder_weight: a of the first block and of the last that has a decoder, linear in between; or one for all.
        classifier_weight: b, likewise.
        mean, std: what the images were normalised with, a number for each channel; none for images in [0, 1].
    """

    loss: Literal["cross-entropy", "contrastive"] = "cross-entropy"
    temperature: float = 0.07
    decoder_weight: Weight = (5.0, 0.2)
    classifier_weight: Weight = (0.05, 0.5)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive("temperature", self.temperature)
        for name in ("decoder_weight", "classifier_weight"):
            object.__setattr__(self, name, _weight(name, getattr(self, name)))
        for name, check in (("mean", check_finite), ("std", check_positive)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _by_channel(name, getattr(self, name), check))


def _weight(name: str, value: Any) -> Weight:
    """A number, or two as a tuple (configuration files give lists)."""
    ends = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(ends) != 2:
        raise ValueError(f"{name} has to be a number from 0 on, or those of the first and the last block: {value!r}")
    for weight in ends:
        check_weight(name, weight)
    return ends if isinstance(value, list | tuple) else value


def _by_channel(name: str, values: Any, check: Callable[[str, Any], None]) -> tuple[float, ...]:
    """Numbers as a tuple, each checked; configuration files give lists, and who computes them may have a tensor."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} has to be a sequence of numbers, one for each channel, and is {values!r}")
    numbers = tuple(values)
    for value in numbers:
        check(name, value)
    return numbers


def weight_at(weight: Weight, index: int, count: int) -> float:
    """The weight of block ``index`` of the ``count - 1`` that have an auxiliary network."""
    first, last = weight if isinstance(weight, tuple) else (weight, weight)
    return first + (last - first) * index / (count - 2) if count > 2 else first


def infopro_head(features: Size, outputs: int) -> nn.Sequential:
    """InfoPro's classifier "1c2f": one convolution and two linear layers.

    3x3 convolution, batch normalisation, ReLU, global average pool, linear to 128, ReLU, linear. The convolution
    doubles C below 64 channels, to 64 at most, and halves the side; from 64 on it keeps both, with 512 channels at
    most. Tokens and vectors have no convolution: the class token (or the mean) is normalised and goes to the linear
    layers.

    Args:
        features: the shape of what it takes.
        outputs: of the last layer, (N, outputs).
    """
    what = "InfoPro's classifier"
    convolution: list[nn.Module] = []
    if len(features) == 4:
        channels = features[1]
        width, stride = (min(2 * channels, 64), 2) if channels < 64 else (min(channels, 512), 1)
        convolution = [
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        features = Size((features[0], width, 1, 1))
    pooling, width = to_vector(what, features)
    head = nn.Sequential(
        *convolution, *pooling, nn.Linear(width, EMBEDDING), nn.ReLU(inplace=True), nn.Linear(EMBEDDING, outputs)
    )
    init_weights(head)
    return head


class InfoProAuxiliary(Auxiliary):
    """A decoder and a classifier on the same features."""

    def __init__(
        self, head: nn.Module, criterion: Criterion, decoder: Decoder, decoder_weight: float, classifier_weight: float
    ) -> None:
        super().__init__()
        self.head = head
        self.decoder = decoder
        self.criterion = criterion
        self.decoder_weight = decoder_weight
        self.classifier_weight = classifier_weight

    def forward(self, features: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        classification = self.criterion(self.head(features), targets)
        return self.decoder_weight * self.decoder(features, images) + self.classifier_weight * classification


@register("infopro")
class InfoPro(Rule):
    """A decoder and a classifier behind every block."""

    Options = InfoProOptions
    # The published runs of MAN and MAN++ on CIFAR-10 with ResNet-32, K = 16.
    host_defaults: ClassVar[Mapping[str, Any]] = {"decoder_weight": (5.0, 0.0), "classifier_weight": (0.5, 0.0)}

    def auxiliary(self, site: Site) -> Auxiliary:
        o = self.options
        criterion, outputs = site.criterion, site.num_classes
        if o.loss == "contrastive":
            ignored = ignored_label(site.criterion)
            criterion = functools.partial(supervised_contrastive, temperature=o.temperature, ignored=ignored)
            outputs = EMBEDDING
        return InfoProAuxiliary(
            infopro_head(site.features, outputs),
            criterion,
            Decoder(site.features, site.partition.input_shape, o.mean, o.std),
            weight_at(o.decoder_weight, site.index, site.count),
            weight_at(o.classifier_weight, site.index, site.count),
        )
