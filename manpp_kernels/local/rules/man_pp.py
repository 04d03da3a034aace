"""MAN++: Su et al., "MAN++: Scaling Momentum Auxiliary Network for Supervised Local Learning", arXiv 2507.16279.

As MAN, with a learnable scaling bias s, a scalar that starts at T / 2::

    activation form (published, T = 2)    y_j = s_j LB_j(x_j) + (T - s_j) EMA_j(x_j)
    parameter form                        y_j = u(x_j; s_j beta_j + (T - s_j) phi_j)

The parameter form mixes the weights of LB (beta) and EMA (phi) and runs one unit with them in place of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from manpp_kernels.local.auxiliary import ActivationTransform, EmaTransform, ParameterTransform
from manpp_kernels.local.options import check_positive
from manpp_kernels.local.rules import register
from manpp_kernels.local.rules.man import Man, ManOptions

_FORMS = {"activation": ActivationTransform, "parameter": ParameterTransform}


@dataclass(frozen=True)
class ManPlusPlusOptions(ManOptions):
    """Options of MAN++, beside those of MAN.

    Attributes:
        form: ``"activation"`` mixes the outputs of two units, ``"parameter"`` the weights of one.
        total: T, what the two coefficients sum to; s starts at T / 2. 2 as published, 1 for a convex mix.
    """

    form: Literal["activation", "parameter"] = "activation"
    total: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("total", self.total)


@register("man++")
class ManPlusPlus(Man):
    """An EMA unit and a trainable one, mixed by a learnable scale, in front of the host's local head."""

    Options = ManPlusPlusOptions

    def transform(self, unit: nn.Module, lb: nn.Module, ema: nn.Module) -> EmaTransform:
        return _FORMS[self.options.form](unit, lb, ema, self.options.total)
