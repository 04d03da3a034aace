"""Models that classify every pixel, in local blocks."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import segmentation

from manpp_kernels.local import partition
from manpp_kernels.local.heads import Width, pixel_head
from manpp_kernels.local.targets import BatchError
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

CLASSES = 5


def convolutions(channels: int = 6, units: int = 3, classes: int = CLASSES) -> nn.Sequential:
    """A fully convolutional network at full resolution."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for _ in range(units):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, classes, 1))


def theirs(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **options)


def batch(side: int = 8, images: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, side, side, generator=generator)
    return x, torch.randint(CLASSES, (images, side, side), generator=generator)


@pytest.mark.parametrize(
    ("name", "side", "units", "last"),
    [
        ("fcn_resnet50", 32, 16, "backbone.layer4.2"),
        ("deeplabv3_mobilenet_v3_large", 32, 16, "backbone.16"),
        ("lraspp_mobilenet_v3_large", 32, 16, "backbone.16"),
    ],
)
def test_torchvisions_models_come_apart(name: str, side: int, units: int, last: str) -> None:
    model = theirs(name)
    parts = partition(model, 4, example=(3, side, side))
    assert parts.of_pixels
    assert parts.output_shape == (2, CLASSES, side, side)
    assert len(parts.segments) == 1 + units
    assert parts.names()[-1][-1] == last
    with pytest.raises(ValueError, match=r"and the model itself gives \(2, 5, 36, 36\); take images whose sides are"):
        partition(model, 4, example=(3, 36, 36))


def test_what_does_not_come_apart() -> None:
    with pytest.raises(TypeError, match=r"FCN has a classifier of its own .* or set its aux_classifier to None"):
        partition(model := theirs("fcn_resnet50", aux_loss=True), 4, example=(3, 32, 32))
    model.aux_classifier = None  # as where it came with pretrained weights, which torchvision makes with one alone
    assert partition(model, 4, example=(3, 32, 32)).of_pixels
    with pytest.raises(ValueError, match=r"has to return logits \(N, num_classes\), or .* and returned \(2, 5, 8\)"):
        partition(nn.Sequential(*convolutions(), nn.Flatten(2, 3), nn.MaxPool1d(8)), 2, example=(3, 8, 8))


def test_a_step_of_dgl_is_what_it_says() -> None:
    """Against the formula, by hand: losses and gradients of two blocks."""
    model = convolutions().double()
    config = TrainerConfig(rule="dgl", blocks=2, learning_rate=0.5, sgd_momentum=0.0, nesterov=False, weight_decay=0.0)
    trainer = LocalTrainer(model, config, example=(3, 8, 8))
    twin = copy.deepcopy(trainer.network)
    images, targets = batch()
    images = images.double()
    result = trainer.step((images, targets))

    first, second = twin
    x = first.body(images)
    head = first.auxiliary.head
    assert [tuple(p.shape) for p in head.parameters()] == [(1, 6, 3, 3), (1,), (1,), (CLASSES, 1, 1, 1), (CLASSES,)]
    logits = second.body(x.detach())
    losses = [F.cross_entropy(head(x), targets), F.cross_entropy(logits, targets)]
    for found, expected in zip(result.losses, losses, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(result.logits, logits)
    for loss in losses:
        loss.backward()
    for p, before in zip(trainer.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), before.detach() - 0.5 * before.grad)


def test_a_head_at_lower_resolution_is_enlarged_to_the_targets() -> None:
    model = theirs("fcn_resnet50")
    trainer = LocalTrainer(model, TrainerConfig(rule="dgl", blocks=["backbone.layer1.2"]), example=(3, 32, 32))
    images, targets = batch(32, 1)
    with torch.no_grad():
        x = torch.randn(1, 256, 8, 8)
        found = trainer.network.blocks[0].auxiliary(x, images, targets)
        logits = trainer.network.blocks[0].auxiliary.head(x)
    logits = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets))


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_end_to_end_is_the_users_own_training(name: str) -> None:
    """A model that returns a mapping, and 255 for pixels that do not count."""
    model = theirs(name)
    twin = copy.deepcopy(model).train()
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    trainer = LocalTrainer(model, TrainerConfig(rule="e2e"), example=(3, 32, 32), criterion=criterion)
    optimizer = TrainerConfig().sgd(list(twin.parameters()))
    images, targets = batch(32)
    targets[:, :16] = 255
    torch.manual_seed(2)  # of the dropout
    result = trainer.step((images, targets))
    torch.manual_seed(2)
    output = twin(images)["out"]
    loss = criterion(output, targets)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(result.logits, output)
    torch.testing.assert_close(result.losses[0], loss)
    exported, expected = trainer.export_state_dict(), twin.state_dict()
    assert list(exported) == list(expected)
    torch.testing.assert_close(exported, expected)

    found = trainer.evaluate([(images, targets)])
    output = twin.eval()(images)["out"]
    counts = targets != 255
    assert found["accuracy"] == pytest.approx((output.argmax(1) == targets)[counts].double().mean().item())
    assert found["loss"] == pytest.approx(criterion(output, targets).item(), rel=1e-4)


