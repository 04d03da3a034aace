"""Models whose head also looks at features of units before the last one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from manpp_kernels.local import Parts, adapt, partition
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


class SkipHead(nn.Module):
    """Pixels classified by deep features, and by those at twice their resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(4, 3, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return self.fine(first + second) + F.interpolate(self.coarse(x), scale_factor=2.0)


class Skipping(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.units = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
                nn.Sequential(nn.ReLU(inplace=inplace), nn.Conv2d(4, 4, 3, padding=1)),
                nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()),
            ]
        )
        self.head = SkipHead()
        self.taps = ("stem", "units.1")

    def forward(self, images: Tensor) -> Tensor:
        first = self.stem(images)
        second = self.units[1](self.units[0](first))
        return self.head(self.units[3](self.units[2](second)), first, second)


@adapt.register
def _(model: Skipping) -> Parts:
    units = {f"units.{i}": unit for i, unit in enumerate(model.units)}
    return Parts(model.stem, units, model.head, taps=model.taps)


def make(**settings: Any) -> LocalTrainer:
    torch.manual_seed(0)
    config = TrainerConfig(**{"rule": "dgl", "learning_rate": 0.1, **settings})
    return LocalTrainer(Skipping().double(), config, example=(3, 8, 8))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, 8, 8).double(), torch.randint(3, (4, 8, 8))


def test_end_to_end_is_the_users_own_training() -> None:
    trainer, twin = make(rule="e2e"), Skipping().double()
    twin.load_state_dict(trainer.model.state_dict())
    optimizer = trainer.config.sgd(list(twin.parameters()))
    images, targets = batch()
    F.cross_entropy(twin(images), targets).backward()
    optimizer.step()
    trainer.step((images, targets))
    torch.testing.assert_close(trainer.export_state_dict(), twin.state_dict())


@pytest.mark.parametrize("blocks", [["stem"], ["stem", "units.1"], ["units.0", "units.2"], 5])
def test_what_the_head_looks_at_is_trained_by_its_own_block(blocks: Any) -> None:
    """The gradients of the head's loss reach what is tapped in its own block, and nothing before."""
    trainer = make(blocks=blocks)
    parts = trainer.network.partition
    twin = copy.deepcopy(trainer.network)
    images, targets = batch()
    trainer.step((images, targets))

    x, first, second = images, None, None
    losses = []
    for j, block in enumerate(twin):
        for name in parts.names()[j]:
            index = ["stem", *parts.parts.units].index(name)
            own = twin.partition.segments[index].module
            x = own(x)
            first, second = (x if name == "stem" else first), (x if name == "units.1" else second)
        if block.auxiliary is not None:
            losses.append(block.auxiliary(x, images, targets))
            x, first, second = (t if t is None else t.detach() for t in (x, first, second))
    losses.append(F.cross_entropy(twin.partition.parts.head(x, first, second), targets))
    for loss in losses:
        loss.backward()
    trainer.config.sgd(list(twin.parameters())).step()
    for a, b in zip(trainer.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate": 2, "order": "unlocked"},
        {"recompute": True},
        {"compile": "aot_eager"},
        {"compile": "aot_eager", "recompute": True},
        {"rule": "lookahead"},
        {"rule": "man++", "order": "unlocked", "accumulate": 2, "rule_options": {"form": "parameter"}},
    ],
    ids=str,
)
def test_it_goes_with_the_other_settings(settings: dict[str, Any]) -> None:
    rule = {key: settings[key] for key in ("rule", "rule_options") if key in settings}
    ours, plain = make(**settings, blocks=3), make(**rule, blocks=3)
    found, expected = ours.step(batch()), plain.step(batch())
    assert [handed for handed in map(ours.network.partition.handed_on, range(2))] == [2, 3]
    if "order" not in settings:
        torch.testing.assert_close(found.losses, expected.losses)
        torch.testing.assert_close(ours.export_state_dict(), plain.export_state_dict())
    again = ours.step(batch())
    assert sum(again.losses) < sum(found.losses)


class Number(nn.Sequential):
    """A model that gives one number for each image."""


@adapt.register
def _(model: Number) -> Parts:
    first, second, *head = model
    return Parts(first, {"1": second}, nn.Sequential(*head), local_head=local_number)


def local_number(features: Size, images: Size, width: str) -> nn.Module:
    return nn.Sequential(nn.Linear(features[1], 1), nn.Flatten(0))


def test_outputs_of_another_kind() -> None:
    torch.manual_seed(0)
    model = Number(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1), nn.Flatten(0))
    config = TrainerConfig(rule="dgl", learning_rate=0.01)
    trainer = LocalTrainer(model, config, example=(4,), criterion=nn.MSELoss())
    images = torch.rand(8, 4)
    rows = trainer.fit([(images, images.sum(1))], 20)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2
    assert rows[-1]["train_acc"] is None


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"rule 'mlaan'.* classify images, and what Skipping gives is \(2, 3, 8, 8\)"):
        make(rule="mlaan")
    model = Skipping(inplace=True)
    model.taps = ("units.0",)  # where the next one begins in place
    with pytest.raises(ValueError, match=r"units\.1 changes its input in place, at which the head looks as well"):
        partition(model, 2, example=(3, 8, 8))
    for taps in (("units.1", "stem"), ("units.9",), ("units.3",)):
        model = Skipping()
        model.taps = taps
        with pytest.raises(ValueError, match=r"taps has to name units before the last one, in their order, and is \["):
            partition(model, 2, example=(3, 8, 8))
    model.taps = ("stem",)
    with pytest.raises(ValueError, match="head does not take"):
        partition(model, 2, example=(3, 8, 8))


class Classifying(Skipping):
    """The same for images: a rule whose blocks are its own has no place for what is tapped."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean((2, 3))


@adapt.register
def _(model: Classifying) -> Parts:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.head

        def forward(self, *features: Tensor) -> Tensor:
            return self.inner(*features).mean((2, 3))

    units = {f"units.{i}": unit for i, unit in enumerate(model.units)}
    return Parts(model.stem, units, Head(), taps=model.taps)


def test_of_images() -> None:
    torch.manual_seed(0)
    images, targets = torch.rand(4, 3, 8, 8), torch.arange(4) % 3
    with pytest.raises(ValueError, match="blocks of the rule 'mlaan' hand on features in a way of their own"):
        LocalTrainer(Classifying(), TrainerConfig(rule="mlaan"), example=(3, 8, 8))
    for rule in ("man++", "predsim", "infopro", "auglocal"):
        trainer = LocalTrainer(Classifying(), TrainerConfig(rule=rule), example=(3, 8, 8))
        assert len(trainer.step((images, targets)).losses) == 5
