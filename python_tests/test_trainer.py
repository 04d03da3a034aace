"""``LocalTrainer``: steps, epochs, their options, and what comes out."""

from __future__ import annotations

import copy
import functools
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from manpp_kernels.local.memory import SavedTensorMeter
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import CHECKPOINT_NAME, LocalTrainer, TrainerConfig

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def small_model(classes: int = 4) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet((1, 1, 1), num_classes=classes, widths=(4, 6, 8))


def small_trainer(model: nn.Module | None = None, optimizer=SGD, scheduler=None, **config) -> LocalTrainer:
    return LocalTrainer(
        small_model() if model is None else model,
        TrainerConfig(**config),
        example=(3, 8, 8),
        optimizer=optimizer,
        scheduler=scheduler,
    )


def batch(n: int = 8, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, side, side), torch.arange(n) % 4


def loader(n: int = 24, size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(*batch(n)), batch_size=size, shuffle=True)


def without_norm() -> nn.Sequential:
    """No layer looks across the batch, so the gradient of a batch is the mean of its parts'."""
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 4)).double()


def test_a_step_is_one_of_training_whatever_mode_the_model_was_left_in() -> None:
    left, kept = small_trainer(), small_trainer()
    for i in range(3):
        torch.manual_seed(i)
        images = batch()
        left.model.eval()
        next(left.model.children()).train()  # as of a part alone
        for trainer in (left, kept):
            trainer.step(images)
    assert all(module.training for module in left.network.modules())
    for a, b in zip(left.persistent_tensors(), kept.persistent_tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_accumulation_is_the_whole_batch_where_no_layer_looks_across_it(count: int) -> None:
    model = without_norm()
    whole = small_trainer(copy.deepcopy(model), rule="e2e")
    parts = small_trainer(copy.deepcopy(model), rule="e2e", accumulate=count)
    images, targets = torch.randn(7, 3, 8, 8, dtype=torch.float64), torch.arange(7) % 4
    for _ in range(2):
        a, b = whole.step((images, targets)), parts.step((images, targets))
        torch.testing.assert_close(a.losses, b.losses)
        torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(whole.model.state_dict(), parts.model.state_dict(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("order", ["published", "unlocked"])
@pytest.mark.parametrize("form", ["activation", "parameter"])
def test_accumulation_of_equal_parts_is_their_mean_gradient_and_moves_the_ema_once(order: str, form: str) -> None:
    trainer = small_trainer(small_model().double(), order=order, rule_options={"form": form}, accumulate=2)
    emas = {name: p for name, p in trainer.network.named_parameters() if ".ema." in name}
    torch._foreach_mul_([p.detach() for p in emas.values()], 0.5)  # as copies their first update would show nothing
    before = copy.deepcopy(trainer.network.state_dict())
    images, targets = batch()
    images = images.double()

    # The same, by hand: the gradients of both halves, at the same parameters and the same EMA.
    by_hand = small_trainer(small_model().double(), order=order, rule_options={"form": form})
    by_hand.network.load_state_dict(before)
    if order == "unlocked":
        by_hand.network.ema_updates().update()
    for half in (slice(0, 4), slice(4, 8)):
        x = images[half]
        for block in by_hand.network:
            out = block(x, images[half], targets[half])
            (out.loss / 2).backward()
            x = out.features
    if order == "published":
        for ema in by_hand.network.ema_updates_by_block():
            ema.update()
    for optimizer in by_hand.optimizers:
        optimizer.step()

    trainer.step((images, targets))
    torch.testing.assert_close(
        dict(trainer.network.named_parameters()), dict(by_hand.network.named_parameters()), rtol=1e-11, atol=1e-12
    )
    assert any(not torch.equal(p, before[name]) for name, p in emas.items())


@pytest.mark.parametrize("order", ["published", "unlocked"])
def test_clipping_is_per_block(order: str) -> None:
    images, targets = batch()
    free = small_trainer(order=order)
    free.step((images, targets))
    norm = 0.05
    clipped = small_trainer(order=order, clip_norm=norm)
    starts = [[p.detach().clone() for p in block.trainable()] for block in clipped.network]
    clipped.step((images, targets))
    for block, unclipped, start in zip(clipped.network, free.network, starts, strict=True):
        moved = torch.cat([(p - s).flatten() for p, s in zip(block.trainable(), start, strict=True)])
        wanted = torch.cat([(p - s).flatten() for p, s in zip(unclipped.trainable(), start, strict=True)])
        assert wanted.norm() > 0.1 * norm  # SGD with a rate of 0.1 moves by a tenth of the gradient
        torch.testing.assert_close(moved, wanted * min(1.0, 0.1 * norm / wanted.norm().item()), rtol=1e-3, atol=1e-6)


def test_channels_last_gives_the_same() -> None:
    # Eight channels at least: in this format, strided 1x1 convolutions of PyTorch 2.14 from fewer channels write past
    # their memory on a CPU with one thread (a bare Conv2d(4, 6, 1, stride=2) does).
    data = batch()
    plain, last = (
        small_trainer(CifarResNet((1, 1, 1), num_classes=4, widths=(8, 16, 24)), channels_last=on)
        for on in (False, True)
    )
    last.model.load_state_dict(plain.export_state_dict())
    last.network.load_auxiliary_state_dict(plain.network.auxiliary_state_dict())
    assert last.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.step(data).losses, last.step(data).losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.step(data).losses, last.step(data).losses, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("order", ["published", "unlocked"])
@pytest.mark.parametrize(
    "config",
    [
        {"rule": "e2e"},
        {"rule": "dgl", "blocks": 2},
        {"rule": "man++", "blocks": 2, "rule_options": {"form": "parameter"}},
        {"rule": "lookahead"},
        {"rule": "mlaan"},
    ],
    ids=lambda c: c["rule"],
)
def test_recomputed_units_keep_less_and_give_the_same(config: dict, order: str) -> None:
    if config["rule"] in ("lookahead", "mlaan") and order == "unlocked":
        pytest.skip("its blocks overlap, which this order cannot do")
    peaks, results = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = CifarResNet((3, 3, 3), num_classes=4, widths=(4, 6, 8)).double()
        trainer = small_trainer(model, order=order, recompute=recompute, **copy.deepcopy(config))
        draw = torch.Generator().manual_seed(1)
        with SavedTensorMeter(trainer.persistent_tensors()) as meter:
            for _ in range(2):
                trainer.step((torch.rand(8, 3, 8, 8, generator=draw).double(), torch.arange(8) % 4))
        peaks.append(meter.peak_bytes)
        results.append(trainer.network.state_dict())
    assert peaks[1] < peaks[0] or config["rule"] in ("lookahead", "mlaan")
    values = [list(state.values()) for state in results]  # the names differ by that of the wrapper
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("schedule", "steps"), [("epoch", 2), ("step", 6)])
@pytest.mark.parametrize("order", ["published", "unlocked"])
def test_schedules(schedule: str, steps: int, order: str) -> None:
    trainer = small_trainer(
        order=order, schedule=schedule, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)
    )
    history = trainer.fit(loader(), 2)
    assert all(o.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**steps) for o in trainer.optimizers)
    assert history[0]["lr"] == pytest.approx(0.1 * (1 if schedule == "epoch" else 0.5**3))


