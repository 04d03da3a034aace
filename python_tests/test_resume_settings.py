"""Resuming with other settings: which come from where, and one warning that says so."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import without
from test_trainer import batch, loader, small_model
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as L

from manpp_kernels.checkpoint import CheckpointError
from manpp_kernels.trainer import CHECKPOINT_NAME, LocalTrainer, TrainerConfig


def trainer(optimizer=None, scheduler=None, criterion=None, **config) -> LocalTrainer:
    made = {"optimizer": optimizer, "scheduler": scheduler, "criterion": criterion}
    return LocalTrainer(small_model(), TrainerConfig(rule="dgl", blocks=2, **config), example=(3, 8, 8), **made)


def warned(folder: Path, **options) -> str | None:
    """What a trainer says when it loads the checkpoint, at most once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(**options).load(folder)
    assert [warning.filename for warning in caught] in ([], [__file__])  # where it was loaded
    return str(caught[0].message) if caught else None


def weight_decays(parameters: list) -> SGD:
    return SGD([{"params": parameters[:3], "weight_decay": 0.5}, {"params": parameters[3:]}], lr=0.1)


def warmup(optimizer: torch.optim.Optimizer, steps: int) -> L.SequentialLR:
    return L.SequentialLR(
        optimizer, [L.LinearLR(optimizer, 0.5, total_iters=steps), L.ExponentialLR(optimizer, 0.9)], [steps]
    )


