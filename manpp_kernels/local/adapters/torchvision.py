"""Torchvision's models as stem, units and head: the convolutional ones; see also torchvision_transformers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torchvision.models import (
    VGG,
    AlexNet,
    ConvNeXt,
    DenseNet,
    EfficientNet,
    GoogLeNet,
    Inception3,
    MNASNet,
    MobileNetV2,
    MobileNetV3,
    RegNet,
    ResNet,
    ShuffleNetV2,
    SqueezeNet,
)
from torchvision.models.squeezenet import Fire

from manpp_kernels.local.adapters import torchvision_transformers  # noqa: F401  (to be registered)
from manpp_kernels.local.parts import Parts, adapt, joined_units, layer_groups, reset_parameters, staged_units
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
    row: list[tuple[str | None, nn.Module]] = []
    for name, child in model.features.named_children():
        if name == "0" or isinstance(child[0], nn.LayerNorm):  # the stem, and down-sampling
            row.append((None, child))
        else:
            row += [(f"features.{name}.{block}", unit) for block, unit in child.named_children()]
    stem, units = joined_units(row)
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


@adapt.register
def _(model: ShuffleNetV2) -> Parts:
    return Parts(
        nn.Sequential(*model.conv1, model.maxpool),
        staged_units(model, ["stage2", "stage3", "stage4"]),
        nn.Sequential(model.conv5, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc),
    )


@adapt.register
def _(model: MNASNet) -> Parts:
    """Inverted residual blocks, in stacks between eight layers and three, which are stem and head."""
    first, last = 8, len(model.layers) - 3
    stacks = {f"layers.{i}": model.layers[i] for i in range(first, last)}
    return Parts(
        model.layers[:first],
        {f"{name}.{block}": unit for name, stack in stacks.items() for block, unit in stack.named_children()},
        nn.Sequential(*model.layers[last:], nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier),
        cifar_resnet.init_weights,
    )


@adapt.register
def _(model: SqueezeNet) -> Parts:
    """Fire modules, each with the pooling before it."""
    row = [(f"features.{i}" if isinstance(m, Fire) else None, m) for i, m in model.features.named_children()]
    stem, units = joined_units(row)
    return Parts(stem, units, nn.Sequential(model.classifier, nn.Flatten()), init_fire)


def init_fire(unit: nn.Module) -> None:
    """As torchvision initialises one: He-uniform convolutions (fan in), biases 0."""
    for m in unit.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


@adapt.register(GoogLeNet)
@adapt.register(Inception3)
def _(model: GoogLeNet | Inception3) -> Parts:
    """Inception blocks, each with the pooling before it."""
    first_version = isinstance(model, GoogLeNet)
    classifiers = ["aux1", "aux2"] if first_version else ["AuxLogits"]
    if model.aux_logits or any(getattr(model, name) is not None for name in classifiers):
        raise TypeError(
            f"{type(model).__name__} has classifiers of its own between its blocks ({', '.join(classifiers)}), where "
            "local learning puts others, and returns what they give in training mode; make it with aux_logits=False"
        )
    prefix = "inception" if first_version else "Mixed_"
    stem, units = joined_units((name if name.startswith(prefix) else None, m) for name, m in model.named_children())
    if model.transform_input:
        stem.insert(0, InputTransform())
    head = nn.Sequential(model.avgpool, nn.Flatten(), model.dropout, model.fc)
    return Parts(stem, units, head, functools.partial(init_inception_block, std=0.01 if first_version else 0.1))


class InputTransform(nn.Module):
    """Images normalised by ImageNet's means and deviations, as if by 0.5 and 0.5: ``transform_input`` of the models."""

    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def forward(self, images: Tensor) -> Tensor:
        values = zip(images.split(1, 1), self.means, self.deviations, strict=True)
        return torch.cat([x * (deviation / 0.5) + (mean - 0.5) / 0.5 for x, mean, deviation in values], 1)


def init_inception_block(unit: nn.Module, std: float) -> None:
    """As the constructors initialise one with ``init_weights=True``, the default."""
    reset_parameters(unit)
    for m in unit.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=std, a=-2, b=2)
