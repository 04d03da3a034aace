"""What ``LocalTrainer.fit`` does around the steps of an epoch: their sums, its row of the history, and Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from manpp_kernels.local.targets import Answers


@dataclass
class EpochTotals:
    """Sums over the steps of an epoch so far; tensors stay on the device until the epoch ends."""

    loss: Tensor | float = 0.0
    correct: Tensor | int = 0
    answered: Tensor | int = 0
    images: int = 0
    seconds: float = 0.0
    timed_seconds: float = 0.0
    timed_steps: int = 0
    peak_memory: int = 0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, answers: Answers) -> None:
        """One step: its mean loss, logits (N, C), targets, and how those are scored."""
        self.images += len(logits)
        self.loss = self.loss + loss.double() * len(logits)
        right, answered = answers(logits, targets.to(logits.device, non_blocking=True))
        self.correct, self.answered = self.correct + right, self.answered + answered

    def tick(self, seconds: float, *, timed: bool, steps: int = 1) -> None:
        """The time of a step; ``timed`` where nothing was measured meanwhile."""
        self.seconds += seconds
        if timed:
            self.timed_seconds += seconds
            self.timed_steps += steps

    def numbers(self) -> dict[str, Any]:
        """All of it without tensors, from which ``EpochTotals(**numbers)`` goes on alike; waits for the device."""
        fields = dataclasses.asdict(self).items()
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in fields}

    def mean_loss(self) -> float:
        """Over the images; waits for the device."""
        return float(self.loss) / self.images

    def accuracy(self) -> float | None:
        """From 0 to 1, or None where the targets are no classes; waits for the device."""
        answered = int(self.answered)
        return float(self.correct) / answered if answered else None

    def row(self) -> dict[str, Any]:
        """The epoch's figures; waits for the device."""
        return {
            "train_loss": self.mean_loss(),
            "train_acc": self.accuracy(),
            "seconds": self.seconds,
            "seconds_per_step": self.timed_seconds / self.timed_steps if self.timed_steps else self.seconds,
            "images_per_second": self.images / max(self.seconds, 1e-9),
            "peak_memory_bytes": self.peak_memory,
        }


def check_trained(totals: EpochTotals, epoch: int) -> None:
    """Raise where an epoch, of this many before, had no batch."""
    if totals.images == 0:
        raise ValueError(
            "the loader gave no batch; has the data fewer images than a batch, with drop_last=True?"
            if epoch == 0
            else f"the loader gave no batch in epoch {epoch + 1}; an iterator is used up by then: give what can be "
            "iterated anew, such as a DataLoader"
        )


def history_row(
    epoch: int,
    totals: EpochTotals,
    validation: EpochTotals | None,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
) -> dict[str, Any]:
    """What is known of an epoch, of this many before; waits for the device."""
    return {
        "epoch": epoch + 1,
        "val_loss": None if validation is None else validation.mean_loss(),
        "val_acc": None if validation is None else validation.accuracy(),
        "lr": float(optimizers[0].param_groups[0]["lr"]),
        **totals.row(),
        "memory": "cuda allocator peak" if device.type == "cuda" else "live saved tensors peak",
    }


def step_schedulers(schedulers: Sequence[Any], row: dict[str, Any]) -> None:
    """After an epoch with this row of the history."""
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(row["train_loss"] if row["val_loss"] is None else row["val_loss"])
        else:
            scheduler.step()


@contextlib.contextmanager
def deferred_interrupt(wanted: bool = True) -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising; the second one raises KeyboardInterrupt as ever.

    Where it is not wanted, or outside the main thread, where Python delivers no signals, the event is never set.
    """
    event = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
