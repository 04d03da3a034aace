"""torchvision's models in local blocks: the parts are the model, and a step trains all of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from manpp_kernels.local import adapt, partition, rule_names
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

models = pytest.importorskip("torchvision.models")
google = pytest.importorskip("torchvision.models.googlenet")  # torchvision.models.googlenet is the function


def named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, num_classes=5, **options)


def convnext() -> nn.Module:
    setting = models.convnext.CNBlockConfig
    return models.ConvNeXt([setting(4, 8, 1), setting(8, 8, 2), setting(8, None, 1)], num_classes=5)


def efficientnet() -> nn.Module:
    block = partial(models.efficientnet.MBConvConfig, width_mult=0.25, depth_mult=1.0)
    setting = [block(1, 3, 1, 32, 16, 1), block(6, 3, 2, 16, 24, 2), block(6, 5, 2, 24, 40, 1)]
    return models.EfficientNet(setting, dropout=0.2, num_classes=5)


def small_vgg(cls: type[nn.Module], batch_norm: bool) -> nn.Module:
    layers = models.vgg.make_layers([8, "M", 8, 8, "M", 8, "M"], batch_norm)
    with torch.device("meta"):  # its classifier alone has 120 million parameters
        model = cls(layers, num_classes=5, init_weights=False)
    model.features = models.vgg.make_layers([8, "M", 8, 8, "M", 8, "M"], batch_norm)
    model.classifier = nn.Sequential(nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5))
    return model


def alexnet() -> nn.Module:
    with torch.device("meta"):
        model = models.AlexNet(num_classes=5)
    layers = [nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True)]
    model.features = nn.Sequential(*layers, nn.MaxPool2d(2))
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Linear(16, 5))
    return model


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 3, 2, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=5)


def swin(version: int) -> nn.Module:
    """At 32x32 pixels the second block shifts its windows."""
    theirs = models.swin_transformer
    second = {"block": theirs.SwinTransformerBlockV2, "downsample_layer": theirs.PatchMergingV2}
    settings = {"dropout": 0.1, "attention_dropout": 0.1, "num_classes": 5, **(second if version == 2 else {})}
    return models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], **settings)


def maxvit() -> nn.Module:
    dropouts = {"stochastic_depth_prob": 0.2, "mlp_dropout": 0.1, "attention_dropout": 0.1}
    return models.MaxVit((32, 32), 8, 4, [8, 16], [1, 2], head_dim=4, num_classes=5, **dropouts)


def thin(in_channels: int, out_channels: int, **options: Any) -> nn.Module:
    """A convolution of GoogLeNet or Inception, whose widths its class fixes, with an eighth of its channels."""
    return google.BasicConv2d(in_channels if in_channels == 3 else in_channels // 8, out_channels // 8, **options)


def googlenet(**options: Any) -> nn.Module:
    blocks = [thin, partial(google.Inception, conv_block=thin), nn.Identity]
    model = models.GoogLeNet(5, aux_logits=False, init_weights=True, blocks=blocks, **options)
    model.fc = nn.Linear(1024 // 8, 5)
    return model


def inception(**options: Any) -> nn.Module:
    theirs = models.inception
    kinds = [theirs.InceptionA, theirs.InceptionB, theirs.InceptionC, theirs.InceptionD, theirs.InceptionE]
    blocks = [thin, *(partial(kind, conv_block=thin) for kind in kinds), nn.Identity]
    model = models.Inception3(5, aux_logits=False, init_weights=True, inception_blocks=blocks, **options)
    model.fc = nn.Linear(2048 // 8, 5)
    return model


# name: what makes it, and the names of its first units
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet18": (named("resnet18"), ["layer1.0", "layer1.1"]),
    "mobilenet v2": (named("mobilenet_v2", width_mult=0.25), ["features.1", "features.2"]),
    "mobilenet v3": (named("mobilenet_v3_small", reduced_tail=True), ["features.1", "features.2"]),
    "efficientnet": (efficientnet, ["features.1.0", "features.2.0", "features.2.1", "features.3.0"]),
    "convnext": (convnext, ["features.1.0", "features.3.0", "features.3.1", "features.5.0"]),
    "vgg": (lambda: small_vgg(models.VGG, False), ["features.3", "features.5", "features.8"]),
    "vgg, batch normalisation": (lambda: small_vgg(models.VGG, True), ["features.4", "features.7", "features.11"]),
    "alexnet": (alexnet, ["features.2"]),
    "regnet": (named("regnet_y_400mf"), ["trunk_output.block1.block1-0", "trunk_output.block2.block2-0"]),
    "densenet": (
        lambda: models.DenseNet(4, (2, 2, 2), 8, num_classes=5),
        ["features.denseblock1", "features.denseblock2", "features.denseblock3"],
    ),
    "vit": (vit, ["encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_2"]),
    "swin": (lambda: swin(1), ["features.1.0", "features.1.1", "features.3.0", "features.3.1"]),
    "swin v2": (lambda: swin(2), ["features.1.0", "features.1.1", "features.3.0", "features.3.1"]),
    "maxvit": (maxvit, ["blocks.0.layers.0", "blocks.1.layers.0", "blocks.1.layers.1"]),
    "shufflenet": (
        lambda: models.ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 64], num_classes=5),
        ["stage2.0", "stage3.0", "stage3.1", "stage4.0"],
    ),
    "mnasnet": (lambda: models.MNASNet(0.1, num_classes=5), ["layers.8.0", "layers.8.1", "layers.8.2", "layers.9.0"]),
    "squeezenet": (named("squeezenet1_1"), [f"features.{i}" for i in (3, 4, 6, 7, 9, 10, 11, 12)]),
    "googlenet": (googlenet, ["inception3a", "inception3b", "inception4a"]),
    "googlenet, other normalisation": (lambda: googlenet(transform_input=True), ["inception3a"]),
    "inception": (inception, ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a"]),
}


def shape(name: str) -> tuple[int, int, int]:
    """Of an image; Inception takes none that are smaller."""
    return (3, 75, 75) if name == "inception" else (3, 32, 32)


def moved(name: str) -> nn.Module:
    """The model, with nothing left at zero, which would hide that a part is missing."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p), alpha=0.01)
    return model


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(6, *shape(name)), torch.randint(0, 5, (6,))


