"""Torchvision's vision transformers as stem, units and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from manpp_kernels.local.parts import Parts, adapt


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
