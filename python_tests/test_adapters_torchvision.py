"""torchvision's models in local blocks: the parts are the model, and a step trains all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from manpp_kernels.local import adapt, partition
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

models = pytest.importorskip("torchvision.models")


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
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_apart_and_is_trained_whole(name: str) -> None:
    torch.manual_seed(0)
    make, units = MODELS[name]
    model = make()
    keys = list(model.state_dict())
    with torch.no_grad():  # what starts at zero would hide that a part is missing
        for p in model.parameters():
            p.add_(torch.rand_like(p), alpha=0.01)
    parts = partition(model, example=(3, 32, 32))  # checks that the parts, run in a row, are the model
    assert [s.name for s in parts.segments[1:]][: len(units)] == units
    trainer = LocalTrainer(model, TrainerConfig(rule="man++", learning_rate=0.01), example=(3, 32, 32))
    before = {k: v.clone() for k, v in model.named_parameters()}
    result = trainer.step((torch.rand(6, 3, 32, 32), torch.randint(0, 5, (6,))))
    assert len(result.losses) == len(trainer.network) == len(parts.segments)
    assert [k for k, v in model.named_parameters() if torch.equal(v, before[k])] == []
    assert list(trainer.export_state_dict()) == keys


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_drop_what_the_model_drops(name: str) -> None:
    """In training mode, with the same random numbers: measuring, in evaluation mode, does not see a dropout."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():  # as above
        for p in model.parameters():
            p.add_(torch.rand_like(p), alpha=0.01)
    parts = adapt(model)
    images, draw = torch.rand(4, 3, 32, 32), torch.get_rng_state()
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
