"""Two processes: an EMA beside a model that FSDP2 has sharded, and the operators under DistributedDataParallel."""

from __future__ import annotations

import copy
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from manpp_kernels import EmaPlan, ModelEma, scale_bias_mix

RANKS = 2


def _rank(rank: int, test: Any, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        torch.manual_seed(0)
        test(rank)
    except BaseException:
        # The other ranks wait for this one in vain, and would be what is reported.
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def on_two_ranks(test: Any, folder: Path) -> None:
    try:
        torch.multiprocessing.spawn(_rank, (test, str(folder)), nprocs=RANKS)
    except Exception as error:
        errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
        pytest.fail("\n".join(errors) or str(error))


def _sharded(rank: int) -> None:
    # Five rows come as three and two, the one row of the last layer as one and none.
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    twin = copy.deepcopy(model)
    whole, sharded, expected = (ModelEma(model, decay=0.5) for _ in range(3))
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model, mesh=mesh)
    fully_shard(sharded.module, mesh=mesh)
    x = torch.randn(8, 4)
    for network, averages in ((model, (whole, sharded)), (twin, (expected,))):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
            for ema in averages:
                ema.update(network)
    for a, b, c in zip(expected.parameters(), whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c.full_tensor(), a)


class Mixed(nn.Module):
    """Two branches, mixed by a learnable scale."""

    def __init__(self) -> None:
        super().__init__()
        self.lb, self.ema = nn.Linear(4, 3), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return scale_bias_mix(self.lb(x), self.ema(x), self.scale)


def _data_parallel(rank: int) -> None:
    plain = Mixed()
    network = DistributedDataParallel(copy.deepcopy(plain))
    x = torch.randn(RANKS, 8, 4)
    results = []
    for model, batch in ((network, x[rank]), (plain, x.flatten(0, 1))):
        ema = [p.detach().clone() for p in model.parameters()]
        plan = EmaPlan(ema, list(model.parameters()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            plan.update(0.5)
        results.append(ema)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        gathered = [torch.empty_like(a) for _ in range(RANKS)]
        dist.all_gather(gathered, a)
        assert torch.equal(*gathered), "every rank has the same EMA"


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("test", [_sharded, _data_parallel])
def test_two_ranks(test: Any, tmp_path: Path) -> None:
    on_two_ranks(test, tmp_path)
