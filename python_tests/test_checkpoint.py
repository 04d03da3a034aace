"""Checkpoints: whole at any moment, exact on resuming, and refused with a reason where they do not fit."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from manpp_kernels import checkpoint
from manpp_kernels.checkpoint import CheckpointError
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import CHECKPOINT_NAME, LocalTrainer, TrainerConfig

NARROW = {"host_options": {"width": "narrow"}}  # heads of which a checkpoint is written fast


class Noisy(nn.Module):
    """A layer that draws from the global generator in every step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.2, self.training)


def make_loader(kind: str) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(20, 3, 8, 8, generator=generator), torch.randint(0, 4, (20,), generator=generator))

    def collate(items):
        images = torch.stack([image for image, _ in items])
        # An augmentation that draws from all three global generators.
        noise = random.random() + np.random.rand() + torch.rand(1)
        return images + 0.1 * noise, torch.stack([label for _, label in items])

    own = torch.Generator().manual_seed(2) if kind == "own" else None
    return DataLoader(data, batch_size=4, shuffle=True, generator=own, collate_fn=collate)


def make_trainer(
    rule: str = "man++", order: str = "published", form: str = "activation", seed: int = 0
) -> LocalTrainer:
    torch.manual_seed(seed)
    model = CifarResNet((1, 1, 1), num_classes=4, widths=(4, 6, 8))
    model.layer2.add_module("noise", Noisy())
    options = {"form": form, **NARROW} if rule == "man++" else None
    return LocalTrainer(
        model,
        TrainerConfig(
            rule=rule, rule_options=options, order=order, blocks=None if rule == "e2e" else ["stem", "layer1.0"]
        ),
        example=(3, 8, 8),
        optimizer=functools.partial(torch.optim.Adam, lr=0.01),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 3),
    )


def seed_everything() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def tensors(trainer: LocalTrainer) -> dict[str, torch.Tensor]:
    found = {**trainer.model.state_dict(), **trainer.network.auxiliary_state_dict()}
    for i, optimizer in enumerate(trainer.optimizers):
        for k, state in optimizer.state_dict()["state"].items():
            found.update({f"optimizer {i} {k} {name}": v for name, v in state.items()})
    return found


def assert_equal(a: LocalTrainer, b: LocalTrainer) -> None:
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    assert [k for k in x if not torch.equal(x[k], y[k])] == []
    timing = {"seconds", "seconds_per_step", "images_per_second"}
    rows = [[{k: v for k, v in row.items() if k not in timing} for row in t.history] for t in (a, b)]
    assert rows[0] == rows[1]


@functools.cache
def uninterrupted(kind: str, rule: str, order: str, form: str) -> LocalTrainer:
    trainer = make_trainer(rule, order, form)
    seed_everything()
    trainer.fit(make_loader(kind), 3, val_loader=make_loader("global"))
    return trainer


