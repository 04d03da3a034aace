"""timm's vision transformers as stem, units and head: VisionTransformer and what derives from it; and what all adapters
for timm's models share."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any

from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from manpp_kernels.local.parts import Parts, adapt, reset_parameters
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
) -> Parts:
    """The first block joins the embedding, whose class token alone has not seen the image."""
    (_, first), *others = model.blocks.named_children()
    return Parts(
        nn.Sequential(embedding, Recomputed(first) if model.grad_checkpointing else first),
        {f"blocks.{name}": block for name, block in others},
        nn.Sequential(model.norm, ForwardHead(model, {*_EMBEDDING, "blocks", "norm"})),
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
