"""What ``LocalTrainer.fit`` asks of a loader, and tells it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from manpp_kernels.checkpoint import loader_generators
from manpp_kernels.training.progress import Progress, length_of

DATA = TensorDataset(torch.arange(8))


class Told:
    """Mixed into what gives an order, it keeps the numbers of the epochs it was told of."""

    told: list[int]

    def set_epoch(self, epoch: int) -> None:
        self.told = [*getattr(self, "told", []), epoch]


class ToldSampler(Told, SequentialSampler): ...


class ToldBatches(Told, BatchSampler): ...


class ToldLoader(Told, DataLoader): ...


def batches_of(sampler: object) -> DataLoader:
    return DataLoader(DATA, batch_sampler=BatchSampler(sampler, 4, drop_last=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: DataLoader(DATA, 4, sampler=ToldSampler(DATA)), lambda loader: loader.sampler),
        (
            lambda: DataLoader(DATA, batch_sampler=ToldBatches(SequentialSampler(DATA), 4, False)),
            lambda loader: loader.batch_sampler,
        ),
        (lambda: batches_of(ToldSampler(DATA)), lambda loader: loader.batch_sampler.sampler),
        (lambda: ToldLoader(DATA, 4), lambda loader: loader),
    ],
    ids=["sampler", "batch sampler", "the sampler of a batch sampler", "loader"],
)
def test_who_gives_the_order_is_told_the_epoch(make: Callable[[], DataLoader], told: Callable) -> None:
    """Each once, as ``DistributedSampler``, which without it gives every epoch the order of the first."""
    loader, progress = make(), Progress()
    for _ in range(2):
        assert len(list(progress.batches(loader))) == 2
        progress.finish_epoch({})
    assert told(loader).told == [0, 1]


def test_where_generators_are_looked_for() -> None:
    own = torch.Generator()
    sampler = RandomSampler(DATA, generator=own)
    assert loader_generators(DataLoader(DATA, 4, shuffle=True)) == []
    for loader in (
        DataLoader(DATA, 4, shuffle=True, generator=own),
        DataLoader(DATA, 4, sampler=sampler),
        DataLoader(DATA, None, sampler=sampler),  # without batches
        batches_of(sampler),
    ):
        assert loader_generators(loader) == [own]


class Endless(TensorDataset):
    """As some of those that stream: it has the method, and no answer."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_a_length_that_nobody_knows() -> None:
    assert length_of(DataLoader(DATA, 4)) == 2
    for loader in (iter([]), (batch for batch in DATA), Endless(torch.arange(8))):
        assert length_of(loader) is None
