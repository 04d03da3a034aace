"""What ``fit`` keeps track of over an epoch: by a clock of the test's own, which times are whose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manpp_kernels.trainer import LocalTrainer, StepResult, TrainerConfig
from manpp_kernels.training.epoch import EpochMeter, EpochTotals


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((10.0, 1.0, 3.0), (14.0, 2.0, 24 / 14)), ((10.0,), (10.0, 10.0, 0.8))],
)
def test_times_are_of_the_steps_alone_and_the_first_is_none_of_many(
    steps: tuple[float, ...], expected: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step measures memory; checkpoints are no part of the training's time."""
    now, durations = 0.0, iter(steps)

    class Clocked(LocalTrainer):
        def step(self, batch: Any) -> StepResult:
            nonlocal now
            now += next(durations)
            return super().step(batch)

        def save(self, path: str | Path) -> None:
            nonlocal now
            now += 1000.0
            super().save(path)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    trainer = Clocked(model, TrainerConfig(rule="dgl"), example=(4,))
    batches = [(torch.rand(8, 4), torch.arange(8) % 3) for _ in steps]
    (row,) = trainer.fit(batches, 1, checkpoint_dir=tmp_path, checkpoint_every=1)
    found = tuple(row[name] for name in ("seconds", "seconds_per_step", "images_per_second"))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "saved", "captured"),
    [({}, 400, 5000), ({"measure_memory": False}, 0, 0), ({"compile": "eager"}, 400, 5000)],
    ids=["measured", "not measured", "compiled"],
)
def test_memory_is_that_of_the_first_step_and_of_a_captured_one(
    config: dict[str, Any], saved: int, captured: int
) -> None:
    totals = EpochTotals()
    meter = EpochMeter(totals, TrainerConfig(**config), torch.device("cpu"), list)
    for size in (100, 300):
        x = torch.ones(size, requires_grad=True)
        with meter.step():
            x.exp().sum().backward()
        meter.tick(0)
    assert totals.peak_memory == saved
    meter.tick(5000)
    meter.tick(0)
    assert totals.peak_memory == captured


def test_memory_that_is_not_measured_is_no_0() -> None:
    def row(**settings: Any) -> dict[str, Any]:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        trainer = LocalTrainer(model, TrainerConfig(rule="e2e", **settings), example=(4,))
        return trainer.fit([(torch.rand(8, 4), torch.arange(8) % 3)], 1)[0]

    without, measured = row(measure_memory=False), row()
    assert list(without) == list(measured)
    assert (without["peak_memory_bytes"], without["memory"]) == (None, None)
    assert measured["peak_memory_bytes"] > 0
    assert measured["memory"] == "live saved tensors peak"
