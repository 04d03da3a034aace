"""Auxiliary networks as they are made: their initial values, and maps that are not square."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Size, nn

from manpp_kernels.local.heads import dgl_head
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("dgl", {}),
        ("dgl", {"width": "wide"}),
        ("predsim", {}),
        ("infopro", {}),
        ("auglocal", {}),
        ("man++", {"host": "infopro"}),
        ("mlaan", {}),
    ],
    ids=str,
)
def test_convolutions_start_he_normal(rule: str, options: dict) -> None:
    """By fan out, as those of the network itself; without which a head is another one than was published."""
    model = CifarResNet((1, 1, 1), widths=(16, 32, 64))
    trainer = LocalTrainer(model, TrainerConfig(rule=rule, rule_options=options), example=(3, 16, 16))
    parts = [m for block in trainer.network if block.auxiliary is not None for m in block.auxiliary.modules()]
    for conv in (m for m in parts if isinstance(m, nn.Conv2d)):
        expected = math.sqrt(2 / (conv.out_channels * math.prod(conv.kernel_size)))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.2)
        # Uniform values of this deviation end at 1.7 times it.
        assert conv.weight.abs().max().item() > 2 * expected
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize("width", ["narrow", "wide"])
@pytest.mark.parametrize("shape", [(4, 6, 12, 4), (4, 6, 4, 12), (4, 6, 9, 16)])
def test_pooling_never_enlarges_a_map_that_is_not_square(shape: tuple[int, ...], width: str) -> None:
    sizes: list[Size] = []
    head = dgl_head(Size(shape), 5, width)
    for layer in head:
        layer.register_forward_hook(lambda _, __, y: sizes.append(y.shape))
    assert head(torch.rand(shape)).shape == (4, 5)
    side = min(shape[2:])
    first = math.ceil(side / 4) if width == "narrow" else min(8, side)
    assert sizes[0][2:] == (first, first)
