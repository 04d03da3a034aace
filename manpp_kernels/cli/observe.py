"""What goes on in each local block while it trains: ``manpp train --observe``.

Once an epoch, a row for each block: mean loss; accuracy of its local head on the batches that it was trained on; the
scale s of MAN++; how far the EMA is from the parameters it follows; and the memory of its activations.

The trainer knows nothing of this. Every rule classifies by the criterion that the trainer hands to it, so a criterion
that looks at the logits sees those of each local head, whatever the auxiliary network is; hooks on the blocks say whose
turn it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels.cli.logs import read_csv, write_csv
from manpp_kernels.local.auxiliary import EmaTransform
from manpp_kernels.local.memory import SavedTensorMeter
from manpp_kernels.local.targets import Criterion, answers
from manpp_kernels.trainer import LocalTrainer
from manpp_kernels.training.step import StepResult

BLOCKS_NAME = "blocks.csv"
# The columns that are scalars for TensorBoard, which has the losses in any case.
_SCALARS = ("accuracy", "scale", "ema_distance", "ema_similarity", "memory_bytes")


class BlockObserver:
    """Follows the blocks of a trainer.

    Args:
        criterion: the loss that the network is trained by; the trainer gets ``observer.criterion`` in its place.

    ``attach`` the trainer once it is made, call ``step`` after every step and ``epoch`` after every epoch.
    """

    def __init__(self, criterion: Criterion) -> None:
        self._inner = criterion
        self._block: int | None = None  # whose turn it is; None outside of training
        self._losses: Tensor | None = None
        self._steps = 0
        self._answers: dict[int, tuple[Tensor | int, Tensor | int]] = {}  # of each block the right ones and all
        self._memory: dict[int, int] = {}
        self._meters: _BlockMeters | None = None
        self.rows: list[dict[str, Any]] = []

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The criterion itself, which also counts the right answers of the block at hand."""
        # A head may be asked several times in a step, for parts of the batch or on other paths: all count.
        if self._block is not None:
            before = self._answers.get(self._block, (0, 0))
            right, seen = answers(logits.detach(), targets)
            self._answers[self._block] = before[0] + right, before[1] + seen
        return self._inner(logits, targets)

    def attach(self, trainer: LocalTrainer, folder: Path) -> None:
        """Follow this trainer; of a resumed run, the rows of the epochs that are done are taken from its folder."""
        path = folder / BLOCKS_NAME
        if trainer.epoch and path.is_file():
            self.rows = [row for row in read_csv(path) if row["epoch"] <= trainer.epoch]
        for index, block in enumerate(trainer.network):
            block.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            block.register_forward_hook(lambda *_: self._enter(None), always_call=True)

    def _enter(self, index: int | None) -> None:
        self._block = index

    def step(self, trainer: LocalTrainer, result: StepResult) -> None:
        """Add up where the figures are, without waiting for them."""
        losses = torch.stack(list(result.losses)).float()
        self._losses = losses if self._losses is None else self._losses + losses
        self._steps += 1
        if self._meters is not None:
            self._memory = self._meters.close()
            self._meters = None
        elif not self._memory:
            # The first step of an epoch may be the trainer's to measure, and meters do not nest: the step after it.
            self._meters = _BlockMeters(trainer)

    def epoch(self, trainer: LocalTrainer, folder: Path) -> list[dict[str, Any]]:
        """Write what the epoch brought to ``folder``; returns its rows."""
        if self._meters is not None:  # an epoch of one step
            self._meters.close()
            self._meters = None
        losses = [None] * len(trainer.network) if self._losses is None else (self._losses / self._steps).tolist()
        rows = [
            {
                "epoch": trainer.epoch,
                "block": index,
                "units": " ".join(names),
                "loss": losses[index],
                "accuracy": self._accuracy(index),
                **ema_measures(block.transforms),
                "memory_bytes": self._memory.get(index),
            }
            for index, (block, names) in enumerate(zip(trainer.network, trainer.network.partition.names(), strict=True))
        ]
        self._losses, self._steps, self._answers = None, 0, {}
        self.rows += rows
        write_csv(self.rows, folder / BLOCKS_NAME)
        return rows

    def _accuracy(self, index: int) -> float | None:
        """None where the block does not classify, as with a contrastive loss."""
        right, seen = self._answers.get(index, (0, 0))
        return float(right) / int(seen) if seen else None


class _BlockMeters:
    """Measures what each block keeps for its backward pass, in the next step."""

    def __init__(self, trainer: LocalTrainer) -> None:
        self._exclude = trainer.persistent_tensors()
        self._bytes: dict[int, int] = {}
        self._hooks = ExitStack()
        self._open: SavedTensorMeter | None = None
        for index, block in enumerate(trainer.network):
            before = block.register_forward_pre_hook(self._begin)
            after = block.register_forward_hook(lambda *_, index=index: self._end(index), always_call=True)
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)

    def _begin(self, *_: Any) -> None:
        self._open = SavedTensorMeter(self._exclude).__enter__()

    def _end(self, index: int) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._bytes[index] = max(self._bytes.get(index, 0), self._open.peak_bytes)
            self._open = None

    def close(self) -> dict[int, int]:
        """Take the hooks off; the bytes of each block."""
        self._hooks.close()
        return self._bytes


@torch.no_grad()
def ema_measures(transforms: Sequence[EmaTransform]) -> dict[str, float | None]:
    """The scale of a block, and its EMA beside the parameters that it follows.

    ``ema_distance`` is the norm of the difference over that of the parameters, ``ema_similarity`` the cosine, of all
    parameters of the unit as one vector. None where there is nothing to measure.
    """
    scales = [scale for t in transforms if isinstance(scale := getattr(t, "scale", None), nn.Parameter)]
    pairs = [pair for t in transforms for pair in t.pairs()]
    measures: dict[str, float | None] = {"scale": None, "ema_distance": None, "ema_similarity": None}
    if scales:
        measures["scale"] = float(torch.stack([s.detach().float().mean() for s in scales]).mean())
    if pairs:
        sums = torch.zeros(4, device=pairs[0][0].device)
        for ema, source in pairs:
            e, p = ema.float().flatten(), source.detach().float().flatten()
            sums += torch.stack([(e - p).dot(e - p), e.dot(e), p.dot(p), e.dot(p)])
        apart, ema_square, source_square, product = sums.tolist()
        measures["ema_distance"] = math.sqrt(apart / max(source_square, 1e-30))
        measures["ema_similarity"] = product / math.sqrt(max(ema_square * source_square, 1e-30))
    return measures


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The measures of a row that there are, by the names of TensorBoard's scalars."""
    return {f"block_{name}/{row['block']:02d}": row[name] for name in _SCALARS if row[name] is not None}
