"""Halves of MAN's transform, to find out what each contributes."""

from __future__ import annotations

from torch import Tensor, nn

from manpp_kernels.local.auxiliary import EmaTransform


class LbAlone(nn.Module):
    """``LB(x)``: a trainable copy of the next unit, and no EMA."""

    def __init__(self, lb: nn.Module) -> None:
        super().__init__()
        self.lb = lb

    def forward(self, x: Tensor) -> Tensor:
        return self.lb(x)


class EmaAlone(EmaTransform):
    """``EMA(x)``: the EMA of the next unit, and no trainable copy; only the head behind it learns."""

    def __init__(self, unit: nn.Module, ema: nn.Module) -> None:
        super().__init__(unit, nn.Identity(), ema)

    def forward(self, x: Tensor) -> Tensor:
        return self.ema(x)
