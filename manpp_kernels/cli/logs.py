"""The files a run keeps of itself: the history as CSV, and TensorBoard events."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manpp_kernels.checkpoint import atomic_path


def write_csv(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the whole history anew, so that the file agrees with the checkpoint whatever happened before."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]) if history else [])
        writer.writeheader()
        writer.writerows(history)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of :func:`write_csv`, numbers as numbers; an empty cell is None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _value(cell: str) -> int | float | str | None:
    for convert in (int, float):
        try:
            return convert(cell)
        except ValueError:
            continue
    return cell or None


class TensorBoardLog:
    """Scalars of each epoch, and the mean loss of each local block."""

    def __init__(self, folder: Path, epochs_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote about epochs that are now done again is left out.
        self._writer = SummaryWriter(str(folder), purge_step=epochs_done + 1)
        self._losses: Tensor | None = None
        self._steps = 0

    def step(self, losses: Sequence[Tensor]) -> None:
        """Add up the blocks' losses where they are, without waiting for them."""
        now = torch.stack(list(losses)).float()
        self._losses = now if self._losses is None else self._losses + now
        self._steps += 1

    def epoch(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name, value, row["epoch"])
        if self._losses is not None and len(self._losses) > 1:
            for index, loss in enumerate((self._losses / self._steps).tolist()):
                self._writer.add_scalar(f"block_loss/{index:02d}", loss, row["epoch"])
        self._losses, self._steps = None, 0
        self._writer.flush()

    def add(self, values: Mapping[str, float], epoch: int) -> None:
        """More scalars of an epoch, by their names."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        self._writer.close()
