"""The processes of one run, where torchrun has started several: what each trains on, and that one alone writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from manpp_kernels.cli.parsing import UserError
from manpp_kernels.training.config import TrainerConfig


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank, count: its number, and how many there are.
        device: what it trains on.
        each_its_share: whether each trains on images of its own.
    """

    rank: int
    count: int
    device: torch.device
    each_its_share: bool = True

    @property
    def share(self) -> tuple[int, int]:
        """Which part of every batch is this process's, and of how many parts."""
        return (self.rank, self.count) if self.each_its_share else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def agree(self, choose: Callable[[], Path]) -> Path:
        """What the first process chooses, for all of them."""
        if self.count == 1:
            return choose()
        chosen = [choose() if self.first else None]
        dist.broadcast_object_list(chosen, src=0, device=self.device)
        assert chosen[0] is not None
        return chosen[0]


@contextlib.contextmanager
def joined(config: TrainerConfig, device: str) -> Iterator[Ranks]:
    """The processes of a run, which end their group where it does.

    Args:
        config: whether there are to be several.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``; of several GPUs each process takes its own.

    Raises:
        UserError: torchrun has not started several, or has and none were asked for, or there is no such device.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if not (config.data_parallel or config.shares_out):
        if started > 1:
            raise UserError(
                f"there are {started} processes, each of which would train the same: add --data-parallel or --pipeline"
            )
        yield Ranks(0, 1, device_named(device))
        return
    if "RANK" not in os.environ:
        raise UserError(
            f"{'--data-parallel' if config.data_parallel else '--pipeline'} is for processes that torchrun starts: "
            "torchrun --nproc-per-node 2 -m manpp_kernels.cli train …"
        )
    chosen = device_named(device)
    if chosen.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"there are {torch.cuda.device_count()} GPUs for process {local + 1} of this machine: start as many "
                "processes as there are GPUs"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen, each_its_share=config.data_parallel)
    finally:
        dist.destroy_process_group()


def device_named(name: str) -> torch.device:
    """A device of the command line; raises UserError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device; use --device cpu")
    return torch.device(name)
