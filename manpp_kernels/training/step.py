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
from manpp_kernels.local.block import LocalBlock
from manpp_kernels.local.network import LocalNetwork
from manpp_kernels.local.targets import BatchError
from manpp_kernels.training.config import AMP_DTYPES, OptimizerFactory, TrainerConfig, make_optimizers
from manpp_kernels.training.replicas import Alone
from manpp_kernels.training.streams import make_lanes

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


class TrainingStep:
    """A step of every block: forward, backward, EMA update and optimizer, in the published or the unlocked order.

    Args:
        network: whose blocks are trained.
        config: order, micro-batches, clipping, precision, streams.
        optimizer: from a list of parameters to an optimizer; called once, in the unlocked order once a block.
        device: where the network is.
        ranks: whose gradients are averaged.
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
        self._ema = [network.ema_updates()] if self._unlocked else network.ema_updates_by_block()
        self._by_block = by_block = [block.trainable() for block in network]
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
        return self._unlocked_step(parts) if self._unlocked else self._published_step(parts)

    def _published_step(self, parts: list[Batch]) -> StepResult:
        """For each block forward, backward, EMA update; then the optimizer, once for all."""
        sums, overlapping = StepSums(parts, len(self._network)), self._network.rule.overlapping
        xs = [self._input(images) for images, _ in parts]
        with self.lanes.step():
            for i, (images, targets) in enumerate(parts):
                x = xs[i]
                for j, block in enumerate(self._network):
                    with self.lanes.block(j):
                        x = self._forward_backward(block, x, images, targets, sums, j)
                        if i == len(parts) - 1:
                            self._update_ema(self._ema[j])
                            if not overlapping:
                                self._ranks.start(self._by_block[j])
        for parameters in self._by_block if overlapping else ():
            self._ranks.start(parameters)
        self._ranks.finish()
        self._optimize(self.optimizers[0], self._by_block)
        self.scaler.update()
        return sums.result()

    def _unlocked_step(self, parts: list[Batch]) -> StepResult:
        """All EMA updates; then for each block forward, backward, optimizer, and its gradients are gone."""
        sums = StepSums(parts, len(self._network))
        self._update_ema(self._ema[0])
        xs = [self._input(images) for images, _ in parts]
        with self.lanes.step():
            for j, (block, optimizer) in enumerate(zip(self._network, self.optimizers, strict=True)):
                with self.lanes.block(j):
                    for i, (images, targets) in enumerate(parts):
                        xs[i] = self._forward_backward(block, xs[i], images, targets, sums, j)
                    block.release()
                    self._ranks.start(self._by_block[j])
                    self._ranks.finish()
                    self._optimize(optimizer, [self._by_block[j]])
                    optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return sums.result()

    def _update_ema(self, updates: EmaUpdates) -> None:
        updates.update()
        # Effective weights that the same launch computed stay each rank's own: they differ by a rounding.
        self._ranks.broadcast(updates.rounded)

    def _input(self, images: Tensor) -> Tensor:
        """What the first block may change; the images are the caller's, and what later blocks may compare with."""
        return images.clone() if self._begins_in_place else images

    def _forward_backward(
        self, block: LocalBlock, x: Tensor, images: Tensor, targets: Tensor, sums: StepSums, j: int
    ) -> Tensor:
        """One micro-batch through one block; returns what the next block takes."""
        x = self.lanes.take(j, x)
        with autocast(self._config, self._device):
            features, loss, logits = block(x, images, targets)
            check_loss(loss)
        share = len(images) / sums.images
        self.scaler.scale(loss if share == 1.0 else loss * share).backward()
        sums.add(j, loss.detach(), share, logits)
        return features

    def _optimize(self, optimizer: torch.optim.Optimizer, blocks: list[list[nn.Parameter]]) -> None:
        """Clip the gradients of each block, and step."""
        if self._config.clip_norm is not None:
            self.scaler.unscale_(optimizer)
            for parameters in blocks:
                nn.utils.clip_grad_norm_(parameters, self._config.clip_norm)
        self.scaler.step(optimizer)


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
