"""MLAAN: Zhang et al., "MLAAN: Scaling Supervised Local Learning with Multilaminar Leap Augmented Auxiliary Network",
arXiv 2406.16633.

Every block is trained on two paths, by two losses::

    independent   x_i = b_i(sg(x_{i-1})),               linear_i(pool(x_i))
    cascaded      v_i = b_i(b_{i-1}(sg(z_{i-2}))),      linear'_i(pool(LAM_i(v_i)))
    L_i = w_ind criterion(independent) + w_cas criterion(cascaded)

The cascaded module i is two blocks in a row, so that it shares a block with each of its neighbours, and a block learns
from the one behind it. z is the path's own features, cut from the graph: it starts as the output of block 0, and
z_i = sg(b_i(z_{i-1})). The modules of the first two blocks begin where the path does, and have one block.

LAM, the leap augmented module, is made of units from far later in the network: of the first, u, the trainable copy and
the EMA are added, LB(v) + EMA(v), as in MAN; the others are trainable copies. The last block has the network's own head
and its criterion, on the independent path.

As two losses train a block, its gradients are complete at the end of a step: the order has to be "published".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manpp_kernels.local.auxiliary import Auxiliary, Init, Site, SumTransform, copy_unit
from manpp_kernels.local.block import BlockOutput, LocalBlock
from manpp_kernels.local.features import linear_head
from manpp_kernels.local.options import check_choices, check_count, check_fraction, check_weight
from manpp_kernels.local.parts import has_parameters
from manpp_kernels.local.rules import Rule, check_units, register
from manpp_kernels.local.segments import Segment
from manpp_kernels.local.targets import Criterion


@dataclass(frozen=True)
class MlaanOptions:
    """Options of MLAAN.

    Attributes:
        independent_weight: of the loss on the independent path.
        cascaded_weight: of the loss on the cascaded path.
        leaps: units in a leap augmented module, fewer where the network ends before.
        momentum: m of the EMA.
        ema_init: the EMA starts as a ``"copy"`` of the unit it follows, or ``"fresh"`` from the initial distribution.
        lb_init: the same for the trainable copies.
    """

    independent_weight: float = 0.001
    cascaded_weight: float = 0.999
    leaps: int = 3
    momentum: float = 0.995
    ema_init: Init = "copy"
    lb_init: Init = "fresh"

    def __post_init__(self) -> None:
        check_choices(self)
        check_weight("independent_weight", self.independent_weight)
        check_weight("cascaded_weight", self.cascaded_weight)
        check_count("leaps", self.leaps)
        check_fraction("momentum", self.momentum)


def leap(site: Site, leaps: int) -> list[Segment]:
    """The units of the leap augmented module behind a block.

    They are spread evenly over what is left of the network, the last of them as near its end as their shapes allow:
    leap t goes to the unit nearest to ``last + (N - 1 - last) t / leaps`` (the later of two) that takes features of the
    shape at hand, behind the leap before.
    """
    segments, last = site.partition.segments, site.partition.blocks[site.index][-1]
    chosen: list[Segment] = []
    at, shape = last, site.features[1:]
    for t in range(1, leaps + 1):
        goal = last + (len(segments) - 1 - last) * t / leaps
        fitting = [
            i
            for i in range(at + 1, len(segments))
            if segments[i - 1].shape[1:] == shape
            and not segments[i].writes_input
            and has_parameters(segments[i].module)
        ]
        if not fitting:
            break
        at = min(fitting, key=lambda i, goal=goal: (abs(i - goal), -i))  # type: ignore[misc]
        chosen.append(segments[at])
        shape = segments[at].shape[1:]
    # Where none fits, the next unit does not either, and says why.
    return chosen or [site.next_unit]


class MlaanAuxiliary(Auxiliary):
    """A linear classifier on the independent path; a leap augmented module and another on the cascaded one."""

    def __init__(
        self,
        independent: nn.Module,
        augmented: nn.Module,
        cascaded: nn.Module,
        criterion: Criterion,
        independent_weight: float,
        cascaded_weight: float,
    ) -> None:
        super().__init__()
        self.independent = independent
        self.augmented = augmented
        self.cascaded = cascaded
        self.criterion = criterion
        self.independent_weight = independent_weight
        self.cascaded_weight = cascaded_weight

    def forward(self, features: Tensor, images: Tensor, targets: Tensor, path: Tensor | None = None) -> Tensor:
        """``path`` are the cascaded module's features; None where they are the block's own."""
        deep = self.cascaded(self.augmented(features if path is None else path))
        independent = self.criterion(self.independent(features), targets)
        return self.independent_weight * independent + self.cascaded_weight * self.criterion(deep, targets)


class Paths(NamedTuple):
    """What a block hands on: its features, and what the cascaded module of the next block takes; both detached."""

    features: Tensor
    cascade: Tensor | None


class CascadedBlock(LocalBlock):
    """A local block whose loss also reaches the block before it, through the cascaded path."""

    def __init__(
        self, body: nn.Module, auxiliary: Auxiliary | None, criterion: Criterion, before: Sequence[LocalBlock]
    ) -> None:
        super().__init__(body, auxiliary, criterion)
        self._place = len(before)
        # In a list, so that the parameters of the block before are not registered as this one's.
        self._before = [block.body for block in before[-1:]]

    def forward(self, x: Any, images: Tensor, targets: Tensor) -> BlockOutput:
        x, z = x if isinstance(x, Paths) else (x, None)
        if self.auxiliary is None:
            return super().forward(x, images, targets)
        features = self.body(x)
        if self._place < 2:
            # The path begins here: its features are the block's own. The module of block 2 begins with block 1, and
            # takes what that takes.
            handed_on = Paths(features.detach(), x if self._place == 1 else None)
            return BlockOutput(handed_on, self.auxiliary(features, images, targets), None)
        middle = self._before[0](z)
        loss = self.auxiliary(features, images, targets, self.body(middle))
        return BlockOutput(Paths(features.detach(), middle.detach()), loss, None)


@register("mlaan")
class Mlaan(Rule):
    """Independent and cascaded paths, and leap augmented modules."""

    Options = MlaanOptions
    overlapping = True

    def __init__(self, options: MlaanOptions) -> None:
        super().__init__(options)
        self.momentum = options.momentum

    def check(self, segments: int, blocks: int) -> None:
        check_units(self.name, segments)

    def auxiliary(self, site: Site) -> Auxiliary:
        o, fresh = self.options, site.partition.parts.init
        first, *others = leap(site, o.leaps)
        lb = copy_unit(first.module, o.lb_init, fresh, trainable=True)
        ema = copy_unit(first.module, o.ema_init, fresh, trainable=False)
        copies = [copy_unit(unit.module, o.lb_init, fresh, trainable=True) for unit in others]
        last = (others or [first])[-1]
        return MlaanAuxiliary(
            linear_head(site.features, site.num_classes, "MLAAN's linear layer"),
            nn.Sequential(SumTransform(first.module, lb, ema), *copies),
            linear_head(torch.Size((site.features[0], *last.shape[1:])), site.num_classes, "MLAAN's linear layer"),
            site.criterion,
            o.independent_weight,
            o.cascaded_weight,
        )

    def block(
        self, body: nn.Module, auxiliary: Auxiliary | None, criterion: Criterion, before: Sequence[LocalBlock]
    ) -> LocalBlock:
        return CascadedBlock(body, auxiliary, criterion, before)