class Targets(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((100,), weight))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, targets)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {"learning_rate": 0.1, "nesterov": True},
            {"learning_rate": 0.001, "nesterov": False, "clip_norm": 1.0, "accumulate": 2, "label_smoothing": 0.2},
            "the checkpoint's go on for SGD.lr 0.1 (here 0.001), SGD.nesterov True (here False); this trainer's hold "
            "for clip_norm 1.0 (there None), accumulate 2 (there 1), label_smoothing 0.2 (there 0.0)",
        ),
        (
            {"optimizer": weight_decays},
            {"optimizer": lambda p: SGD([{"params": p[:3]}, {"params": p[3:]}], lr=0.1)},
            "the checkpoint's go on for SGD.weight_decay [0.5, 0] (here 0)",
        ),
        (
            {"optimizer": functools.partial(AdamW, betas=(0.9, 0.99)), "order": "unlocked"},
            {"optimizer": functools.partial(AdamW, foreach=False), "order": "unlocked"},
            "the checkpoint's go on for AdamW.betas [0.9, 0.99] (here [0.9, 0.999])",
        ),
        (
            {"scheduler": lambda o: L.CosineAnnealingLR(o, 2)},
            {"scheduler": lambda o: L.CosineAnnealingLR(o, 6)},
            "the checkpoint's go on for CosineAnnealingLR.T_max 2 (here 6)",
        ),
        (
            {"scheduler": lambda o: L.OneCycleLR(o, 0.1, total_steps=9), "schedule": "step"},
            {"scheduler": lambda o: L.OneCycleLR(o, 0.2, total_steps=90), "schedule": "step"},
            "SGD.max_lr 0.1 (here 0.2), SGD.min_lr 4e-07 (here 8e-07), OneCycleLR.total_steps 9 (here 90)",
        ),
        (
            {"scheduler": functools.partial(warmup, steps=2)},
            {"scheduler": functools.partial(warmup, steps=3)},
            "the checkpoint's go on for SequentialLR.milestones [2] (here [3]), LinearLR.total_iters 2 (here 3)",
        ),
        (
            {"criterion": nn.CrossEntropyLoss(ignore_index=3)},
            {"criterion": nn.MultiMarginLoss()},
            "this trainer's hold for criterion MultiMarginLoss(reduction='mean', p=1, margin=1.0) (there "
            "CrossEntropyLoss(reduction='mean', ignore_index=3, label_smoothing=0.0))",
        ),
        (
            {"criterion": nn.CrossEntropyLoss(torch.ones(4))},
            {"criterion": nn.CrossEntropyLoss(torch.tensor([9.0, 1, 1, 1]))},
            "weight=[9.0, 1.0, 1.0, 1.0]) (there CrossEntropyLoss(",
        ),
        (
            {"criterion": nn.functional.cross_entropy},
            {"channels_last": True, "recompute": True, "measure_memory": False},
            None,
        ),
        ({"criterion": Targets(1.0)}, {"criterion": Targets(2.0)}, "weight=100 numbers with the sum 200) (there "),
        ({"optimizer": AdamW}, {"optimizer": functools.partial(AdamW, foreach=False)}, None),
        ({"learning_rate": np.float64(0.1)}, {"learning_rate": 0.1}, None),
    ],
    ids=[
        *("config", "groups", "betas", "cosine", "one cycle", "sequential", "criterion", "class weights", "harmless"),
        *("many numbers", "how it is computed", "NumPy's number"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_one_warning_names_what_differs(tmp_path: Path, before: dict, after: dict, message: str | None) -> None:
    trainer(**before).fit(loader(), 1, checkpoint_dir=tmp_path)
    assert warned(tmp_path, **before) is None
    found = warned(tmp_path, **after)
    if message is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith("the checkpoint is of a training with other settings: ")
        assert message in found
    without(tmp_path / CHECKPOINT_NAME, "settings")
    assert warned(tmp_path, **after) is None  # of the first checkpoints nothing is known


def test_what_is_said_is_what_happens(tmp_path: Path) -> None:
    trainer(learning_rate=0.1).fit(loader(), 1, checkpoint_dir=tmp_path)
    resumed = trainer(learning_rate=0.001, clip_norm=1.0)
    message = r"go on for SGD\.lr 0\.1 \(here 0\.001\); this trainer's hold for clip_norm 1\.0"
    with pytest.warns(UserWarning, match=message):
        resumed.fit(loader(), 2, checkpoint_dir=tmp_path, resume=True)
    assert [row["lr"] for row in resumed.history] == [0.1, 0.1]
    # As the next checkpoint has it: the learning rate that went on, and the norm that held.
    found = warned(tmp_path, learning_rate=0.001)
    assert found is not None
    assert "SGD.lr 0.1 (here 0.001); this trainer's hold for clip_norm None (there 1.0)" in found
    # How docs/training.md changes the learning rate.
    again = trainer(learning_rate=0.1, clip_norm=1.0)
    again.load(tmp_path)
    for optimizer in again.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.01
    assert again.fit(loader(), 3, checkpoint_dir=tmp_path)[-1]["lr"] == 0.01
    assert warned(tmp_path, learning_rate=0.01, clip_norm=1.0) is None


def test_a_schedule_that_goes_on_is_that_of_the_next_checkpoint(tmp_path: Path) -> None:
    cosines: list[Callable] = [functools.partial(L.CosineAnnealingLR, T_max=n) for n in (2, 6)]
    trainer(scheduler=cosines[0]).fit(loader(), 1, checkpoint_dir=tmp_path)
    resumed = trainer(scheduler=cosines[1])
    with pytest.warns(UserWarning, match=r"T_max 2 \(here 6\)"):
        resumed.fit(loader(), 2, checkpoint_dir=tmp_path, resume=True)
    assert warned(tmp_path, scheduler=cosines[0]) is None


def test_a_schedule_that_counts_something_else(tmp_path: Path) -> None:
    cosine: Callable = functools.partial(L.CosineAnnealingLR, T_max=4)
    trainer(scheduler=cosine).fit(loader(), 1, checkpoint_dir=tmp_path)
    other = trainer(scheduler=cosine, schedule="step")
    with pytest.raises(CheckpointError, match="training with schedule='epoch', here it is 'step'"):
        other.load(tmp_path)
    assert other.epoch == 0


class Growing:
    """A loader with a batch more in every epoch, as those that sort images by their size may have."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 + self.epoch

    def __iter__(self) -> Iterator:
        return (batch() for _ in range(len(self)))


def test_a_loader_whose_length_is_that_of_the_epoch(tmp_path: Path) -> None:
    def interrupt(trainer, result) -> None:
        if (trainer.epoch, trainer.position) == (1, 2):
            raise KeyboardInterrupt

    first, growing = trainer(), Growing()
    first.fit(growing, 2, on_step=interrupt, checkpoint_dir=tmp_path)
    assert (first.epoch, first.position) == (1, 2)
    resumed = trainer()
    resumed.fit(Growing(), 3, checkpoint_dir=tmp_path, resume=True)
    first.fit(growing, 3)
    assert first.epoch == resumed.epoch == 3


def test_a_loader_of_another_length(tmp_path: Path) -> None:
    def interrupt(trainer, result) -> None:
        if trainer.position == 2:
            raise KeyboardInterrupt

    first = trainer()
    first.fit(loader(24, 8), 1, on_step=interrupt, checkpoint_dir=tmp_path)
    message = "2 of the 3 batches of this epoch are done, and the loader has 6"
    with pytest.raises(CheckpointError, match=message):
        first.fit(loader(24, 4), 1)
    resumed = trainer()
    resumed.load(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        resumed.fit(loader(24, 4), 1)
    with pytest.raises(CheckpointError, match=message):
        trainer().fit(loader(24, 4), 1, checkpoint_dir=tmp_path, resume=True)
    resumed.fit(loader(24, 8), 1, checkpoint_dir=tmp_path)
    resumed.fit(loader(24, 4), 2, checkpoint_dir=tmp_path)  # a new epoch may be another
    resumed.fit((batch() for _ in range(3)), 3, checkpoint_dir=tmp_path)  # and have no length
    assert resumed.epoch == 3


def test_numpys_numbers_are_the_same_as_pythons(tmp_path: Path) -> None:
    """They are accepted, as of a sweep over an array, and written as text."""
    options = {"rule": "man++", "rule_options": {"momentum": 0.5, "auxiliary_depth": 1}, "accumulate": 2}
    theirs = {"rule": "man++", "rule_options": {"momentum": np.float64(0.5), "auxiliary_depth": np.int64(1)}}
    first = LocalTrainer(small_model(), TrainerConfig(**theirs, accumulate=np.int64(2)), example=(3, 8, 8))
    first.save(tmp_path / CHECKPOINT_NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocalTrainer(small_model(), TrainerConfig(**options), example=(3, 8, 8)).load(tmp_path)
