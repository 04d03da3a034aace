"""Torchvision's vision transformers as stem, units and head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.ops import Permute

from manpp_kernels.local.parts import Parts, adapt, joined_units, reset_parameters


@adapt.register
def _(model: VisionTransformer) -> Parts:
    # The embedding alone would be no local block: its class token has not seen the image, so that a classifier on it
    # would teach the patches nothing. The encoder's first block joins it.
    first, *others = model.encoder.layers.named_children()
    return Parts(
        nn.Sequential(Embedding(model), first[1]),
        {f"encoder.layers.{name}": unit for name, unit in others},
        nn.Sequential(model.encoder.ln, ClassToken(), model.heads),
        init_encoder_block,
    )


class Embedding(nn.Module):
    """Images (N, C, H, W) to tokens (N, T, C), the class token first; holds the model's own parameters."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.conv_proj = model.conv_proj
        self.class_token = model.class_token
        self.pos_embedding = model.encoder.pos_embedding
        self.dropout = model.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        return self.dropout(x + self.pos_embedding)


class ClassToken(nn.Module):
    """Tokens (N, T, C) to the first of them (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def init_encoder_block(module: nn.Module) -> None:
    """As torchvision initialises a block: Xavier-uniform weights, biases of the MLP near 0."""
    for m in module.modules():
        if isinstance(m, nn.MultiheadAttention):
            m._reset_parameters()
            m.out_proj.reset_parameters()
            nn.init.zeros_(m.out_proj.bias)
        elif isinstance(m, nn.LayerNorm):
            m.reset_parameters()
        elif type(m) is nn.Linear:
            nn.init.xavier_uniform_(m.weight)
            nn.init.normal_(m.bias, std=1e-6)


@adapt.register
def _(model: SwinTransformer) -> Parts:
    """Blocks of both versions, the first of a stage with the patch merging before it.

    Inside, the channels come last. Between units the features are maps (N, C, H, W), as local heads take them: a view.
    """
    row: list[tuple[str | None, nn.Module]] = []
    for i, (name, child) in enumerate(model.features.named_children()):
        if i % 2 == 0:  # the embedding, and patch merging
            row.append((None, child))
        else:
            row += [(f"features.{name}.{block}", unit) for block, unit in child.named_children()]
    stem, units = joined_units(row)
    return Parts(
        stem.append(_channels_first()),
        {name: nn.Sequential(_channels_last(), unit, _channels_first()) for name, unit in units.items()},
        nn.Sequential(_channels_last(), model.norm, model.permute, model.avgpool, model.flatten, model.head),
        init_swin_block,
    )


def _channels_first() -> nn.Module:
    return Permute([0, 3, 1, 2])


def _channels_last() -> nn.Module:
    return Permute([0, 2, 3, 1])


@torch.no_grad()
def init_swin_block(unit: nn.Module) -> None:
    """As torchvision initialises one, its relative positions and the scale of its attention included."""
    reset_parameters(unit)
    for m in unit.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, ShiftedWindowAttentionV2):  # whose relative positions are computed, by linear layers
            nn.init.constant_(m.logit_scale, math.log(10))
        elif isinstance(m, ShiftedWindowAttention):
            nn.init.trunc_normal_(m.relative_position_bias_table, std=0.02)


@adapt.register
def _(model: MaxVit) -> Parts:
    """Layers: an inverted residual block, attention in windows and attention over a grid."""
    blocks = {f"blocks.{i}.layers": block.layers for i, block in model.blocks.named_children()}
    units = {f"{name}.{i}": unit for name, layers in blocks.items() for i, unit in layers.named_children()}
    return Parts(model.stem, units, model.classifier, init_maxvit_layer)


@torch.no_grad()
def init_maxvit_layer(unit: nn.Module) -> None:
    """As torchvision initialises one, its relative positions included."""
    reset_parameters(unit)
    for m in unit.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, RelativePositionalMultiHeadAttention):
            nn.init.trunc_normal_(m.relative_position_bias_table, std=0.02)
