"""The processes that train one network together, or the one that does alone: who they are, and how they agree."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manpp_kernels.training.epoch import EpochTotals

Batch = tuple[Tensor, Tensor]


class Alone:
    """One process, which trains every block: nobody to agree with. The interface of :class:`Group`.

    Attributes:
        rank, count: its number, and how many there are.
        parts: those of a checkpoint that every rank has its own of.
    """

    rank, count = 0, 1
    parts: tuple[str, ...] = ("totals", "epoch_start", "rng")

    def describe(self) -> dict[str, object]:
        """What has to agree for a training to go on from another's checkpoint."""
        return {"ranks": self.count, "pipeline": None}

    # Replicas: gradients are averaged.

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Have one rank's values for tensors that come out otherwise on every rank that has a copy."""

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Begin to average the gradients of ``parameters``, which are complete."""

    def finish(self) -> None:
        """Put the means of all that was begun in the gradients' place."""

    # A pipeline: the blocks are shared out.

    def own(self, blocks: int) -> range:
        """Which of so many blocks this rank trains."""
        return range(blocks)

    def loader(self, loader: Iterable[Any]) -> Iterable[Any]:
        """What this rank goes through in an epoch."""
        return loader

    def counted(self, batches: Iterable[Any], done: int) -> Iterable[Any]:
        """The rest of an epoch's batches, of which so many are ``done``; other ranks may count on their number."""
        return batches

    def batch(self, batch: Any) -> Any:
        """The batch of the step that begins, of which this rank was given ``batch``."""
        return batch

    def hand_on(self, *tensors: Tensor) -> None:
        """Have the next rank take ``tensors``, if there is one."""

    def take(self, block: int, x: Any) -> Any:
        """What ``block`` works on, where the one before it on this rank has handed on ``x``."""
        return x

    def give(self, block: int, x: Any) -> None:
        """The features of ``block`` are there: have those work on them who wait for them."""

    def fetch(self, block: int | None) -> None:
        """The EMAs of ``block`` (None: of all) are about to move: have the parameters that they follow."""

    def moved(self, block: int) -> None:
        """The optimizer has moved the parameters of ``block``."""

    def collect(self) -> None:
        """Have all of the network as it is now."""

    # Both.

    def end_epoch(self) -> None:
        """Have the same network on every rank."""

    def totals(self, own: EpochTotals) -> EpochTotals:
        """The sums of an epoch over all ranks."""
        return own

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        return [value]

    def to_first(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on rank 0; what is elsewhere is nobody's."""
        return self.gather(value)

    def agree(self, **values: object) -> None:
        """Raise ValueError, on every rank, where a value is not the same on all: they would wait for each other."""

    def first(self, action: Callable[[], None]) -> None:
        """Rank 0 does it, and the others wait for it; where it fails, every rank raises."""
        action()


class Group(Alone):
    """The ranks of the default process group; all its methods are called on every rank.

    Args:
        setting: the trainer's setting that asks for it.
        tensors: what every rank has a copy of; rank 0's becomes everyone's.
        device: that this rank trains on.

    Raises:
        RuntimeError: there is no process group.
        ValueError: a rank has other tensors.
    """

    def __init__(self, setting: str, tensors: Sequence[Tensor], device: torch.device) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{setting} needs a process group: start with torchrun, and call "
                "torch.distributed.init_process_group() before the trainer is made"
            )
        self.rank, self.count, self._device = dist.get_rank(), dist.get_world_size(), device
        every = self.gather([(str(t.dtype), tuple(t.shape)) for t in tensors])
        for rank, found in enumerate(every):
            if found != every[0]:
                raise ValueError(
                    f"rank {rank} has another network to train than rank 0: make it of the same model, with the same "
                    "settings, on every rank"
                )
        broadcast(tensors, 0)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        # NCCL sends objects from the current device, which the caller may have left at the first for all ranks.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            dist.all_gather_object(values, value)
        return values

    def agree(self, **values: object) -> None:
        every = self.gather(values)
        for name in values:
            found = [value[name] for value in every]
            if any(value != found[0] for value in found):
                raise ValueError(f"{name} has to be the same on every rank, and is {', '.join(map(str, found))}")

    def first(self, action: Callable[[], None]) -> None:
        failed: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as error:
                failed = error
        reason = self.gather(None if failed is None else f"{type(failed).__name__}: {failed}")[0]
        if failed is not None:
            raise failed
        if reason is not None:
            raise RuntimeError(f"rank 0 failed, for all ranks: {reason}")


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """The values of rank ``source`` become everyone's."""
    for group in alike(tensors):
        flat = flatten(group)
        dist.broadcast(flat, source)
        unflatten(flat, group)


def alike(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """By dtype and device: one message each."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for t in tensors:
        groups[t.dtype, t.device].append(t)
    return iter(groups.values())


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """The values of ``tensors``, one after the other, in new memory."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Put the values of :func:`flatten` back into ``tensors``."""
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])
