"""Torchvision's models as stem, units and head: the convolutional ones; see also torchvision_transformers."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import (
    VGG,
    AlexNet,
    ConvNeXt,
    DenseNet,
    EfficientNet,
    MobileNetV2,
    MobileNetV3,
    RegNet,
    ResNet,
)

from manpp_kernels.local.adapters import torchvision_transformers  # noqa: F401  (to be registered)
from manpp_kernels.local.parts import Parts, adapt, layer_groups, reset_parameters, staged_units
from manpp_kernels.models import cifar_resnet


@adapt.register
def _(model: ResNet) -> Parts:
    """ResNet, Wide ResNet and ResNeXt."""
    return Parts(
        nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool),
        staged_units(model, ["layer1", "layer2", "layer3", "layer4"]),
        nn.Sequential(model.avgpool, nn.Flatten(), model.fc),
        cifar_resnet.init_weights,  # the same distributions as torchvision's constructor
    )


@adapt.register(MobileNetV2)
@adapt.register(MobileNetV3)
@adapt.register(EfficientNet)
def _(model: MobileNetV2 | MobileNetV3 | EfficientNet) -> Parts:
    """Inverted residual blocks between a first convolution and a last one, which are stem and head."""
    (_, stem), *middle, (_, last) = model.features.named_children()
    units: dict[str, nn.Module] = {}
    for name, child in middle:
        blocks = child.named_children() if isinstance(model, EfficientNet) else [("", child)]
        units |= {f"features.{name}.{block}".rstrip("."): unit for block, unit in blocks}
    pool = nn.AdaptiveAvgPool2d(1) if isinstance(model, MobileNetV2) else model.avgpool
    return Parts(stem, units, nn.Sequential(last, pool, nn.Flatten(), model.classifier), cifar_resnet.init_weights)


@adapt.register
def _(model: ConvNeXt) -> Parts:
    (_, stem), *others = model.features.named_children()
    units: dict[str, nn.Module] = {}
    downsample: list[nn.Module] = []  # belongs to the first block after it, whose name the two have
    for name, child in others:
        if not isinstance(child[0], nn.LayerNorm):
            for block, unit in child.named_children():
                units[f"features.{name}.{block}"] = nn.Sequential(*downsample, unit) if downsample else unit
                downsample = []
        else:
            downsample = [child]
    return Parts(stem, units, nn.Sequential(model.avgpool, model.classifier), init_convnext_block)


@torch.no_grad()
def init_convnext_block(unit: nn.Module) -> None:
    """As the constructors of torchvision and timm initialise one, but for its layer scale, which stays as it is."""
    reset_parameters(unit)
    for m in unit.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


@adapt.register(VGG)
@adapt.register(AlexNet)
def _(model: VGG | AlexNet) -> Parts:
    """Every convolution with what follows it; the layers after the last pooling are the head."""
    groups = layer_groups(model.features)
    stem, *units = (nn.Sequential(*(child for _, child in group)) for group in groups)
    names = [f"features.{group[0][0]}" for group in groups[1:]]
    head = nn.Sequential(model.avgpool, nn.Flatten(), model.classifier)
    init = cifar_resnet.init_weights if isinstance(model, VGG) else reset_parameters
    return Parts(stem, dict(zip(names, units, strict=True)), head, init)


@adapt.register
def _(model: RegNet) -> Parts:
    stages = {f"trunk_output.{name}": stage for name, stage in model.trunk_output.named_children()}
    units = {f"{name}.{block}": unit for name, stage in stages.items() for block, unit in stage.named_children()}
    return Parts(model.stem, units, nn.Sequential(model.avgpool, nn.Flatten(), model.fc), init_regnet_block)


def init_regnet_block(unit: nn.Module) -> None:
    """As torchvision initialises one: He-normal convolutions (fan out), whose biases are PyTorch's."""
    reset_parameters(unit)
    for m in unit.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


@adapt.register
def _(model: DenseNet) -> Parts:
    """Dense blocks, each with the transition after it."""
    stem: list[nn.Module] = []
    units: dict[str, nn.Sequential] = {}
    for name, child in model.features.named_children():
        if name.startswith("denseblock"):
            units[f"features.{name}"] = nn.Sequential(child)
        elif name.startswith("transition"):
            units[list(units)[-1]].append(child)
        elif not units:
            stem.append(child)
    pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(model.features.norm5, *pool, model.classifier)
    return Parts(nn.Sequential(*stem), units, head, init_dense_block)


def init_dense_block(unit: nn.Module) -> None:
    """As torchvision initialises one: He-normal convolutions (fan in)."""
    reset_parameters(unit)
    for m in unit.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
