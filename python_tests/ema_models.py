"""A model with everything an EMA can meet, and :class:`ModelEma` beside timm's on it."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from manpp_kernels import ModelEma


class Net(nn.Module):
    """Parameters, float and integer buffers, a boolean one, one that is not persistent, and a frozen parameter."""

    def __init__(self, dtype: torch.dtype = torch.cfloat) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
        self.head = nn.Linear(5, 4)
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.randn(2, dtype=dtype))
        self.register_buffer("cache", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def change(model: nn.Module, step: int) -> None:
    """What a training step does to a model, without the training."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
            if t.is_floating_point() or t.is_complex():
                t.add_(noise.to(t.dtype) * 0.1)
            elif t.dtype == torch.bool:
                t.logical_not_()
            else:
                t.add_(1)


def assert_same(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        # timm steps by lerp, this package by a sum of two products: a few roundings apart after several steps.
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)
    for x, y in zip(ours.module.buffers(), theirs.module.buffers(), strict=True):  # those not in the state_dict, too
        torch.testing.assert_close(x, y, **tolerance)


def side_by_side(model: nn.Module, **options: Any) -> tuple[ModelEma, ModelEmaV3]:
    return ModelEma(model, **options), ModelEmaV3(model, **options)
