"""Resuming: what may go on from a checkpoint, what is said where something differs, and what is never lost."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from test_trainer import loader, small_trainer
from torch.utils._pytree import tree_leaves

from manpp_kernels import checkpoint
from manpp_kernels.checkpoint import CheckpointError
from manpp_kernels.trainer import CHECKPOINT_NAME, LocalTrainer

L = torch.optim.lr_scheduler
Adam, AdamW = (functools.partial(kind, lr=0.01) for kind in (torch.optim.Adam, torch.optim.AdamW))


class Counting(torch.optim.SGD):
    """As timm's Lamb and Adan: a group has a key more after the first step."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def two(optimizer: torch.optim.Optimizer) -> L.LRScheduler:
    return L.SequentialLR(optimizer, [L.ConstantLR(optimizer, 1.0, 0), L.ExponentialLR(optimizer, 0.9)], [2])


def three(optimizer: torch.optim.Optimizer) -> L.LRScheduler:
    parts = [L.ConstantLR(optimizer, 1.0, 0), L.ExponentialLR(optimizer, 0.9), L.ExponentialLR(optimizer, 0.5)]
    return L.SequentialLR(optimizer, parts, [2, 3])


def trained(folder: Path, **options) -> LocalTrainer:
    """A trainer after an epoch, whose checkpoint is in the folder."""
    trainer = small_trainer(rule="dgl", **options)
    trainer.fit(loader(), 1, checkpoint_dir=folder)
    return trainer


def without(path: Path, *parts: str) -> None:
    """Make a checkpoint one of the first, which lacked some parts."""
    state = torch.load(path)
    torch.save({key: value for key, value in state.items() if key not in parts}, path)


@pytest.mark.parametrize("first", [False, True], ids=["with names", "of the first"])
def test_optimizers_that_add_to_their_groups(tmp_path: Path, first: bool) -> None:
    make = functools.partial(Counting, lr=0.1)
    trained(tmp_path, optimizer=make)
    if first:
        without(tmp_path / CHECKPOINT_NAME, "classes")
    resumed = small_trainer(rule="dgl", optimizer=make)
    resumed.fit(loader(), 2, checkpoint_dir=tmp_path, resume=True)
    assert resumed.optimizers[0].param_groups[0]["step"] == 6


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"optimizer": AdamW}, {"optimizer": Adam}, "optimizer is AdamW, here it is Adam; use the optimizer"),
        (
            {"scheduler": lambda o: L.LambdaLR(o, lambda epoch: 0.5)},
            {"scheduler": lambda o: L.MultiplicativeLR(o, lambda epoch: 0.5)},
            "scheduler is LambdaLR, here it is MultiplicativeLR; use the scheduler",
        ),
        ({"scheduler": two}, {"scheduler": three}, "SequentialLR of ConstantLR, ExponentialLR, here it is"),
        ({"scheduler": three}, {"scheduler": two}, "here it is SequentialLR of ConstantLR, ExponentialLR; use"),
        (
            {"optimizer": lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:]}], lr=0.1)},
            {},
            "optimizer is no SGD over these parameters in these groups",
        ),
    ],
)
def test_optimizers_and_schedulers_of_another_class(tmp_path: Path, before: dict, after: dict, message: str) -> None:
    trained(tmp_path, **before)
    with pytest.raises(CheckpointError, match=message):
        small_trainer(rule="dgl", **after).load(tmp_path)


@pytest.mark.parametrize(("before", "after"), [(two, three), (three, two)])
def test_the_first_checkpoints_are_told_by_their_keys(tmp_path: Path, before, after) -> None:
    trained(tmp_path, scheduler=before)
    without(tmp_path / CHECKPOINT_NAME, "classes")
    small_trainer(rule="dgl", scheduler=before).load(tmp_path)
    with pytest.raises(CheckpointError, match="scheduler is no SequentialLR of ConstantLR, ExponentialLR"):
        small_trainer(rule="dgl", scheduler=after).load(tmp_path)
    with pytest.raises(CheckpointError, match="optimizer is no Adam over these"):
        small_trainer(rule="dgl", scheduler=before, optimizer=Adam).load(tmp_path)


def fail_once(monkeypatch, owner: object, name: str, error: type[BaseException] = IndexError) -> None:
    """The method does what it does, and fails in the end the first time."""
    method, calls = getattr(owner, name), []

    def call(*args):
        method(*args)
        calls.append(args)
        if len(calls) == 1:
            raise error("list index out of range")

    monkeypatch.setattr(owner, name, call)


