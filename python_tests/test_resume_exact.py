"""Resuming is exact whatever ended a run: a validation that failed, a callback, a crash after either."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from test_checkpoint import assert_equal, make_loader, make_trainer, seed_everything
from test_trainer import batch, loader, small_model, small_trainer
from torch.utils.data import DataLoader

from manpp_kernels.trainer import CHECKPOINT_NAME, LocalTrainer, TrainerConfig

Adam = functools.partial(torch.optim.Adam, lr=0.01)


class Crash(Exception):
    pass


class Fragile:
    """A loader whose epoch of this number breaks off; like one of workers, it draws from the global generator."""

    def __init__(self, fails_in: int | None = None) -> None:
        self.fails_in, self.epoch = fails_in, 0

    def __iter__(self):
        self.epoch += 1
        torch.rand(1)
        yield batch()
        if self.epoch == self.fails_in:
            raise Crash


@pytest.mark.parametrize("kind", ["global", "own"])
@pytest.mark.filterwarnings("ignore:Detected call of")  # an epoch that is resumed after its last step only ends
def test_an_epoch_is_not_lost_where_its_validation_fails(tmp_path: Path, kind: str) -> None:
    whole, first, second = make_trainer(), make_trainer(), make_trainer(seed=9)
    seed_everything()
    whole.fit(make_loader(kind), 3, val_loader=Fragile())
    seed_everything()
    with pytest.raises(Crash):
        first.fit(make_loader(kind), 3, val_loader=Fragile(2), checkpoint_dir=tmp_path)
    assert (first.epoch, first.position, len(first.history)) == (1, 5, 1)

    steps = []
    second.load(tmp_path / CHECKPOINT_NAME)
    assert (second.epoch, second.position) == (1, 5)
    history = second.fit(make_loader(kind), 3, val_loader=Fragile(), on_step=lambda t, r: steps.append(t.epoch))
    assert steps == [2] * 5
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert_equal(whole, second)


@pytest.mark.parametrize("kind", ["global", "own"])
def test_a_trainer_goes_on_after_a_validation_that_failed(kind: str) -> None:
    whole, parted = make_trainer(), make_trainer()
    seed_everything()
    whole.fit(make_loader(kind), 2, val_loader=Fragile())
    seed_everything()
    train = make_loader(kind)
    with pytest.raises(Crash):
        parted.fit(train, 2, val_loader=Fragile(1))
    parted.fit(train, 2, val_loader=Fragile())
    assert_equal(whole, parted)


def test_what_cannot_go_well_shows_before_the_first_step(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for options, error, message in (
        ({"checkpoint_dir": file}, OSError, r"no checkpoint can be written to .*file \(.*\); choose another folder"),
        ({"checkpoint_dir": file / "below"}, OSError, r"no checkpoint can be written to .*below \(Not a directory\)"),
        ({"val_loader": []}, ValueError, "val_loader has no batch to evaluate"),
        ({"val_loader": DataLoader([])}, ValueError, "val_loader has no batch to evaluate"),
    ):
        trainer, steps = small_trainer(rule="dgl"), []
        with pytest.raises(error, match=message):
            trainer.fit(loader(), 1, on_step=lambda *_, steps=steps: steps.append(1), **options)
        assert steps == []
    folder = tmp_path / "a" / "b"
    small_trainer(rule="dgl").fit(loader(), 1, checkpoint_dir=folder)
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT_NAME]


def test_a_folder_that_cannot_be_written_to_shows_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    def refuse(**_) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    trainer = small_trainer(rule="dgl")
    with pytest.raises(
        OSError, match=r"no checkpoint can be written to .* \(Permission denied\); choose another folder"
    ):
        trainer.fit(loader(), 1, checkpoint_dir=tmp_path)
    assert trainer.position == 0


def test_a_checkpoint_saved_again_before_any_step_is_the_same(tmp_path: Path) -> None:
    """The generators of a loader that the trainer has not seen yet are in it, too."""
    whole, first, second, third = make_trainer(), make_trainer(), make_trainer(seed=8), make_trainer(seed=9)
    seed_everything()
    whole.fit(make_loader("own"), 2)
    seed_everything()
    first.fit(make_loader("own"), 1, checkpoint_dir=tmp_path)
    second.load(tmp_path)
    second.save(tmp_path / "again.pt")
    third.fit(make_loader("own"), 2, resume=tmp_path / "again.pt")
    assert_equal(whole, third)


def test_an_epoch_goes_on_that_had_no_batch_at_first(tmp_path: Path) -> None:
    whole, first, second = make_trainer(), make_trainer(), make_trainer(seed=9)
    seed_everything()
    whole.fit(make_loader("own"), 1)
    with pytest.raises(ValueError, match="gave no batch"):
        first.fit(iter([]), 1)
    seed_everything()

    def interrupt(trainer, result) -> None:
        if trainer.position == 2:
            raise KeyboardInterrupt

    first.fit(make_loader("own"), 1, on_step=interrupt, checkpoint_dir=tmp_path)
    second.fit(make_loader("own"), 1, resume=tmp_path)
    assert_equal(whole, second)


def lower(trainer, row) -> None:
    """A learning rate set by hand, a row that is added to, and random numbers."""
    for group in trainer.optimizers[0].param_groups:
        group["lr"] *= 0.1
    row["note"] = torch.rand(()).item()


def test_what_a_callback_changes_is_in_the_checkpoint_of_its_epoch(tmp_path: Path) -> None:
    whole, first, second = (small_trainer(rule="dgl", optimizer=Adam) for _ in range(3))
    seed_everything()
    whole.fit(make_loader("global"), 3, on_epoch=lower)
    seed_everything()

    def crash(trainer, result) -> None:
        if trainer.epoch == 1:
            raise Crash

    with pytest.raises(Crash):
        first.fit(make_loader("global"), 3, on_epoch=lower, on_step=crash, checkpoint_dir=tmp_path)
    second.fit(make_loader("global"), 3, on_epoch=lower, checkpoint_dir=tmp_path, resume=True)
    assert [row["lr"] for row in second.history] == [row["lr"] for row in whole.history]
    assert_equal(whole, second)


@pytest.mark.parametrize("error", [Crash, SystemExit])
def test_an_epoch_is_not_lost_where_its_callback_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def crash(trainer, row) -> None:
        raise error

    with pytest.raises(error):
        make_trainer().fit(make_loader("global"), 2, on_epoch=crash, checkpoint_dir=tmp_path)
    resumed = make_trainer()
    resumed.load(tmp_path)
    assert (resumed.epoch, resumed.position) == (1, 0)


@pytest.mark.parametrize("fails", ["validation", "callback"])
def test_a_subclass_saves_in_its_own_way_where_an_epoch_fails(tmp_path: Path, fails: str) -> None:
    class Noting(LocalTrainer):
        def save(self, path: str | Path) -> None:
            super().save(path)
            Path(path).with_name("note").write_text(f"{self.epoch} {self.position}")

    def crash(trainer, row) -> None:
        raise Crash

    trainer = Noting(small_model(), TrainerConfig(rule="dgl"), example=(3, 8, 8))
    options = {"on_epoch": crash} if fails == "callback" else {"val_loader": Fragile(1)}
    with pytest.raises(Crash):
        trainer.fit([batch()], 1, checkpoint_dir=tmp_path, **options)
    assert (tmp_path / "note").read_text() == ("1 0" if fails == "callback" else "0 1")


@pytest.mark.parametrize("stop", [0, 2])  # after the first epoch, in the middle of the second
@pytest.mark.parametrize("training_workers", [0, 1])
def test_validation_loaders_with_workers_that_persist(tmp_path: Path, training_workers: int, stop: int) -> None:
    """They draw a random number before the first validation, and not again."""
    data = make_loader("global").dataset

    def loaders() -> tuple[DataLoader, DataLoader]:
        training = {"num_workers": training_workers, "persistent_workers": training_workers > 0}
        return (
            DataLoader(data, batch_size=4, shuffle=True, **training),
            DataLoader(data, batch_size=20, num_workers=1, persistent_workers=True),
        )

    def fit(trainer: LocalTrainer, epochs: int = 3, **options) -> None:
        loader, val_loader = loaders()
        trainer.fit(loader, epochs, val_loader=val_loader, **options)

    def interrupt(trainer, result) -> None:
        if (trainer.epoch, trainer.position) == (1, stop):
            raise KeyboardInterrupt

    whole, first, second = make_trainer("dgl"), make_trainer("dgl"), make_trainer("dgl", seed=9)
    seed_everything()
    fit(whole)
    seed_everything()
    fit(first, 2 if stop else 1, checkpoint_dir=tmp_path, on_step=interrupt)
    assert (first.epoch, first.position) == (1, stop)
    fit(second, checkpoint_dir=tmp_path, resume=True)
    assert_equal(whole, second)


def test_validating_leaves_the_training_as_it_is() -> None:
    validated, alone = make_trainer(), make_trainer()
    seed_everything()
    validated.fit(make_loader("global"), 2, val_loader=Fragile())
    seed_everything()
    alone.fit(make_loader("global"), 2)
    for a, b in zip(validated.persistent_tensors(), alone.persistent_tensors(), strict=True):
        assert torch.equal(a, b)
