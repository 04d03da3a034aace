"""How many blocks each rank of a pipeline should train: by what they take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch

from manpp_kernels.local.options import check_count
from manpp_kernels.local.partition import minimax
from manpp_kernels.trainer import LocalTrainer
from manpp_kernels.training.step import Batch, autocast


def measure_block_seconds(trainer: LocalTrainer, batch: Batch, rounds: int = 3) -> list[float]:
    """What each local block takes for its forward and backward pass of a batch, in seconds; the least of some rounds.

    No parameter changes and no gradient is left; running statistics and random numbers move on as in training.

    Args:
        trainer: in one process.
        batch: images and targets, as for :meth:`manpp_kernels.LocalTrainer.step`.
        rounds: how often all are measured.

    Raises:
        ValueError: the blocks overlap, so that they have no times of their own; ``rounds`` is below 1.
    """
    check_count("rounds", rounds)
    trainer.network.rule.check_apart(streams=1, pipeline=True)
    images, targets = trainer._on_device(batch)
    trainer.model.train()
    trainer.network.train()
    seconds = [float("inf")] * len(trainer.network)
    for _ in range(rounds):
        x = images.clone()  # which the first block may change
        for j, block in enumerate(trainer.network):
            start = _now(trainer.device)
            with autocast(trainer.config, trainer.device):
                x, loss, _ = block(x, images, targets)
            loss.backward()
            seconds[j] = min(seconds[j], _now(trainer.device) - start)
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
