"""Look-ahead against a second implementation; how far its gradients reach, what it adds to the network, its errors."""

from __future__ import annotations

import pytest
import torch
from naive_local import below, cross_entropy, head, unit
from naive_rules import NaiveRule, assert_steps_agree, auxiliary_sizes, make_pair, small_batch, small_model

from manpp_kernels.local import make_rule, measure_step_memory
from manpp_kernels.models import resnet32
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


class NaiveLookahead(NaiveRule):
    """A unit's gradient is the sum of those from its own block's loss and from all losses that look through it."""

    AHEAD = (("layer1.0",), ("layer2.0",), ("layer2.1",), ("layer3.0",))  # what each block's loss looks through

    def step(self, images, targets):
        own = [k for j in range(5) for names in self.names(j) for k in names]
        p = {k: v.clone().requires_grad_(k in own) for k, v in self.model.items() if v.is_floating_point()}
        a = {k: v.clone().requires_grad_(k in own) for k, v in self.auxiliary.items() if v.is_floating_point()}
        losses, x = [], images
        for j, (name,) in enumerate(self.blocks):
            x = y = self.segment(name, x.detach(), p)
            if j < 4:
                for ahead in self.AHEAD[j]:
                    y = unit(y, below(p, ahead))  # by the batch, and no running statistics
                key = f"{j}.{'host.' * len(self.AHEAD[j])}head"
                losses.append(cross_entropy(head(y, below(a, key), self.width), targets))
        losses.append(cross_entropy(x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"], targets))
        leaves = [p[k] if k in p else a[k] for k in own]
        gradients = dict(zip(own, torch.autograd.grad(sum(losses), leaves), strict=True))
        self.optimize(gradients)
        return [loss.detach() for loss in losses], gradients


@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_a_step_equals_the_naive_implementation(width: str) -> None:
    config = TrainerConfig(rule="lookahead", rule_options={"host_options": {"width": width}})
    assert_steps_agree(*make_pair(NaiveLookahead, config, width=width))


def test_a_loss_reaches_its_own_block_and_the_next_unit() -> None:
    config = TrainerConfig(rule="lookahead", blocks=["layer1.0", "layer2.1"])
    trainer = LocalTrainer(small_model(), config, example=(3, 16, 16))
    images, targets = small_batch()
    x, reached = images, []
    for block in trainer.network:
        out = block(x, images, targets)
        out.loss.backward()
        reached.append(
            sorted(
                {
                    k.rpartition(".conv")[0]
                    for k, p in trainer.model.named_parameters()
                    if p.grad is not None and ".conv" in k
                }
            )
        )
        trainer.network.zero_grad(set_to_none=True)
        x = out.features
        assert not x.requires_grad
    assert reached == [["layer1.0", "layer2.0"], ["layer2.0", "layer2.1", "layer3.0"], ["layer3.0"]]


def test_it_owns_the_hosts_head_and_nothing_else() -> None:
    assert auxiliary_sizes("lookahead", None, resnet32()) == auxiliary_sizes("man", {"parts": "ema"}, resnet32())
    trainer = LocalTrainer(small_model(), TrainerConfig(rule="lookahead"), example=(3, 16, 16))
    trained = [p for block in trainer.network for p in block.trainable()]
    assert len({id(p) for p in trained}) == len(trained)
    assert all(key.split(".")[1] == "host" for key in trainer.network.auxiliary_state_dict())


def test_running_statistics_move_once_a_step() -> None:
    trainer = LocalTrainer(small_model(), TrainerConfig(rule="lookahead"), example=(3, 16, 16))
    trainer.step(small_batch())
    assert trainer.model.layer2[0].bn1.num_batches_tracked.item() == 1


def test_it_follows_parameters_that_move() -> None:
    """Where the model's tensors are replaced in place, as by module.to(), it sees the new ones."""
    trainer = LocalTrainer(small_model(), TrainerConfig(rule="lookahead"), example=(3, 16, 16))
    trainer.network.to(torch.float32)
    images, targets = small_batch()
    result = trainer.step((images.float(), targets))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in result.losses)


def test_it_keeps_less_for_backward_than_man() -> None:
    saved = {
        rule: measure_step_memory(
            LocalTrainer(small_model(), TrainerConfig(rule=rule), example=(3, 16, 16)), small_batch()
        ).saved_peak
        for rule in ("lookahead", "man")
    }
    assert saved["lookahead"] < saved["man"]


def test_its_blocks_overlap() -> None:
    with pytest.raises(ValueError, match="the blocks of the rule 'lookahead' overlap"):
        LocalTrainer(small_model(), TrainerConfig(rule="lookahead", order="unlocked"), example=(3, 16, 16))
    with pytest.raises(ValueError, match="'man' cannot be a host"):
        make_rule("lookahead", {"host": "man"})
