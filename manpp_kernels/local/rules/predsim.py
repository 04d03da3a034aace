"""PredSim: Nøkland and Eidnes, "Training Neural Networks with Local Error Signals", ICML 2019.

A block learns to predict the classes by one linear layer, and to make images of a class similar::

    S(v)_ik = cosine of v_i - mean(v_i) and v_k - mean(v_k)                 (N x N)
    L_j = w mean (S(std(conv_j(x_j))) - S(onehot(target)))^2 + (1 - w) criterion(linear_j(pool(x_j)), target)

where std is taken over space, for each image and channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Size, Tensor, nn

from manpp_kernels.local.auxiliary import Auxiliary, Site
from manpp_kernels.local.features import linear_head, require
from manpp_kernels.local.losses import similarity_matching
from manpp_kernels.local.options import check_count, check_fraction
from manpp_kernels.local.rules import Rule, register
from manpp_kernels.local.targets import Criterion, ignored_label
from manpp_kernels.models.cifar_resnet import init_weights


@dataclass(frozen=True)
class PredSimOptions:
    """Options of PredSim.

    Attributes:
        similarity_weight: w, of the similarity matching; the prediction has 1 - w.
        linear_inputs: maps are averaged until one has this many values or fewer. 2048 in the paper, 1024 in later
            comparisons.
    """

    similarity_weight: float = 0.99
    linear_inputs: int = 1024

    def __post_init__(self) -> None:
        check_fraction("similarity_weight", self.similarity_weight)
        check_count("linear_inputs", self.linear_inputs)


def pooled_size(channels: int, height: int, width: int, limit: int) -> tuple[int, int]:
    """The size at which a map of ``channels`` has at most ``limit`` values, by halving the longer side (height first).

    A single pixel is not made smaller, whatever its channels.
    """
    while channels * height * width > limit and max(height, width) > 1:
        if height >= width:
            height = -(-height // 2)
        else:
            width = -(-width // 2)
    return height, width


def prediction_head(features: Size, num_classes: int, limit: int) -> nn.Sequential:
    """Average pooling and one linear layer to logits; on tokens the layer takes the class token or the mean."""
    if len(features) != 4:
        return linear_head(features, num_classes)
    height, width = pooled_size(features[1], features[2], features[3], limit)
    pool = nn.Identity() if (height, width) == features[2:] else nn.AdaptiveAvgPool2d((height, width))
    head = nn.Sequential(pool, nn.Flatten(), nn.Linear(features[1] * height * width, num_classes))
    init_weights(head)
    return head


class Similarity(nn.Module):
    """A vector for each image whose similarities are matched: a projection, and its standard deviation over space.

    Maps are projected by a 3x3 convolution, tokens and vectors by a linear layer, each without bias and as wide as the
    features. Vectors, and maps of one pixel, have no space: the projection itself is compared.
    """

    def __init__(self, features: Size) -> None:
        super().__init__()
        self.project: nn.Module
        if len(features) == 4:
            self.project, places = (
                nn.Conv2d(features[1], features[1], 3, padding=1, bias=False),
                math.prod(features[2:]),
            )
        else:
            self.project = nn.Linear(features[-1], features[-1], bias=False)
            places = math.prod(features[1:-1])
        self.space = (2, 3) if len(features) == 4 else (1,)
        self.spread = places > 1
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        return y.std(self.space) if self.spread else y.flatten(1)


class PredSimAuxiliary(Auxiliary):
    """A linear prediction and a projection whose similarities are matched with those of the labels."""

    def __init__(
        self, head: nn.Module, similarity: nn.Module, criterion: Criterion, weight: float, classes: int
    ) -> None:
        super().__init__()
        self.head = head
        self.similarity = similarity
        self.criterion = criterion
        self.weight = weight
        self.classes, self.ignored = classes, ignored_label(criterion)

    def forward(self, features: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        matching = similarity_matching(self.similarity(features), targets, self.classes, self.ignored)
        return self.weight * matching + (1 - self.weight) * self.criterion(self.head(features), targets)


@register("predsim")
class PredSim(Rule):
    """A linear classifier and similarity matching behind every block."""

    Options = PredSimOptions

    def auxiliary(self, site: Site) -> Auxiliary:
        require("PredSim's linear layer", site.features)
        return PredSimAuxiliary(
            prediction_head(site.features, site.num_classes, self.options.linear_inputs),
            Similarity(site.features),
            site.criterion,
            self.options.similarity_weight,
            site.num_classes,
        )
