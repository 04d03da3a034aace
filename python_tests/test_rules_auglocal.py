"""AugLocal against a second implementation; the layers it chooses, its sizes and errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from naive_local import batch_norm, below, cross_entropy, unit
from naive_rules import NaiveRule, assert_steps_agree, auxiliary_sizes, make_pair

from manpp_kernels.local import make_rule
from manpp_kernels.local.rules.auglocal import chosen_layers, depth_at
from manpp_kernels.models import CifarResNet, resnet32, resnet110
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


class NaiveAugLocal(NaiveRule):
    """Five layers, c = 0.5: with d = 2 all but the fourth block have two residual blocks; that has one layer left."""

    deepest = 2

    def auxiliary_loss(self, j, x, targets, a):
        depth = self.deepest if j < 3 else 1
        for t in range(depth):
            x = unit(x, below(a, f"head.{t}"))
        x = x.mean((2, 3))
        p = below(a, f"head.{depth}")
        if depth == 1:
            x = batch_norm(x, p["2.weight"], p["2.bias"])
        return cross_entropy(x @ p[f"{4 - depth}.weight"].T + p[f"{4 - depth}.bias"], targets)


class NaiveShallow(NaiveAugLocal):
    """d = 1: one residual block as wide as the last layer, with stride 2 from whichever stage."""

    deepest = 1


@pytest.mark.parametrize("order", ["published", "unlocked"])
def test_a_step_equals_the_naive_implementation(order: str) -> None:
    trainer, naive = make_pair(NaiveAugLocal, TrainerConfig(rule="auglocal", order=order))
    assert_steps_agree(trainer, naive)


def test_one_block_halves_the_side_once() -> None:
    config = TrainerConfig(rule="auglocal", rule_options={"auxiliary_depth": 1})
    assert_steps_agree(*make_pair(NaiveShallow, config))


def test_a_stage_that_is_left_out_is_halved_by_the_next_block() -> None:
    """From 16x16: 4x4 is what the chosen layers 3 and 6 have, both in the last stage."""
    model = CifarResNet((1, 1, 4), num_classes=4, widths=(4, 8, 16))
    config = TrainerConfig(rule="auglocal", blocks=["stem"], rule_options={"pyramid": 0.0})
    auxiliary = LocalTrainer(model, config, example=(3, 16, 16)).network.blocks[0].auxiliary
    assert auxiliary is not None
    blocks = [block for block in auxiliary.head if hasattr(block, "conv1")]
    assert [(block.conv1.out_channels, *block.conv1.stride) for block in blocks] == [(16, 2, 2), (16, 2, 2)]


def test_the_layers_that_are_chosen() -> None:
    assert [chosen_layers(j, 16, 2) for j in (0, 1, 5, 12, 13, 14)] == [
        [8, 15],
        [8, 15],
        [10, 15],
        [14, 15],
        [14, 15],
        [15],
    ]
    assert chosen_layers(0, 55, 4) == [14, 27, 40, 54]
    assert [depth_at(5, 0.5, i, 55) for i in (0, 26, 53)] == [5, 4, 3]
    assert {depth_at(2, 0.5, i, 16) for i in range(15)} == {2}
    assert depth_at(3, 1.0, 0, 2) == 3


def block_size(before: int, after: int) -> int:
    """Two 3x3 convolutions with their batch normalisations, and the 1x1 shortcut where the width changes."""
    shortcut = before * after + 2 * after if before != after else 0
    return 9 * before * after + 9 * after * after + 4 * after + shortcut


def size(*widths: int) -> int:
    """Blocks of these widths, from the first, and a linear layer of 64; a batch normalisation where there is one."""
    blocks = sum(block_size(a, b) for a, b in itertools.pairwise(widths))
    return blocks + 64 * 10 + 10 + (2 * 64 if len(widths) == 2 else 0)


def test_sizes_of_resnet32_with_16_blocks() -> None:
    # By block: the two widths chosen. Layers 1 to 5 have 16 channels, 6 to 10 have 32, 11 to 15 have 64.
    expected = [size(16, 32, 64)] * 6 + [size(32, 64, 64)] * 5 + [size(64, 64, 64)] * 3 + [size(64, 64)]
    # Behind layer 5 lies 10; behind 6, round(10.5) = 10; behind 7, 11.
    expected[6] = size(32, 32, 64)
    assert [size(16, 32, 64), size(32, 32, 64), size(32, 64, 64), size(64, 64, 64), size(64, 64)] == [
        72906,
        76938,
        132362,
        148618,
        74762,
    ]
    assert auxiliary_sizes("auglocal", None, resnet32()) == expected


def test_sizes_of_resnet110_with_55_blocks() -> None:
    """d = 3, c = 0.5: three residual blocks up to block 26, two behind it, one for the last."""
    width = [16] * 19 + [32] * 18 + [64] * 18
    expected = []
    for j in range(54):
        depth = 3 if j <= 26 else 2
        left = 54 - j
        at = (
            [j + 1 + t for t in range(left)]
            if left <= depth
            else [round(j + left / depth * t) for t in range(1, depth + 1)]
        )
        expected.append(size(width[j], *(width[i] for i in at)))
    assert expected[0] == size(16, 16, 32, 64) == 77578
    assert expected[26] == size(32, 32, 64, 64) == 150922
    assert expected[53] == size(64, 64) == 74762
    assert auxiliary_sizes("auglocal", {"auxiliary_depth": 3}, resnet110()) == expected


@pytest.mark.parametrize("pyramid", [0.0, 1.0])
def test_how_far_depth_falls(pyramid: float) -> None:
    options = {"auxiliary_depth": 4, "pyramid": pyramid}
    trainer = LocalTrainer(resnet32(), TrainerConfig(rule="auglocal", rule_options=options), example=(3, 16, 16))
    depths = [len(block.auxiliary.head) - 1 for block in trainer.network if block.auxiliary is not None]
    falling = [4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1]  # round(4 - 3 i / 14), and as many as are left
    assert depths == (falling if pyramid else [4] * 12 + [3, 2, 1])


def test_a_network_of_bottlenecks_has_bottlenecks() -> None:
    resnet = pytest.importorskip("torchvision.models.resnet")
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)
    trainer = LocalTrainer(model, TrainerConfig(rule="auglocal", blocks=["stem", "layer2.0"]), example=(3, 32, 32))
    first, second, _ = trainer.network.blocks[0].auxiliary.head
    # From the stem's 64 channels at 8x8: layers 2 (512 channels at 4x4) and 4 (2048 at 1x1).
    assert first.conv3.weight.shape == (512, 128, 1, 1)
    assert (first.conv2.stride, second.conv2.stride) == ((2, 2), (2, 2))
    assert len(trainer.step((torch.rand(4, 3, 32, 32), torch.arange(4))).losses) == 3


def test_images_that_are_not_square_have_the_same_strides() -> None:
    def strides(side: int) -> list[tuple[int, ...]]:
        trainer = LocalTrainer(resnet32(), TrainerConfig(rule="auglocal"), example=(3, 16, side))
        parts = (m for block in trainer.network if block.auxiliary is not None for m in block.auxiliary.modules())
        return [m.stride for m in parts if isinstance(m, torch.nn.Conv2d)]

    assert strides(48) == strides(16)


def test_vectors_as_features() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 7), torch.nn.Linear(7, 4))
    trainer = LocalTrainer(model, TrainerConfig(rule="auglocal"), example=torch.randn(2, 6))
    assert len(trainer.step((torch.randn(8, 6), torch.randint(0, 4, (8,)))).losses) == 2


def test_wrong_options_and_features() -> None:
    with pytest.raises(ValueError, match="auxiliary_depth has to be 1 or more"):
        make_rule("auglocal", {"auxiliary_depth": 0})
    with pytest.raises(ValueError, match=r"pyramid has to lie in \[0, 1\]"):
        make_rule("auglocal", {"pyramid": 2.0})
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 8)),
        torch.nn.Linear(8, 5),
    )
    with pytest.raises(ValueError, match=r"1 gives \(N, 8\) where the block gives \(N, 4, 6, 6\)"):
        LocalTrainer(model, TrainerConfig(rule="auglocal"), example=(3, 8, 8))
