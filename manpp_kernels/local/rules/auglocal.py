"""AugLocal: Ma et al., "Scaling Supervised Local Learning with Augmented Auxiliary Networks", ICLR 2024.

The auxiliary network of a block is a small copy of what follows: d residual blocks as wide as d layers chosen uniformly
among those behind it, then global average pooling and one linear layer, trained by the criterion. With the N layers
counted from 0 (the stem), the block's last being j::

    layers    round(j + (N - 1 - j) / d t),  t = 1 ... d;  all of those left where they are fewer than d
    depth     d_i = max(1, round(d (1 - i c / (K - 2)) + i c / (K - 2)))           i: the block, from 0 to K - 2

Depth falls along the network (the pyramid, c), as later blocks have less left to stand in for. ``round`` takes halves
to the even number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Size, nn

from manpp_kernels.local.auxiliary import Auxiliary, Classifier, Site, copy_unit
from manpp_kernels.local.features import describe, linear_head, require
from manpp_kernels.local.options import check_count, check_fraction
from manpp_kernels.local.residual import LinearBlock, residual_block
from manpp_kernels.local.rules import Rule, register
from manpp_kernels.local.segments import Segment
from manpp_kernels.models.cifar_resnet import init_weights


@dataclass(frozen=True)
class AugLocalOptions:
    """Options of AugLocal.

    Attributes:
        auxiliary_depth: d, residual blocks of the first auxiliary network. 2 in the published runs of ResNet-32, 3 to 5
            in those of ResNet-110.
        pyramid: c, how far depth falls towards 1 along the network; 0 keeps it.
    """

    auxiliary_depth: int = 2
    pyramid: float = 0.5

    def __post_init__(self) -> None:
        check_count("auxiliary_depth", self.auxiliary_depth)
        check_fraction("pyramid", self.pyramid)


def depth_at(depth: int, pyramid: float, index: int, count: int) -> int:
    """d_i of block ``index`` of ``count``."""
    fall = index * pyramid / (count - 2) if count > 2 else 0.0
    return max(1, round(depth * (1 - fall) + fall))


def chosen_layers(last: int, layers: int, depth: int) -> list[int]:
    """The layers that stand for those behind layer ``last``, of ``layers`` counted from 0."""
    left = layers - 1 - last
    if left <= depth:
        return list(range(last + 1, layers))
    return [round(last + left / depth * t) for t in range(1, depth + 1)]


def _stride(side: int, wanted: int) -> int:
    """2 while the side is not yet that of the layer: where a block leaves a stage out, the next one halves again."""
    return 2 if round(side / wanted) > 1 else 1


def _blocks(features: Size, chosen: Sequence[Segment], site: Site) -> tuple[list[nn.Module], Size]:
    """A block for each chosen segment, and the shape of what the last of them gives."""
    blocks: list[nn.Module] = []
    for segment in chosen:
        if len(segment.shape) != len(features):
            raise ValueError(
                f"AugLocal follows the layers behind a block, and {segment.name} gives {describe(segment.shape)} where "
                f"the block gives {describe(features)}; set a boundary where features are already of the later kind"
            )
        width = segment.shape[1]
        if len(features) == 4:
            # A ResNet's own layers double their width where they halve the side.
            stride = _stride(features[2], segment.shape[2])
            blocks.append(residual_block(features[1], width, stride, segment.module))
            features = Size((features[0], width, *(-(-side // stride) for side in features[2:])))
        elif len(features) == 3:
            if segment.shape != features or segment.writes_input:
                raise ValueError(
                    f"AugLocal copies transformer blocks that keep the shape {describe(features)} and leave their "
                    f"input as it is, and {segment.name} does not; choose other boundaries, or another rule"
                )
            blocks.append(copy_unit(segment.module, "fresh", site.partition.parts.init, trainable=True))
        else:
            block = LinearBlock(features[1], width)
            init_weights(block)
            blocks.append(block)
            features = Size((features[0], width))
    return blocks, features


@register("auglocal")
class AugLocal(Rule):
    """A short network of the same kind as the layers that follow, behind every block."""

    Options = AugLocalOptions

    def auxiliary(self, site: Site) -> Auxiliary:
        require("AugLocal's auxiliary network", site.features)
        segments = site.partition.segments
        last = site.partition.blocks[site.index][-1]
        depth = depth_at(self.options.auxiliary_depth, self.options.pyramid, site.index, site.count)
        chosen = [segments[i] for i in chosen_layers(last, len(segments), depth)]
        blocks, features = _blocks(site.features, chosen, site)
        head = linear_head(features, site.num_classes, "AugLocal's linear layer")
        if len(blocks) == 1 and len(features) != 3:
            norm = nn.BatchNorm1d(features[1])
            init_weights(norm)
            head = nn.Sequential(*head[:-1], norm, head[-1])
        return Classifier(nn.Sequential(*blocks, head), site.criterion)
