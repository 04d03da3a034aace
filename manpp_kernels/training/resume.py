"""What a trainer keeps in its checkpoints, which files those are, and how it goes on from one."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from manpp_kernels import checkpoint
from manpp_kernels.checkpoint import CheckpointError
from manpp_kernels.local.network import LocalNetwork
from manpp_kernels.local.options import check_count
from manpp_kernels.training.group import Alone
from manpp_kernels.training.progress import Progress
from manpp_kernels.training.resume_checks import check_fits, check_kind, classes
from manpp_kernels.training.resume_settings import Settings, check_schedule, differences, optimizer_settings

CHECKPOINT_NAME = "checkpoint.pt"


class TrainingState:
    """All that the next step of a training depends on: what a checkpoint holds."""

    def __init__(
        self,
        network: LocalNetwork,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[LRScheduler],
        scaler: torch.amp.GradScaler,
        progress: Progress,
    ) -> None:
        self.network, self.model = network, network.partition.model
        self.optimizers, self.schedulers = optimizers, schedulers
        self.scaler, self.progress = scaler, progress

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Those of the networks, which are the trainer's own."""
        return {"model": self.model.state_dict(), "auxiliary": self.network.auxiliary_state_dict()}

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.tensors(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [s.state_dict() for s in self.schedulers],
            "scaler": self.scaler.state_dict(),
            **self.progress.state_dict(),
        }

    def copied(self) -> dict[str, Any]:
        """A state to go back to, whatever loading another does; of the networks, which it writes into, a copy."""
        state = self.state_dict()
        for part in self.tensors():
            state[part] = {key: _copy(value) for key, value in state[part].items()}
        # Loading replaces an optimizer's tensors, and a scheduler's numbers may be lists.
        state["schedulers"] = copy.deepcopy(state["schedulers"])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        steppers: list[Any] = [*self.optimizers, *self.schedulers]
        for stepper, loaded in zip(steppers, [*state["optimizers"], *state["schedulers"]], strict=True):
            stepper.load_state_dict(loaded)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.model.load_state_dict(state["model"])
        self.network.load_auxiliary_state_dict(state["auxiliary"])
        self.progress.load_state_dict(state)


class Checkpoints:
    """The checkpoint files of one training.

    Args:
        state: what they hold.
        kind: what has to agree where one is loaded: rule, blocks, order and the like.
        settings: what the training was made with, of which a difference is only shown.
        ranks: which train together.
    """

    def __init__(self, state: TrainingState, kind: Mapping[str, object], settings: Settings, ranks: Alone) -> None:
        self._state, self._kind, self._settings, self._ranks = state, kind, settings, ranks
        self._own: set[Path] = set()  # this training's, which may be written over; resolved

    def save(self, path: str | Path) -> None:
        """See :meth:`manpp_kernels.trainer.LocalTrainer.save`."""
        state, own = self._state.state_dict(), self._state
        if not own.schedulers:  # a rate that was set since goes on; one that a scheduler moves is no setting
            self._settings["loaded"] |= optimizer_settings(own.optimizers)
        state.update(kind=self._kind, classes=classes(own.optimizers, own.schedulers), settings=self._settings)
        state.update({part: self._ranks.to_first(state[part]) for part in self._ranks.parts})
        self._ranks.first(lambda: checkpoint.write(path, state))
        self._own.add(Path(path).resolve())

    def load(self, path: str | Path) -> None:
        """See :meth:`manpp_kernels.trainer.LocalTrainer.load`, which has to be what calls this."""
        file, own = _file_of(path), self._state
        state = checkpoint.read(file)
        check_kind(state, self._kind, self._ranks.parts, self._ranks.count)
        state.update({part: state[part][self._ranks.rank] for part in self._ranks.parts})
        check_fits(state, own.tensors(), own.schedulers, own.optimizers)
        settings = state.get("settings")
        check_schedule(settings, self._settings)
        different = differences(settings, self._settings)
        if different is not None and self._ranks.rank == 0:
            warnings.warn(different, stacklevel=3)  # where the trainer's load was called
        before = own.copied()
        try:
            own.load_state_dict(state)
        except BaseException as error:
            own.load_state_dict(before)
            if not isinstance(error, Exception):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{file} is of another training, as a part of it does not load here ({type(error).__name__}: {reason})"
                "; use the model, optimizer and scheduler that it was written with"
            ) from error
        own.progress.resume_from(state["rng"])
        self._own |= _continued(file)
        if settings is not None:
            self._settings = {**self._settings, "loaded": settings["loaded"]}

    def place(self, folder: str | Path | None, every: int | None, resume: bool | str | Path) -> Path | None:
        """Where ``fit`` keeps its checkpoint, if anywhere; raises where one of another training would be lost."""
        path = Path(folder) / CHECKPOINT_NAME if folder is not None else None
        if every is not None and path is None:
            raise ValueError("checkpoint_every says how often checkpoint_dir is written to; give checkpoint_dir too")
        if every is not None:
            check_count("checkpoint_every", every)
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

    @contextlib.contextmanager
    def kept_in(self, path: Path | None, save: Callable[[Path], None]) -> Iterator[None]:
        """What was trained is in the checkpoint, if there is to be one, where what is inside fails.

        It is written by ``save``, the trainer's, which a subclass may have made more of.
        """
        if path is not None and self._ranks.count > 1:  # which could not agree on it afterwards
            save(path)
        try:
            yield
        except BaseException:
            if path is not None and self._ranks.count == 1:
                save(path)
            raise


def _file_of(path: str | Path) -> Path:
    """The checkpoint of which this is the path, or the folder."""
    return Path(path) / CHECKPOINT_NAME if Path(path).is_dir() else Path(path)


def _continued(file: Path) -> set[Path]:
    """The checkpoints that belong to who continues from ``file``: of a copy in a run's folder, the run's own too."""
    return {file.resolve(), file.resolve().with_name(CHECKPOINT_NAME)}


def _copy(value: Any) -> Any:
    """On the CPU, as memory of the device may be short."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
