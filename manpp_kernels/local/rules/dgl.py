"""DGL: Belilovsky, Eickenberg and Oyallon, "Decoupled Greedy Learning of CNNs", ICML 2020.

Every block but the last has a small classifier of its own and trains by its cross-entropy::

    L_j = criterion(head_j(x_j), target)

Where the model classifies every pixel (semantic segmentation), so does every head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from manpp_kernels.local.auxiliary import Auxiliary, Classifier, PixelClassifier, Site
from manpp_kernels.local.heads import Width, dgl_head, pixel_head
from manpp_kernels.local.options import check_choices
from manpp_kernels.local.rules import Rule, register


@dataclass(frozen=True)
class DglOptions:
    """Options of DGL.

    Attributes:
        width: of the local head, ``"narrow"`` as in DGL, ``"wide"`` as the host of MAN++, or ``"linear"``, pooling
            and one linear layer; see :func:`manpp_kernels.local.heads.dgl_head`, and for a model that classifies pixels
            :func:`manpp_kernels.local.heads.pixel_head`.
    """

    width: Width = "narrow"

    def __post_init__(self) -> None:
        check_choices(self)


@register("dgl")
class Dgl(Rule):
    """A local classifier behind every block."""

    Options = DglOptions
    host_defaults: ClassVar[Mapping[str, Any]] = {"width": "wide"}

    any_outputs = True

    def auxiliary(self, site: Site) -> Auxiliary:
        partition, width = site.partition, self.options.width
        if partition.parts.local_head is not None:
            return Classifier(partition.parts.local_head(site.features, partition.input_shape, width), site.criterion)
        if partition.of_pixels:
            return PixelClassifier(pixel_head(site.features, site.num_classes, width), site.criterion)
        return Classifier(dgl_head(site.features, site.num_classes, width), site.criterion)
