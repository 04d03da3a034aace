"""timm's models in local blocks: the parts are the model, and a step trains all of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm_models import MODELS, WIDE, convnext, dinov3, models, resnet_v1, rotary, swin, vit
from torch import nn

from manpp_kernels.cli.parsing import UserError
from manpp_kernels.cli.training import build_model
from manpp_kernels.local import adapt, partition
from manpp_kernels.local.adapters.timm_stages import LAYOUTS, Layout, register
from manpp_kernels.local.memory import SavedTensorMeter
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def made(name: str) -> nn.Module:
    _, factory = MODELS[name]
    torch.manual_seed(0)
    return factory()


def example(name: str) -> tuple[int, int, int]:
    side, _ = MODELS[name]
    return 3, side, side


@torch.no_grad()
def shake(model: nn.Module, amount: float) -> None:
    """What starts at zero would hide that a part is missing."""
    for p in model.parameters():
        p.add_(torch.rand_like(p), alpha=amount)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_apart_and_is_trained_whole(name: str) -> None:
    model, shape = made(name), example(name)
    keys = list(model.state_dict())
    shake(model, 0.1)
    # Narrow local heads: those of MAN++ are far larger than these models.
    rule: dict[str, Any] = {"rule": "man++", "rule_options": {"host_options": {"width": "narrow"}}}
    config = TrainerConfig(learning_rate=0.01, **({"rule": "dgl", "blocks": 3} if name in WIDE else rule))
    trainer = LocalTrainer(model, config, example=shape)  # checks that the parts, run in a row, are the model
    before = {k: v.clone() for k, v in model.named_parameters()}
    result = trainer.step((torch.rand(4, *shape), torch.randint(0, 5, (4,))))
    assert len(result.losses) == len(trainer.network) > 2
    assert [k for k, v in model.named_parameters() if torch.equal(v, before[k])] == []
    assert list(trainer.export_state_dict()) == keys


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_drop_what_the_model_drops(name: str) -> None:
    """In training mode, with the same random numbers: measuring, in evaluation mode, does not see a dropout."""
    model = made(name)
    shake(model, 0.01)
    parts = adapt(model)
    images, draw = torch.rand(4, *example(name)), torch.get_rng_state()
    whole = model(images)
    torch.set_rng_state(draw)
    x = images
    for part in (parts.stem, *parts.units.values()):
        x = part(x)
        assert x.dim() < 4 or x.shape[2] == x.shape[3]  # local heads take (N, C, H, W)
    assert torch.equal(parts.head(x), whole)


def test_there_is_a_small_model_of_every_class_with_an_adapter() -> None:
    classes = {cls for name in MODELS for cls in type(made(name)).__mro__}
    assert set(LAYOUTS) <= {(cls.__module__.rpartition(".")[2], cls.__name__) for cls in classes}


def test_a_version_of_timm_without_a_class() -> None:
    register({("no_such_module", "Net"): Layout(), ("resnet", "NoSuchNet"): Layout()})


CHECKPOINTED = ["resnet", "vit", "convnext", "resnet v2", "regnet", "mobilenet v3", "swin", "eva 02", "caformer"]


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("rule", ["e2e", "man++"])
def test_gradient_checkpointing_keeps_less_and_computes_the_same(rule: str, name: str) -> None:
    model = made(name).double()
    images, labels = torch.rand(6, *example(name), dtype=torch.float64), torch.randint(0, 5, (6,))
    peaks, trained = [], []
    for recomputed in (False, True):
        copied = copy.deepcopy(model)
        copied.set_grad_checkpointing(recomputed)
        torch.manual_seed(1)
        options = {"form": "parameter"} if rule == "man++" else None
        trainer = LocalTrainer(
            copied,
            TrainerConfig(rule=rule, rule_options=options, blocks=1 if rule == "e2e" else 2),
            example=example(name),
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
    trainer = LocalTrainer(model, TrainerConfig(rule="dgl", blocks=2), example=example("vit"))
    runs.clear()
    trainer.step((torch.rand(2, 3, 8, 8), torch.tensor([0, 1])))
    assert sorted(runs) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_unit_that_recomputes_its_blocks_itself_is_not_recomputed() -> None:
    model = made("gcvit")
    model.set_grad_checkpointing(True)
    assert not adapt(model).recomputed


@pytest.mark.parametrize("name", ["deit, two heads", "levit, two heads", "repvit"])
def test_a_model_that_trains_a_head_for_distillation(name: str) -> None:
    model = made(name)
    model.set_distilled_training(True)
    with pytest.raises(TypeError, match=r"two heads in training.*call set_distilled_training.False."):
        adapt(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rope_type": "mixed", "attn_type": "rope"}, "is learned, by all blocks together"),
        ({"rope_shift_coords": 0.5}, "draws its coordinates anew for each batch"),
        ({"patch_drop_rate": 0.5}, "leaves out the patches that patch_drop_rate does"),
    ],
)
def test_a_rotary_embedding_that_is_no_constant(options: dict, reason: str) -> None:
    with pytest.raises(TypeError, match=f"the rotary embedding of Eva {reason}.*take a model whose embedding"):
        adapt(rotary(**options))


def test_a_rotary_embedding_is_of_the_models_image_size() -> None:
    model = dinov3()
    model(torch.rand(1, 3, 24, 24))
    with pytest.raises(ValueError, match=r"that of 4 x 4 patches, and the images have 6 x 6; take images of"):
        partition(model, example=(3, 24, 24))
    model.set_input_size(24)
    partition(model, example=(3, 24, 24))


def test_a_rotary_embedding_goes_where_its_unit_goes() -> None:
    unit, other, *_ = adapt(dinov3()).units.values()
    assert unit.embedding.data_ptr() != other.embedding.data_ptr()  # or streams could not run both at once
    assert "embedding" not in unit.state_dict()
    tokens = torch.rand(2, 19, 16)
    expected = unit(tokens)
    assert copy.deepcopy(unit).double().embedding.dtype == torch.float64
    unit.embedding.zero_()
    assert not torch.allclose(unit(tokens), expected)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(models.Beit, {"use_shared_rel_pos_bias": True}), (models.VisionTransformerRelPos, {"shared_rel_pos": True})],
)
def test_blocks_that_share_relative_positions(cls: type[nn.Module], options: dict) -> None:
    with pytest.raises(TypeError, match=f"all blocks of this {cls.__name__} share the parameters of their relative"):
        adapt(vit(cls, **options))


def test_units_carry_the_names_of_the_state_dict() -> None:
    def units(name: str) -> list[str]:
        return list(adapt(made(name)).units)

    assert partition(resnet_v1(), 2, example=(3, 32, 32)).names()[0] == ["stem", "layer1.0", "layer2.0"]
    assert partition(vit(), example=(3, 8, 8)).names() == [["stem"], ["blocks.1"], ["blocks.2"], ["blocks.3"]]
    assert units("convnext") == [f"stages.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))]
    assert units("swin") == [f"layers.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0))]
    assert units("dino v3") == ["blocks.1", "blocks.2", "blocks.3"]
    assert units("cspnet") == ["stages.0", "stages.1", "stages.2", "stages.3"]
    assert units("starnet") == ["stages.0.1", "stages.1.1", "stages.2.1", "stages.2.2", "stages.3.1"]
    assert units("vgg") == ["features.4", "features.8", "features.11"]
    assert units("densenet") == [f"features.denseblock{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("name", ["resnet", "vit", "convnext", "swin", "dino v3", "caformer"])
def test_a_copy_of_a_part_is_no_longer_the_model(name: str) -> None:
    model = made(name)
    theirs = {id(p) for p in model.parameters()}
    parts = adapt(model)
    for part in (parts.stem, *parts.units.values(), parts.head):
        assert all(id(p) in theirs for p in part.parameters())
        assert not any(id(p) in theirs for p in copy.deepcopy(part).parameters())


WIDER = {
    "resnet": resnet_v1,
    "vit": lambda: vit(embed_dim=64),
    "convnext": lambda: convnext(dims=(32,) * 4),
    "swin": lambda: swin(embed_dim=32),
    "swin, weights left": lambda: swin(embed_dim=32, weight_init="skip"),
    "eva": lambda: vit(models.Eva, embed_dim=64),
}


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("resnet", "conv1.weight"),
        ("vit", "attn.qkv.weight"),
        ("convnext", "mlp.fc1.weight"),
        ("resnet v2", "conv1.weight"),
        ("resnet v2", "conv3.weight"),
        ("regnet", "conv2.conv.weight"),
        ("mobilenet v3", "conv.weight"),
        ("swin", "attn.qkv.weight"),
        ("swin, weights left", "attn.qkv.weight"),
        ("eva", "mlp.fc1.weight"),  # the second is scaled by depth
        ("byobnet", "conv1_1x1.conv.weight"),
        ("coatnet", "attn.qkv.weight"),
        ("mambaout", "fc1.weight"),
        ("cspnet", "conv_transition.conv.weight"),
        ("rexnet", "conv.weight"),
        ("hgnet", "conv.weight"),
    ],
)
def test_a_fresh_copy_of_a_unit_is_drawn_as_timm_draws_it(name: str, weight: str) -> None:
    torch.manual_seed(0)
    parts = adapt(WIDER[name]() if name in WIDER else made(name))
    unit = list(parts.units.values())[-1]
    fresh = copy.deepcopy(unit)
    parts.init(fresh)
    key = next(k for k in fresh.state_dict() if k.endswith(weight))
    ours, theirs = fresh.state_dict()[key], unit.state_dict()[key]
    assert not torch.equal(ours, theirs)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15)
    for key, value in unit.state_dict().items():
        if value.dim() < 2 and value.is_floating_point() and (value == value.flatten()[0]).all():
            assert torch.equal(fresh.state_dict()[key], value), key  # norms, layer scales, biases that start at zero


def test_the_command_line_takes_timms_names() -> None:
    model = build_model("timm/convnext_atto", 7)
    assert model.get_classifier().out_features == 7
    with pytest.raises(UserError, match=r"timm has no model 'convnext_ato' .did you mean"):
        build_model("timm/convnext_ato", 7)
