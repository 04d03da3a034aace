"""Models taken apart into stem, units and head, and what is refused."""

from __future__ import annotations

import pytest
import torch
from test_partition import convnet, mlp
from torch import nn

from manpp_kernels.local import Parts, adapt, partition
from manpp_kernels.local.parts import reset_parameters


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

    class Deep(Mine):
        def __init__(self) -> None:
            super().__init__()
            nn.init.constant_(self.c.weight, 1e-6)  # images differ by a few roundings of what the bias gives
            nn.init.ones_(self.c.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + 2**-22)

    partition(Deep(), example=(4,))

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


def test_fresh_attention_is_fresh() -> None:
    attention = nn.MultiheadAttention(8, 2)
    before = {key: value.clone() for key, value in attention.state_dict().items()}
    reset_parameters(attention)
    for key in ("in_proj_weight", "out_proj.weight"):
        assert not torch.equal(attention.state_dict()[key], before[key])
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()


class Residual(nn.Module):
    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.unit(x)


class MeanByRows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(3).mean(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason_to_refuse_what_adds_in_another_order(dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            self.units = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for unit in self.units:
                x = x + unit(x)
            return self.head(x.mean((2, 3)))

    @adapt.register(Net)
    def _(model: Net) -> Parts:
        units = {str(i): unit if i == lost else Residual(unit) for i, unit in enumerate(model.units)}
        return Parts(model.stem, units, nn.Sequential(MeanByRows(), model.head))

    for seed in range(5):
        torch.manual_seed(seed)
        model = Net().to(dtype)
        lost = None
        partition(model, example=(3, 12, 12))
        lost = 3  # whose shortcut is missing
        with pytest.raises(ValueError, match="do not give what the model itself gives"):
            partition(model, example=(3, 12, 12))