def test_a_scheduler_that_follows_the_loss() -> None:
    plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=0, threshold=1e9)
    data = loader()
    for val_loader, key in ((data, "val_loss"), (None, "train_loss")):
        trainer = small_trainer(scheduler=plateau)
        history = trainer.fit(data, 3, val_loader=val_loader)
        assert [row["lr"] for row in history] == pytest.approx([0.1, 0.1, 0.01]), "no epoch is better by so much"
        assert trainer.schedulers[0].best == history[0][key]


def test_schedulers_that_cannot_be_stepped() -> None:
    class ByEpoch:  # as timm's
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            pass

        def step(self, epoch: int, metric: float | None = None) -> None:
            raise AssertionError("never called")

    with pytest.raises(TypeError, match="scheduler ByEpoch needs epoch"):
        small_trainer(scheduler=ByEpoch)
    with pytest.raises(ValueError, match="ReduceLROnPlateau looks at the loss of an epoch"):
        small_trainer(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau, schedule="step")


def test_any_optimizer() -> None:
    for make in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        for order in ("published", "unlocked"):
            trainer = small_trainer(optimizer=make, order=order)
            trainer.step(batch())
            assert len(trainer.optimizers) == (1 if order == "published" else 4)


def test_the_default_optimizer_is_the_published_sgd() -> None:
    (optimizer,) = small_trainer(optimizer=None).optimizers
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    given = {"learning_rate": 0.3, "sgd_momentum": 0.5, "nesterov": False, "weight_decay": 0.2}
    group = small_trainer(optimizer=None, **given).optimizers[0].param_groups[0]
    assert [group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")] == list(given.values())


def test_a_history_row() -> None:
    torch.manual_seed(1)
    trainer = small_trainer()
    rows: list[dict] = []
    history = trainer.fit(loader(), 2, val_loader=loader(), on_epoch=lambda t, row: rows.append(row))
    assert rows == history
    assert [row["epoch"] for row in history] == [1, 2]
    assert set(history[0]) == {
        "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds", "seconds_per_step",
        "images_per_second", "peak_memory_bytes", "memory",
    }  # fmt: skip
    assert 0 <= history[0]["train_acc"] <= 1
    assert history[0]["peak_memory_bytes"] > 0
    assert history[0]["seconds"] > history[0]["seconds_per_step"] > 0
    assert small_trainer().fit(loader(), 1)[0]["val_acc"] is None


def test_the_mean_loss_of_an_epoch_is_over_images() -> None:
    """With a last batch that is smaller, and a rate of 0, so that the model stays as it is."""
    trainer = small_trainer(optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    losses: list[tuple[float, int]] = []
    row = trainer.fit(loader(12, 8), 1, on_step=lambda t, r: losses.append((r.losses[-1].item(), len(r.logits))))[0]
    assert [n for _, n in losses] == [8, 4]
    assert row["train_loss"] == pytest.approx(sum(x * n for x, n in losses) / 12, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_evaluate_is_the_deployed_model(smoothing: float) -> None:
    """Its loss is the one that is trained by."""
    trainer = small_trainer(label_smoothing=smoothing)
    trainer.step(batch())
    images, targets = batch(10)
    # One batch without images: what a filter or a share of few images may leave.
    found = trainer.evaluate([(images[at], targets[at]) for at in (slice(0, 7), slice(0), slice(7, None))])
    deployed = small_model()
    deployed.load_state_dict(trainer.export_state_dict())
    deployed.eval()
    logits = deployed(images)
    assert found["images"] == 10
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == targets).double().mean().item())
    loss = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.model.training


def test_training_learns() -> None:
    torch.manual_seed(0)
    targets = torch.arange(64) % 4
    images = torch.randn(64, 3, 8, 8) + torch.eye(4)[targets][:, :3, None, None] * 2
    data = DataLoader(TensorDataset(images, targets), batch_size=16, shuffle=True)
    for config in ({}, {"order": "unlocked", "rule_options": {"form": "parameter"}}):
        trainer = small_trainer(optimizer=functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9), **config)
        history = trainer.fit(data, 20, val_loader=data)
        assert history[-1]["train_acc"] > 0.9
        assert history[-1]["val_acc"] > 0.8


