"""Weights that leave the package: copies, also of models whose state is more than tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manpp_kernels import checkpoint
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


class Counting(nn.Linear):
    """A layer whose ``state_dict`` has a dictionary in it, as of quantized and Transformer Engine's layers."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.extra: dict[str, Any] = {"calls": 0, "scale": torch.ones(1)}

    def get_extra_state(self) -> dict[str, Any]:
        return self.extra

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), Counting(), nn.GELU(), nn.Linear(6, 4))


@pytest.mark.parametrize("rule", ["dgl", "man++"])
def test_extra_state_is_exported_as_it_is(rule: str) -> None:
    trainer = LocalTrainer(model(), TrainerConfig(rule=rule), example=(5,))
    trainer.model[2].extra["calls"] = 3
    trainer.step((torch.rand(4, 5), torch.arange(4)))
    exported = trainer.export_state_dict()
    assert list(exported) == list(trainer.model.state_dict())
    assert exported["2._extra_state"] == {"calls": 3, "scale": torch.ones(1)}
    trainer.model[2].extra["calls"] = 4
    loaded = model()
    loaded.load_state_dict(exported)
    assert loaded[2].extra["calls"] == 3  # a copy


def test_what_is_exported_stays_as_it_was() -> None:
    trainer = LocalTrainer(model(), TrainerConfig(rule="dgl"), example=(5,))
    exported = trainer.export_state_dict()
    before = {key: value.clone() for key, value in exported.items() if isinstance(value, torch.Tensor)}
    trainer.step((torch.rand(4, 5), torch.arange(4)))
    assert all(torch.equal(exported[key], value) for key, value in before.items())
    assert not torch.equal(trainer.model[0].weight, before["0.weight"])


def test_a_safetensors_file_holds_tensors_alone(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=r"'2\._extra_state' of Sequential is no tensor"):
        checkpoint.export_weights(model(), tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []
