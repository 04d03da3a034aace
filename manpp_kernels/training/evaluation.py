"""The deployed model on a loader's batches, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from manpp_kernels.local.parts import logits_of
from manpp_kernels.local.segments import evaluating
from manpp_kernels.local.targets import Targets
from manpp_kernels.training.epoch import EpochTotals
from manpp_kernels.training.group import Batch
from manpp_kernels.training.step import check_loss, check_pair


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    targets_are: Targets,
    classes: int,
    placed: Callable[[Batch], Batch],
    precision: Callable[[], AbstractContextManager[Any]],
) -> EpochTotals:
    """The sums over all batches; those without images are passed over.

    Args:
        targets_are: what the targets mean, and the criterion.
        classes: of the model's output.
        placed: puts a batch on the device.
        precision: in which the model runs.

    Raises:
        TypeError, ValueError: a batch does not fit, or there are no images at all.
    """
    totals = EpochTotals()
    with evaluating(model):
        for batch in loader:
            if len(check_pair(batch)[0]) == 0:  # whose mean loss is no number
                continue
            targets_are.check(batch[1], classes, first=totals.images == 0)
            images, targets = placed(batch)
            with precision():
                logits = logits_of(model(images))
                loss = targets_are.criterion(logits, targets)
                check_loss(loss)
            totals.add(loss, logits, targets, targets_are.answers)
    if totals.images == 0:
        raise ValueError("the loader gave no batch to evaluate")
    return totals
