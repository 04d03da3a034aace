"""MLAAN against a second implementation; how far its gradients reach, the units it leaps to, its sizes and errors."""

from __future__ import annotations

import pytest
import torch
from naive_local import below, cross_entropy, unit
from naive_rules import NaiveRule, assert_steps_agree, auxiliary_sizes, make_pair, small_batch, small_model

from manpp_kernels.local import Site, make_rule, partition
from manpp_kernels.local.rules.mlaan import leap
from manpp_kernels.models import resnet32, resnet110
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

# The units of the leap augmented module behind each of the first four of five blocks (3, 2 and 1 leaps fit).
LEAPS = [["layer1.0", "layer2.0", "layer3.0"], ["layer2.0", "layer2.1", "layer3.0"], ["layer2.1", "layer3.0"]]
LEAPS += [["layer3.0"]]


class NaiveMlaan(NaiveRule):
    weights = (0.001, 0.999)

    def module_loss(self, j, x, v, targets, a):
        def linear(y, p):
            return y.mean((2, 3)) @ p["2.weight"].T + p["2.bias"]

        independent = cross_entropy(linear(x, below(a, "independent")), targets)
        v = unit(v, below(a, "augmented.0.lb")) + unit(v, below(a, "augmented.0.ema"))
        for t in range(1, len(LEAPS[j])):
            v = unit(v, below(a, f"augmented.{t}"))
        return self.weights[0] * independent + self.weights[1] * cross_entropy(linear(v, below(a, "cascaded")), targets)

    def move_emas(self):
        for j, names in enumerate(LEAPS):
            prefix = f"{j}.augmented.0.ema."
            for k in [k for k in self.auxiliary if k.startswith(prefix)]:
                theta = self.model[f"{names[0]}.{k[len(prefix) :]}"]
                self.auxiliary[k] = self.momentum * self.auxiliary[k] + (1 - self.momentum) * theta

    def step(self, images, targets):
        own = [k for j in range(5) for names in self.names(j) for k in names]
        p = {k: v.clone().requires_grad_(k in own) for k, v in self.model.items() if v.is_floating_point()}
        a = {k: v.clone().requires_grad_(k in own) for k, v in self.auxiliary.items() if v.is_floating_point()}
        segments = [names[0] for names in self.blocks]
        losses = []
        x = self.segment("stem", images, p)
        losses.append(self.module_loss(0, x, x, targets, below(a, "0")))
        z = x.detach()
        for j in range(1, 4):
            before = x.detach()
            x = self.segment(segments[j], before, p)
            if j == 1:
                v = x
            else:
                middle = self.segment(segments[j - 1], z, p)
                v = self.segment(segments[j], middle, p)
                z = middle.detach()
            losses.append(self.module_loss(j, x, v, targets, below(a, str(j))))
        x = self.segment(segments[4], x.detach(), p)
        losses.append(cross_entropy(x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"], targets))
        leaves = {k: p[k] if k in p else a[k] for k in own}
        gradients = dict(zip(own, torch.autograd.grad(sum(losses), list(leaves.values())), strict=True))
        self.move_emas()
        self.optimize(gradients)
        return [loss.detach() for loss in losses], gradients


@pytest.mark.parametrize("weights", [(0.001, 0.999), (0.5, 0.5)])
def test_a_step_equals_the_naive_implementation(weights: tuple[float, float]) -> None:
    options = {"independent_weight": weights[0], "cascaded_weight": weights[1], "momentum": 0.9, "ema_init": "fresh"}
    trainer, naive = make_pair(NaiveMlaan, TrainerConfig(rule="mlaan", rule_options=options), momentum=0.9)
    naive.weights = weights
    assert_steps_agree(trainer, naive)


def test_a_loss_reaches_its_own_block_and_the_one_before() -> None:
    trainer = LocalTrainer(small_model(), TrainerConfig(rule="mlaan"), example=(3, 16, 16))
    images, targets = small_batch()
    x, reached = images, []
    for block in trainer.network:
        out = block(x, images, targets)
        out.loss.backward()
        bodies = [other.body for other in trainer.network]
        reached.append([j for j, body in enumerate(bodies) if any(p.grad is not None for p in body.parameters())])
        trainer.network.zero_grad(set_to_none=True)
        x = out.features
        assert not any(t.requires_grad for t in (x if isinstance(x, tuple) else (x,)) if t is not None)
    assert reached == [[0], [1], [1, 2], [2, 3], [4]]


def test_micro_batches_keep_their_own_paths() -> None:
    config = TrainerConfig(rule="mlaan", accumulate=2, blocks=3)
    trainer = LocalTrainer(small_model(), config, example=(3, 16, 16))
    assert all(loss.isfinite() for loss in trainer.step(small_batch()).losses)


LEAPS_32 = [
    [5, 6, 11],
    [6, 10, 11],
    *[[6, 11, 15]] * 4,
    [9, 11, 15],
    *[[10, 11, 15]] * 2,
    *[[11, 13, 15]] * 2,
    [12, 14, 15],
    [13, 14, 15],
    [14, 15],
    [15],
]
LEAPS_110 = {0: [18, 19, 37], 1: [19, 36, 37], 2: [19, 37, 54], 18: [19, 37, 54], 19: [31, 37, 54], 53: [54]}


def leaps_of(model: torch.nn.Module, j: int, leaps: int = 3) -> list[int]:
    parts = partition(model, example=(3, 32, 32))
    places = {segment.name: i for i, segment in enumerate(parts.segments)}
    return [places[s.name] for s in leap(Site(parts, j, parts.segments[j].shape, 10, cross_entropy), leaps)]


def test_the_units_that_are_leapt_to() -> None:
    assert [leaps_of(resnet32(), j) for j in (0, 1, 4, 6, 8, 10, 12, 13, 14)] == [
        LEAPS_32[j] for j in (0, 1, 4, 6, 8, 10, 12, 13, 14)
    ]
    assert leaps_of(resnet32(), 12, leaps=2) == [14, 15]  # half way is 13.5: the later of two
    model = resnet110()
    assert {j: leaps_of(model, j) for j in LEAPS_110} == LEAPS_110


@pytest.mark.parametrize(("lb_init", "ema_init"), [("copy", "fresh"), ("fresh", "copy")])
def test_initial_values_of_the_units(lb_init: str, ema_init: str) -> None:
    model, options = small_model(), {"lb_init": lb_init, "ema_init": ema_init}
    trainer = LocalTrainer(model, TrainerConfig(rule="mlaan", rule_options=options), example=(3, 16, 16))
    first, *others = trainer.network.blocks[0].auxiliary.augmented
    for init, copies in ((ema_init, [first.ema]), (lb_init, [first.lb, *others])):
        for twin, name in zip(copies, LEAPS[0], strict=False):
            assert torch.equal(twin.conv1.weight, model.get_submodule(name).conv1.weight) == (init == "copy")


@pytest.mark.parametrize("leaps", [1, 2])
def test_how_many_leaps_there_are(leaps: int) -> None:
    config = TrainerConfig(rule="mlaan", rule_options={"leaps": leaps})
    trainer = LocalTrainer(small_model(), config, example=(3, 16, 16))
    found = [len(block.auxiliary.augmented) for block in trainer.network if block.auxiliary is not None]
    assert found == [leaps, leaps, leaps, 1]


def size_of(width: int, places: list[int], per_stage: int) -> int:
    """Two linear layers, and the units: 9 a b + 9 b b and two batch normalisations, a shortcut where they widen."""
    total, last = width * 10 + 10, width
    for i in places:
        stage = (i - 1) // per_stage
        b = 16 << stage
        a = b // 2 if stage and (i - 1) % per_stage == 0 else b
        total += 9 * a * b + 9 * b * b + 4 * b + (a * b + 2 * b if a != b else 0)
        last = b
    return total + last * 10 + 10


def test_sizes_of_resnet32_with_16_blocks() -> None:
    widths = [16] * 6 + [32] * 5 + [64] * 4
    expected = [size_of(width, places, 5) for width, places in zip(widths, LEAPS_32, strict=True)]
    assert (expected[0], expected[2], expected[9], expected[14]) == (77748, 147060, 206676, 75284)
    assert auxiliary_sizes("mlaan", None, resnet32()) == expected


def test_sizes_of_resnet110_with_55_blocks() -> None:
    sizes = auxiliary_sizes("mlaan", None, resnet110())
    for j, places in LEAPS_110.items():
        assert sizes[j] == size_of(16 if j < 19 else 32 if j < 37 else 64, places, 18)
    assert (sizes[0], sizes[2], sizes[53]) == (77748, 147060, 75284)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leaps": 0}, "leaps has to be 1 or more"),
        ({"cascaded_weight": -1.0}, "cascaded_weight has to be 0 or more"),
        ({"momentum": 2.0}, r"momentum has to lie in \[0, 1\]"),
        ({"lb_init": "zero"}, "lb_init has to be one of copy, fresh"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rule("mlaan", options)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"blocks of the rule 'mlaan' overlap.*use order='published'"):
        LocalTrainer(small_model(), TrainerConfig(rule="mlaan", order="unlocked"), example=(3, 16, 16))
    with pytest.raises(ValueError, match="can be divided into 1 to 5 local blocks"):
        LocalTrainer(small_model(), TrainerConfig(rule="mlaan", blocks=6), example=(3, 16, 16))
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5)
    )
    with pytest.raises(ValueError, match="no units behind its stem"):
        LocalTrainer(model, TrainerConfig(rule="mlaan"), example=(3, 8, 8))
