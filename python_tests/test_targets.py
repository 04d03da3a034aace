"""What targets mean: class numbers, ignored ones, probabilities, and whatever else a criterion takes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from manpp_kernels import LocalTrainer, TrainerConfig
from manpp_kernels.local.targets import answers
from manpp_kernels.models import CifarResNet


def trainer(criterion: nn.Module | None, rule: str = "man++", classes: int = 4) -> LocalTrainer:
    torch.manual_seed(0)
    model = CifarResNet((1, 1, 1), num_classes=classes, widths=(4, 6, 8))
    return LocalTrainer(model, TrainerConfig(rule=rule), example=(3, 8, 8), criterion=criterion)


def test_answers() -> None:
    logits = torch.eye(4)[[0, 1, 2, 2]]
    assert answers(logits, torch.tensor([0, 1, 2, 3])) == (3, 4)
    assert answers(logits, torch.tensor([0, 1, -100, 3]), -100) == (2, 3)
    assert answers(logits, torch.tensor([0, 1, 2, 3]), 0) == (2, 3)  # a class that is ignored, and predicted
    assert answers(logits, torch.eye(4)[[0, 1, 2, 3]]) == (3, 4)
    # Distributions, unless floating-point targets are known to be something else, or one row shows that they are.
    mixed = torch.tensor([[0.5, 0.5, 0, 0], [0, 1.0, 0, 0], [0, 0, 0.9, 0.1], [0.25, 0.25, 0, 0.5]])
    assert answers(logits, mixed) == (3, 4)
    assert answers(logits, mixed, probabilities=False) == (0, 0)
    for row in ([1.0, 1, 0, 0], [2.0, 0, 0, -1], [0.0, 0, 0, 0]):
        assert answers(logits, torch.cat([mixed[:3], torch.tensor([row])])) == (0, 0)
    # Neither several labels an image, nor numbers to be met, are right or wrong.
    assert answers(logits, torch.ones(4, 4, dtype=torch.int64)) == (0, 0)
    assert answers(logits, torch.ones(4)) == (0, 0)
    assert answers(logits[:, :1], torch.ones(4, 1)) == (0, 0)


def test_ignored_labels_are_neither_refused_nor_counted() -> None:
    criterion = nn.CrossEntropyLoss(ignore_index=-1)
    local = trainer(criterion)
    images, targets = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, -1, 2, -1, 3])
    result = local.step((images, targets))
    torch.testing.assert_close(result.losses[-1], criterion(result.logits, targets))
    (row,) = local.fit([(images, targets)], 1)
    assert row["train_acc"] * 4 == round(row["train_acc"] * 4)
    with pytest.raises(ValueError, match="labels lie between -2 and 3"):
        local.step((images, targets.clamp(min=-2) - (targets == -1).long()))


@pytest.mark.parametrize(
    ("rule", "options"), [("infopro", {"loss": "contrastive", "decoder_weight": 0.0}), ("predsim", {}), ("dgl", {})]
)
@pytest.mark.parametrize(
    ("criterion", "ignored"),
    [
        (None, -100),
        (nn.CrossEntropyLoss(ignore_index=3), 3),
        (functools.partial(nn.functional.cross_entropy, ignore_index=3), 3),
        (functools.partial(nn.functional.cross_entropy, label_smoothing=0.1), -100),
    ],
)
def test_blocks_learn_nothing_from_ignored_images(rule: str, options: dict, criterion, ignored: int) -> None:
    torch.manual_seed(0)
    local = LocalTrainer(
        CifarResNet((1, 1, 1), num_classes=4, widths=(4, 6, 8)),
        TrainerConfig(rule=rule, rule_options=options),
        example=(3, 8, 8),
        criterion=criterion,
    )
    auxiliary = local.network.blocks[0].auxiliary
    assert auxiliary is not None
    auxiliary.eval()  # batch normalisations would mix the images
    targets = torch.tensor([0, 1, ignored, 0, ignored, 1])
    features = torch.rand(6, 4, 8, 8, requires_grad=True)
    auxiliary(features, torch.rand(6, 3, 8, 8), targets).backward()
    assert features.grad is not None
    moved = features.grad.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == (targets != ignored).tolist()


def test_cross_entropy_ignores_what_pytorchs_own_does() -> None:
    images, targets = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, -100, 2, -100, 3])
    expected = None
    for criterion in (nn.CrossEntropyLoss(), None, nn.functional.cross_entropy):
        local = trainer(criterion)
        losses = local.step((images, targets)).losses
        expected = losses if expected is None else expected
        torch.testing.assert_close(losses, expected)
        accuracy = local.evaluate([(images, targets)])["accuracy"]
        assert accuracy is not None
        assert accuracy * 4 == round(accuracy * 4)


@pytest.mark.parametrize(
    ("criterion", "classes", "targets"),
    [
        (
            lambda logits, t: nn.functional.binary_cross_entropy_with_logits(logits, t.float()),
            4,
            torch.ones(4, 4).long(),
        ),
        (lambda logits, t: nn.functional.mse_loss(logits.flatten(), t), 1, torch.rand(4)),
        (nn.BCEWithLogitsLoss(), 1, torch.rand(4, 1)),
        (nn.BCEWithLogitsLoss(), 4, torch.eye(4)),
        (nn.functional.binary_cross_entropy_with_logits, 4, torch.eye(4)),
        (
            functools.partial(nn.functional.binary_cross_entropy_with_logits, pos_weight=torch.ones(4)),
            4,
            torch.eye(4),
        ),
        (
            lambda logits, t: nn.functional.binary_cross_entropy_with_logits(logits, t),
            4,
            torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]),
        ),
        (nn.MSELoss(), 4, torch.eye(4)),
        (lambda logits, t: nn.functional.mse_loss(logits, t), 4, torch.rand(4, 4) + 1),
        (lambda logits, t: nn.functional.cross_entropy(logits, t % 4), 4, torch.tensor([4, 5, 6, 7])),
    ],
    ids=[
        "several labels",
        "a number",
        "one probability",
        "one label of several",
        "the function of it",
        "the function with a weight",
        "own function of several labels",
        "numbers",
        "a function",
        "own classes",
    ],
)
def test_targets_that_are_the_criterions_alone(criterion, classes: int, targets: torch.Tensor) -> None:
    local = trainer(criterion, classes=classes)
    batch = torch.randn(4, 3, 8, 8), targets
    (row,) = local.fit([batch], 1, val_loader=[batch])
    assert row["train_acc"] is row["val_acc"] is None or targets.max() > 3
    assert row["train_loss"] > 0


def test_a_criterion_that_is_a_module_stays_out_of_the_blocks(tmp_path: Path) -> None:
    class Weighted(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.register_buffer("weight", torch.full((4,), weight))
            self.temperature = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (
                nn.functional.cross_entropy(logits / self.temperature, targets, reduction="none") * self.weight[0]
            ).mean()

    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    for rule in ("e2e", "dgl", "man++", "predsim"):
        own, other = trainer(Weighted(1.0), rule), trainer(None, rule)
        assert own.network.state_dict().keys() == other.network.state_dict().keys()
        torch.testing.assert_close(own.step(batch).losses, other.step(batch).losses)
        own.save(tmp_path / rule)
        resumed = trainer(Weighted(3.0), rule)
        resumed.load(tmp_path / rule)
        torch.testing.assert_close(resumed.step(batch).losses[-1], 3 * own.step(batch).losses[-1])
    with pytest.raises(ValueError, match="Weighted has parameters that require grad"):
        trainer(Weighted(1.0).requires_grad_())
