"""Two processes: an EMA beside a model that FSDP2 has sharded, and the operators under DistributedDataParallel."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_agreed, on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from manpp_kernels import EmaPlan, ModelEma, scale_bias_mix
from manpp_kernels.checkpoint import CheckpointError
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import CHECKPOINT_NAME, LocalTrainer, TrainerConfig

RANKS = 2


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


def _half_precision(rank: int) -> None:
    """EMAs are rounded by random numbers, which are each rank's own."""
    torch.manual_seed(rank)
    for settings in ({}, {"rule_options": {"form": "parameter"}, "order": "unlocked"}):
        model = CifarResNet((1, 1, 1), num_classes=4, widths=(4, 6, 8)).bfloat16()
        trainer = LocalTrainer(model, TrainerConfig(rule="man++", data_parallel=True, **settings), example=(3, 8, 8))
        for _ in range(2):
            trainer.step((torch.rand(4, 3, 8, 8).bfloat16(), torch.arange(4)))
        assert_agreed([e for block in trainer.network for t in block.transforms for e, _ in t.pairs()])


LINEAR = {"host_options": {"width": "linear"}}
TRAININGS = [
    TrainerConfig(rule="e2e", blocks=1, accumulate=2),
    TrainerConfig(rule="dgl", rule_options={"width": "linear"}, order="unlocked", clip_norm=0.1),
    TrainerConfig(rule="man++", rule_options=LINEAR),
    TrainerConfig(rule="man++", rule_options={**LINEAR, "form": "parameter"}, order="unlocked", accumulate=2),
    TrainerConfig(rule="lookahead", rule_options=LINEAR, clip_norm=0.1),
    TrainerConfig(rule="mlaan"),
]


def _local_training(rank: int) -> None:
    """Two ranks train as one process does on both their batches, where no layer looks across a batch."""

    def trainer(config: TrainerConfig) -> LocalTrainer:
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).double()
        return LocalTrainer(model, config, example=(3, 6, 6))

    for config in TRAININGS:
        torch.manual_seed(rank)  # the copies begin unlike: rank 0's it is
        ours = trainer(dataclasses.replace(config, data_parallel=True))
        torch.manual_seed(0)
        alone = trainer(config)
        images = torch.randn(3, RANKS, 4, 3, 6, 6, dtype=torch.float64)
        targets = torch.randint(4, (3, RANKS, 4))
        for x, t in zip(images, targets, strict=True):
            result = ours.step((x[rank], t[rank]))
            whole = alone.step((x.flatten(0, 1), t.flatten()))
            losses = torch.stack(result.losses)
            dist.all_reduce(losses)
            torch.testing.assert_close(losses / RANKS, torch.stack(whole.losses))
        assert_agreed([t.detach() for t in ours.persistent_tensors()])
        if rank == 0:
            for a, b in zip(ours.persistent_tensors(), alone.persistent_tensors(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def _trainer(rank: int, rule: str) -> LocalTrainer:
    torch.manual_seed(rank)
    config = TrainerConfig(rule=rule, data_parallel=True)
    return LocalTrainer(CifarResNet((1, 1, 1), 4, widths=(8, 8, 8)), config, example=(3, 8, 8))


def _loader(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data))


def _local_epochs(rank: int) -> None:
    """History, running statistics and checkpoints: the same on every rank, and resuming is exact."""
    folder = Path("run")
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % 4)
    trainer, loader = functools.partial(_trainer, rank, "man++"), functools.partial(_loader, data)

    whole = trainer()
    history = whole.fit(loader(), 3, val_loader=loader())
    assert_agreed([t.detach() for t in whole.persistent_tensors()])
    assert_agreed([torch.tensor([[row[key] for key in ("train_loss", "train_acc", "val_loss")] for row in history])])
    said: list[int] = []
    log = (lambda _, row: said.append(row["epoch"])) if rank == 0 else None  # as one rank alone writes a log
    trainer().fit(loader(), 1, checkpoint_dir=folder, checkpoint_every=2, on_epoch=log)
    assert said == [1] * (rank == 0)
    second = trainer()
    second.fit(loader(), 3, val_loader=loader(), checkpoint_dir=folder, resume=True)
    for a, b in zip(whole.persistent_tensors(), second.persistent_tensors(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(IsADirectoryError if rank == 0 else RuntimeError, match="run"):
        second.save(folder)  # where rank 0 cannot write, no rank waits for it
    if rank == 0:
        alone = LocalTrainer(
            CifarResNet((1, 1, 1), 4, widths=(8, 8, 8)), TrainerConfig(rule="man++"), example=(3, 8, 8)
        )
        with pytest.raises(CheckpointError, match="its ranks is 2, here it is 1"):
            alone.load(folder / CHECKPOINT_NAME)


def _failing_validation(rank: int) -> None:
    """The ranks cannot agree on a checkpoint once one of them has failed: it is there before."""
    data = TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % 4)
    trainer, loader = functools.partial(_trainer, rank, "dgl"), functools.partial(_loader, data)

    def broken() -> Any:
        yield data[:4]
        raise ZeroDivisionError

    whole, second = trainer(), trainer()
    with pytest.raises(ValueError, match="val_loader has to be the same on every rank, and is a loader, None"):
        whole.fit(loader(), 2, val_loader=loader() if rank == 0 else None)
    whole.fit(loader(), 2)
    with pytest.raises(ZeroDivisionError):
        trainer().fit(loader(), 2, val_loader=broken(), checkpoint_dir="failing")
    second.load("failing")
    assert (second.epoch, second.position) == (0, 3)
    second.fit(loader(), 2)
    for a, b in zip(whole.persistent_tensors(), second.persistent_tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize(
    "test", [_sharded, _data_parallel, _local_training, _local_epochs, _failing_validation, _half_precision]
)
def test_two_ranks(test: Any, tmp_path: Path) -> None:
    on_ranks(RANKS, test, tmp_path)


def test_data_parallel_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"start with torchrun, and call torch\.distributed\.init_process_group"):
        LocalTrainer(CifarResNet((1, 1, 1), 4), TrainerConfig(data_parallel=True), example=(3, 8, 8))
