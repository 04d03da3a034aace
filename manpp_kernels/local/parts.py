"""A model as stem, units and head.

The parts are references to the user's own modules: training them trains the user's model, whose ``state_dict`` keeps
its keys. How a class of models comes apart is one small function in a registry, :data:`adapt`::

    @adapt.register(MyNet)
    def _(model: MyNet) -> Parts:
        return Parts(model.patch_embed, {f"blocks.{i}": b for i, b in enumerate(model.blocks)}, model.classifier)
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn

from manpp_kernels.models import cifar_resnet


def reset_parameters(module: nn.Module) -> None:
    """Draw the parameters anew, each layer by its own ``reset_parameters``: PyTorch's defaults.

    Parameters of a module that has no such method (a class token, a layer scale) stay as they are.
    """
    for m in module.modules():
        reset = getattr(m, "reset_parameters", None)
        if callable(reset):
            reset()
    for m in module.modules():
        if isinstance(m, nn.MultiheadAttention):  # has it under a private name, and draws its projection's bias as well
            m._reset_parameters()


def logits_of(output: Any) -> Any:
    """The logits in what a model returns: all of it, or the entry ``"out"``, as in torchvision's segmentation."""
    return output.get("out") if isinstance(output, Mapping) else output


def has_parameters(module: nn.Module) -> bool:
    """Whether there is any."""
    return any(True for _ in module.parameters())


@dataclass(frozen=True)
class Parts:
    """A model taken apart: ``head(units[-1](... units[0](stem(images))))`` has to be the logits of ``model(images)``.

    With taps it is ``head(x, *tapped)``: the output of the last unit, and those of the units named, in their order.

    Attributes:
        stem: from images to the first unit's input.
        units: the residual or transformer blocks in order, by the names that boundaries are given in.
        head: from the last unit's output to logits (N, num_classes), or (N, num_classes, H, W) of pixels.
        init: initialises a fresh copy of a unit in place, as the model's own constructor does.
        recomputed: whether the units keep no activations, and run once more in the backward pass (copies of a unit in
            an auxiliary network keep theirs).
        taps: the units (or ``"stem"``) whose outputs the head looks at beside the last one's, without gradient where
            they are another block's.
        local_head: for a model whose outputs are no logits of images or pixels: from the shapes of features and of
            images (with the batch dimension) and the width of the ``dgl`` rule to a module that takes such features
            and gives outputs like the model's.
    """

    stem: nn.Module
    units: Mapping[str, nn.Module]
    head: nn.Module
    init: Callable[[nn.Module], None] = reset_parameters
    recomputed: bool = False
    taps: Sequence[str] = ()
    local_head: Callable[[Size, Size, str], nn.Module] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.units, Mapping):
            raise TypeError(f"units has to be a mapping of names to modules, and is {type(self.units).__name__}")
        named = {"stem": self.stem, **{f"unit {name}": unit for name, unit in self.units.items()}, "head": self.head}
        for name, module in named.items():
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} has to be a module, and is {type(module).__name__}; wrap a function in one")
        names = ["stem", *self.units]
        if list(self.taps) != [name for name in names[:-1] if name in self.taps]:
            raise ValueError(
                f"taps has to name units before the last one, in their order, and is {list(self.taps)}; there are "
                f"{', '.join(names)}"
            )


class TappedRow(nn.Module):
    """Modules in a row, which also hand on what a head further down looks at.

    ``forward`` takes a tensor, or a tuple of it and what was tapped before, and gives such a tuple, or where the row
    ends in the head what that gives.

    Args:
        modules: the row.
        tapped: for each of them whether its output is handed on.
        head: that the row ends in, if it does.
    """

    def __init__(self, modules: Iterable[nn.Module], tapped: Iterable[bool], head: nn.Module | None) -> None:
        super().__init__()
        self.row, self.head = nn.ModuleList(modules), head
        self._tapped = list(tapped)

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        y, *before = x if isinstance(x, tuple) else (x,)
        taps = list(before)  # to PyTorch 2.10's compiler the rest of a tuple is one
        for module, tapped in zip(self.row, self._tapped, strict=True):
            y = module(y)
            if tapped:
                taps.append(y)
        return (y, *taps) if self.head is None else self.head(y, *taps)  # type: ignore[no-any-return]


