"""MAN: Su et al., "Momentum Auxiliary Network for Supervised Local Learning", ECCV 2024.

Between a block and the local head of a host rule stands an EMA of the first unit u of the next block, and LB, a
trainable copy of it::

    phi_j <- m phi_j + (1 - m) theta_u
    y_j = LB_j(x_j) + EMA_j(x_j)
    L_j = host's loss on y_j

For ablations, y is one of the two alone: LB_j(x_j), without any EMA, or EMA_j(x_j), without a trainable copy.

Only parameters are averaged: the EMA's batch normalisations use batch statistics. y has the shape of u's output, and
the host's head is built for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from manpp_kernels.local.ablation import EmaAlone, LbAlone
from manpp_kernels.local.auxiliary import (
    Auxiliary,
    EmaTransform,
    Init,
    Site,
    SumTransform,
    copy_unit,
)
from manpp_kernels.local.options import check_count, check_fraction
from manpp_kernels.local.rules import Hosted, HostedOptions, register


@dataclass(frozen=True)
class ManOptions(HostedOptions):
    """Options of MAN, beside its host; those of MAN++ extend them.

    Attributes:
        momentum: m of the EMA.
        ema_init: the EMA starts as a ``"copy"`` of the unit it follows, or ``"fresh"`` from the initial distribution.
        lb_init: the same for the trainable copies.
        parts: what y is made of: ``"both"``; ``"lb"``, a trainable copy of the unit without EMA; ``"ema"``, the EMA
            without a trainable copy. One alone takes half the compute, and has no scale.
        auxiliary_depth: units in front of the host's head: the first as above, the others trainable copies of those
            that follow it. 2 in the published runs of vision transformers.
    """

    momentum: float = 0.995
    ema_init: Init = "copy"
    lb_init: Init = "fresh"
    parts: Literal["both", "lb", "ema"] = "both"
    auxiliary_depth: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("auxiliary_depth", self.auxiliary_depth)
        check_fraction("momentum", self.momentum)
        if self.auxiliary_depth > 1 and self.units != "next":
            raise ValueError("auxiliary_depth counts units from the next one on, so it goes with units='next' alone")


@register("man")
class Man(Hosted):
    """An EMA unit and a trainable one, added, in front of the host's local head."""

    Options = ManOptions

    def __init__(self, options: ManOptions) -> None:
        super().__init__(options)
        self.momentum = options.momentum

    def auxiliary(self, site: Site) -> Auxiliary:
        fresh = site.partition.parts.init
        units = site.ahead(self.options.units)
        transforms = [self._transform(unit.module, fresh) for unit in units]
        others = site.later[1 : self.options.auxiliary_depth]
        if others:
            copies = [copy_unit(unit.module, self.options.lb_init, fresh, trainable=True) for unit in others]
            transforms.append(nn.Sequential(*copies))
        return self.hosted(site, transforms, (others or units)[-1].shape)

    def _transform(self, unit: nn.Module, fresh: Callable[[nn.Module], None]) -> nn.Module:
        """From x to y, with copies of ``unit`` that are initialised by ``fresh``."""
        if self.options.parts == "ema":
            return EmaAlone(unit, copy_unit(unit, self.options.ema_init, fresh, trainable=False))
        lb = copy_unit(unit, self.options.lb_init, fresh, trainable=True)
        if self.options.parts == "lb":
            return LbAlone(lb)
        return self.transform(unit, lb, copy_unit(unit, self.options.ema_init, fresh, trainable=False))

    def transform(self, unit: nn.Module, lb: nn.Module, ema: nn.Module) -> EmaTransform:
        """How LB and EMA become y."""
        return SumTransform(unit, lb, ema)
