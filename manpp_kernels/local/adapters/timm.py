"""timm's vision transformers as stem, units and head: VisionTransformer and what derives from it, Eva, BEiT and the
transformer with relative positions; and what all adapters for timm's models share."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any

import torch
from timm.models import named_apply
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from manpp_kernels.local.parts import Parts, adapt, has_parameters, reset_parameters
from manpp_kernels.local.recompute import Recomputed

InitUnit = Callable[[nn.Module], None]


class ForwardHead(nn.Module):
    """Features to logits, by the model's own ``forward_head`` and the children that are in no other part.

    Args:
        model: with the weights, which the head shares.
        without: the children in other parts.

    Raises:
        TypeError: the model gives two outputs in training.
    """

    def __init__(self, model: nn.Module, without: Collection[str]) -> None:
        super().__init__()
        if any(getattr(m, "distilled_training", False) for m in model.modules()):
            raise TypeError(
                f"{type(model).__name__} gives the logits of two heads in training, one for distillation, and local "
                "learning trains one output; call set_distilled_training(False), which gives their mean"
            )
        self.model = with_only(model, [name for name in model._modules if name not in without])
        self.model._parameters = {}  # a transformer's tokens and position embedding are the embedding's

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(features)
        return logits


def with_only(model: nn.Module, children: Iterable[str]) -> Any:
    """A shallow copy with some of the children: the model's own methods on the model's own parameters.

    How a vision transformer adds its position embedding and pools its tokens depends on a dozen settings, which only
    its own methods follow; and a part that held the whole model would own the parameters of all parts.
    """
    part = copy.copy(model)
    part._modules = {name: model._modules[name] for name in children if name in model._modules}
    part._parameters = dict(model._parameters)
    return part


def checkpointed(model: nn.Module, units: Iterable[nn.Module]) -> bool:
    """Whether ``model.set_grad_checkpointing()`` was called, for what ran the units; a unit's own stays the unit's."""
    inside = {m for unit in units for m in unit.modules()}
    return any(getattr(m, "grad_checkpointing", False) for m in model.modules() if m not in inside)


def unless_skipped(model: nn.Module, init: InitUnit) -> InitUnit:
    """``init``, or PyTorch's defaults where the model was made with ``weight_init="skip"``, which leaves them."""
    return reset_parameters if getattr(model, "weight_init_mode", "") == "reset" else init


class Own:
    """What draws a unit anew where a model's constructor applies a function to each layer, or to each and its name.

    Args:
        name: of the function, a method of the model or in a module. A version of timm that has none leaves PyTorch's
            defaults.
        options: what the constructor passes to it.
    """

    def __init__(self, name: str = "_init_weights", **options: Any) -> None:
        self.name, self.options = name, options

    def of(self, model: nn.Module, module: ModuleType | None = None) -> InitUnit:
        draw = getattr(model, self.name, None) or getattr(module, self.name, None)
        if draw is None:
            return reset_parameters
        named = "name" in inspect.signature(draw).parameters

        def init(unit: nn.Module) -> None:
            reset_parameters(unit)
            if named:
                named_apply(functools.partial(draw, **self.options), unit, include_root=True)
            else:
                unit.apply(draw)

        return init


def init_transformer_block(unit: nn.Module) -> None:
    """As the constructors of VisionTransformer and Swin draw one."""
    reset_parameters(unit)
    unit.apply(init_weights_vit_timm)


def _transformer(
    model: Any,
    embedding: nn.Module,
    init: InitUnit,
    unit: Callable[[nn.Module], nn.Module] = lambda block: block,
) -> Parts:
    """The first block joins the embedding, whose class token alone has not seen the image."""
    (_, first), *others = ((name, unit(block)) for name, block in model.blocks.named_children())
    return Parts(
        nn.Sequential(embedding, Recomputed(first) if model.grad_checkpointing else first),
        {f"blocks.{name}": block for name, block in others},
        nn.Sequential(model.norm, ForwardHead(model, {*_EMBEDDING, "rope", "blocks", "norm"})),
        unless_skipped(model, init),
        recomputed=model.grad_checkpointing,
    )


