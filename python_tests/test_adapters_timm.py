"""timm's models in local blocks: the parts are the model, and a step trains all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from manpp_kernels.cli.parsing import UserError
from manpp_kernels.cli.training import build_model
from manpp_kernels.local import adapt, partition
from manpp_kernels.local.memory import SavedTensorMeter
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

timm = pytest.importorskip("timm")


def vit(**options) -> nn.Module:
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**{**settings, **options})


def convnext(**options) -> nn.Module:
    settings = {"depths": (1, 1, 2, 1), "dims": (4, 4, 8, 8), "num_classes": 5}
    return timm.models.ConvNeXt(**{**settings, **options})


def resnet(block: type[nn.Module] = timm.models.resnet.BasicBlock, **options) -> nn.Module:
    return timm.models.ResNet(block, (1, 2, 1, 1), channels=(8, 8, 8, 8), num_classes=5, **options)


def resnet_v2(**options) -> nn.Module:
    return timm.models.ResNetV2((1, 2, 1, 1), channels=(128,) * 4, stem_chs=32, num_classes=5, **options)


def small(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


BOTTLENECK = timm.models.resnet.Bottleneck
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "resnet-d": lambda: resnet(BOTTLENECK, stem_type="deep", stem_width=8, avg_down=True),
    "eca-resnext": lambda: resnet(BOTTLENECK, cardinality=2, base_width=32, block_args={"attn_layer": "eca"}),
    "resnet with dropout": lambda: resnet(drop_rate=0.2, drop_path_rate=0.1),
    "vit": vit,
    "vit, mean of the tokens": lambda: vit(class_token=False, global_pool="avg"),
    "vit, registers": lambda: vit(reg_tokens=2, no_embed_class=True, init_values=1e-1),
    "vit, attention pool": lambda: vit(global_pool="map", class_token=False),
    "vit, dropouts": lambda: vit(drop_rate=0.1, pos_drop_rate=0.1, drop_path_rate=0.1, pre_norm=True),
    "vit, some of the patches": lambda: vit(patch_drop_rate=0.5),
    "convnext": convnext,
    "convnext v2": lambda: convnext(use_grn=True, ls_init_value=None, conv_mlp=True),
    "convnext, head norm last": lambda: convnext(head_norm_first=True, stem_type="overlap"),
    "resnet v2": resnet_v2,
    "resnet v2, no pre-activation": lambda: resnet_v2(preact=False, drop_rate=0.1),
    "regnet": small("regnetx_002"),
    "regnet, squeeze and excitation": small("regnety_002"),
    "efficientnet": small("efficientnet_lite0"),
    "efficientnet, dropouts": small("efficientnet_b0", drop_rate=0.1, drop_path_rate=0.1),
    "mobilenet v3": small("mobilenetv3_small_050"),
    "mobilenet v4": small("mobilenetv4_conv_small_050"),
}


def example(model: nn.Module) -> tuple[int, int, int]:
    return (3, 8, 8) if isinstance(model, timm.models.VisionTransformer) else (3, 32, 32)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_apart_and_is_trained_whole(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    keys = list(model.state_dict())
    with torch.no_grad():  # what starts at zero would hide that a part is missing
        for p in model.parameters():
            p.add_(torch.rand_like(p), alpha=0.1)
    partition(model, example=example(model))  # checks that the parts, run in a row, are the model
    trainer = LocalTrainer(model, TrainerConfig(rule="man++", learning_rate=0.01), example=example(model))
    before = {k: v.clone() for k, v in model.named_parameters()}
    images = torch.rand(6, *example(model))
    result = trainer.step((images, torch.randint(0, 5, (6,))))
    assert len(result.losses) == len(trainer.network) > 2
    assert [k for k, v in model.named_parameters() if torch.equal(v, before[k])] == []
    assert list(trainer.export_state_dict()) == keys


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_drop_what_the_model_drops(name: str) -> None:
    """In training mode, with the same random numbers: measuring, in evaluation mode, does not see a dropout."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():  # as above
        for p in model.parameters():
            p.add_(torch.rand_like(p), alpha=0.01)
    parts = adapt(model)
    images, draw = torch.rand(4, *example(model)), torch.get_rng_state()
    whole = model(images)
    torch.set_rng_state(draw)
    assert torch.equal(nn.Sequential(parts.stem, *parts.units.values(), parts.head)(images), whole)


