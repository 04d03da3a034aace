"""What goes into a training step and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manpp_kernels.local.targets import BatchError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a training step gives, on the device: reading a value from it waits for the step.

    Attributes:
        losses: the loss of each block, K detached scalars; the last is the network's own.
        logits: of the network (N, num_classes), detached, in training mode.
    """

    losses: list[Tensor]
    logits: Tensor


class StepSums:
    """The losses and logits of a step, gathered over its micro-batches."""

    def __init__(self, parts: list[Batch], blocks: int) -> None:
        self.images = sum(len(images) for images, _ in parts)
        self._losses: list[Tensor | float] = [0.0] * blocks
        self._logits: list[Tensor] = []

    def add(self, block: int, loss: Tensor, share: float, logits: Tensor | None) -> None:
        self._losses[block] = loss if share == 1.0 else self._losses[block] + loss * share
        if logits is not None:
            self._logits.append(logits)

    def result(self) -> StepResult:
        logits = self._logits[0] if len(self._logits) == 1 else torch.cat(self._logits)
        return StepResult([torch.as_tensor(loss) for loss in self._losses], logits)


def check_batch(batch: Batch, accumulate: int, least_images: Callable[[], int]) -> None:
    """Raise where images and targets do not fit the network or each other.

    Args:
        batch: as it was given.
        accumulate: the number of micro-batches.
        least_images: says how many images one has to have; asked only where there is one.
    """
    images, _ = check_pair(batch)
    least = len(images) // accumulate
    if least < 1 or (least < 2 and least < least_images()):
        raise BatchError(
            f"a batch of {len(images)} in {accumulate} micro-batches leaves {least} images for one, and "
            + ("each needs 1" if least < 1 else "the batch normalisation of the local heads needs 2")
            + "; drop a smaller last batch (drop_last=True)"
        )


def check_pair(batch: Batch) -> Batch:
    """The batch itself; raises where it is no pair of tensors, of images and as many targets."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        kinds = ", ".join(type(t).__name__ for t in batch) if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"a batch has to be images and targets, two tensors, and is {kinds}")
    images, targets = batch
    if not images.is_floating_point():
        raise BatchError(f"images have to be of a floating dtype, and are {images.dtype}; scale and normalise them")
    if len(images) != len(targets):
        raise BatchError(f"there are {len(images)} images and {len(targets)} targets")
    return images, targets


def check_loss(loss: Tensor) -> None:
    """Raise where a criterion gives no single number to train by, of which PyTorch only says that there is no grad."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the criterion has to return a scalar tensor, the mean over the batch, and returned {what}")
