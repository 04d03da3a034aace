"""The CIFAR ResNets: known sizes, initial values, shortcuts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from manpp_kernels.models import MODELS, BasicBlock, CifarResNet, resnet20, resnet32, resnet110


@pytest.mark.parametrize(("name", "convs"), [("resnet20", 19), ("resnet32", 31), ("resnet44", 43), ("resnet56", 55)])
def test_depth(name: str, convs: int) -> None:
    model = MODELS[name]()
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == convs
    assert sum(isinstance(m, BasicBlock) for m in model.modules()) == (convs - 1) // 2


def test_parameter_counts() -> None:
    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    # He et al., table 6: 0.27 M, 0.46 M and 1.7 M, with the parameter-free shortcut.
    assert count(resnet20(shortcut="A")) == 269_722
    assert count(resnet32(shortcut="A")) == 464_154
    assert count(resnet110(shortcut="A")) == 1_727_962
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count(resnet32()) == 464_154 + projections


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_shapes(shortcut: str) -> None:
    model = CifarResNet((1, 1, 1), num_classes=7, in_channels=1, shortcut=shortcut)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model(torch.randn(2, 1, 9, 13)).shape == (2, 7)
    assert model.layer3(model.layer2(torch.randn(2, 16, 8, 8))).shape == (2, 64, 2, 2)


def test_the_padded_shortcut_is_the_input_at_every_second_pixel() -> None:
    block = BasicBlock(4, 8, 2, "A")
    x = torch.randn(2, 4, 6, 6)
    y = block.downsample(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == y[:, 6:].abs().sum() == 0


def test_initial_values() -> None:
    model = resnet32()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.25)
            assert m.bias is None
        elif isinstance(m, nn.BatchNorm2d):
            assert torch.equal(m.weight, torch.ones_like(m.weight))
            assert torch.equal(m.bias, torch.zeros_like(m.bias))


def test_a_unit_leaves_its_input_alone() -> None:
    for block in (BasicBlock(4, 4), BasicBlock(4, 8, 2, "A"), BasicBlock(4, 8, 2, "B")):
        x = torch.randn(2, 4, 6, 6)
        before = x.clone()
        block(x)
        assert torch.equal(x, before)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="shortcut has to be 'A' or 'B'"):
        resnet20(shortcut="C")
    with pytest.raises(ValueError, match="1 or more units"):
        CifarResNet((1, 0, 1))
