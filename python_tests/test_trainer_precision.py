"""``LocalTrainer`` in half precision: autocast, loss scaling, and models that are in it themselves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_trainer import batch, small_model, small_trainer


@pytest.mark.parametrize("config", [{"rule": "man++"}, {"rule": "man++", "rule_options": {"form": "parameter"}}, {}])
@pytest.mark.parametrize("order", ["published", "unlocked"])
def test_the_emas_of_a_model_in_half_precision_move(config: dict, order: str) -> None:
    """By the right amount on average, also where 20 steps are less than half of what a bfloat16 next to it differs."""
    if not config:
        config = {"rule": "mlaan", "blocks": 3}
        if order == "unlocked":
            pytest.skip("its blocks overlap, which this order cannot do")
    torch.manual_seed(0)
    trainer = small_trainer(small_model().bfloat16(), order=order, **copy.deepcopy(config))
    pairs = [pair for block in trainer.network for t in block.transforms for pair in t.pairs()]
    start = [e.double() for e, _ in pairs]
    exact = [e.clone() for e in start]
    for _ in range(20):
        before = [p.detach().double() for _, p in pairs]  # either order moves EMAs before the optimizer's update
        trainer.step((torch.rand(8, 3, 8, 8).bfloat16(), torch.arange(8) % 4))
        for x, p in zip(exact, before, strict=True):
            x.lerp_(p, 1 - trainer.network.rule.momentum)
    moved = torch.cat([(e.double() - s).flatten() for (e, _), s in zip(pairs, start, strict=True)])
    wanted = torch.cat([(x - s).flatten() for x, s in zip(exact, start, strict=True)])
    small = wanted.abs() < 2**-9 * torch.cat([s.flatten() for s in start]).abs()
    assert small.sum() > 300
    assert ((moved * wanted.sign())[small].mean() / wanted.abs()[small].mean()).item() == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize("form", ["activation", "parameter"])
@pytest.mark.parametrize("order", ["published", "unlocked"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast(amp: str, order: str, form: str) -> None:
    trainer = small_trainer(amp=amp, order=order, rule_options={"form": form})
    exact = small_trainer(order=order, rule_options={"form": form})
    data = batch()
    result, expected = trainer.step(data), exact.step(data)
    assert result.logits.dtype == (torch.bfloat16 if amp == "bf16" else torch.float16)
    torch.testing.assert_close(torch.stack(result.losses).float(), torch.stack(expected.losses), rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(tmp_path: Path) -> None:
    trainer = small_trainer(amp="fp16", clip_norm=1.0)
    before = copy.deepcopy(trainer.model.fc.weight)
    scaler = trainer._local_step.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 128.0})  # the usual start overflows in a few steps
    trainer.step(batch())
    assert not torch.equal(trainer.model.fc.weight, before)
    assert scaler.get_scale() == 128.0
    before = copy.deepcopy(trainer.model.fc.weight)
    images, targets = batch()
    trainer.step((images * float("inf"), targets))
    assert torch.equal(trainer.model.fc.weight, before)
    assert scaler.get_scale() == 64.0
    trainer.save(tmp_path / "c.pt")
    other = small_trainer(amp="fp16", clip_norm=1.0)
    other.load(tmp_path / "c.pt")
    assert other._local_step.scaler.get_scale() == 64.0


@pytest.mark.parametrize("order", ["published", "unlocked"])
def test_clipping_is_of_gradients_without_the_scale_of_fp16(order: str) -> None:
    data, moved = batch(), []
    for scale in (1.0, 1024.0):
        trainer = small_trainer(amp="fp16", clip_norm=0.05, order=order)
        trainer._local_step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        start = copy.deepcopy(trainer.model.fc.weight)
        trainer.step(data)
        moved.append(trainer.model.fc.weight - start)
    torch.testing.assert_close(*moved, rtol=0.05, atol=1e-5)
