"""``EmaPlan``: the tables of a launch of ``ema_scale_update``, built once and used every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manpp_kernels.ops import _checks
from manpp_kernels.ops import ema_scale_update as op


class EmaPlan:
    """An EMA update of fixed lists of tensors, prepared once.

    Args:
        ema, params, bias, groups, total, rounding: as for :func:`manpp_kernels.ema_scale_update`. The plan keeps
            references to the tensors; ``bias`` asks for effective weights, whose scale comes with every update.
    """

    def __init__(
        self,
        ema: Tensor | Sequence[Tensor],
        params: Tensor | Sequence[Tensor],
        *,
        bias: Tensor | Sequence[Tensor] | None = None,
        groups: Sequence[int] | None = None,
        total: float = 2.0,
        rounding: op.Rounding = "nearest",
    ) -> None:
        self.ema, self.params = _checks.as_list("ema", ema), _checks.as_list("params", params)
        self.bias = None if bias is None else _checks.as_list("bias", bias)
        self.groups, self.total, self.rounding = groups, total, rounding

    @torch.no_grad()
    def update(self, momentum: float | Tensor, scale: Tensor | None = None) -> list[Tensor] | None:
        """One step of the EMA, and with ``bias`` the effective weights, differentiable in scale and bias."""
        with torch.set_grad_enabled(self.bias is not None):
            return op.ema_scale_update(
                self.ema,
                self.params,
                momentum,
                scale=scale,
                bias=self.bias,
                groups=self.groups,
                total=self.total,
                rounding=self.rounding,
            )  # type: ignore[call-overload]
