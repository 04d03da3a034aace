"""What ``LocalTrainer.fit`` does around the steps of an epoch: sums, time, memory, the row of the history, Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from manpp_kernels.local.memory import SavedTensorMeter
from manpp_kernels.local.targets import Answers
from manpp_kernels.training.config import TrainerConfig


@dataclass
class EpochTotals:
    """Sums over the steps of an epoch so far; tensors stay on the device until the epoch ends.

    Of memory it is the peak, 0 where none was measured: every step keeps something for its backward pass.
    """

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
            "peak_memory_bytes": self.peak_memory or None,
        }


class EpochMeter:
    """Times the steps of an epoch, from where it is made on, and measures their memory.

    The first step is none of the timed ones: it sets up what the others use, and on a CPU is slowed by the measuring.

    Args:
        totals: what all is added to.
        config: whether memory is measured.
        device: where the steps run.
        persistent: what is in memory anyway, and does not count where saved tensors do.
    """

    def __init__(
        self, totals: EpochTotals, config: TrainerConfig, device: torch.device, persistent: Callable[[], list[Tensor]]
    ) -> None:
        self._totals, self._device, self._persistent = totals, device, persistent
        self._memory, self._on_gpu = config.measure_memory, device.type == "cuda"
        self._saved_tensors = self._memory and not self._on_gpu
        self._steps = 0
        if self._memory and self._on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        if self._steps > 0 or not self._saved_tensors:
            yield
            return
        with SavedTensorMeter(self._persistent()) as meter:
            yield
        self._see(meter.peak_bytes)

    def tick(self, captured_bytes: int) -> None:
        """A step is done; ``captured_bytes`` are those that its graph takes, which the allocator does not see."""
        first, self._steps = self._steps == 0, self._steps + 1
        if first and self._on_gpu:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._totals.tick(now - self._last, timed=not first)
        self._last = now
        self._see(captured_bytes)

    def skip(self) -> None:
        """What was done since the last step is no time of the training's."""
        self._last = time.perf_counter()

    def end(self) -> None:
        """The epoch has no more steps; waits for those that are still under way."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
            self._totals.tick(time.perf_counter() - self._last, timed=True, steps=0)
            self._see(torch.cuda.max_memory_allocated(self._device))

    def _see(self, peak: int) -> None:
        if self._memory:
            self._totals.peak_memory = max(self._totals.peak_memory, peak)


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
    memory = "cuda allocator peak" if device.type == "cuda" else "live saved tensors peak"
    return {
        "epoch": epoch + 1,
        "val_loss": None if validation is None else validation.mean_loss(),
        "val_acc": None if validation is None else validation.accuracy(),
        "lr": float(optimizers[0].param_groups[0]["lr"]),
        **totals.row(),
        "memory": memory if totals.peak_memory else None,
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