def everything(trainer: LocalTrainer) -> list:
    """All that a step depends on, in a form to be compared."""
    steppers = [s.state_dict() for s in (*trainer.optimizers, *trainer.schedulers)]
    progress = [trainer.epoch, trainer.position, trainer.history, checkpoint.rng_state()]
    leaves = tree_leaves([trainer.persistent_tensors(), steppers, progress])
    return [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


@pytest.mark.parametrize("part", ["optimizers", "schedulers", "auxiliary", "totals", "rng", "progress"])
def test_a_load_that_fails_changes_nothing(tmp_path: Path, monkeypatch, part: str) -> None:
    """Wherever it fails: at an optimizer or scheduler, in the networks, at numbers that are not there."""
    options = {"order": "unlocked", "blocks": 2, "scheduler": two, "optimizer": Adam}
    trained(tmp_path, **options)
    trainer = small_trainer(rule="dgl", **options)
    torch.manual_seed(7)
    trainer.fit([(torch.rand(4, 3, 8, 8), torch.arange(4) % 4)] * 3, 1)  # other data, and so another state
    path = tmp_path / CHECKPOINT_NAME
    state = torch.load(path)
    if part == "auxiliary":
        fail_once(monkeypatch, trainer.network, "load_auxiliary_state_dict")
    elif part == "optimizers":
        fail_once(monkeypatch, trainer.optimizers[-1], "load_state_dict")
    elif part == "schedulers":  # of the class: an attribute of a scheduler is a part of its state
        fail_once(monkeypatch, L.SequentialLR, "load_state_dict")
    elif part == "progress":
        del state["progress"]["position"]
    else:
        state[part] = [None]
    torch.save(state, path)
    before = everything(trainer)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is of another training, as a part of it does not load"):
        trainer.load(path)
    assert everything(trainer) == before
    trainer.fit(loader(), 2)


def test_a_load_that_is_interrupted_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    trained(tmp_path)
    trainer = small_trainer(rule="dgl")
    fail_once(monkeypatch, trainer.network, "load_auxiliary_state_dict", KeyboardInterrupt)
    before = everything(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.load(tmp_path)
    assert everything(trainer) == before


def test_the_scale_of_fp16_goes_on(tmp_path: Path) -> None:
    first, second = trained(tmp_path, amp="fp16"), small_trainer(rule="dgl", amp="fp16")
    second.load(tmp_path)
    states = [trainer._local_step.scaler.state_dict() for trainer in (first, second)]
    assert states[0] == states[1]
    assert states[0] != small_trainer(rule="dgl", amp="fp16")._local_step.scaler.state_dict()


def test_a_training_writes_over_its_own_checkpoints_alone(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    trained(a)
    trained(b)
    (a / "copy.pt").write_bytes((a / CHECKPOINT_NAME).read_bytes())
    kept = (b / CHECKPOINT_NAME).read_bytes()
    message = "b/checkpoint.pt is the checkpoint of another training: continue it with resume=True"

    resumed = small_trainer(rule="dgl")
    for resume in (a, str(a / CHECKPOINT_NAME)):
        with pytest.raises(FileExistsError, match=message):
            resumed.fit(loader(), 2, resume=resume, checkpoint_dir=b)
        assert resumed.epoch == 0  # not even loaded

    in_two = trained(tmp_path / "c")
    saved = small_trainer(rule="dgl")
    saved.save(tmp_path / "anywhere.pt")
    for trainer in (in_two, saved):
        with pytest.raises(FileExistsError, match=message):
            trainer.fit(loader(), 2, checkpoint_dir=b)
    assert (b / CHECKPOINT_NAME).read_bytes() == kept

    # Its own, by whatever name: the one that was saved, the folder of a copy in it, and a second one, by its own path.
    saved.save(tmp_path / "c" / ".." / "c" / CHECKPOINT_NAME)
    saved.fit(loader(), 1, checkpoint_dir=tmp_path / "c")
    resumed.fit(loader(), 2, resume=a / "copy.pt", checkpoint_dir=a)
    assert len(resumed.fit(loader(), 3, checkpoint_dir=a)) == 3
    small_trainer(rule="dgl").fit(loader(), 2, resume=a, checkpoint_dir=tmp_path / "new")
