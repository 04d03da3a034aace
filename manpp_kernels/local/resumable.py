"""What a trainer keeps in its checkpoints, and how it goes on from one."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from manpp_kernels import checkpoint
from manpp_kernels.checkpoint import CheckpointError
from manpp_kernels.local.agreement import check_fits, classes
from manpp_kernels.local.config import TrainerConfig
from manpp_kernels.local.epoch import EpochTotals, batches_from, length_of, set_epoch
from manpp_kernels.local.network import LocalNetwork
from manpp_kernels.local.replicas import Alone, Replicas
from manpp_kernels.local.settings import Settings, check_schedule, differences, optimizer_settings

CHECKPOINT_NAME = "checkpoint.pt"
_PROGRESS = {"epoch": "epoch", "position": "position", "ended": "_ended", "batches": "_epoch_length"}
# What every rank has its own of.
_OF_A_RANK = ("totals", "epoch_start", "rng")


class Resumable:
    """The half of ``LocalTrainer`` that writes and reads checkpoints; the attributes are the trainer's."""

    model: nn.Module
    config: TrainerConfig
    network: LocalNetwork
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[LRScheduler]
    epoch: int
    position: int
    history: list[dict[str, Any]]
    _scaler: torch.amp.GradScaler
    _ranks: Replicas | Alone
    _totals: EpochTotals
    _ended: bool  # whether the epoch has no more batches, and only its validation is to come
    _epoch_start: dict[str, Any] | None  # the generators at the start of the current epoch
    _loaded_rng: dict[str, Any] | None  # from a checkpoint, until fit has the loader's generators
    _generators: list[torch.Generator]
    _epoch_length: int | None  # batches of the current epoch, where the loader says so
    _settings: Settings
    _evaluate: Callable[[Iterable[Any]], EpochTotals]
    _own: set[Path]  # the checkpoints that are this training's, and may be written over; resolved

    def save(self, path: str | Path) -> None:
        """Write a checkpoint atomically: all that the next step depends on, by rank 0 for all ranks."""
        state = self._state()
        if (
            not self.schedulers
        ):  # a rate that was set since is what goes on; one that a scheduler moves is not a setting
            self._settings["loaded"] |= optimizer_settings(self.optimizers)
        # Each rank's own: the sums of the epoch so far, and random numbers.
        state.update({part: self._ranks.gather(state[part]) for part in _OF_A_RANK})
        state.update(kind=self._kind(), classes=classes(self.optimizers, self.schedulers), settings=self._settings)
        self._ranks.first(lambda: checkpoint.write(path, state))
        self._own.add(Path(path).resolve())

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint of :meth:`save`, of the same rule, network, blocks and optimizer.

        The numbers of optimizers and schedulers, such as a learning rate, are then the checkpoint's, and all others
        those that this trainer was made with; one warning names what differs.

        Args:
            path: the checkpoint, or the folder that ``fit`` wrote it to.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: the file is damaged, foreign, or of another training. Nothing was changed.
        """
        file = _file_of(path)
        state = checkpoint.read(file)
        check_fits(state, self._kind(), self._tensors(), self.schedulers, self.optimizers)
        settings = state.get("settings")
        check_schedule(settings, self._settings)
        different = differences(settings, self._settings)
        if different is not None and self._ranks.rank == 0:
            warnings.warn(different, stacklevel=2)
        before = self._kept()
        try:
            state.update({part: state[part][self._ranks.rank] for part in _OF_A_RANK})
            self._set_state(state)
        except BaseException as error:
            self._set_state(before)
            if not isinstance(error, Exception):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{file} is of another training, as a part of it does not load here ({type(error).__name__}: {reason})"
                "; use the model, optimizer and scheduler that it was written with"
            ) from error
        # The loader's own generators follow in fit, which has the loader.
        self._loaded_rng = state["rng"]
        self._own |= _continued(file)
        if settings is not None:
            self._settings = {**self._settings, "loaded": settings["loaded"]}

    def _state(self) -> dict[str, Any]:
        """What changes in the course of a training; the tensors are the trainer's own."""
        return {
            **self._tensors(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [s.state_dict() for s in self.schedulers],
            "scaler": self._scaler.state_dict(),
            "progress": {name: getattr(self, attribute) for name, attribute in _PROGRESS.items()},
            "totals": self._totals.numbers(),
            "history": self.history,
            "epoch_start": self._epoch_start,
            "rng": self._rng_state(),
        }

    def _kept(self) -> dict[str, Any]:
        """A state to go back to, whatever loading another does; of the networks, which it writes into, a copy."""
        state = self._state()
        for part in self._tensors():
            state[part] = {key: _copy(value) for key, value in state[part].items()}
        # Loading replaces an optimizer's tensors, and a scheduler's numbers may be lists.
        state["schedulers"] = copy.deepcopy(state["schedulers"])
        return state

    def _set_state(self, state: dict[str, Any]) -> None:
        """Go to a state of :meth:`_state`."""
        totals = EpochTotals(**state["totals"])
        steppers: list[Any] = [*self.optimizers, *self.schedulers]
        for stepper, loaded in zip(steppers, [*state["optimizers"], *state["schedulers"]], strict=True):
            stepper.load_state_dict(loaded)
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self.model.load_state_dict(state["model"])
        self.network.load_auxiliary_state_dict(state["auxiliary"])
        checkpoint.set_rng_state({**state["rng"], "generators": []})
        progress = {"ended": False, "batches": None, **state["progress"]}  # which the first checkpoints had not
        for name, attribute in _PROGRESS.items():
            setattr(self, attribute, progress[name])
        self._totals, self.history, self._epoch_start = totals, state["history"], state["epoch_start"]

    def _begin(
        self,
        loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        folder: str | Path | None,
        every: int | None,
        resume: bool | str | Path,
    ) -> Path | None:
        """What ``fit`` does before its first step, where all shows that could only fail later; its checkpoint."""
        path = self._checkpoint_file(folder, every, resume)
        if val_loader is not None and length_of(val_loader) == 0:
            raise ValueError("val_loader has no batch to evaluate; give it images, or None for no validation")
        if resume:
            self.load(path if resume is True and path is not None else str(resume))
        if path is not None:
            self._ranks.first(functools.partial(checkpoint.check_place, path))
        self._generators = checkpoint.loader_generators(loader)
        return path

    def _check_length(self, batches: int | None) -> None:
        """Raise where the rest of an epoch would be that of another loader; None is a length that is not known."""
        if self.position > 0 and None not in (batches, self._epoch_length) and batches != self._epoch_length:
            raise CheckpointError(
                f"{self.position} of the {self._epoch_length} batches of this epoch are done, and the loader has "
                f"{batches}, so that the rest would be another's; go on with the same data and batch size"
            )
        self._epoch_length = batches

    def _batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The rest of the epoch's batches."""
        set_epoch(loader, self.epoch)
        self._check_length(length_of(loader))
        resumed = self._loaded_rng is not None
        now, self._loaded_rng = self._loaded_rng or self._rng_state(), None
        if self.position == 0:
            self._epoch_start = now
        ended, self._ended = self._ended, False
        start, at = self._epoch_start, (self.epoch, self.position)
        return batches_from(loader, *at, start, now, self._generators, resumed=resumed, ended=ended)

    def _validate(self, loader: Iterable[Any], path: Path | None) -> EpochTotals:
        """Evaluate after an epoch; where that fails, the epoch is in the checkpoint, and is validated on resuming."""
        # Whatever it draws is not missed in the training: the workers of a loader, new or persistent, among it.
        with self._kept_in(path), checkpoint.kept_rng_state(self._generators):
            totals = self._evaluate(loader)
        return self._ranks.totals(totals)

    @contextlib.contextmanager
    def _kept_in(self, path: Path | None) -> Iterator[None]:
        """What was trained is in the checkpoint, if there is to be one, where what is inside fails."""
        if path is not None and self._ranks.count > 1:  # which could not agree on it afterwards
            self.save(path)
        try:
            yield
        except BaseException:
            if path is not None and self._ranks.count == 1:
                self.save(path)
            raise

    def _checkpoint_file(self, folder: str | Path | None, every: int | None, resume: bool | str | Path) -> Path | None:
        """Where ``fit`` keeps its checkpoint, if anywhere; raises where one of another training would be lost."""
        path = Path(folder) / CHECKPOINT_NAME if folder is not None else None
        if every is not None and path is None:
            raise ValueError("checkpoint_every says how often checkpoint_dir is written to; give checkpoint_dir too")
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every has to be 1 step or more, and is {every}")
        if resume is True and path is None:
            raise ValueError("resume=True continues from checkpoint_dir; give checkpoint_dir, or the path to resume")
        source = path if resume is True else _file_of(resume) if resume else None
        own = self._own if source is None else self._own | _continued(source)
        if path is not None and path.exists() and path.resolve() not in own:
            raise FileExistsError(
                f"{path} is the checkpoint of another training: continue it with resume=True, or choose another "
                "checkpoint_dir"
            )
        return path

    def _rng_state(self) -> dict[str, Any]:
        if self._loaded_rng is None:
            return checkpoint.rng_state(self._generators)
        # Loaded, and the loader not seen yet: its generators are where the checkpoint has them.
        return {**checkpoint.rng_state(), "generators": self._loaded_rng["generators"]}

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": self.model.state_dict(), "auxiliary": self.network.auxiliary_state_dict()}

    def _kind(self) -> dict[str, object]:
        described = self.network.describe()
        return {**described, "order": self.config.order, "amp": self.config.amp, "ranks": self._ranks.count}


def _file_of(path: str | Path) -> Path:
    """The checkpoint of which this is the path, or the folder."""
    return Path(path) / CHECKPOINT_NAME if Path(path).is_dir() else Path(path)


def _continued(file: Path) -> set[Path]:
    """The checkpoints that belong to who continues from ``file``: of a copy in a run's folder, the run's own too."""
    return {file.resolve(), file.resolve().with_name(CHECKPOINT_NAME)}


def _copy(value: Any) -> Any:
    """On the CPU, as memory of the device may be short."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
