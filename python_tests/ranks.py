"""Processes that test together what is distributed."""

from __future__ import annotations

import datetime
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor


def _rank(rank: int, test: Any, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    store, patience = f"file://{folder}/store", datetime.timedelta(minutes=3)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=patience)
    try:
        torch.manual_seed(0)
        test(rank)
    except BaseException:
        # The other ranks wait for this one in vain, and would be what is reported.
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
    # Not the usual end: after sharded training PyTorch's own teardown aborts one process in twenty ("terminate called
    # without an active exception"), when the test has passed.
    os._exit(0)


def on_ranks(count: int, test: Any, folder: Path) -> None:
    """Run ``test(rank)`` in so many processes, on one thread each."""
    try:
        torch.multiprocessing.spawn(_rank, (test, str(folder), count), nprocs=count)
    except Exception as error:
        errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
        pytest.fail("\n".join(errors) or str(error))


def assert_agreed(tensors: list[Tensor]) -> None:
    for t in tensors:
        every = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(every, t.contiguous())
        for other in every:
            assert torch.equal(other, t), "every rank has the same"
