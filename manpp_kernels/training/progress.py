"""How far ``LocalTrainer.fit`` is, down to the batch and the random numbers, and the batches from there on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from manpp_kernels import checkpoint
from manpp_kernels.checkpoint import CheckpointError
from manpp_kernels.training.epoch import EpochTotals


class Progress:
    """How far a training is.

    Attributes:
        epoch, position: epochs done, and batches done of the current one.
        history: a row for each epoch done.
        totals: the sums of the current epoch so far.
        ended: whether the current epoch has no more batches, and only its validation is to come.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.position = 0
        self.history: list[dict[str, Any]] = []
        self.totals = EpochTotals()
        self.ended = False
        self._length: int | None = None  # batches of the current epoch, where the loader says so
        self._start: dict[str, Any] | None = None  # the random numbers at the start of the current epoch
        self._loaded: dict[str, Any] | None = None  # those of a checkpoint, until there are batches to go on with
        self._generators: list[torch.Generator] = []  # of the loader

    def use(self, loader: Iterable[Any]) -> None:
        """Count the generators that ``loader`` draws from among the random numbers."""
        self._generators = checkpoint.loader_generators(loader)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The rest of the epoch's batches, as if those before had just been used.

        The loader is started again with the generators as they were at the epoch's start, so that it draws the same
        order; the batches already used are drawn and dropped; then the generators are put where they are now.

        Raises:
            CheckpointError: the loader has another number of batches, or of generators, than that of the batches done.
            ValueError: it ends before the batches that are done.
        """
        set_epoch(loader, self.epoch)
        self._check_length(length_of(loader))
        resumed, now, self._loaded = self._loaded is not None, self._loaded or self._rng_state(), None
        ended, self.ended = self.ended, False
        fresh = isinstance(loader, DataLoader) and loader.persistent_workers and loader._iterator is None
        if resumed and self.epoch > 0 and fresh:
            # Its workers were there before this epoch, and with them the random number that the loader draws for them.
            iter(loader)
        if self.position == 0 or self._start is None:
            if self.position == 0:
                self._start = now
            checkpoint.set_rng_state(now, self._generators)
            yield from loader
            return
        checkpoint.set_rng_state(self._start, self._generators)
        iterator = iter(loader)
        for done in range(self.position):
            if next(iterator, None) is None:
                raise ValueError(
                    f"{self.position} batches of this epoch are done, and the loader has only {done}: another loader"
                )
        checkpoint.set_rng_state(now, self._generators)
        if not ended:  # at its end a sampler may draw once more
            yield from iterator

    def _check_length(self, batches: int | None) -> None:
        """Raise where the rest of an epoch would be that of another loader; None is a length that is not known."""
        if self.position > 0 and None not in (batches, self._length) and batches != self._length:
            raise CheckpointError(
                f"{self.position} of the {self._length} batches of this epoch are done, and the loader has "
                f"{batches}, so that the rest would be another's; go on with the same data and batch size"
            )
        self._length = batches

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """The current epoch is done, with this row of the history."""
        self.history.append(row)
        self.epoch, self.position, self.ended = self.epoch + 1, 0, False
        self.totals, self._start = EpochTotals(), None

    def kept_rng_state(self) -> contextlib.AbstractContextManager[None]:
        """What is drawn inside is not missed in the training: workers of a loader, new or persistent, draw too."""
        return checkpoint.kept_rng_state(self._generators)

    def _rng_state(self) -> dict[str, Any]:
        if self._loaded is None:
            return checkpoint.rng_state(self._generators)
        # Loaded, and the loader not seen yet: its generators are where the checkpoint has them.
        return {**checkpoint.rng_state(), "generators": self._loaded["generators"]}

    def state_dict(self) -> dict[str, Any]:
        """All of it, as the parts of a checkpoint."""
        return {
            "progress": {
                "epoch": self.epoch,
                "position": self.position,
                "ended": self.ended,
                "batches": self._length,
            },
            "totals": self.totals.numbers(),
            "history": self.history,
            "epoch_start": self._start,
            "rng": self._rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a state of :meth:`state_dict`, but for the loader's own generators, which follow in :meth:`batches`."""
        totals, progress = EpochTotals(**state["totals"]), state["progress"]
        checkpoint.set_rng_state({**state["rng"], "generators": []})
        self.epoch, self.position = progress["epoch"], progress["position"]
        self.ended, self._length = progress.get("ended", False), progress.get("batches")  # the first have none
        self.totals, self.history, self._start = totals, state["history"], state["epoch_start"]

    def resume_from(self, rng: dict[str, Any]) -> None:
        """Have the next batches begin with the random numbers of a checkpoint, the loader's among them."""
        self._loaded = rng


def length_of(loader: Iterable[Any]) -> int | None:
    """How many batches it has, where it says so."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tell a loader and its samplers, where they ask for it, how many epochs are done."""
    for owner in checkpoint.loader_and_samplers(loader):
        tell = getattr(owner, "set_epoch", None)
        if callable(tell):
            tell(epoch)
