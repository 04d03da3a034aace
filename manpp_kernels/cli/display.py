"""What a run shows while it goes on, and the table at its end."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# Reading a loss from a GPU waits for it; this often is enough for the eye.
_SECONDS_BETWEEN_READINGS = 0.5


class Display:
    """Progress on a terminal as a bar with the loss, elsewhere as a line for each epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress: Progress | None = None
        self._last_reading = 0.0

    @contextlib.contextmanager
    def run(self, name: str, steps: int, done: int) -> Iterator[None]:
        """Show a run of ``steps`` steps, of which ``done`` have been done before."""
        self._name = name
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as self._progress:
            self._task = self._progress.add_task(name, total=steps, completed=done, loss="")
            try:
                yield
            finally:
                self._progress = None

    def step(self, trainer: Any, result: Any) -> None:
        """For ``on_step`` of :meth:`manpp_kernels.trainer.LocalTrainer.fit`."""
        if self._progress is None:
            return
        self._progress.advance(self._task)
        now = time.monotonic()
        # The first process of a pipeline, which shows this, has not the network's own loss.
        if result.logits is not None and now - self._last_reading >= _SECONDS_BETWEEN_READINGS:
            self._last_reading = now
            self._progress.update(self._task, loss=f"loss {float(result.losses[-1]):.3f}")

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        """Print what an epoch brought."""
        self.console.print(
            f"{self._name}  epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  "
            f"train {_percent(row['train_acc'])}  test {_percent(row['val_acc'])}  {row['seconds']:.1f} s",
            highlight=False,
        )


def results_table(runs: Mapping[str, Sequence[Mapping[str, Any]]], on_gpu: bool) -> Table:
    """Accuracy, memory and time of one or several runs, by their histories."""
    # What is measured differs: see the trainer's column "memory".
    memory = "peak memory" if on_gpu else "peak activation memory"
    table = Table("run", "epochs")
    for title in ("accuracy", memory, "seconds a step", "training"):
        table.add_column(title, justify="right")
    for name, history in runs.items():
        peaks = [row["peak_memory_bytes"] for row in history if row["peak_memory_bytes"]]
        steps = [row["seconds_per_step"] for row in history if row["seconds_per_step"]]
        table.add_row(
            name,
            str(len(history)),
            _percent(history[-1]["val_acc"]) if history else "–",
            f"{max(peaks) / 2**20:.1f} MiB" if peaks else "–",
            f"{statistics.median(steps):.3f}" if steps else "–",
            f"{sum(row['seconds'] for row in history):.0f} s",
        )
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
