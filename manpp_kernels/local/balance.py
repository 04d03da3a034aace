"""Sharing blocks out so that none takes much more than others: by memory among blocks, by time among ranks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from manpp_kernels.trainer import LocalTrainer


def minimax(costs: Sequence[Sequence[float]], count: int) -> list[int]:
    """Ends of ``count`` non-empty runs of which the dearest costs the least possible, by dynamic programming.

    Args:
        costs: of the run from i to j (included) at [i][j - i].
        count: how many runs.
    """
    n = len(costs)
    # best[i]: (the least dearest of the first i in k runs, the ends of those runs)
    best: list[tuple[float, list[int]] | None] = [(0, [])] + [None] * n
    for k in range(1, count + 1):
        now: list[tuple[float, list[int]] | None] = [None] * (n + 1)
        for i in range(k, n + 1):
            options = ((max(b[0], costs[j][i - 1 - j]), j) for j in range(k - 1, i) if (b := best[j]) is not None)
            value, j = min(options)
            before = best[j]
            assert before is not None
            now[i] = (value, [*before[1], i])
        best = now
    found = best[n]
    assert found is not None
    return found[1]


def measure_block_seconds(trainer: LocalTrainer, batch: tuple[Tensor, Tensor], rounds: int = 3) -> list[float]:
    """What each local block takes for its forward and backward pass of a batch, in seconds; the least of some rounds.

    No parameter changes and no gradient is left; running statistics and random numbers move on as in training.

    Args:
        trainer: in one process, with blocks that do not overlap.
        batch: images and targets, as for :meth:`manpp_kernels.LocalTrainer.step`, on the trainer's device.
        rounds: how often all are measured.
    """
    seconds = [float("inf")] * len(trainer.network)
    trainer.model.train()
    trainer.network.train()
    for _ in range(rounds):
        images, targets = batch
        x = images.clone()  # which the first block may change
        for j, block in enumerate(trainer.network):
            start = _now(trainer.device)
            x, loss, _ = block(x, images, targets)
            loss.backward()
            seconds[j] = min(seconds[j], _now(trainer.device) - start)
            block.release()
            for p in block.parameters():
                p.grad = None
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def share_out(seconds: Sequence[float], ranks: int) -> list[int]:
    """How many blocks in a row each rank of a pipeline should train, so that the slowest takes the least time.

    Args:
        seconds: of each block, as :func:`measure_block_seconds` gives them.
        ranks: how many, as many as there are blocks or fewer.

    Raises:
        ValueError: there are fewer blocks than ranks, or no ranks.
    """
    if not 1 <= ranks <= len(seconds):
        raise ValueError(f"{len(seconds)} blocks cannot be shared out over {ranks} ranks: each needs one")
    ends = minimax([list(itertools.accumulate(seconds[i:])) for i in range(len(seconds))], ranks)
    return [end - start for start, end in itertools.pairwise([0, *ends])]
