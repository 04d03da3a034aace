"""Models taken apart, and divided into local blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from manpp_kernels.local import Parts, adapt, measure_step_memory, partition
from manpp_kernels.local.partition import Segment, _block_bytes, _minimax
from manpp_kernels.local.parts import reset_parameters
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
            ends = _minimax([list(itertools.accumulate(weights[a:])) for a in range(n)], count)
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


def test_sequential() -> None:
    parts = partition(mlp(), example=(3, 4, 4))
    assert parts.names() == [["stem"], ["3"], ["5"]]
    parts = partition(convnet(), example=torch.randn(4, 3, 8, 8))
    assert parts.names() == [["stem"], ["4"], ["8"]]
    assert [type(m).__name__ for m in parts.parts.head] == ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    with pytest.raises(ValueError, match="has 1 layers with parameters"):
        partition(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), example=(3, 4, 4))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, num_classes=5)
    parts = partition(model, ["layer2.1", "layer3.1"], example=(3, 32, 32))
    assert parts.segments[1].name == "layer1.0"
    assert len(parts.segments) == {"resnet18": 9}.get(name, 17)


def test_a_model_of_ones_own() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            for b in self.b:
                x = b(x)
            return self.c(x)

    with pytest.raises(TypeError, match="no adapter for Mine; register a function"):
        partition(Mine(), example=(4,))

    @adapt.register(Mine)
    def _(model: Mine) -> Parts:
        return Parts(model.a, {f"b.{i}": m for i, m in enumerate(model.b)}, model.c)

    assert partition(Mine(), example=torch.randn(3, 4)).names() == [["stem"], ["b.0"], ["b.1"]]

    class Different(Mine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    with pytest.raises(ValueError, match="do not give what the model itself gives"):
        partition(Different(), example=(4,))

    class Faint(Different):
        def __init__(self) -> None:
            super().__init__()
            nn.init.constant_(self.c.weight, 1e-9)  # outputs that are alike, whatever the image, as of a deep network
            nn.init.zeros_(self.c.bias)

    with pytest.raises(ValueError, match="do not give what the model itself gives"):
        partition(Faint(), example=(4,))

    class Rounded(Faint):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (0.5 + 1e-6)

    partition(Rounded(), example=(4,))

    class Extra(Mine):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.Linear(4, 4)

    with pytest.raises(ValueError, match=r"leaves out the parameter d\.weight"):
        partition(Extra(), example=(4,))

    class Tied(Mine):
        def __init__(self) -> None:
            super().__init__()
            self.b[1].weight = self.b[0].weight

    with pytest.raises(ValueError, match=r"b\.0 and b\.1 share a parameter"):
        partition(Tied(), example=(4,))


class Pooled(nn.Module):
    """Maps to vectors, with or without a dropout of its own."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x.mean((2, 3)), self.p, self.training)


class Row(nn.Module):
    """A network whose ``forward`` pools and drops out without modules, as many do."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        self.a, self.c = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.b = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        for b in self.b:
            x = b(x)
        return self.c(nn.functional.dropout(x.mean((2, 3)), self.p, self.training))

    def parts(self, stem: nn.Module | None = None, pool: nn.Module | None = None) -> Parts:
        units = {f"b.{i}": unit for i, unit in enumerate(self.b)}
        return Parts(stem or self.a, units, nn.Sequential(pool or Pooled(self.p), self.c))


def test_what_only_training_mode_shows_is_not_lost() -> None:
    @adapt.register(Row)
    def _(model: Row) -> Parts:
        return model.parts()

    class Forgotten(Row):
        pass

    @adapt.register(Forgotten)
    def _(model: Forgotten) -> Parts:
        return model.parts(pool=Pooled())

    model = Row().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    partition(model, example=(3, 8, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"Forgotten.*in training mode; .*F\.dropout"):
        partition(Forgotten(), example=(3, 8, 8))
    partition(Forgotten(0.0), example=(3, 8, 8))

    class Supervised(Forgotten):
        """Takes targets in training, so that there is nothing to compare with."""

        error: type[Exception]

        def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
            if self.training and targets is None:
                raise self.error("targets")
            return super().forward(x)

    for Supervised.error in (ValueError, TypeError, AssertionError):
        partition(Supervised(), example=(3, 8, 8))

    class Noisy(Forgotten):
        """Differs from one time to the next whatever the generators say."""

        times = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Noisy.times += self.training
            return super().forward(x) + Noisy.times * self.training

    partition(Noisy(0.0), example=(3, 8, 8))


class Counter(nn.Module):
    """Counts its calls in training mode, in a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return x.clone()


