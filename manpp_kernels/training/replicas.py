"""Data parallel: every rank of a process group trains a copy of the network on batches of its own.

The gradients of a local block are averaged as soon as its backward pass is done, while the blocks behind it compute:
with gradient isolation no later block can add to them. (Where a rule's losses overlap, at the end of the step.)
DistributedDataParallel serves one backward pass over all parameters; here there is one for each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manpp_kernels.local.network import LocalNetwork
from manpp_kernels.training.epoch import EpochTotals
from manpp_kernels.training.group import Group, alike, broadcast, flatten, unflatten


class Replicas(Group):
    """The copies of a network on the ranks of the default process group; all its methods are called on every rank.

    Args:
        network: this rank's copy; rank 0's values become everyone's.
        device: that this rank trains on.

    Raises:
        RuntimeError: there is no process group.
    """

    def __init__(self, network: LocalNetwork, device: torch.device) -> None:
        super().__init__("data_parallel", network.persistent_tensors(), device)
        self._network = network
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's values become everyone's."""
        broadcast(tensors, 0)

    @torch.no_grad()
    def start(self, parameters: Sequence[Tensor]) -> None:
        """Begin to average the gradients of ``parameters``, which are complete; the same have one on every rank."""
        for group in alike([p.grad for p in parameters if p.grad is not None]):
            flat = flatten(group)
            self._pending.append((dist.all_reduce(flat, async_op=True), flat, group))

    @torch.no_grad()
    def finish(self) -> None:
        for work, flat, group in self._pending:
            work.wait()
            unflatten(flat.div_(self.count), group)
        self._pending.clear()

    def end_epoch(self) -> None:
        """Running statistics, each rank's own until then, become rank 0's."""
        broadcast(list(self._network.buffers()), 0)

    def totals(self, own: EpochTotals) -> EpochTotals:
        """Over the images of every rank; of times and memory the largest."""
        numbers = own.numbers()
        every = self.gather(numbers)
        summed = ("loss", "correct", "answered", "images")
        return EpochTotals(**{name: (sum if name in summed else max)(e[name] for e in every) for name in numbers})
