"""timm's models as stem, units and head: ResNet, VisionTransformer, ConvNeXt, and what derives from them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from manpp_kernels.local.parts import Parts, Recomputed, adapt, reset_parameters, staged_units
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
        _TokenHead(model),
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


class _TokenHead(nn.Module):
    """Tokens (N, T, C) to logits."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = _with_only(model, ["norm", "attn_pool", "fc_norm", "head_drop", "head"])
        self.model._parameters = {}  # the tokens and the position embedding are the embedding's

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(self.model.norm(tokens))
        return logits


def _with_only(model: VisionTransformer, children: Iterable[str]) -> VisionTransformer:
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
        _init_convnext_block,
        recomputed=any(stage.grad_checkpointing for stage in stages.values()),
    )


@torch.no_grad()
def _init_convnext_block(unit: nn.Module) -> None:
    """As timm initialises a block, but for its layer scale, which stays what it is in the model."""
    reset_parameters(unit)
    for m in unit.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
