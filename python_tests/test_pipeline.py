"""Local blocks shared out over processes train as they do in one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_agreed, on_ranks
from test_taps import Skipping
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from manpp_kernels.checkpoint import CheckpointError
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import CHECKPOINT_NAME, LocalTrainer, TrainerConfig
from manpp_kernels.training.pipeline import Pipeline

LINEAR = {"host_options": {"width": "linear"}}
TRAININGS: dict[str, dict[str, Any]] = {
    "dgl, in parts": {"rule": "dgl", "accumulate": 2, "clip_norm": 0.1, "channels_last": True},
    "dgl, shared out unevenly": {"rule": "dgl", "order": "unlocked", "pipeline": (1, 3), "recompute": True},
    "man++": {"rule": "man++", "rule_options": LINEAR},
    "man++, bf16": {"rule": "man++", "rule_options": LINEAR, "amp": "bf16"},
    "man++, unlocked": {"rule": "man++", "rule_options": {**LINEAR, "form": "parameter"}, "order": "unlocked"},
    # The EMAs of the first block follow units of every later stage.
    "man++, stages": {"rule": "man++", "rule_options": {**LINEAR, "units": "stages"}, "accumulate": 2},
    "infopro": {"rule": "infopro"},
}


def _trainer(settings: dict[str, Any], pipeline: bool = True, seed: int = 0, **more: Any) -> LocalTrainer:
    torch.manual_seed(seed)
    config = TrainerConfig(**{"blocks": 4, "pipeline": True, **settings})
    if not pipeline:
        config = dataclasses.replace(config, pipeline=False, **more)
    return LocalTrainer(CifarResNet((1, 1, 1), 4, widths=(4, 6, 8)), config, example=(3, 8, 8))


def _assert_same(found: LocalTrainer, expected: LocalTrainer) -> None:
    for a, b in zip(found.persistent_tensors(), expected.persistent_tensors(), strict=True):
        assert torch.equal(a, b)


class Centred(nn.Module):
    """Puts another tensor in its buffer's place in every forward pass."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.linear(x - self.mean)


def _of_small_numbers(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, targets.long())


def _replaced_buffers(rank: int) -> None:
    def trainer(pipeline: bool) -> LocalTrainer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), Centred(4), Centred(4), nn.Linear(4, 2))
        config = TrainerConfig(rule="dgl", blocks=3, pipeline=pipeline)
        return LocalTrainer(model, config, example=(4,), criterion=_of_small_numbers)

    ours, alone = trainer(True), trainer(False)
    for _ in range(2):
        batch = torch.randn(6, 4), (torch.arange(6) % 2).to(torch.uint16)
        ours.step(batch if rank == 0 else None)
        alone.step(batch)
    state = ours.export_state_dict()
    assert all(torch.equal(a, state[key]) for key, a in alone.export_state_dict().items())
    assert not ours._ranks._mail._sent, "what was taken is let go of"


def _steps(rank: int) -> None:
    _replaced_buffers(rank)
    torch.manual_seed(5)
    batches = [(torch.rand(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(3)]
    for name, settings in TRAININGS.items():
        ours = _trainer(settings, seed=rank)  # the copies begin unlike: rank 0's it is
        alone = _trainer(settings, False)
        own = ours._ranks.own(4)
        for batch in batches:
            result = ours.step(batch if rank == 0 else None)
            whole = alone.step(batch)
            assert [loss.item() for loss in result.losses] == [whole.losses[j].item() for j in own], name
            assert torch.equal(result.targets, batch[1])
            if own.stop == 4:
                assert result.logits is not None
                assert torch.equal(result.logits, whole.logits), name
            else:
                assert result.logits is None
        state = ours.export_state_dict()
        _assert_same(ours, alone)
        assert all(torch.equal(a, state[key]) for key, a in alone.export_state_dict().items())

    torch.manual_seed(0)
    config = TrainerConfig(rule="dgl", blocks=4, learning_rate=0.05, pipeline=True)
    skipping = Skipping()  # whose head looks at features of the other rank
    ours = LocalTrainer(copy.deepcopy(skipping), config, example=(3, 8, 8))
    torch.manual_seed(0)
    alone = LocalTrainer(skipping, dataclasses.replace(config, pipeline=False), example=(3, 8, 8))
    alone.network.load_state_dict(ours.network.state_dict())
    for images, _ in batches:
        batch = images, (images.sum(1) > 1.5).long()
        ours.step(batch if rank == 0 else None)
        alone.step(batch)
    ours.export_state_dict()
    _assert_same(ours, alone)


def _three_steps(rank: int) -> None:
    """Parameters that EMAs follow come from the next rank and from the one after it."""
    for name in ("man++, unlocked", "man++, stages"):
        ours, alone = _trainer(TRAININGS[name]), _trainer(TRAININGS[name], False)
        for tensors in ours._ranks._awaited.values():
            assert len(set(map(id, tensors))) == len(tensors), "once for all EMAs that follow it"
        for _ in range(4):
            batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
            ours.step(batch if rank == 0 else None)
            alone.step(batch)
        ours.export_state_dict()
        _assert_same(ours, alone)


def _loader(seed: int = 0) -> DataLoader:
    data = TensorDataset(torch.randn(22, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(22) % 4)
    return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed))


FIGURES = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr")


def _epochs(rank: int) -> None:
    """History, checkpoints and resuming are those of one process, whatever the other ranks' loaders would give."""
    trainer = functools.partial(_trainer, TRAININGS["man++"])
    factory = functools.partial(torch.optim.Adam, lr=0.01)
    config = {**TRAININGS["man++"], "blocks": 4}

    def made(pipeline: Any) -> LocalTrainer:
        torch.manual_seed(0)
        network = CifarResNet((1, 1, 1), 4, widths=(4, 6, 8))
        scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
        return LocalTrainer(
            network,
            TrainerConfig(**config, pipeline=pipeline),
            example=(3, 8, 8),
            optimizer=factory,
            scheduler=scheduler,
        )

    alone, whole = made(False), made(True)
    expected = alone.fit(_loader(), 3, val_loader=_loader())
    found = whole.fit(_loader(rank), 3, val_loader=_loader())
    for a, b in zip(expected, found, strict=True):
        assert {key: a[key] for key in FIGURES} == {key: b[key] for key in FIGURES}
    _assert_same(whole, alone)
    assert_agreed([t.detach() for t in whole.persistent_tensors()])

    class Stop(Exception):
        pass

    def stop(trainer: LocalTrainer, _: Any) -> None:
        if (trainer.epoch, trainer.position) == (1, 4):
            raise Stop

    first, second = made(True), made(True)
    with pytest.raises(Stop):
        first.fit(_loader(rank), 3, checkpoint_dir="run", checkpoint_every=3, val_loader=_loader(), on_step=stop)
    second.fit(_loader(rank), 3, checkpoint_dir="run", val_loader=_loader(), resume=True)
    _assert_same(second, alone)
    # To the state of the checkpoint again, with parameters of a later step on their way.
    second.step((torch.randn(4, 3, 8, 8), torch.arange(4)))
    second.load("run")
    batch = torch.ones(4, 3, 8, 8), torch.arange(4)
    alone.step(batch)
    second.step(batch)
    second.export_state_dict()
    _assert_same(second, alone)
    if rank == 0:
        with pytest.raises(CheckpointError, match="its ranks is 2, here it is 1"):
            made(False).load(f"run/{CHECKPOINT_NAME}")
    with pytest.raises(CheckpointError, match=r"its pipeline is \[2, 2\], here it is \[1, 3\]"):
        _trainer({**TRAININGS["man++"], "pipeline": (1, 3)}).load("run")
    with pytest.raises(CheckpointError, match=r"its pipeline is \[2, 2\], here it is None"):
        trainer(False, data_parallel=True).load("run")


def _ahead(rank: int) -> None:
    """A rank does not wait for who comes behind it: the second begins when the first is two steps ahead."""
    trainer, flag = _trainer({"rule": "dgl"}), Path("two-steps-done")
    while rank == 1 and not flag.exists():
        time.sleep(0.01)
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    for step in range(2):
        targets.fill_(step)  # as a loader that uses its memory again
        result = trainer.step((images, targets))
        assert result.targets.tolist() == [step] * 4
    targets.fill_(2)
    flag.touch()
    trainer.export_state_dict()
    _errors(rank)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.randn(3, 8, 8), 0)] * 4)