def untrained(model: nn.Module, trainer: LocalTrainer, batch: tuple[torch.Tensor, torch.Tensor]) -> list[str]:
    """The parameters that a step leaves as they are."""
    before = {k: v.clone() for k, v in model.named_parameters()}
    trainer.step(batch)
    return [k for k, v in model.named_parameters() if torch.equal(v, before[k])]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_apart_and_is_trained_whole(name: str) -> None:
    units = MODELS[name][1]
    model = moved(name)
    keys = list(model.state_dict())
    parts = partition(model, example=shape(name))  # checks that the parts, run in a row, are the model
    assert [s.name for s in parts.segments[1:]][: len(units)] == units
    trainer = LocalTrainer(model, TrainerConfig(rule="man++", learning_rate=0.01), example=shape(name))
    before = {k: v.clone() for k, v in model.named_parameters()}
    result = trainer.step(batch(name))
    assert len(result.losses) == len(trainer.network) == len(parts.segments)
    assert [k for k, v in model.named_parameters() if torch.equal(v, before[k])] == []
    assert list(trainer.export_state_dict()) == keys


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_drop_what_the_model_drops(name: str) -> None:
    """In training mode, with the same random numbers: measuring, in evaluation mode, does not see a dropout."""
    model = moved(name)
    parts = adapt(model)
    images, draw = torch.rand(4, *shape(name)), torch.get_rng_state()
    whole = model(images)
    torch.set_rng_state(draw)
    assert torch.equal(nn.Sequential(parts.stem, *parts.units.values(), parts.head)(images), whole)


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_copy_of_a_unit_is_drawn_as_torchvision_draws_it(name: str) -> None:
    if name in ("alexnet", "vgg", "vgg, batch normalisation"):
        pytest.skip("made without its initial values here; those of its layers are PyTorch's, or He-normal")
    torch.manual_seed(0)
    parts = adapt(MODELS[name][0]())
    unit = max(parts.units.values(), key=lambda u: max(p.numel() for p in u.parameters()))
    fresh = copy.deepcopy(unit)
    with torch.no_grad():  # what is not drawn anew then differs
        for key, p in fresh.named_parameters():
            if "layer_scale" not in key:  # which stays as it is
                p.fill_(7.0)
    parts.init(fresh)
    for key, theirs in unit.named_parameters():
        ours = fresh.get_parameter(key)
        if torch.all(theirs == theirs.flatten()[0]):
            assert torch.equal(ours, theirs), key
        else:
            assert not torch.equal(ours, theirs), key
            assert ours.abs().max() < 7, key
            if theirs.numel() >= 64:  # so many have a standard deviation within a multiple of this share
                share, std = theirs.numel() ** -0.5, theirs.std().item()
                assert ours.std().item() == pytest.approx(std, rel=6 * share), key
                assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=8 * share * std), key


# Attention in windows, shuffled channels, branches, pooling in front: what the residual networks of other tests lack.
VARIED = ["swin", "swin v2", "maxvit", "shufflenet", "mnasnet", "squeezenet", "googlenet", "inception"]
SETTINGS: dict[str, dict[str, Any]] = {
    "parameter form": {"rule": "man++", "rule_options": {"form": "parameter"}},
    "balanced": {"rule": "dgl", "blocks": 3, "balance": "memory"},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", VARIED)
def test_other_settings_train_all_of_it(name: str, settings: str) -> None:
    model = moved(name)
    trainer = LocalTrainer(model, TrainerConfig(**SETTINGS[settings]), example=shape(name))
    assert untrained(model, trainer, batch(name)) == []


@pytest.mark.parametrize("name", VARIED)
def test_recomputed_units_are_trained_the_same(name: str) -> None:
    states = []
    for recompute in (False, True):
        config = TrainerConfig(rule="dgl", blocks=3, recompute=recompute)
        trainer = LocalTrainer(moved(name), config, example=shape(name))
        trainer.step(batch(name))
        states.append(trainer.export_state_dict())
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("rule", rule_names())
def test_every_rule_trains_maps_whose_channels_come_last(rule: str) -> None:
    model = moved("swin v2")
    trainer = LocalTrainer(model, TrainerConfig(rule=rule), example=(3, 32, 32))
    assert all(segment.shape[1] in (8, 16) for segment in trainer.network.partition.segments)
    assert untrained(model, trainer, batch("swin v2")) == []


@pytest.mark.parametrize("make", [models.GoogLeNet, models.Inception3])
def test_classifiers_between_the_blocks_are_refused(make: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        model = make(5, init_weights=False)
    with pytest.raises(TypeError, match=r"has classifiers of its own .*aux_logits=False"):
        adapt(model)
    model.aux_logits = False  # does not keep it from having them
    with pytest.raises(TypeError, match=r"has classifiers of its own .*aux_logits=False"):
        adapt(model)


def test_every_classification_model_has_an_adapter() -> None:
    adapt(MODELS["vit"][0]())  # the adapters of a library are imported with its first model
    made = {inspect.signature(models.get_model_builder(n)).return_annotation for n in models.list_models(module=models)}
    assert models.SwinTransformer in made
    assert [cls for cls in made if adapt.dispatch(cls) is adapt.dispatch(object)] == []