@functools.singledispatch
def adapt(model: nn.Module) -> Parts:
    """Take ``model`` apart by the adapter registered for its class; ``adapt.register`` adds one.

    Raises:
        TypeError: no adapter is registered for this class.
    """
    for cls in type(model).__mro__:
        missing = [m for m in _LIBRARIES.get(cls.__module__.partition(".")[0], ()) if m not in sys.modules]
        if missing:
            for adapters in missing:
                importlib.import_module(adapters)
            return adapt(model)
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    # torch.compile, DataParallel and their like; what has parameters beside it is a network with a part of that name.
    if isinstance(inner, nn.Module) and set(inner.parameters()) == set(model.parameters()):
        raise TypeError(
            f"the model is wrapped, as {type(model).__name__}; pass the {type(inner).__name__} inside (the trainer "
            "compiles, and trains on several devices, by settings of its own)"
        )
    raise TypeError(
        f"there is no adapter for {type(model).__name__}; register a function that returns its stem, units and head: "
        "@manpp_kernels.local.adapt.register (docs/models.md shows one)"
    )


def take_apart(model: nn.Module) -> Parts:
    """What the adapter of ``model`` says of it.

    Raises:
        TypeError: there is none, or it says something else than :class:`Parts`.
    """
    parts = adapt(model)
    if not isinstance(parts, Parts):
        raise TypeError(
            f"the adapter of {type(model).__name__} has to return manpp_kernels.local.Parts, and returned "
            f"{type(parts).__name__}"
        )
    return parts


# The adapters for the models of a library are imported once a model of it comes along: the library itself then has
# been, and who has none of it needs none.
_LIBRARIES = {
    "timm": ("manpp_kernels.local.adapters.timm", "manpp_kernels.local.adapters.timm_stages"),
    "torchvision": (
        "manpp_kernels.local.adapters.torchvision",
        "manpp_kernels.local.adapters.torchvision_segmentation",
        "manpp_kernels.local.detection",
    ),
}


def staged_units(model: nn.Module, stages: Sequence[str]) -> dict[str, nn.Module]:
    """The children of each stage, by their names in the model's ``state_dict``."""
    return {f"{stage}.{name}": unit for stage in stages for name, unit in getattr(model, stage).named_children()}


def joined_units(row: Iterable[tuple[str | None, nn.Module]]) -> tuple[nn.Sequential, dict[str, nn.Module]]:
    """The stem and the units of a row of modules, in which only units have a name.

    What stands between two units, as down-sampling, joins the unit after it, whose name the two have. What comes before
    the first unit is the stem; what comes behind the last is the head's, and left out.
    """
    stem = nn.Sequential()
    units: dict[str, nn.Module] = {}
    before: list[nn.Module] = []
    for name, module in row:
        if name is None:
            before.append(module)
            continue
        if not units:
            stem, before = nn.Sequential(*before), []
        units[name] = nn.Sequential(*before, module) if before else module
        before = []
    return stem, units


@adapt.register
def _(model: cifar_resnet.CifarResNet) -> Parts:
    return Parts(
        nn.Sequential(model.conv1, model.bn1, model.relu),
        staged_units(model, model.stages),
        nn.Sequential(model.avgpool, nn.Flatten(), model.fc),
        cifar_resnet.init_weights,
    )


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_POOLS = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
_HEAD_LAYERS = (*_POOLS, nn.Flatten, nn.modules.dropout._DropoutNd)


@adapt.register
def _(model: nn.Sequential) -> Parts:
    """Every child with parameters that is not a norm starts a group, which the norms, activations and pools after it
    join. The first group is the stem, the last is the head, with the pooling, flattening and dropout right before it.
    """
    groups = layer_groups(model)
    if len(groups) < 2:
        raise ValueError(
            f"the nn.Sequential has {len(groups)} layers with parameters; local learning needs a stem, units and a head"
        )
    while len(groups[-2]) > 1 and isinstance(groups[-2][-1][1], _HEAD_LAYERS):
        groups[-1].insert(0, groups[-2].pop())
    stem, *units, head = (nn.Sequential(*(child for _, child in group)) for group in groups)
    names = [group[0][0] for group in groups[1:-1]]
    return Parts(stem, dict(zip(names, units, strict=True)), head)


def layer_groups(model: nn.Sequential) -> list[list[tuple[str, nn.Module]]]:
    """Every child with parameters that is not a norm, with the norms, activations and pools after it, by name."""
    groups: list[list[tuple[str, nn.Module]]] = []
    for name, child in model._modules.items():  # named_children() leaves out a module that comes a second time
        if child is None:
            continue
        starts = has_parameters(child) and not isinstance(child, _NORMS)
        if not groups or (starts and any(has_parameters(before) for _, before in groups[-1])):
            groups.append([])
        groups[-1].append((name, child))
    return groups
