"""MAN's two halves alone, a trainable copy and an EMA; and MAN with more units behind them."""

from __future__ import annotations

import pytest
import torch
from naive_local import below, cross_entropy, head, unit
from naive_rules import NaiveRule, assert_steps_agree, auxiliary_sizes, make_pair, small_batch, small_model

from manpp_kernels.local import make_rule, measure_step_memory
from manpp_kernels.models import resnet32
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


class NaiveHalf(NaiveRule):
    def auxiliary_loss(self, j, x, targets, a):
        return cross_entropy(head(unit(x, below(a, f"transform.{self.kind}")), below(a, "host.head"), "wide"), targets)


class NaiveDeep(NaiveRule):
    """Two units behind each block: LB and EMA of the next, and a trainable copy of the one after it."""

    def auxiliary_loss(self, j, x, targets, a):
        y = unit(x, below(a, "transform.lb")) + unit(x, below(a, "transform.ema"))
        if j < 3:
            y = unit(y, below(a, "host.transform.0"))
            a = below(a, "host")
        return cross_entropy(head(y, below(a, "host.head"), "wide"), targets)


def test_a_step_with_more_units() -> None:
    config = TrainerConfig(rule="man", rule_options={"auxiliary_depth": 2})
    assert_steps_agree(*make_pair(NaiveDeep, config, kind="sum"))
    with pytest.raises(ValueError, match="auxiliary_depth has to be 1 or more"):
        make_rule("man", {"auxiliary_depth": 0})


@pytest.mark.parametrize("lb_init", ["copy", "fresh"])
def test_further_units_start_as_lb_does(lb_init: str) -> None:
    model, options = small_model(), {"auxiliary_depth": 2, "lb_init": lb_init, "ema_init": "fresh"}
    trainer = LocalTrainer(model, TrainerConfig(rule="man", rule_options=options), example=(3, 16, 16))
    auxiliary = trainer.network.blocks[0].auxiliary
    for twin, source in ((auxiliary.transform.lb, model.layer1[0]), (auxiliary.host.transform[0], model.layer2[0])):
        assert torch.equal(twin.conv1.weight, source.conv1.weight) == (lb_init == "copy")


@pytest.mark.parametrize("parts", ["lb", "ema"])
@pytest.mark.parametrize("order", ["published", "unlocked"])
def test_a_step_equals_the_naive_implementation(parts: str, order: str) -> None:
    config = TrainerConfig(rule="man++", rule_options={"parts": parts}, order=order)
    trainer, naive = make_pair(NaiveHalf, config, kind=parts)
    assert any(".ema." in key for key in naive.auxiliary) == (parts == "ema")
    assert_steps_agree(trainer, naive)


def test_alone_man_and_man_plus_plus_are_the_same() -> None:
    for parts in ("lb", "ema"):
        sizes = [auxiliary_sizes(rule, {"parts": parts}, small_model()) for rule in ("man", "man++")]
        assert sizes[0] == sizes[1]


def test_sizes_for_the_published_network() -> None:
    """LB alone has as many trainable parameters as MAN; EMA alone has those of the host."""
    both, lb, ema = (auxiliary_sizes("man", {"parts": parts}, resnet32()) for parts in ("both", "lb", "ema"))
    assert both == lb
    assert [n - m for n, m in zip(lb, ema, strict=True)] == [4672] * 5 + [14528] + [18560] * 4 + [57728] + [73984] * 4


def test_half_keeps_less_for_backward() -> None:
    saved = {
        parts: measure_step_memory(
            LocalTrainer(small_model(), TrainerConfig(rule_options={"parts": parts}), example=(3, 16, 16)),
            small_batch(),
        ).saved_peak
        for parts in ("both", "lb", "ema")
    }
    assert max(saved["lb"], saved["ema"]) < saved["both"]


def test_wrong_parts() -> None:
    with pytest.raises(ValueError, match="parts has to be one of both, lb, ema"):
        make_rule("man", {"parts": "none"})
