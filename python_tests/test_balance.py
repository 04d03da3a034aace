"""How blocks are shared out over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from manpp_kernels.trainer import LocalTrainer, TrainerConfig
from manpp_kernels.training import balance
from manpp_kernels.training.balance import measure_block_seconds, share_out


def test_the_slowest_rank_takes_the_least_time() -> None:
    assert share_out([3.0, 1.0, 1.0, 1.0], 2) == [1, 3]
    assert share_out([1.0, 1.0, 1.0, 3.0], 2) == [3, 1]
    assert share_out([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [3, 1, 1]
    assert share_out([1.0, 1.0], 1) == [2]
    for ranks in (0, 3):
        with pytest.raises(ValueError, match=f"2 blocks cannot be shared out over {ranks} ranks"):
            share_out([1.0, 1.0], ranks)


CLOCK = [0.0]


class Slow(nn.Linear):
    """It takes five seconds by this clock."""

    def forward(self, x: Tensor) -> Tensor:
        CLOCK[0] += 5.0
        return super().forward(x)


# LB of the first block is a copy of the slow unit, which runs with the effective weights.
@pytest.mark.parametrize(("rule", "expected"), [("dgl", [0.0, 5.0, 0.0]), ("man++", [5.0, 5.0, 0.0])])
def test_the_seconds_of_each_block(monkeypatch: pytest.MonkeyPatch, rule: str, expected: list[float]) -> None:
    monkeypatch.setattr(balance, "_now", lambda device: CLOCK[0])
    layers = [nn.Linear(4, 4), nn.ReLU(), Slow(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    options = {"form": "parameter"} if rule == "man++" else None
    config = TrainerConfig(rule=rule, rule_options=options, order="unlocked")
    trainer = LocalTrainer(nn.Sequential(*layers), config, example=(4,))
    before = [p.clone() for p in trainer.network.parameters()]
    batch = torch.randn(6, 4), torch.arange(6) % 2
    assert measure_block_seconds(trainer, batch, rounds=2) == expected
    for p, value in zip(trainer.network.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is None
    trainer.step(batch)


def test_blocks_run_as_in_training() -> None:
    """In the trainer's precision and layout, and not where they have no times of their own."""
    seen: list[tuple[torch.dtype, bool]] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    model[2].register_forward_pre_hook(
        lambda _, x: seen.append((x[0].dtype, x[0].is_contiguous(memory_format=torch.channels_last)))
    )
    batch = torch.randn(4, 3, 8, 8), torch.arange(4) % 2
    for rule in ("dgl", "mlaan"):
        config = TrainerConfig(rule=rule, amp="bf16", channels_last=True)
        trainer = LocalTrainer(model, config, example=(3, 8, 8))
        seen.clear()
        if rule == "dgl":
            measure_block_seconds(trainer, batch, rounds=1)
            assert seen == [(torch.bfloat16, True)]
        else:
            with pytest.raises(ValueError, match="cannot run at once"):
                measure_block_seconds(trainer, batch)
    with pytest.raises(ValueError, match="rounds has to be 1 or more, and is 0"):
        measure_block_seconds(trainer, batch, rounds=0)
