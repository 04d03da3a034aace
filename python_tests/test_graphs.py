"""Training steps as CUDA graphs: on a stand-in for the device the bookkeeping, on a GPU the values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manpp_kernels.local.graphs import StepGraph
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

CASES = {
    "e2e": {"rule": "e2e"},
    "dgl": {"rule": "dgl"},
    "man++": {"rule": "man++"},
    "man++, unlocked": {"rule": "man++", "order": "unlocked"},
    "man++, parameter form": {"rule": "man++", "rule_options": {"form": "parameter"}},
    "man++, parameter form, unlocked": {"rule": "man++", "rule_options": {"form": "parameter"}, "order": "unlocked"},
    "infopro": {"rule": "infopro", "rule_options": {"loss": "contrastive"}},
    "lookahead": {"rule": "lookahead"},
    "mlaan": {"rule": "mlaan"},
    "accumulated, clipped": {"rule": "man++", "accumulate": 2, "clip_norm": 0.5},
}


def make(device: str = "cpu", scheduler: Any = None, optimizer: Any = None, **config: Any) -> LocalTrainer:
    torch.manual_seed(0)
    model = CifarResNet((1, 1, 1), num_classes=4, widths=(8, 12, 16)).double().to(device)
    return LocalTrainer(
        model,
        TrainerConfig(learning_rate=0.05, **config),
        example=torch.randn(2, 3, 8, 8, dtype=torch.float64),
        scheduler=scheduler,
        optimizer=optimizer,
    )


def batches(count: int, n: int = 8, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.rand(n, 3, 8, 8, generator=draw, dtype=torch.float64).to(device), (torch.arange(n) % 4).to(device))
        for _ in range(count)
    ]


class Recorder:
    """Stands in for a GPU: a capture runs nothing, a replay does what was captured, with the numbers of then."""

    peak_bytes = 7

    def __init__(self, trainer: LocalTrainer) -> None:
        self.trainer = trainer
        self.captures = self.replays = self.runs = 0

    def run(self, call: Callable[[], Any]) -> Any:
        self.runs += 1
        return call()

    def capture(self, call: Callable[[], Any]) -> Any:
        self.captures += 1
        self._call, self._rates = call, [g["lr"] for o in self.trainer.optimizers for g in o.param_groups]
        self._results = torch.zeros(len(self.trainer.network), dtype=torch.float64), torch.zeros(8, 4).double()
        return self._results

    def replay(self) -> None:
        self.replays += 1
        groups = [g for o in self.trainer.optimizers for g in o.param_groups]
        now = [g["lr"] for g in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        for result, value in zip(self._results, self._call(), strict=True):
            result.copy_(value.detach())
        for group, rate in zip(groups, now, strict=True):
            group["lr"] = rate

    def forget(self) -> None: ...


def recorded(trainer: LocalTrainer) -> Recorder:
    """Put a graph into a trainer on the CPU."""
    recorder = Recorder(trainer)
    trainer._graph = StepGraph(trainer._compute, trainer.optimizers, recorder)  # type: ignore[arg-type]
    return recorder


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_steps(case: str) -> None:
    eager, graphed = make(**CASES[case]), make(**CASES[case])
    recorder = recorded(graphed)
    kept = []
    for batch in batches(6):
        a, b = eager.step(batch), graphed.step(batch)
        assert all(torch.equal(x, y) for x, y in zip(a.losses, b.losses, strict=True))
        assert torch.equal(a.logits, b.logits)
        kept.append((b, [x.clone() for x in b.losses], b.logits.clone()))
    assert (recorder.runs, recorder.captures, recorder.replays) == (3, 1, 3)
    for result, losses, logits in kept:  # a later step writes over none of them
        assert all(torch.equal(x, y) for x, y in zip(result.losses, losses, strict=True))
        assert torch.equal(result.logits, logits)
    for a, b in zip(eager.persistent_tensors(), graphed.persistent_tensors(), strict=True):
        assert torch.equal(a, b)


def test_epochs_with_a_smaller_last_batch_and_another_learning_rate() -> None:
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    eager, graphed = (make(rule="man++", scheduler=schedule) for _ in range(2))
    recorder = recorded(graphed)
    epoch = [*batches(5), *batches(1, n=4)]
    for trainer in (eager, graphed):
        trainer.fit(epoch, 3)
    assert (recorder.runs, recorder.captures, recorder.replays) == (3 + 3, 3, 2 + 5 + 5)
    for a, b in zip(eager.persistent_tensors(), graphed.persistent_tensors(), strict=True):
        assert torch.equal(a, b)
    assert [row["train_loss"] for row in eager.history] == [row["train_loss"] for row in graphed.history]


def test_the_first_batch_may_be_the_odd_one() -> None:
    trainer = make(rule="dgl")
    recorder = recorded(trainer)
    for batch in [*batches(2, n=4), *batches(5)]:
        trainer.step(batch)
    assert (recorder.runs, recorder.captures, recorder.replays) == (5, 1, 2)
    assert trainer._graph is not None
    assert trainer._graph.peak_bytes == 7


def test_a_loaded_checkpoint_starts_over(tmp_path) -> None:
    """The optimizer's state is in other tensors then, of which a graph would know nothing."""
    schedule = functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    eager, graphed = (make(rule="man++", scheduler=schedule) for _ in range(2))
    recorder = recorded(graphed)
    for trainer in (eager, graphed):
        for batch in batches(4):
            trainer.step(batch)
        trainer.save(tmp_path / "checkpoint.pt")
        trainer.load(tmp_path / "checkpoint.pt")
        for batch in batches(5):
            trainer.step(batch)
    assert (recorder.runs, recorder.captures, recorder.replays) == (6, 2, 3)
    for a, b in zip(eager.persistent_tensors(), graphed.persistent_tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_cannot_be_captured_says_so_and_leaves_the_trainer_whole() -> None:
    trainer = make(rule="dgl")
    recorder = recorded(trainer)

    def refuse(call: Callable[[], Any]) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    recorder.capture = refuse  # type: ignore[method-assign]
    for batch in batches(3):
        trainer.step(batch)
    before = [t.clone() for t in trainer.persistent_tensors()]
    with pytest.raises(RuntimeError, match=r"cannot be captured.*stream is capturing\).*cuda_graphs"):
        trainer.step(batches(1)[0])
    for a, b in zip(before, trainer.persistent_tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", [{"schedule": "step"}, {"amp": "fp16"}, {"data_parallel": True}], ids=str)
def test_settings_that_do_not_go_together(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"cuda_graphs does not go with {next(iter(setting))}"):
        TrainerConfig(cuda_graphs=True, **setting)


def test_it_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a CUDA device, and the model is on cpu"):
        make(cuda_graphs=True)


OPTIMIZERS = {
    "Adam": (torch.optim.Adam, "make Adam with capturable=True"),
    "AdamW, capturable": (functools.partial(torch.optim.AdamW, capturable=True), None),
    "Adagrad": (torch.optim.Adagrad, "Adagrad cannot"),
    "SGD": (functools.partial(torch.optim.SGD, lr=0.1), None),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_can_be_captured(name: str) -> None:
    from manpp_kernels.local.graphs import check_capturable

    factory, message = OPTIMIZERS[name]
    optimizer = factory([torch.nn.Parameter(torch.zeros(1))])
    if message is None:
        check_capturable([optimizer])
    else:
        with pytest.raises(ValueError, match=message):
            check_capturable([optimizer])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str) -> None:
    """Beside eager steps: values after captures, replays, a smaller batch and another learning rate."""
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    eager, graphed = (
        make("cuda", scheduler=schedule, cuda_graphs=graphs, **copy.deepcopy(CASES[case])) for graphs in (False, True)
    )
    epoch = [*batches(5), *batches(1, n=4)]
    for trainer in (eager, graphed):
        trainer.fit(epoch, 2)
    for a, b in zip(eager.persistent_tensors(), graphed.persistent_tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    for a, b in zip(eager.history, graphed.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-7)
        assert b["peak_memory_bytes"] > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_adam_on_a_gpu() -> None:
    adam = functools.partial(torch.optim.AdamW, lr=1e-2, capturable=True)
    eager, graphed = (make("cuda", optimizer=adam, rule="man++", cuda_graphs=graphs) for graphs in (False, True))
    for batch in batches(6):
        eager.step(batch)
        graphed.step(batch)
    for a, b in zip(eager.persistent_tensors(), graphed.persistent_tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
