"""Training steps as CUDA graphs: the bookkeeping, on a stand-in for the device."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manpp_kernels.local.recompute import Recomputed, make_capturable
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig
from manpp_kernels.training.graphs import StepGraph

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
    "recomputed": {"rule": "e2e", "recompute": True},
    "blocks recomputed": {"rule": "man++", "blocks": 2, "recompute": True},
    "recomputed, compiled": {"rule": "dgl", "blocks": 2, "recompute": True, "compile": "aot_eager"},
}


def make(
    device: str = "cpu", scheduler: Any = None, optimizer: Any = None, criterion: Any = None, **config: Any
) -> LocalTrainer:
    torch.manual_seed(0)
    model = CifarResNet((1, 1, 1), num_classes=4, widths=(8, 12, 16)).double().to(device)
    return LocalTrainer(
        model,
        TrainerConfig(learning_rate=0.05, **config),
        example=torch.randn(2, 3, 8, 8, dtype=torch.float64),
        scheduler=scheduler,
        optimizer=optimizer,
        criterion=criterion,
    )


def batches(count: int, n: int = 8, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.rand(n, 3, 8, 8, generator=draw, dtype=torch.float64).to(device), (torch.arange(n) % 4).to(device))
        for _ in range(count)
    ]


def numbers(trainer: LocalTrainer) -> list[dict[str, Any]]:
    groups = [g for o in trainer.optimizers for g in o.param_groups]
    return [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in groups]


def addresses(trainer: LocalTrainer) -> list[int]:
    states = [t for o in trainer.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    return [t.data_ptr() for t in (*trainer.persistent_tensors(), *states)]


def step_both(eager: LocalTrainer, graphed: LocalTrainer, steps: int) -> None:
    for batch in batches(steps):
        eager.step(batch)
        graphed.step(batch)


def assert_same(eager: LocalTrainer, graphed: LocalTrainer, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    for a, b in zip(eager.persistent_tensors(), graphed.persistent_tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


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
        self._call, self._numbers, self._addresses = call, numbers(self.trainer), addresses(self.trainer)
        self._results = torch.zeros(len(self.trainer.network), dtype=torch.float64), torch.zeros(8, 4).double()
        return self._results

    def replay(self) -> None:
        self.replays += 1
        assert addresses(self.trainer) == self._addresses, "a GPU would write where the tensors were"
        groups, now = [g for o in self.trainer.optimizers for g in o.param_groups], numbers(self.trainer)
        for group, then in zip(groups, self._numbers, strict=True):
            group.update(copy.deepcopy(then))
        for result, value in zip(self._results, self._call(), strict=True):
            result.copy_(value.detach())
        assert addresses(self.trainer) == self._addresses, "a GPU would make this tensor anew at every replay"
        for group, then in zip(groups, now, strict=True):
            group.update(then)

    def forget(self) -> None: ...


def recorded(trainer: LocalTrainer, *criteria: torch.nn.Module) -> Recorder:
    """Put a graph into a trainer on the CPU."""
    recorder = Recorder(trainer)
    make_capturable(trainer.network)
    device: Any = recorder
    trainer._graph = StepGraph(trainer._local_step, [trainer.network, *criteria], trainer.optimizers, device)
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
    assert_same(eager, graphed)


def test_epochs_with_a_smaller_last_batch_and_another_learning_rate() -> None:
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    eager, graphed = (make(rule="man++", scheduler=schedule) for _ in range(2))
    recorder = recorded(graphed)
    epoch = [*batches(5), *batches(1, n=4)]
    for trainer in (eager, graphed):
        trainer.fit(epoch, 3)
    assert (recorder.runs, recorder.captures, recorder.replays) == (3 + 3, 3, 2 + 5 + 5)
    assert_same(eager, graphed)
    assert [row["train_loss"] for row in eager.history] == [row["train_loss"] for row in graphed.history]


def test_the_rate_of_one_block_alone() -> None:
    eager, graphed = (make(rule="dgl", order="unlocked") for _ in range(2))
    recorder = recorded(graphed)
    for i, batch in enumerate(batches(7)):
        for trainer in (eager, graphed):
            trainer.optimizers[-1].param_groups[0]["lr"] = 0.05 if i < 5 else 0.01
            trainer.step(batch)
    assert (recorder.runs, recorder.captures, recorder.replays) == (3, 2, 4)
    assert_same(eager, graphed)


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
    assert_same(eager, graphed)


def momentum_at_the_drop(trainer: LocalTrainer) -> None:
    trainer.optimizers[0].state.clear()
    trainer.optimizers[0].param_groups[0]["lr"] = 0.01


def other_memory(trainer: LocalTrainer) -> None:
    parameter = next(trainer.model.parameters())
    parameter.data = parameter.data.clone()


def other_buffers(trainer: LocalTrainer) -> None:
    norm = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.running_mean = norm.running_mean + 1


CHANGES: dict[str, Callable[[LocalTrainer], Any]] = {
    "momentum begun anew, and a smaller rate": momentum_at_the_drop,
    "a parameter in other memory": other_memory,
    "a buffer replaced": other_buffers,
    "the optimizer's state loaded": lambda t: t.optimizers[0].load_state_dict(
        copy.deepcopy(t.optimizers[0].state_dict())
    ),
    "another momentum": lambda t: t.optimizers[0].param_groups[0].update(momentum=0.5),
    "a frozen parameter": lambda t: next(t.model.parameters()).requires_grad_(False),
}


@pytest.mark.parametrize(("steps", "counts"), [(5, (6, 2, 4)), (3, (6, 1, 2))], ids=["replays", "warm-up"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_between_is_noticed(change: str, steps: int, counts: tuple[int, ...]) -> None:
    narrow = {"host_options": {"width": "narrow"}}  # wide heads would take most of the time
    eager, graphed = (make(rule="man++", rule_options=narrow) for _ in range(2))
    recorder = recorded(graphed)
    step_both(eager, graphed, steps)
    for trainer in (eager, graphed):
        CHANGES[change](trainer)
    step_both(eager, graphed, 5)
    assert (recorder.runs, recorder.captures, recorder.replays) == counts
    assert_same(eager, graphed)


def test_a_criterion_with_other_weights_is_noticed() -> None:
    def make_one() -> tuple[LocalTrainer, torch.nn.CrossEntropyLoss]:
        criterion = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0, 0.5]).double())
        return make(rule="dgl", criterion=criterion), criterion

    (eager, _), (graphed, criterion) = make_one(), make_one()
    recorder = recorded(graphed, criterion)
    step_both(eager, graphed, 5)
    for trainer in (eager, graphed):
        trainer._targets.criterion.func.weight = torch.tensor([0.5, 1.0, 3.0, 1.0]).double()  # type: ignore[attr-defined]
    step_both(eager, graphed, 5)
    assert (recorder.runs, recorder.captures, recorder.replays) == (6, 2, 4)
    assert_same(eager, graphed)


def test_a_checkpoint_from_before_the_first_step(tmp_path) -> None:
    """Loaded when a step is about to be captured: the momentum that it makes would begin anew at every replay."""
    eager, graphed = make(rule="dgl"), make(rule="dgl")
    recorder = recorded(graphed)
    for trainer in (eager, graphed):
        trainer.save(tmp_path / "checkpoint.pt")
        for batch in batches(3):
            trainer.step(batch)
        trainer.load(tmp_path / "checkpoint.pt")
        for batch in batches(5):
            trainer.step(batch)
    assert (recorder.runs, recorder.captures, recorder.replays) == (6, 1, 2)
    assert_same(eager, graphed)


def test_a_trainer_and_its_graph_go_with_its_last_reference() -> None:
    trainer = make(rule="dgl")
    gone = weakref.ref(trainer)
    trainer._graph = StepGraph(trainer._local_step, [trainer.network], trainer.optimizers, Recorder(None))  # type: ignore[arg-type]
    trainer.step(batches(1)[0])
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()


def test_a_learning_rate_that_is_a_tensor_on_the_host() -> None:
    def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, torch.tensor(0.05, dtype=torch.float64), momentum=0.9, foreach=False)

    eager, graphed = (make(rule="dgl", optimizer=sgd) for _ in range(2))
    recorder = recorded(graphed)
    for i, batch in enumerate(batches(7)):
        for trainer in (eager, graphed):
            if i == 5:
                trainer.optimizers[0].param_groups[0]["lr"].fill_(0.01)
            trainer.step(batch)
    assert (recorder.runs, recorder.captures, recorder.replays) == (3, 2, 4)
    assert_same(eager, graphed)


def test_memory_that_does_not_suffice_is_no_other_error() -> None:
    """And the training goes on from there, with a warm-up: what a capture begins, its end may leave half done."""
    eager, trainer = make(rule="dgl"), make(rule="dgl")
    recorder = recorded(trainer)
    assert trainer._graph is not None

    def refuse(call: Callable[[], Any]) -> Any:
        raise torch.OutOfMemoryError("none left")

    capture, recorder.capture = recorder.capture, refuse  # type: ignore[method-assign]
    step_both(eager, trainer, 3)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        trainer.step(batches(1)[0])
    assert trainer._graph.peak_bytes == 0
    recorder.capture = capture  # type: ignore[method-assign]
    step_both(eager, trainer, 3)
    assert (recorder.runs, recorder.captures, trainer._graph.peak_bytes) == (6, 0, 0)
    step_both(eager, trainer, 2)
    assert (recorder.runs, recorder.captures, trainer._graph.peak_bytes) == (6, 1, recorder.peak_bytes)
    assert_same(eager, trainer)


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
    "Adam, in one group": (
        lambda p: torch.optim.Adam(
            [{"params": p, "capturable": True}, {"params": [torch.nn.Parameter(torch.zeros(1))]}]
        ),
        "make Adam with capturable=True",
    ),
    "AdamW, capturable": (functools.partial(torch.optim.AdamW, capturable=True), None),
    "Adagrad": (torch.optim.Adagrad, "Adagrad cannot"),
    "SGD": (functools.partial(torch.optim.SGD, lr=0.1), None),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_can_be_captured(name: str) -> None:
    from manpp_kernels.training.graphs import check_capturable

    factory, message = OPTIMIZERS[name]
    optimizer = factory([torch.nn.Parameter(torch.zeros(1))])
    if message is None:
        check_capturable([optimizer])
    else:
        with pytest.raises(ValueError, match=message):
            check_capturable([optimizer])


def test_what_a_trainer_sets_for_steps_that_are_captured(monkeypatch) -> None:
    compiled: dict[str, Any] = {}
    monkeypatch.setattr("manpp_kernels.trainer.check_device", lambda device: None)
    monkeypatch.setattr("manpp_kernels.trainer.make_step_graph", lambda *args: None)
    monkeypatch.setattr("manpp_kernels.trainer.compile_blocks", lambda *args, **how: compiled.update(how))
    for graphs in (False, True):
        trainer = make(rule="e2e", recompute=True, cuda_graphs=graphs)
        assert {m.capturable for m in trainer.network.modules() if isinstance(m, Recomputed)} == {graphs}
        make(rule="dgl", compile="aot_eager", cuda_graphs=graphs)
        assert compiled["dynamic"] is (False if graphs else None)