def test_soft_targets_and_an_own_criterion() -> None:
    images, targets = batch()
    soft = torch.eye(4)[targets]
    hard, mixed = small_trainer(), small_trainer()
    torch.testing.assert_close(hard.step((images, targets)).losses, mixed.step((images, soft)).losses)
    own = LocalTrainer(
        small_model(), example=(3, 8, 8), criterion=lambda logits, t: nn.functional.mse_loss(logits, torch.eye(4)[t])
    )
    result = own.step((images, targets))
    torch.testing.assert_close(result.losses[-1], nn.functional.mse_loss(result.logits, soft))
    smooth = small_trainer(label_smoothing=0.1)
    result = smooth.step((images, targets))
    expected = nn.functional.cross_entropy(result.logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(result.losses[-1], expected)


def test_ctrl_c_ends_after_the_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = small_trainer()
    steps: list[int] = []

    def press(t: LocalTrainer, result: object) -> None:
        steps.append(t.position)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    history = trainer.fit(loader(), 3, on_step=press, checkpoint_dir=tmp_path)
    assert trainer.interrupted
    assert steps == [1, 2]
    assert history == []
    assert (tmp_path / CHECKPOINT_NAME).exists()
    assert signal.getsignal(signal.SIGINT) is before
    trainer.fit(loader(), 1)
    assert not trainer.interrupted


def test_a_second_ctrl_c_in_a_step_saves_nothing(tmp_path: Path) -> None:
    trainer = small_trainer()

    def press_twice(module: nn.Module, args: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer.model.layer3[0].register_forward_pre_hook(press_twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader(), 1, checkpoint_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parts_that_alone_are_in_evaluation_mode_stay_in_it() -> None:
    """A frozen batch normalisation keeps its statistics, as in plain PyTorch."""
    trainer = small_trainer()
    norm = trainer.model.bn1
    norm.requires_grad_(False).eval()
    before = copy.deepcopy(norm.state_dict())
    trainer.fit([batch(), batch()], 2, val_loader=[batch()])
    assert not norm.training
    assert trainer.model.layer1[0].bn1.training
    assert all(torch.equal(value, norm.state_dict()[key]) for key, value in before.items())


def test_vectors_as_features() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4))
    for rule in ("dgl", "man++"):
        trainer = LocalTrainer(copy.deepcopy(model), TrainerConfig(rule=rule), example=(6,))
        assert len(trainer.step((torch.randn(8, 6), torch.arange(8) % 4)).losses) == 2


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_torchvision_models_train(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, num_classes=4)
    trainer = LocalTrainer(model, TrainerConfig(blocks=["layer2.1", "layer3.0"]), example=(3, 32, 32))
    assert len(trainer.step(batch(4, 32)).losses) == 3
    assert list(trainer.export_state_dict()) == list(models.get_model(name, num_classes=4).state_dict())
