"""Models taken apart, and divided into local blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from manpp_kernels.local import measure_step_memory, partition
from manpp_kernels.local.partition import _block_bytes, minimax
from manpp_kernels.local.segments import Segment
from manpp_kernels.models import CifarResNet, resnet20, resnet32, resnet110
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(48, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def convnet() -> nn.Sequential:
    def layers(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True), nn.MaxPool2d(2)]

    return nn.Sequential(
        *layers(3, 4), *layers(4, 6), *layers(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def test_resnet32_k16_is_the_stem_alone_and_then_each_unit_alone() -> None:
    parts = partition(resnet32(), 16, example=(3, 32, 32))
    names = parts.names()
    assert names[0] == ["stem"]
    assert names[1:] == [[f"layer{s}.{u}"] for s in (1, 2, 3) for u in range(5)]
    assert [tuple(s.shape[1:]) for s in parts.segments][::5] == [
        (16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)
    ]  # fmt: skip
    assert parts.output_shape[1:] == (10,)


def test_resnet110_has_55() -> None:
    parts = partition(resnet110(), example=(3, 8, 8))
    assert len(parts) == 55
    assert all(len(names) == 1 for names in parts.names())


@pytest.mark.parametrize("count", range(1, 17))
def test_a_count_is_distributed_evenly(count: int) -> None:
    parts = partition(resnet32(), count, example=(3, 8, 8))
    sizes = [len(block) for block in parts.blocks]
    assert len(sizes) == count
    assert sum(sizes) == 16
    assert sizes == sorted(sizes)
    assert max(sizes) - min(sizes) <= 1
    assert list(itertools.chain.from_iterable(parts.blocks)) == list(range(16))
    assert partition(resnet32(), np.int64(count), example=(3, 8, 8)).blocks == parts.blocks


def test_boundaries() -> None:
    model = CifarResNet((1, 1, 1))
    expected = [["stem", "layer1.0"], ["layer2.0"], ["layer3.0"]]
    assert partition(model, ["layer1.0", "layer2.0"], example=(3, 8, 8)).names() == expected
    assert partition(model, [1, 2], example=(3, 8, 8)).names() == expected
    assert partition(model, [], example=(3, 8, 8)).names() == [["stem", "layer1.0", "layer2.0", "layer3.0"]]


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (0, ValueError, "blocks is 0, and CifarResNet can be divided into 1 to 4"),
        (5, ValueError, "blocks is 5"),
        (True, TypeError, "a number or a sequence"),
        ("layer1.0", TypeError, "a number or a sequence"),
        (["layer9.0"], ValueError, "'layer9.0' is no unit of this model; there are stem, layer1.0"),
        (["layer3.0"], ValueError, "leaves a block empty"),
        ([3], ValueError, "leaves a block empty"),
        ([-1], ValueError, "leaves a block empty"),
        (["layer2.0", "layer1.0"], ValueError, "have to ascend"),
        ([1, 1], ValueError, "have to ascend"),
        ([1.5], TypeError, "the name of a unit or its place"),
    ],
)
def test_wrong_blocks(blocks: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        partition(CifarResNet((1, 1, 1)), blocks, example=(3, 8, 8))


def test_unknown_balance_and_example() -> None:
    with pytest.raises(ValueError, match="balance has to be one of count, memory"):
        partition(resnet20(), 2, example=(3, 8, 8), balance="time")
    with pytest.raises(TypeError, match="example has to be"):
        partition(resnet20(), 2, example="digits")


def test_balanced_by_memory() -> None:
    model = resnet32()
    by_memory = partition(model, 4, example=(3, 32, 32), balance="memory")
    by_count = partition(model, 4, example=(3, 32, 32))

    def most(parts) -> int:
        return max(sum(by_memory.segments[i].saved_bytes for i in block) for block in parts.blocks)

    assert all(s.saved_bytes > 0 for s in by_memory.segments)
    assert most(by_memory) < most(by_count)
    assert len(by_memory.blocks[0]) < len(by_memory.blocks[-1])  # early activations are larger


def test_balancing_by_memory_knows_what_recomputed_units_keep() -> None:
    """The measured peak of the chosen blocks is the least of all partitions, or next to it: heads are not balanced."""
    images = torch.rand(2, 3, 16, 16)

    def peak(blocks, **config) -> int:
        config = TrainerConfig(rule="dgl", rule_options={"width": "linear"}, blocks=blocks, recompute=True, **config)
        trainer = LocalTrainer(resnet20(), config, example=(3, 16, 16))
        return measure_step_memory(trainer, (images, torch.tensor([0, 1]))).saved_peak

    best = min(peak(list(cuts)) for cuts in itertools.combinations(range(9), 2))
    assert peak(3, balance="memory") <= 1.02 * best


def test_what_a_block_of_recomputed_units_keeps() -> None:
    """By hand: the stem all it saves, a unit its input; and while a unit runs once more, what it saves itself."""
    outputs, saved = ((2, 5), (2, 3), (2, 2)), (100, 40, 60)
    segments = [Segment("", nn.Identity(), torch.Size(y), n, False) for y, n in zip(outputs, saved, strict=True)]
    assert _block_bytes(segments, False, 4) == [[100, 140, 200], [40, 100], [60]]
    assert _block_bytes(segments, True, 4) == [[100, 140, 100 + 4 * 5 + 60], [40, 4 * 5 + 60], [60]]


def test_minimax_is_the_best_of_all_partitions() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 8):
        weights = torch.randint(1, 20, (n,), generator=generator).tolist()
        for count in range(1, n + 1):
            best = min(
                max(sum(weights[a:b]) for a, b in itertools.pairwise([0, *cuts, n]))
                for cuts in itertools.combinations(range(1, n), count - 1)
            )
            ends = minimax([list(itertools.accumulate(weights[a:])) for a in range(n)], count)
            assert len(ends) == count
            assert max(sum(weights[a:b]) for a, b in itertools.pairwise([0, *ends])) == best


def test_measuring_changes_nothing() -> None:
    model = CifarResNet((1, 1, 1)).train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    partition(model, 2, example=(3, 8, 8), balance="memory")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_measuring_a_stem_that_begins_in_place() -> None:
    class Normalise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sub_(0.5).mul_(2 if self.training else 4)

    example = torch.rand(4, 4)
    before = example.clone()
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    for balance in ("count", "memory"):
        parts = partition(nn.Sequential(Normalise(), *layers), 2, example=example, balance=balance)
        assert [segment.writes_input for segment in parts.segments] == [True, False]
    assert torch.equal(example, before)


def test_measuring_dropouts_draws_no_random_numbers() -> None:
    units = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)]
    model = nn.Sequential(*units, nn.Linear(4, 2))
    random = torch.get_rng_state()
    partition(model, 2, example=(4,), balance="memory")
    assert torch.equal(torch.get_rng_state(), random)


def test_balancing_by_memory_takes_units_that_begin_in_place_and_a_single_image() -> None:
    """What training takes as well; one image on 1x1 maps is too little for a batch normalisation."""

    def unit() -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *(unit() for _ in range(3)), head)
    blocks = partition(model, 2, example=torch.rand(1, 3, 8, 8), balance="memory")
    assert len(blocks) == 2
    assert all(segment.saved_bytes > 0 for segment in blocks.segments)