@pytest.mark.parametrize("name", ["resnet", "vit", "convnext", "resnet v2", "regnet", "mobilenet v3"])
@pytest.mark.parametrize("rule", ["e2e", "man++"])
def test_gradient_checkpointing_keeps_less_and_computes_the_same(rule: str, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    images, labels = torch.rand(6, *example(model), dtype=torch.float64), torch.randint(0, 5, (6,))
    peaks, trained = [], []
    for recomputed in (False, True):
        copied = copy.deepcopy(model)
        copied.set_grad_checkpointing(recomputed)
        torch.manual_seed(1)
        options = {"form": "parameter"} if rule == "man++" else None
        trainer = LocalTrainer(
            copied,
            TrainerConfig(rule=rule, rule_options=options, blocks=1 if rule == "e2e" else 2),
            example=example(model),
        )
        with SavedTensorMeter(trainer.persistent_tensors()) as meter:
            trainer.step((images, labels))
        peaks.append(meter.peak_bytes)
        trained.append(copied.state_dict())  # running statistics, too, which see every batch twice
    assert peaks[1] < peaks[0]
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_is_of_every_block_of_a_transformer() -> None:
    """Of the first, which is a part of the stem, too: each runs once more in the backward pass."""
    model = vit()
    model.set_grad_checkpointing(True)
    runs: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    trainer = LocalTrainer(model, TrainerConfig(rule="dgl", blocks=2), example=example(model))
    runs.clear()
    trainer.step((torch.rand(2, 3, 8, 8), torch.tensor([0, 1])))
    assert sorted(runs) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_model_with_a_head_for_distillation() -> None:
    deit = timm.models.deit.VisionTransformerDistilled
    model = deit(img_size=8, patch_size=4, embed_dim=8, depth=4, num_heads=2, num_classes=5)
    with pytest.raises(TypeError, match=r"VisionTransformerDistilled has a second head.*take the model without"):
        adapt(model)


def test_units_carry_the_names_of_the_state_dict() -> None:
    assert partition(resnet(), 2, example=(3, 32, 32)).names()[0] == ["stem", "layer1.0", "layer2.0"]
    assert partition(vit(), example=(3, 8, 8)).names() == [["stem"], ["blocks.1"], ["blocks.2"], ["blocks.3"]]
    units = [names[0] for names in partition(convnext(), example=(3, 32, 32)).names()]
    assert units == ["stem", *(f"stages.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0)))]


@pytest.mark.parametrize("name", ["resnet", "vit", "convnext"])
def test_a_copy_of_a_part_is_no_longer_the_model(name: str) -> None:
    model = MODELS[name]()
    theirs = {id(p) for p in model.parameters()}
    parts = adapt(model)
    for part in (parts.stem, *parts.units.values(), parts.head):
        assert all(id(p) in theirs for p in part.parameters())
        assert not any(id(p) in theirs for p in copy.deepcopy(part).parameters())


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("resnet", "conv1.weight"),
        ("vit", "attn.qkv.weight"),
        ("convnext", "mlp.fc1.weight"),
        ("resnet v2", "conv1.weight"),
        ("regnet", "conv1.conv.weight"),
        ("mobilenet v3", "conv.weight"),
    ],
)
def test_a_fresh_copy_of_a_unit_is_drawn_as_timm_draws_it(name: str, weight: str) -> None:
    torch.manual_seed(0)
    wider = {"resnet": resnet, "vit": lambda: vit(embed_dim=64), "convnext": lambda: convnext(dims=(32,) * 4)}
    parts = adapt(wider.get(name, MODELS[name])())
    unit = list(parts.units.values())[-1]
    fresh = copy.deepcopy(unit)
    parts.init(fresh)
    key = next(k for k in fresh.state_dict() if k.endswith(weight))
    ours, theirs = fresh.state_dict()[key], unit.state_dict()[key]
    assert not torch.equal(ours, theirs)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15)
    for key, value in unit.state_dict().items():
        if value.dim() < 2 and value.is_floating_point():  # norms, biases, layer scales
            assert torch.equal(fresh.state_dict()[key], value), key


def test_the_command_line_takes_timms_names() -> None:
    model = build_model("timm/convnext_atto", 7)
    assert model.get_classifier().out_features == 7
    with pytest.raises(UserError, match=r"timm has no model 'convnext_ato' .did you mean"):
        build_model("timm/convnext_ato", 7)
