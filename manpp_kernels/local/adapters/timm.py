"""timm's models as stem, units and head: ResNet and its second version, RegNet, EfficientNet, MobileNetV3, ConvNeXt,
VisionTransformer, and what derives from them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from timm.models._efficientnet_builder import efficientnet_init_weights
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from manpp_kernels.local.adapters.torchvision import init_convnext_block
from manpp_kernels.local.parts import Parts, adapt, reset_parameters, staged_units
from manpp_kernels.local.recompute import Recomputed
from manpp_kernels.models import cifar_resnet


@adapt.register
def _(model: ResNet) -> Parts:
    """ResNet, ResNeXt, Wide ResNet, SE-ResNet, ResNet-D and the like."""
    return Parts(
        nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool),
        staged_units(model, ["layer1", "layer2", "layer3", "layer4"]),
        nn.Sequential(model.global_pool, nn.Dropout(model.drop_rate or 0.0), model.fc),
        _init_residual_block,
        recomputed=model.grad_checkpointing,
    )


def _init_residual_block(unit: nn.Module) -> None:
    """As timm initialises a block: the last normalisation of a branch starts at zero."""
    cifar_resnet.init_weights(unit)
    for m in unit.modules():
        zero = getattr(m, "zero_init_last", None)
        if callable(zero):
            zero()


@adapt.register
def _(model: VisionTransformer) -> Parts:
    if hasattr(model, "head_dist"):
        raise TypeError(
            f"{type(model).__name__} has a second head, for distillation, and local learning trains one; take the "
            "model without (as deit_tiny_patch16_224)"
        )
    # The first block joins the embedding, whose class token alone has not seen the image.
    (_, first), *others = model.blocks.named_children()
    return Parts(
        nn.Sequential(_Embedding(model), Recomputed(first) if model.grad_checkpointing else first),
        {f"blocks.{name}": unit for name, unit in others},
        nn.Sequential(model.norm, _Head(model, ["attn_pool", "fc_norm", "head_drop", "head"])),
        _init_transformer_block,
        recomputed=model.grad_checkpointing,
    )


class _Embedding(nn.Module):
    """Images (N, C, H, W) to tokens (N, T, C)."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = _with_only(model, ["patch_embed", "pos_drop", "patch_drop", "norm_pre"])

    def forward(self, images: Tensor) -> Tensor:
        m = self.model
        tokens: Tensor = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(images))))
        return tokens


class _Head(nn.Module):
    """Features to logits, by the model's own ``forward_head``."""

    def __init__(self, model: nn.Module, children: Iterable[str]) -> None:
        super().__init__()
        self.model: Any = _with_only(model, children)
        self.model._parameters = {}  # a transformer's tokens and position embedding are the embedding's

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(features)
        return logits


def _with_only(model: nn.Module, children: Iterable[str]) -> Any:
    """A shallow copy with some of the children: the model's own methods on the model's own parameters.

    How a vision transformer adds its position embedding and pools its tokens depends on a dozen settings, which only
    its own methods follow; and a part that held the whole model would own the parameters of all parts.
    """
    part = copy.copy(model)
    part._modules = {name: model._modules[name] for name in children if name in model._modules}
    part._parameters = dict(model._parameters)
    return part


def _init_transformer_block(unit: nn.Module) -> None:
    reset_parameters(unit)
    unit.apply(init_weights_vit_timm)


@adapt.register
def _(model: ConvNeXt) -> Parts:
    stages: dict[str, Any] = dict(model.stages.named_children())
    units: dict[str, nn.Module] = {}
    for name, stage in stages.items():
        units |= {f"stages.{name}.blocks.{i}": block for i, block in stage.blocks.named_children()}
        if not isinstance(stage.downsample, nn.Identity):  # it belongs to the first block, whose name the two have
            first = f"stages.{name}.blocks.0"
            units[first] = nn.Sequential(stage.downsample, units[first])
    return Parts(
        model.stem,
        units,
        nn.Sequential(model.norm_pre, model.head),
        init_convnext_block,
        recomputed=any(stage.grad_checkpointing for stage in stages.values()),
    )


@adapt.register(EfficientNet)
@adapt.register(MobileNetV3)
def _(model: EfficientNet | MobileNetV3) -> Parts:
    if isinstance(model, EfficientNet):
        head = nn.Sequential(model.conv_head, model.bn2, _Head(model, ["global_pool", "classifier"]))
    else:
        children = ["global_pool", "conv_head", "norm_head", "act2", "flatten", "classifier"]
        head = nn.Sequential(_Head(model, children))
    return Parts(
        nn.Sequential(model.conv_stem, model.bn1),
        {f"blocks.{i}.{j}": unit for i, stage in model.blocks.named_children() for j, unit in stage.named_children()},
        head,
        efficientnet_init_weights,
        recomputed=model.grad_checkpointing,
    )


@adapt.register
def _(model: RegNet) -> Parts:
    stages = ["s1", "s2", "s3", "s4"]
    return Parts(
        model.stem,
        staged_units(model, stages),
        nn.Sequential(model.final_conv, model.head),
        _init_residual_block,
        recomputed=any(getattr(model, stage).grad_checkpointing for stage in stages),
    )


@adapt.register
def _(model: ResNetV2) -> Parts:
    stages: dict[str, Any] = dict(model.stages.named_children())
    return Parts(
        model.stem,
        {f"stages.{i}.blocks.{j}": unit for i, s in stages.items() for j, unit in s.blocks.named_children()},
        nn.Sequential(model.norm, model.head),
        _init_residual_block,
        recomputed=any(stage.grad_checkpointing for stage in stages.values()),
    )