def test_parameters_that_a_forward_pass_moves_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counter(), nn.Linear(4, 4), nn.Linear(4, 2))
    for balance in ("count", "memory"):
        partition(model.train(), 2, example=(4,), balance=balance)
        assert model[1].calls == 0


def test_a_part_with_parameters_that_the_model_has_not() -> None:
    """A new batch normalisation is all but the identity, and would not show in what the parts give."""

    class Normalised(Row):
        pass

    @adapt.register(Normalised)
    def _(model: Normalised) -> Parts:
        return model.parts(stem=nn.Sequential(model.a, nn.BatchNorm2d(4)))

    with pytest.raises(ValueError, match=r"adds the parameter 1\.weight to stem, which the model has not"):
        partition(Normalised(), example=(3, 8, 8))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_does_not_suffice_is_no_fault_of_the_parts(error: type[Exception]) -> None:
    class Large(Row):
        pass

    class Full(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error("out of memory")

    @adapt.register(Large)
    def _(model: Large) -> Parts:
        return model.parts(pool=Full())

    with pytest.raises(error):
        partition(Large(), example=(3, 8, 8))


def test_parts_that_do_not_follow_each_other() -> None:
    class Forked(Row):
        pass

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x, None

    @adapt.register(Forked)
    def _(model: Forked) -> Parts:
        return model.parts(pool=nn.Flatten())

    with pytest.raises(ValueError, match=r"head does not take \(2, 4, 2, 2\), which the parts before it give: mat1"):
        partition(Forked(), example=(3, 8, 8))

    class Paired(Row):
        pass

    @adapt.register(Paired)
    def _(model: Paired) -> Parts:
        return model.parts(stem=nn.Sequential(model.a, Pair()))

    with pytest.raises(ValueError, match="stem returns tuple, and the next part takes one tensor"):
        partition(Paired(), example=(3, 8, 8))


def test_a_sequential_that_uses_a_module_twice() -> None:
    relu, dropout = nn.ReLU(), nn.Dropout(0.5)
    layers = [nn.Linear(48, 8), relu, dropout, nn.Linear(8, 8), relu, dropout, nn.Linear(8, 8), relu, dropout]
    parts = adapt(nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 3)))
    found = [[type(m).__name__ for m in part] for part in (parts.stem, *parts.units.values(), parts.head)]
    unit = ["Linear", "ReLU", "Dropout"]
    assert found == [["Flatten", *unit], unit, ["Linear", "ReLU"], ["Dropout", "Linear"]]


def test_balancing_by_memory_takes_units_that_begin_in_place_and_a_single_image() -> None:
    """What training takes as well; one image on 1x1 maps is too little for a batch normalisation."""

    def unit() -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *(unit() for _ in range(3)), head)
    blocks = partition(model, 2, example=torch.rand(1, 3, 8, 8), balance="memory")
    assert len(blocks) == 2
    assert all(segment.saved_bytes > 0 for segment in blocks.segments)


def test_fresh_attention_is_fresh() -> None:
    attention = nn.MultiheadAttention(8, 2)
    before = {key: value.clone() for key, value in attention.state_dict().items()}
    reset_parameters(attention)
    for key in ("in_proj_weight", "out_proj.weight"):
        assert not torch.equal(attention.state_dict()[key], before[key])
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()