@pytest.mark.parametrize("kind", ["global", "own"])
@pytest.mark.parametrize(
    ("rule", "order", "form"),
    [
        ("e2e", "published", ""),
        ("man++", "published", "activation"),
        ("man++", "unlocked", "activation"),
        ("man++", "unlocked", "parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of")  # an epoch that is resumed after its last step only ends
@pytest.mark.parametrize("stop", [2, 5, 7])  # in the first epoch, at its end, in the second
def test_resuming_is_exact(tmp_path: Path, kind: str, rule: str, order: str, form: str, stop: int) -> None:
    first = make_trainer(rule, order, form)
    seed_everything()
    steps = 0

    def interrupt(trainer, result) -> None:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt

    history = first.fit(
        make_loader(kind), 3, val_loader=make_loader("global"), on_step=interrupt, checkpoint_dir=tmp_path
    )
    assert first.interrupted
    # Interrupted after its last step, an epoch is not over: its end is still to come.
    assert (first.epoch, first.position, len(history)) == {2: (0, 2, 0), 5: (0, 5, 0), 7: (1, 2, 1)}[stop]

    second = make_trainer(rule, order, form, seed=9)
    random.seed(8)
    second.fit(make_loader(kind), 3, val_loader=make_loader("global"), checkpoint_dir=tmp_path, resume=True)
    assert not second.interrupted
    assert second.epoch == 3
    assert_equal(uninterrupted(kind, rule, order, form), second)


@pytest.mark.parametrize("stop", [2, 5, 7, 10])  # in the first epoch, at its end, in the second, at its end
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_resuming_with_workers_that_persist(tmp_path: Path, stop: int) -> None:
    """They draw a random number of the loader's before the first epoch, and not again."""

    def loader() -> DataLoader:
        data = make_loader("global").dataset
        return DataLoader(data, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)

    class Stop(Exception):
        pass

    def crash(trainer, result) -> None:
        if trainer.epoch * 5 + trainer.position == stop:
            trainer.save(tmp_path / "checkpoint.pt")
            raise Stop

    whole, first, second = make_trainer("dgl"), make_trainer("dgl"), make_trainer("dgl", seed=9)
    seed_everything()
    whole.fit(loader(), 3)
    seed_everything()
    with pytest.raises(Stop):
        first.fit(loader(), 3, on_step=crash)
    second.fit(loader(), 3, resume=tmp_path)
    assert_equal(whole, second)


def test_resuming_at_an_epochs_end_is_exact(tmp_path: Path) -> None:
    whole, first, second = make_trainer(), make_trainer(), make_trainer(seed=9)
    seed_everything()
    whole.fit(make_loader("global"), 3)
    seed_everything()
    first.fit(make_loader("global"), 2, checkpoint_dir=tmp_path)
    seed_everything()
    second.fit(make_loader("global"), 3, resume=tmp_path / CHECKPOINT_NAME)
    assert_equal(whole, second)


def test_fit_can_go_on_in_the_same_process() -> None:
    whole, parted = make_trainer(), make_trainer()
    seed_everything()
    whole.fit(make_loader("global"), 2)
    seed_everything()
    loader, steps = make_loader("global"), []

    def interrupt(trainer, result) -> None:
        steps.append(1)
        if len(steps) in (3, 8):
            raise KeyboardInterrupt

    while parted.epoch < 2:
        parted.fit(loader, 2, on_step=interrupt)
    assert_equal(whole, parted)


def test_checkpoints_every_few_steps(tmp_path: Path) -> None:
    whole, first, second = make_trainer(), make_trainer(), make_trainer(seed=9)
    seed_everything()
    whole.fit(make_loader("global"), 2)
    seed_everything()

    def crash(trainer, result) -> None:
        if trainer.position == 4:
            raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        first.fit(make_loader("global"), 2, on_step=crash, checkpoint_dir=tmp_path, checkpoint_every=3)
    second.load(tmp_path / CHECKPOINT_NAME)
    assert (second.epoch, second.position) == (0, 3)
    second.fit(make_loader("global"), 2)
    assert_equal(whole, second)


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """A process that does nothing but write checkpoints is killed at four different moments."""
    path = tmp_path / "c.pt"
    # Forked for each, as the import takes longest.
    script = textwrap.dedent("""
        import os, sys, torch
        from manpp_kernels import checkpoint
        for _ in sys.stdin:
            child = os.fork()
            if child == 0:
                for i in range(100000):
                    checkpoint.write(sys.argv[1], {"i": i, "data": torch.full((200_000,), float(i))})
                    if i == 0:
                        print(os.getpid(), flush=True)
            os.waitpid(child, 0)
            print("ended", flush=True)
    """)
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for moment in range(4):
            parent.stdin.write("\n")
            child = int(parent.stdout.readline())
            time.sleep(0.013 * (moment + 1))
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "ended\n"
            state = checkpoint.read(path)
            assert bool((state["data"] == state["i"]).all())


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_may_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint.write(tmp_path / "c.pt", {"i": 1})
        checkpoint.export_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("c.pt", "w.safetensors")] == [mode, mode]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_a_failure_while_saving_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch, where: str) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"i": 1})

    def fail(*args, **kwargs):
        if where == "save":
            Path(args[1]).write_bytes(b"half")
        raise OSError("no space left")

    owner = torch if where == "save" else os
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write(path, {"i": 2})
    monkeypatch.undo()
    assert checkpoint.read(path)["i"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_numpy_numbers_are_read_back(tmp_path: Path) -> None:
    """As a learning rate, in an optimizer's groups, and in a row that a callback has added to."""
    sgd = functools.partial(torch.optim.SGD, lr=np.sqrt(np.float64(0.01)))
    local = LocalTrainer(CifarResNet((1, 1, 1), 4), TrainerConfig(rule="dgl"), example=(3, 8, 8), optimizer=sgd)
    local.fit(
        make_loader("global"), 1, on_epoch=lambda _, row: row.update(best=np.float32(0.5)), checkpoint_dir=tmp_path
    )
    local.save(tmp_path / CHECKPOINT_NAME)
    state = checkpoint.read(tmp_path / CHECKPOINT_NAME)
    assert type(state["optimizers"][0]["param_groups"][0]["lr"]) is float
    assert state["history"][0]["best"] == 0.5
    local.load(tmp_path / CHECKPOINT_NAME)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    checkpoint.write(path, {"history": [1]})
    with pytest.raises(CheckpointError, match=r"not written.*the part history holds other things"):
        checkpoint.write(path, {"rest": {"a": torch.ones(2)}, "history": [Path("x")]})
    assert checkpoint.read(path)["history"] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["file.pt"]


def refused(trainer: LocalTrainer, path: Path, message: str) -> None:
    before = {k: v.clone() for k, v in tensors(trainer).items()}
    with pytest.raises(CheckpointError, match=message):
        trainer.load(path)
    assert all(torch.equal(v, before[k]) for k, v in tensors(trainer).items())
    assert (trainer.epoch, trainer.position) == (0, 0)


def test_a_disk_that_is_full_leaves_the_checkpoint_of_before(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, {"part": 1})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt.* (cannot be written|File too large)"):
            checkpoint.write(path, {"part": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    trainer = make_trainer()
    path = tmp_path / "c.pt"
    trainer.save(path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(trainer, path, "is damaged, or no checkpoint of this package: it is cut short")
    path.write_text("epoch,loss\n1,2\n")
    refused(trainer, path, "is damaged, or no checkpoint of this package: it is cut short, or of another kind")
    torch.save(trainer.model.state_dict(), path)
    refused(trainer, path, "was written by another program")
    torch.save({"format": "manpp_kernels checkpoint", "version": 99}, path)
    refused(trainer, path, "has the version 99")
    torch.save({"format": "manpp_kernels checkpoint", "version": 2}, path)
    refused(trainer, path, "is not complete: its part 'kind' is missing")
    trainer.save(path)
    state = torch.load(path)
    torch.save({**state, "rng": []}, path)
    refused(trainer, path, "is not complete: its part 'rng' is not that of 1 ranks")
    torch.save(trainer.model, path)  # a pickle that would run code
    refused(trainer, path, "is damaged, or no checkpoint of this package: it holds other things than tensors")
    with pytest.raises(FileNotFoundError):
        trainer.load(tmp_path / "none.pt")


def test_checkpoints_of_another_training(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    make_trainer().save(path)
    refused(make_trainer("dgl"), path, "another training: its rule is 'man[+][+]', here it is 'dgl'")
    refused(make_trainer(order="unlocked"), path, "its order is 'published', here it is 'unlocked'")
    refused(make_trainer(form="parameter"), path, "its rule options is")

    def other(
        model: nn.Module, blocks=("stem", "layer1.0"), optimizer=torch.optim.Adam, scheduler=None, **config
    ) -> LocalTrainer:
        config = TrainerConfig(blocks=blocks, rule_options={"form": "activation", **NARROW}, **config)
        return LocalTrainer(model, config, example=(3, 8, 8), optimizer=optimizer, scheduler=scheduler)

    def network(*widths: int) -> nn.Module:
        model = CifarResNet((1, 1, 1), num_classes=4, widths=widths or (4, 6, 8))
        model.layer2.add_module("noise", Noisy())
        return model

    refused(other(network(), ("stem",)), path, "its blocks is")
    refused(other(network(), amp="bf16"), path, "its amp is None, here it is")
    refused(other(network(4, 6, 9)), path, "another network: 'layer3.0.conv1.weight' of its part 'model' has the shape")
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3)
    refused(other(network(), optimizer=sgd, scheduler=cosine), path, "optimizer is Adam, here it is SGD")
    refused(other(network()), path, "has 1 schedulers, here there are 0")
    step = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    refused(other(network(), scheduler=step), path, "scheduler is CosineAnnealingLR, here it is StepLR")


def test_a_loader_with_other_generators(tmp_path: Path) -> None:
    first = make_trainer()
    first.fit(make_loader("own"), 1, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="draws from 0 generators, and the checkpoint"):
        make_trainer().fit(make_loader("global"), 2, checkpoint_dir=tmp_path, resume=True)


def test_a_shorter_loader(tmp_path: Path) -> None:
    first = make_trainer()
    first.fit(
        make_loader("global"), 1, on_step=lambda t, r: signal.raise_signal(signal.SIGINT), checkpoint_dir=tmp_path
    )
    assert first.position == 1
    with pytest.raises(ValueError, match="the loader has only 0"):
        make_trainer().fit(iter([]), 1, checkpoint_dir=tmp_path, resume=True)


def test_exported_weights(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    model = make_trainer().model.to(memory_format=torch.channels_last)
    checkpoint.export_weights(model, path)
    other = make_trainer(seed=3).model
    checkpoint.import_weights(other, path)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is damaged, or no safetensors"):
        checkpoint.import_weights(other, path)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="another network"):
        checkpoint.import_weights(CifarResNet((1, 1, 1)), path)
    with pytest.raises(FileNotFoundError):
        checkpoint.import_weights(other, tmp_path / "none")


def test_random_states_come_back() -> None:
    generator = torch.Generator().manual_seed(3)

    def draw() -> tuple[float, ...]:
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.randn(),
            torch.rand(()).item(),
            torch.rand((), generator=generator).item(),
        )

    draw()
    state = checkpoint.rng_state([generator])
    first = draw()
    draw()
    checkpoint.set_rng_state(state, [generator])
    assert draw() == first
