"""Training steps as CUDA graphs on a GPU: their values, beside those of eager steps."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from test_graphs import CASES, assert_same, batches, make, step_both
from torch import Tensor

from manpp_kernels.trainer import LocalTrainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def counted(trainer: LocalTrainer) -> dict[str, int]:
    """How often a trainer on a GPU captures and replays from here on."""
    assert trainer._graph is not None
    device, counts = trainer._graph._device, {"capture": 0, "replay": 0}
    methods = {name: getattr(device, name) for name in counts}

    def call(name: str, *args: Any) -> Any:
        counts[name] += 1
        return methods[name](*args)

    for name in counts:
        setattr(device, name, functools.partial(call, name))
    return counts


@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str) -> None:
    """Beside eager steps: values after captures, replays, a smaller batch and another learning rate."""
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    eager, graphed = (
        make("cuda", scheduler=schedule, cuda_graphs=graphs, **copy.deepcopy(CASES[case])) for graphs in (False, True)
    )
    counts = counted(graphed)
    epoch = [*batches(5), *batches(1, n=4)]
    for trainer in (eager, graphed):
        trainer.fit(epoch, 2, val_loader=batches(2))
    assert counts == {"capture": 2, "replay": 2 + 5}
    assert graphed._graph is not None
    assert graphed.history[1]["peak_memory_bytes"] >= graphed._graph.peak_bytes > 0
    assert_same(eager, graphed, rtol=1e-7, atol=1e-9)
    for a, b in zip(eager.history, graphed.history, strict=True):
        for name in ("train_loss", "val_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-7)


def test_a_checkpoint_in_between_on_a_gpu(tmp_path) -> None:
    """Saved after replays, loaded into another trainer and into the same one."""
    eager, graphed = (make("cuda", rule="man++", cuda_graphs=graphs) for graphs in (False, True))
    for trainer in (eager, graphed):
        for batch in batches(5):
            trainer.step(batch)
    graphed.save(tmp_path / "checkpoint.pt")
    other = make("cuda", rule="man++", cuda_graphs=True)
    counts = counted(graphed)
    for trainer in (graphed, other):
        trainer.load(tmp_path / "checkpoint.pt")
    for trainer in (eager, graphed, other):
        for batch in batches(5):
            trainer.step(batch)
    assert counts == {"capture": 1, "replay": 2}
    for a, b, c in zip(*(t.persistent_tensors() for t in (eager, graphed, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(a, c, rtol=1e-7, atol=1e-9)


def test_adam_on_a_gpu() -> None:
    adam = functools.partial(torch.optim.AdamW, lr=1e-2, capturable=True)
    eager, graphed = (make("cuda", optimizer=adam, rule="man++", cuda_graphs=graphs) for graphs in (False, True))
    counts = counted(graphed)
    step_both(eager, graphed, 6)
    assert counts == {"capture": 1, "replay": 3}
    assert_same(eager, graphed, rtol=1e-6, atol=1e-8)


def test_memory_that_does_not_suffice_on_a_gpu() -> None:
    """It shows in the middle of a capture, and training goes on."""
    eager, graphed = (make("cuda", rule="man++", cuda_graphs=graphs) for graphs in (False, True))
    step_both(eager, graphed, 3)
    graph = graphed._graph
    assert graph is not None
    call = graph._call

    def too_much(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        call(images, targets)
        raise torch.OutOfMemoryError("none left")

    graph._call = too_much  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        graphed.step(batches(1)[0])
    del graph._call
    counts = counted(graphed)
    step_both(eager, graphed, 5)
    assert counts == {"capture": 1, "replay": 2}
    assert_same(eager, graphed, rtol=1e-7, atol=1e-9)
