"""Every rule against a second implementation in plain PyTorch, value for value, and what the rules promise."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from naive_local import Adam, Naive, Sgd
from torch import nn
from torch.nn.utils import parametrizations

from manpp_kernels.local import make_rule, partition, rule_names
from manpp_kernels.local.auxiliary import ParameterTransform
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

OPTIMIZERS = {
    "sgd": (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2), Sgd),
    "adam": (functools.partial(torch.optim.Adam, lr=1e-2, eps=1e-4), Adam),
}

# name: rule, its options, the naive kind, width, total
RULES = {
    "dgl-narrow": ("dgl", {}, "head", "narrow", 2.0),
    "dgl-wide": ("dgl", {"width": "wide"}, "head", "wide", 2.0),
    "dgl-linear": ("dgl", {"width": "linear"}, "head", "linear", 2.0),
    "man": ("man", {}, "sum", "wide", 2.0),
    "man-narrow": ("man", {"host_options": {"width": "narrow"}, "momentum": 0.9}, "sum", "narrow", 2.0),
    "activation-2": ("man++", {}, "activation", "wide", 2.0),
    "activation-1": ("man++", {"total": 1.0}, "activation", "wide", 1.0),
    "parameter-2": ("man++", {"form": "parameter"}, "parameter", "wide", 2.0),
    "parameter-1": ("man++", {"form": "parameter", "total": 1.0}, "parameter", "wide", 1.0),
}


def small_model() -> CifarResNet:
    return CifarResNet((1, 2, 1), num_classes=5, widths=(4, 6, 8)).double()


def batch(n: int = 12, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    # Values between 0 and 1, which the rules that reconstruct images need.
    return torch.rand(n, 3, side, side, dtype=torch.float64), torch.randint(0, 5, (n,))


def gradients_by_name(trainer: LocalTrainer) -> dict[str, torch.Tensor]:
    """Every gradient as the optimizers see it, filled in during a step."""
    names = {id(p): k for k, p in trainer.model.named_parameters()}
    for j, block in enumerate(trainer.network):
        if block.auxiliary is not None:
            names.update({id(p): f"{j}.{k}" for k, p in block.auxiliary.named_parameters()})
    found: dict[str, torch.Tensor] = {}

    def hook(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    found[names[id(p)]] = p.grad.clone()

    for optimizer in trainer.optimizers:
        optimizer.register_step_pre_hook(hook)
    return found


def compare(found, expected, step: int = 0) -> None:
    # To float64 rounding, which the second step's batch normalisations of a few values carry on and enlarge.
    rtol, atol = ((1e-11, 1e-12), (1e-9, 1e-11))[step]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def run_both(config, naive_kind, width, total, momentum, optimizer, blocks) -> None:
    make, naive_optimizer = OPTIMIZERS[optimizer]
    trainer = LocalTrainer(small_model(), config, example=(3, 16, 16), optimizer=make)
    naive = Naive(
        {k: v.clone() for k, v in trainer.model.state_dict().items()},
        {k: v.clone() for k, v in trainer.network.auxiliary_state_dict().items()},
        blocks,
        naive_optimizer(),
        naive_kind,
        width,
        config.order,
        momentum,
        total,
    )
    seen = gradients_by_name(trainer)
    for step in range(2):
        images, targets = batch()
        seen.clear()
        result = trainer.step((images, targets))
        losses, gradients = naive.step(images, targets)
        compare(dict(enumerate(result.losses)), dict(enumerate(losses)), step)
        assert set(seen) == set(gradients)
        compare(seen, gradients, step)
        compare(trainer.model.state_dict(), naive.model, step)
        trained = {k: v for k, v in naive.auxiliary.items() if "running" not in k and "batches" not in k}
        compare(trainer.network.auxiliary_state_dict(), trained, step)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("order", ["published", "unlocked"])
@pytest.mark.parametrize("name", RULES)
def test_a_step_equals_the_naive_implementation(name: str, order: str, optimizer: str) -> None:
    rule, options, kind, width, total = RULES[name]
    blocks = [["stem"], ["layer1.0"], ["layer2.0"], ["layer2.1"], ["layer3.0"]]
    config = TrainerConfig(rule=rule, rule_options=options, order=order)
    run_both(config, kind, width, total, options.get("momentum", 0.995), optimizer, blocks)


@pytest.mark.parametrize("form", ["activation", "parameter"])
@pytest.mark.parametrize("order", ["published", "unlocked"])
def test_a_step_with_blocks_of_several_units(form: str, order: str) -> None:
    config = TrainerConfig(
        rule_options={"form": form, "ema_init": "fresh"}, order=order, blocks=["layer1.0", "layer2.1"]
    )
    blocks = [["stem", "layer1.0"], ["layer2.0", "layer2.1"], ["layer3.0"]]
    run_both(config, form, "wide", 2.0, 0.995, "sgd", blocks)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["e2e", "dgl", "man++"])
def test_one_block_is_end_to_end(rule: str, optimizer: str) -> None:
    blocks = [["stem", "layer1.0", "layer2.0", "layer2.1", "layer3.0"]]
    run_both(TrainerConfig(rule=rule, blocks=1), "head", "wide", 2.0, 0.995, optimizer, blocks)


@pytest.mark.parametrize("rule", ["dgl", "man", "man++"])
def test_a_block_gets_no_gradient_from_later_losses(rule: str) -> None:
    trainer = LocalTrainer(small_model(), TrainerConfig(rule=rule), example=(3, 16, 16))
    images, targets = batch()
    x = images
    for j, block in enumerate(trainer.network):
        out = block(x, images, targets)
        assert not out.features.requires_grad
        out.loss.backward()
        for i, other in enumerate(trainer.network):
            for p in other.parameters():
                assert (p.grad is not None) == (i == j and p.requires_grad)
                p.grad = None
        x = out.features


def test_the_ema_has_no_gradient_of_its_own_and_passes_it_to_its_input() -> None:
    trainer = LocalTrainer(small_model(), TrainerConfig(rule="man"), example=(3, 16, 16))
    transform = trainer.network.blocks[0].auxiliary.transform
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    transform.ema(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in transform.ema.parameters())


@pytest.mark.parametrize("form", ["activation", "parameter"])
def test_gradients_never_exist_for_more_than_one_block_in_the_unlocked_order(form: str) -> None:
    trainer = LocalTrainer(
        small_model(), TrainerConfig(order="unlocked", rule_options={"form": form}), example=(3, 16, 16)
    )
    most: list[int] = []

    def watch(p: torch.Tensor) -> None:
        most.append(sum(any(q.grad is not None for q in block.parameters()) for block in trainer.network))

    for p in trainer.network.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(watch)
    trainer.step(batch())
    assert max(most) == 1
    assert len(most) == sum(p.requires_grad for p in trainer.network.parameters())
    assert all(p.grad is None for p in trainer.network.parameters())


def test_effective_weights_are_dropped_after_each_block_in_the_unlocked_order() -> None:
    trainer = LocalTrainer(
        small_model(), TrainerConfig(order="unlocked", rule_options={"form": "parameter"}), example=(3, 16, 16)
    )
    trainer.step(batch())
    transforms = [m for m in trainer.network.modules() if isinstance(m, ParameterTransform)]
    assert len(transforms) == 4
    assert all(t.values is None for t in transforms)


@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_initial_values_of_copies(init: str) -> None:
    model = small_model()
    trainer = LocalTrainer(
        model, TrainerConfig(rule="man", rule_options={"ema_init": init, "lb_init": init}), example=(3, 16, 16)
    )
    transform = trainer.network.blocks[0].auxiliary.transform
    for twin in (transform.lb, transform.ema):
        assert torch.equal(twin.conv1.weight, model.layer1[0].conv1.weight) == (init == "copy")
        assert twin.conv1.weight.data_ptr() != model.layer1[0].conv1.weight.data_ptr()


def test_copies_train_whatever_mode_their_unit_is_in() -> None:
    """A frozen part of the model stays in evaluation mode; what is trained beside it does not."""
    model = small_model()
    model.layer1.eval()
    trainer = LocalTrainer(model, TrainerConfig(rule="man"), example=(3, 16, 16))
    trainer.step(batch())
    assert not model.layer1[0].training
    assert all(module.training for module in trainer.network.blocks[0].auxiliary.modules())


@pytest.mark.parametrize("computed", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_fresh_copies_of_weights_that_are_computed(computed: Callable[[nn.Module], nn.Module]) -> None:
    def conv() -> nn.Module:
        return computed(nn.Conv2d(8, 8, 3, padding=1))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.Flatten(), nn.Linear(8 * 36, 4))
    for init in ("fresh", "copy"):
        options = {"lb_init": init, "ema_init": init}
        trainer = LocalTrainer(copy.deepcopy(model), TrainerConfig(rule_options=options), example=(3, 8, 8))
        transform = trainer.network.blocks[0].auxiliary.transform
        for twin in (transform.lb[0], transform.ema[0]):
            source = dict(model[2].named_parameters())
            for name, value in twin.named_parameters():
                assert torch.equal(value, source[name]) == (init == "copy"), name
            assert twin.weight.std() > 0.01
        trainer.step((torch.rand(4, 3, 8, 8), torch.arange(4)))


def test_weights_computed_by_hooks_cannot_be_drawn_anew() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        convs = [nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), convs[0], convs[1], nn.Flatten(), nn.Linear(8 * 36, 4))
    with pytest.raises(ValueError, match=r"cannot be drawn anew; use those of torch\.nn\.utils\.parametrizations"):
        LocalTrainer(model, TrainerConfig(), example=(3, 8, 8))


def test_copies_keep_no_running_statistics() -> None:
    trainer = LocalTrainer(small_model(), TrainerConfig(), example=(3, 16, 16))
    assert list(trainer.network.blocks[0].auxiliary.transform.buffers()) == []


def test_the_scale_starts_at_half_the_total() -> None:
    for total in (2.0, 1.0):
        trainer = LocalTrainer(small_model(), TrainerConfig(rule_options={"total": total}), example=(3, 16, 16))
        assert trainer.network.blocks[0].auxiliary.transform.scale.item() == total / 2


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("backprop", None, "there is no rule 'backprop'; there are"),
        ("man++", {"host": "mystery"}, "there is no rule 'mystery'"),
        ("man++", {"host": "man"}, "'man' cannot be a host; choose from dgl"),
        ("man++", {"form": "weights"}, "form has to be one of activation, parameter"),
        ("man++", {"total": 0.0}, "total has to be positive"),
        ("man", {"momentum": 1.5}, r"momentum has to lie in \[0, 1\]"),
        ("man", {"momentun": 0.9}, "no option 'momentun'; it has auxiliary_depth"),
        ("man", {"ema_init": "zero"}, "ema_init has to be one of copy, fresh"),
        ("dgl", {"width": "huge"}, "width has to be one of narrow, wide"),
        ("e2e", {"width": "wide"}, "no option 'width'; it has none"),
    ],
)
def test_wrong_rules_and_options(rule: str, options: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rule(rule, options)


def test_options_of_another_rule() -> None:
    with pytest.raises(TypeError, match="have to be a mapping or DglOptions"):
        make_rule("dgl", make_rule("man").options)


def test_every_rule_trains_and_leaves_the_models_keys_alone() -> None:
    for name in rule_names():
        model = small_model()
        keys = list(model.state_dict())
        trainer = LocalTrainer(model, TrainerConfig(rule=name), example=(3, 16, 16))
        trainer.step(batch())
        assert list(model.state_dict()) == keys == list(trainer.export_state_dict())
        fresh = small_model()
        fresh.load_state_dict(trainer.export_state_dict())


def test_an_ema_needs_a_unit_to_follow() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5)
    )
    with pytest.raises(ValueError, match="no units behind its stem"):
        LocalTrainer(model, TrainerConfig(rule="man++"), example=(3, 8, 8))


def test_a_unit_that_writes_its_input_cannot_be_copied() -> None:
    unit = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Conv2d(4, 4, 3, padding=1))
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), unit, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5)
    )
    with pytest.raises(ValueError, match="changes its input in place"):
        LocalTrainer(model, TrainerConfig(rule="man++"), example=(3, 8, 8))
    LocalTrainer(model, TrainerConfig(rule="dgl"), example=(3, 8, 8))


def test_a_rule_can_come_from_outside() -> None:
    """A rule with a loss that sees images and targets, registered without touching the package."""
    from manpp_kernels.local import Auxiliary, Rule, register, rules

    class Reconstruction(Auxiliary):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.decode = torch.nn.Conv2d(channels, 3, 1)

        def forward(self, features, images, targets):
            size = images.shape[2:]
            return (torch.nn.functional.interpolate(self.decode(features), size) - images).square().mean()

    @register("reconstruction")
    class ReconstructionRule(Rule):
        def auxiliary(self, site):
            return Reconstruction(site.features[1])

    try:
        trainer = LocalTrainer(small_model(), TrainerConfig(rule="reconstruction"), example=(3, 16, 16))
        assert len(trainer.step(batch()).losses) == 5
    finally:
        del rules._rules["reconstruction"]


def test_a_site_knows_the_units_further_down() -> None:
    parts = partition(small_model(), example=(3, 16, 16))
    from manpp_kernels.local import Site

    site = Site(parts, 1, parts.segments[1].shape, 5, torch.nn.functional.cross_entropy)
    assert [s.name for s in site.later] == ["layer2.0", "layer2.1", "layer3.0"]
    assert site.next_unit.shape[1:] == (6, 8, 8)
