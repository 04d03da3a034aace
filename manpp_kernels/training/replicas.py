"""Data parallel: every rank of a process group trains a copy of the network on batches of its own.

The gradients of a local block are averaged as soon as its backward pass is done, while the blocks behind it compute:
with gradient isolation no later block can add to them. (Where a rule's losses overlap, at the end of the step.)
DistributedDataParallel serves one backward pass over all parameters; here there is one for each block.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manpp_kernels.training.epoch import EpochTotals


class Alone:
    """One process: nobody to agree with. The interface of :class:`Replicas`."""

    rank, count = 0, 1

    def broadcast(self, tensors: Sequence[Tensor]) -> None: ...

    def start(self, parameters: Sequence[Tensor]) -> None: ...

    def finish(self) -> None: ...

    def totals(self, own: EpochTotals) -> EpochTotals:
        return own

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def first(self, action: Callable[[], None]) -> None:
        action()


class Replicas(Alone):
    """The copies of a network on the ranks of the default process group; all its methods are called on every rank.

    Args:
        tensors: what the copies hold; rank 0's becomes everyone's.
        device: that this rank trains on.

    Raises:
        RuntimeError: there is no process group.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "data_parallel needs a process group: start with torchrun, and call "
                "torch.distributed.init_process_group() before the trainer is made"
            )
        self.rank, self.count, self._device = dist.get_rank(), dist.get_world_size(), device
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []
        self.broadcast(tensors)

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's values become everyone's."""
        for group in _alike(tensors):
            flat = _flatten(group)
            dist.broadcast(flat, 0)
            _unflatten(flat, group)

    @torch.no_grad()
    def start(self, parameters: Sequence[Tensor]) -> None:
        """Begin to average the gradients of ``parameters``, which are complete; the same have one on every rank."""
        for group in _alike([p.grad for p in parameters if p.grad is not None]):
            flat = _flatten(group)
            self._pending.append((dist.all_reduce(flat, async_op=True), flat, group))

    @torch.no_grad()
    def finish(self) -> None:
        """Put the means of all that was begun in the gradients' place."""
        for work, flat, group in self._pending:
            work.wait()
            _unflatten(flat.div_(self.count), group)
        self._pending.clear()

    def totals(self, own: EpochTotals) -> EpochTotals:
        """Over the images of every rank; of times and memory the largest."""
        numbers = own.numbers()
        every = self.gather(numbers)
        summed = ("loss", "correct", "answered", "images")
        return EpochTotals(**{name: (sum if name in summed else max)(e[name] for e in every) for name in numbers})

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        values: list[Any] = [None] * self.count
        # NCCL sends objects from the current device, which the caller may have left at the first for all ranks.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            dist.all_gather_object(values, value)
        return values

    def first(self, action: Callable[[], None]) -> None:
        """Rank 0 does it, and the others wait for it; where it fails, every rank raises."""
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


def _alike(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """By dtype and device: one message each."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for t in tensors:
        groups[t.dtype, t.device].append(t)
    return iter(groups.values())


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])