def _digits() -> list[tuple[Tensor, Tensor]]:
    """Real images, of which every pixel is background or ink."""
    images = torch.from_numpy(load_digits().images[:256] / 16).float()[:, None].expand(-1, 3, -1, -1)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return list(zip(noisy.split(32), (images[:, 0] > 0.5).long().split(32), strict=True))


RULES: dict[str, dict[str, Any]] = {
    "dgl": {"rule": "dgl", "rule_options": {"width": "wide"}, "recompute": True},
    "man": {"rule": "man", "rule_options": {"host_options": {"width": "linear"}}},
    "man++": {"rule": "man++", "rule_options": {"host_options": {"width": "narrow"}, "form": "parameter"}},
    "lookahead": {"rule": "lookahead", "rule_options": {"host_options": {"width": "linear"}}},
}


@pytest.mark.parametrize("name", RULES)
def test_training_learns(name: str) -> None:
    model = convolutions(classes=2)
    trainer = LocalTrainer(model, TrainerConfig(blocks=3, accumulate=2, **RULES[name]), example=(3, 8, 8))
    batches = _digits()
    assert 0.6 < 1 - torch.cat([targets for _, targets in batches]).double().mean() < 0.75, "background"
    row = trainer.fit(batches, 6, val_loader=batches)[-1]
    assert row["train_acc"] > 0.93
    assert row["val_acc"] > 0.93
    result = trainer.step(batches[0])
    assert all(loss < 0.25 for loss in result.losses), "every block has learned"


@pytest.mark.parametrize(
    ("rule", "options"),
    [("predsim", None), ("infopro", None), ("auglocal", None), ("mlaan", None), ("man++", {"host": "infopro"})],
)
def test_rules_that_classify_images(rule: str, options: Any) -> None:
    message = rf"of the rule {re.escape(repr(rule))}, .* gives is \(2, 5, 8, 8\); choose 'dgl'"
    with pytest.raises(ValueError, match=message):
        LocalTrainer(convolutions(), TrainerConfig(rule=rule, rule_options=options), example=(3, 8, 8))


def test_targets_and_batches() -> None:
    trainer = LocalTrainer(convolutions(), TrainerConfig(rule="dgl"), example=(3, 8, 8))
    images, targets = batch()
    with pytest.raises(BatchError, match=r"targets have to be \(N, H, W\), and are \(4,\)"):
        trainer.step((images, targets[:, 0, 0]))
    with pytest.raises(BatchError, match="labels lie between 0 and 5, and the model has 5 classes"):
        trainer.step((images, torch.where(targets == 0, 5, 0)))
    trainer.step((images[:1], targets[:1]))  # one image has pixels enough for batch statistics


@pytest.mark.parametrize("classes", [1, CLASSES])
def test_a_criterion_that_compares_otherwise(classes: int) -> None:
    """Targets of twice the resolution, or of one logit: nothing is right or wrong."""

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        if classes == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], (targets > 2).float())
        return F.cross_entropy(F.interpolate(logits, targets.shape[1:]), targets)

    trainer = LocalTrainer(
        convolutions(classes=classes), TrainerConfig(rule="dgl"), example=(3, 8, 8), criterion=criterion
    )
    images, targets = batch()
    if classes > 1:
        targets = targets.repeat_interleave(2, 1).repeat_interleave(2, 2)
    row = trainer.fit([(images, targets)], 1, val_loader=[(images, targets)])[-1]
    assert (row["train_acc"], row["val_acc"]) == (None, None)
    assert row["val_loss"] > 0


def test_widths() -> None:
    features = torch.Size((2, 16, 8, 8))

    def count(width: Width) -> int:
        return sum(p.numel() for p in pixel_head(features, 3, width).parameters())

    assert count("narrow") == 9 * 16 * 4 + 2 * 4 + 4 * 3 + 3
    assert count("wide") == 9 * 16 * 128 + 2 * 128 + 128 * 3 + 3
    assert count("linear") == 16 * 3 + 3
    with pytest.raises(ValueError, match=r"a head for pixels takes maps \(N, C, H, W\), and the features here are"):
        pixel_head(torch.Size((2, 16)), 3, "narrow")