_EMBEDDING = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")


class _Embedding(nn.Module):
    """Images (N, C, H, W) to tokens (N, T, C)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = with_only(model, _EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        m = self.model
        tokens: Tensor = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(images))))
        return tokens


@adapt.register
def _(model: VisionTransformer) -> Parts:
    return _transformer(model, _Embedding(model), init_transformer_block)


class _EvaEmbedding(_Embedding):
    """The same, without the rotary embedding, which the blocks have, as it is for one size of the images alone."""

    def __init__(self, model: Eva) -> None:
        super().__init__(model)
        self.grid = model.patch_embed.grid_size if model.rope is not None and model.dynamic_img_size else None
        self.model.rope = None

    def forward(self, images: Tensor) -> Tensor:
        patches = self.model.patch_embed(images)
        if self.grid is not None and patches.shape[1:3] != self.grid:  # where it is not dynamic, it checks this itself
            raise ValueError(
                f"the rotary embedding is that of {' x '.join(map(str, self.grid))} patches, and the images have "
                f"{' x '.join(map(str, patches.shape[1:3]))}; take images of the model's size, or make it one for "
                "theirs, by timm.create_model(..., img_size=...) or model.set_input_size"
            )
        tokens, _ = self.model._pos_embed(patches)
        norm = getattr(self.model, "norm_pre", nn.Identity())  # an older timm has none
        normalised: Tensor = norm(tokens)
        return normalised


class _Rotary(nn.Module):
    """A block with the rotary embedding that the model hands to all of its blocks."""

    embedding: Tensor

    def __init__(self, block: nn.Module, embedding: Tensor) -> None:
        super().__init__()
        self.block = block
        # Its own, as blocks that run at once on streams share no buffer.
        self.register_buffer("embedding", embedding.clone(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.block(tokens, rope=self.embedding)
        return result


@adapt.register
def _(model: Eva) -> Parts:
    rope: Any = model.rope
    if rope is None:
        return _transformer(model, _EvaEmbedding(model), Own().of(model))
    refused = {
        "is learned, by all blocks together": has_parameters(rope),
        "draws its coordinates anew for each batch": getattr(rope, "aug_active", False),
        "leaves out the patches that patch_drop_rate does": getattr(model, "patch_drop", None) is not None,
    }
    for reason, found in refused.items():
        if found:
            raise TypeError(
                f"the rotary embedding of {type(model).__name__} {reason}, and units take one tensor alone; take a "
                "model whose embedding depends on the size of the images alone"
            )
    with torch.no_grad():
        embedding = rope.get_embed(shape=model.patch_embed.grid_size)
    return _transformer(model, _EvaEmbedding(model), Own().of(model), functools.partial(_Rotary, embedding=embedding))


class _BeitEmbedding(_Embedding):
    def forward(self, images: Tensor) -> Tensor:
        m = self.model
        x: Tensor = m.patch_embed(images)
        x = torch.cat([m.cls_token.expand(len(x), -1, -1), x], 1)
        dropped: Tensor = m.pos_drop(x if m.pos_embed is None else x + m.pos_embed)
        return dropped


class _RelPosEmbedding(_Embedding):
    def forward(self, images: Tensor) -> Tensor:
        m = self.model
        x: Tensor = m.patch_embed(images)
        return x if m.cls_token is None else torch.cat([m.cls_token.expand(len(x), -1, -1), x], 1)


@adapt.register
def _(model: Beit) -> Parts:
    _refuse_shared(model, model.rel_pos_bias)
    return _transformer(model, _BeitEmbedding(model), Own().of(model))


@adapt.register
def _(model: VisionTransformerRelPos) -> Parts:
    _refuse_shared(model, model.shared_rel_pos)
    return _transformer(model, _RelPosEmbedding(model), init_transformer_block)


def _refuse_shared(model: nn.Module, positions: nn.Module | None) -> None:
    if positions is not None:
        raise TypeError(
            f"all blocks of this {type(model).__name__} share the parameters of their relative positions, so no "
            "boundary can come between them; take a model whose blocks have their own"
        )
