"""A training step: what goes into it, the two orders it can take, and what comes out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels.local.auxiliary import EmaUpdates
from manpp_kernels.local.network import LocalNetwork
from manpp_kernels.local.targets import BatchError
from manpp_kernels.training.config import AMP_DTYPES, OptimizerFactory, TrainerConfig, make_optimizers
from manpp_kernels.training.group import Alone, Batch
from manpp_kernels.training.streams import make_lanes

__all__ = ["Batch", "StepResult", "TrainingStep"]


@dataclass(frozen=True)
class StepResult:
    """What a training step gives, on the device: reading a value from it waits for the step.

    Attributes:
        losses: the loss of each block, K detached scalars; the last is the network's own. Those of a pipeline's rank
            are of its own blocks.
        logits: of the network (N, num_classes), detached, in training mode; None on all ranks of a pipeline but the
            last.
        targets: the batch's, which are rank 0's in a pipeline.
    """

    losses: list[Tensor]
    logits: Tensor | None
    targets: Tensor


class StepSums:
    """The losses and logits of a step, gathered over its micro-batches."""

    def __init__(self, parts: list[Batch], blocks: range) -> None:
        self.images = sum(len(images) for images, _ in parts)
        self._losses: dict[int, Tensor | float] = dict.fromkeys(blocks, 0.0)
        self._logits: list[Tensor] = []

    def add(self, block: int, loss: Tensor, share: float, logits: Tensor | None) -> None:
        self._losses[block] = loss if share == 1.0 else self._losses[block] + loss * share
        if logits is not None:
            self._logits.append(logits)

    def result(self, targets: Tensor) -> StepResult:
        logits = torch.cat(self._logits) if len(self._logits) > 1 else self._logits[0] if self._logits else None
        return StepResult([torch.as_tensor(loss) for loss in self._losses.values()], logits, targets)


class TrainingStep:
    """A step of every block: forward, backward, EMA update and optimizer, in the published or the unlocked order.

    Args:
        network: whose blocks are trained.
        config: order, micro-batches, clipping, precision, streams.
        optimizer: from a list of parameters to an optimizer; called once, in the unlocked order once a block.
        device: where the network is.
        ranks: whose gradients are averaged, or among whom the blocks are shared out.
        shared: modules that every block calls, as the criterion.

    Attributes:
        optimizers, scaler: of the parameters, and of the loss in half precision.
        lanes: where the blocks run.
    """

    def __init__(
        self,
        network: LocalNetwork,
        config: TrainerConfig,
        optimizer: OptimizerFactory,
        device: torch.device,
        *,
        ranks: Alone,
        shared: Sequence[nn.Module] = (),
    ) -> None:
        self._network, self._config, self._device, self._ranks = network, config, device, ranks
        self._unlocked = config.order == "unlocked"
        self._own = ranks.own(len(network))
        self._blocks = dict(enumerate(network))  # of which this rank trains its own
        # By block, or under None for all at once.
        self._ema: dict[int | None, EmaUpdates]
        if self._unlocked:
            self._ema = {None: network.ema_updates(self._own)}
        else:
            self._ema = dict(enumerate(network.ema_updates_by_block()))
        self._by_block = {j: self._blocks[j].trainable() for j in self._own}
        by_block = list(self._by_block.values())
        groups = by_block if self._unlocked else [list(itertools.chain.from_iterable(by_block))]
        self.optimizers = make_optimizers(optimizer, groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.lanes = make_lanes(network, config.streams, device, shared=shared)
        self._begins_in_place = network.partition.segments[0].writes_input

    def __call__(self, images: Tensor, targets: Tensor) -> StepResult:
        """The step, of a batch on the device; it depends on tensors on the device alone, and waits for none."""
        count = self._config.accumulate
        parts = list(zip(images.tensor_split(count), targets.tensor_split(count), strict=True))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums = self._unlocked_step(parts) if self._unlocked else self._published_step(parts)
        return sums.result(targets)

    def _published_step(self, parts: list[Batch]) -> StepSums:
        """For each block forward, backward, EMA update; then the optimizer, once for all."""
        sums, overlapping = StepSums(parts, self._own), self._network.rule.overlapping
        xs = [self._input(images) for images, _ in parts]
        with self.lanes.step():
            for i, (images, targets) in enumerate(parts):
                x = xs[i]
                for j in self._own:
                    with self.lanes.block(j):
                        x = self._forward_backward(j, x, images, targets, sums)
                        if i == len(parts) - 1:
                            self._update_ema(j)
                            if not overlapping:
                                self._ranks.start(self._by_block[j])
        for parameters in self._by_block.values() if overlapping else ():
            self._ranks.start(parameters)
        self._ranks.finish()
        self._optimize(self.optimizers[0], self._own)
        self.scaler.update()
        return sums

    def _unlocked_step(self, parts: list[Batch]) -> StepSums:
        """All EMA updates; then for each block forward, backward, optimizer, and its gradients are gone."""
        sums = StepSums(parts, self._own)
        self._update_ema(None)
        xs = [self._input(images) for images, _ in parts]
        with self.lanes.step():
            for j, optimizer in zip(self._own, self.optimizers, strict=True):
                with self.lanes.block(j):
                    for i, (images, targets) in enumerate(parts):
                        xs[i] = self._forward_backward(j, xs[i], images, targets, sums)
                    self._blocks[j].release()
                    self._ranks.start(self._by_block[j])
                    self._ranks.finish()
                    self._optimize(optimizer, range(j, j + 1))
                    optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return sums

    def _update_ema(self, block: int | None) -> None:
        """Move the EMAs of a block, or of all."""
        self._ranks.fetch(block)
        updates = self._ema[block]
        updates.update()
        # Effective weights that the same launch computed stay each rank's own: they differ by a rounding.
        self._ranks.broadcast(updates.rounded)

    def _input(self, images: Tensor) -> Tensor:
        """What the first block may change; the images are the caller's, and what later blocks may compare with."""
        return images.clone() if self._begins_in_place else images

    def _forward_backward(self, j: int, x: Tensor, images: Tensor, targets: Tensor, sums: StepSums) -> Tensor:
        """One micro-batch through one block; returns what the next block takes."""
        x = self.lanes.take(j, self._ranks.take(j, x))
        with autocast(self._config, self._device):
            features, loss, logits = self._blocks[j](x, images, targets)
            check_loss(loss)
        self._ranks.give(j, features)
        share = len(images) / sums.images
        self.scaler.scale(loss if share == 1.0 else loss * share).backward()
        sums.add(j, loss.detach(), share, logits)
        return features

    def _optimize(self, optimizer: torch.optim.Optimizer, blocks: range) -> None:
        """Clip the gradients of each block, and step."""
        if self._config.clip_norm is not None:
            self.scaler.unscale_(optimizer)
            for j in blocks:
                nn.utils.clip_grad_norm_(self._by_block[j], self._config.clip_norm)
        self.scaler.step(optimizer)
        for j in blocks:
            self._ranks.moved(j)


def autocast(config: TrainerConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The precision that ``config`` asks for."""
    dtype = AMP_DTYPES[config.amp]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


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
