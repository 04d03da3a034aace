"""MAN, MAN++ and look-ahead with ``units="stages"``: first units of all later stages in front of the host's head."""

from __future__ import annotations

import pytest
import torch
from naive_local import below, cross_entropy, head, unit
from naive_rules import NaiveRule, assert_steps_agree, auxiliary_sizes, make_pair, small_batch, small_model
from test_rules_lookahead import NaiveLookahead

from manpp_kernels.local import Site, make_rule, partition
from manpp_kernels.models import CifarResNet, resnet32
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

STAGES = [["layer2.0", "layer3.0"], ["layer2.0", "layer3.0"], ["layer3.0"], ["layer3.0"]]


class NaiveStages(NaiveRule):
    """``kind`` says how LB and EMA of a unit become one output; ``total`` is T."""

    def auxiliary_loss(self, j, x, targets, a):
        for _ in STAGES[j]:
            x = self.transform(x, below(a, "transform"))
            a = below(a, "host")
        return cross_entropy(head(x, below(a, "head"), self.width), targets)

    def transform(self, x, a):
        lb, ema = below(a, "lb"), below(a, "ema")
        if self.kind in ("lb", "ema"):
            return unit(x, lb if self.kind == "lb" else ema)
        if self.kind == "sum":
            return unit(x, lb) + unit(x, ema)
        s = a["scale"]
        if self.kind == "activation":
            return s * unit(x, lb) + (self.total - s) * unit(x, ema)
        return unit(x, {k: s * lb[k] + (self.total - s) * ema[k] for k in lb})

    def move_ema(self, j):
        prefix = f"{j}.transform.ema."
        for source in STAGES[j] if j < len(STAGES) else ():
            for k in self.auxiliary:
                if k.startswith(prefix):
                    theta = self.model[f"{source}.{k[len(prefix) :]}"]
                    self.auxiliary[k] = self.momentum * self.auxiliary[k] + (1 - self.momentum) * theta
            prefix = prefix.replace("transform", "host.transform")


@pytest.mark.parametrize("order", ["published", "unlocked"])
@pytest.mark.parametrize(
    ("rule", "options", "kind"),
    [
        ("man", {}, "sum"),
        ("man", {"parts": "lb"}, "lb"),
        ("man", {"parts": "ema", "momentum": 0.9}, "ema"),
        ("man++", {}, "activation"),
        ("man++", {"form": "parameter", "total": 1.0}, "parameter"),
        ("man++", {"host_options": {"width": "linear"}}, "activation"),
    ],
)
def test_a_step_equals_the_naive_implementation(rule: str, options: dict, kind: str, order: str) -> None:
    config = TrainerConfig(rule=rule, rule_options={"units": "stages", **options}, order=order)
    more = {"total": options.get("total", 2.0), "momentum": options.get("momentum", 0.995)}
    more["width"] = options.get("host_options", {}).get("width", "wide")
    trainer, naive = make_pair(NaiveStages, config, kind=kind, **more)
    emas = {k.split(".transform.ema.")[0] for k in naive.auxiliary if ".transform.ema." in k}
    assert emas == (set() if kind == "lb" else {"0", "0.host", "1", "1.host", "2", "3"})
    assert_steps_agree(trainer, naive)


class NaiveLookaheadStages(NaiveLookahead):
    AHEAD = STAGES


def test_a_step_of_lookahead() -> None:
    config = TrainerConfig(rule="lookahead", rule_options={"units": "stages"})
    assert_steps_agree(*make_pair(NaiveLookaheadStages, config))


def names(model, blocks, units: str) -> list[list[str]]:
    parts = partition(model, blocks, example=(3, 16, 16))
    sites = [Site(parts, j, torch.Size(), 5, torch.nn.functional.cross_entropy) for j in range(len(parts) - 1)]
    return [[segment.name for segment in site.ahead(units)] for site in sites]


def test_which_units() -> None:
    assert names(small_model(), None, "stages") == STAGES
    assert names(small_model(), None, "next") == [["layer1.0"], ["layer2.0"], ["layer2.1"], ["layer3.0"]]
    # In the last stage there is none left: the next unit.
    last = CifarResNet((1, 1, 3), num_classes=5, widths=(4, 8, 16))
    assert names(last, ["layer1.0", "layer3.0"], "stages") == [["layer2.0", "layer3.0"], ["layer3.1"]]
    # A unit of the block itself is not ahead of it, and the wider first unit counts as a stage of its own.
    wide = CifarResNet((2, 1, 1), num_classes=5, widths=(4, 8, 16))
    assert names(wide, ["layer2.0"], "stages") == [["layer3.0"]]


def test_sizes_for_the_published_network() -> None:
    """Trained, by hand: LB and scale of 16 -> 32 (14,528 + 1) and of 32 -> 64 (57,728 + 1), then the next unit."""
    stages, ema = (
        auxiliary_sizes(rule, {"units": "stages", **more}, resnet32())
        for rule, more in (("man++", {}), ("man", {"parts": "ema"}))
    )
    assert [n - m for n, m in zip(stages, ema, strict=True)] == [14529 + 57729] * 6 + [57729] * 5 + [73985] * 4


def test_vision_transformers_have_one_stage() -> None:
    from torchvision.models import VisionTransformer

    vit = VisionTransformer(image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16)
    assert names(vit, None, "stages") == names(vit, None, "next")


def test_it_trains_and_leaves_the_model_its_keys() -> None:
    model = small_model()
    keys = list(model.state_dict())
    trainer = LocalTrainer(model, TrainerConfig(rule_options={"units": "stages"}), example=(3, 16, 16))
    images, targets = small_batch()
    first = sum(trainer.step((images, targets)).losses)
    for _ in range(20):
        last = sum(trainer.step((images, targets)).losses)
    assert last < first
    assert list(trainer.model.state_dict()) == keys


def test_misuse() -> None:
    for rule in ("man", "man++", "lookahead"):
        with pytest.raises(ValueError, match="units has to be one of next, stages, and is 'all'"):
            make_rule(rule, {"units": "all"})
    with pytest.raises(ValueError, match="it goes with units='next' alone"):
        make_rule("man", {"units": "stages", "auxiliary_depth": 2})