def _errors(rank: int) -> None:
    trainer = _trainer({"rule": "dgl"})
    with pytest.raises(ValueError, match="the process group hands on no tensors of meta, where this rank"):
        Pipeline(trainer.network, torch.device("meta"), TrainerConfig(pipeline=True))
    if rank == 0:
        with pytest.raises(TypeError, match=r"no tensors of the dtype torch.float32 with 9 dimensions; give"):
            trainer._ranks.hand_on(torch.zeros([1] * 9))
    with pytest.raises(ValueError, match="the 4 local blocks are to be shared out over 2 ranks as 1, 2: each rank"):
        _trainer({"rule": "dgl", "pipeline": (1, 2)})
    with pytest.raises(ValueError, match="the 1 local blocks are to be shared out over 2 ranks as 0, 1"):
        _trainer({"rule": "e2e", "blocks": 1})
    with pytest.raises(ValueError, match="on every rank the same number, and they have an unknown number, 6"):
        _trainer({"rule": "dgl"}).fit(DataLoader(Endless(), 2) if rank == 0 else _loader(), 1)
    with pytest.raises(ValueError, match=r"rank 1 has another network to train than rank 0: make it of the same model"):
        _trainer({"rule": "dgl", "blocks": 4 - rank})
    with pytest.raises(ValueError, match="accumulate has to be the same on every rank, and is 1, 2"):
        _trainer({"rule": "dgl", "accumulate": 1 + rank})
    with pytest.raises(ValueError, match="epochs has to be the same on every rank, and is 1, 2"):
        trainer.fit(_loader(), 1 + rank)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="SyncBatchNorm waits for all ranks, and in a pipeline one alone runs it"):
        LocalTrainer(model, TrainerConfig(rule="dgl", blocks=2, pipeline=True), example=(4,))
    norm = nn.BatchNorm1d(4, affine=False)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), norm), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), norm), nn.Linear(4, 2)
    )
    with pytest.raises(ValueError, match=r"blocks 0 and 1 share body.*running_mean, which ranks 0 and 1 of a pipeline"):
        LocalTrainer(model, TrainerConfig(rule="dgl", blocks=2, pipeline=True), example=(4,))
    dist.barrier()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("test", [_steps, _epochs, _ahead])
def test_two_ranks(test: Any, tmp_path: Path) -> None:
    on_ranks(2, test, tmp_path)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_three_ranks(tmp_path: Path) -> None:
    on_ranks(3, _three_steps, tmp_path)


class Miscounted:
    def __init__(self, batches: int) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter([(torch.randn(4, 3, 8, 8), torch.arange(4))] * self._batches)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_loaders_that_miscount(tmp_path: Path) -> None:
    """Other ranks would wait, so that the first is to say so; here it is the only one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        trainer = _trainer({"rule": "dgl"})
        trainer.fit(Miscounted(2), 1)
        with pytest.raises(ValueError, match="the loader says that it has 2 batches, and gave 1: the other ranks"):
            trainer.fit(Miscounted(1), 2)
        with pytest.raises(ValueError, match="the loader says that it has 2 batches, and gave more"):
            _trainer({"rule": "dgl"}).fit(Miscounted(3), 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amp": "fp16"}, "pipeline does not go with amp='fp16'"),
        ({"cuda_graphs": True}, "pipeline does not go with cuda_graphs=True"),
        ({"data_parallel": True}, "pipeline does not go with data_parallel=True"),
        ({"pipeline": (2, 0)}, "every number of blocks in pipeline has to be 1 or more, and is 0"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**{"pipeline": True, **settings})


def test_the_setting_is_a_flag_or_numbers() -> None:
    for pipeline in ("no", 2, None):
        with pytest.raises(TypeError, match="pipeline has to be True, False or a number for each rank, and is"):
            TrainerConfig(pipeline=pipeline)
    with pytest.raises(TypeError, match="every number of blocks in pipeline has to be a whole number"):
        TrainerConfig(pipeline=(1.5, 2))


def test_blocks_that_overlap_stay_together() -> None:
    with pytest.raises(ValueError, match=r"'mlaan'.* cannot run at once; set pipeline=False"):
        _trainer({"rule": "mlaan"})


def test_it_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"pipeline needs a process group: start with torchrun, and call"):
        _trainer({"rule": "dgl"})
