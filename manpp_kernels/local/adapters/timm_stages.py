"""timm's models that are a stem, stages and a head, as a table: a row a class.

timm's convention carries one function for all of them. A stage is an ``nn.Sequential`` of blocks, or a downsampling and
then ``blocks``; behind the stages come some layers of ``forward_features``, and then ``forward_head``. Where a version
of timm does something else, :func:`manpp_kernels.local.partition` finds it and refuses the model.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from timm.models import levit
from timm.models._efficientnet_builder import efficientnet_init_weights
from timm.models.densenet import DenseNet, DenseTransition
from timm.models.levit import Levit
from torch import Tensor, nn
from torchvision.ops import Permute

from manpp_kernels.local.adapters.timm import (
    ForwardHead,
    InitUnit,
    Own,
    checkpointed,
    init_transformer_block,
    unless_skipped,
)
from manpp_kernels.local.adapters.torchvision import init_convnext_block, init_dense_block
from manpp_kernels.local.parts import Parts, adapt, layer_groups, reset_parameters
from manpp_kernels.models import cifar_resnet

Units = dict[str, nn.Module]


class Nhwc(enum.Flag):
    """Which parts work on (N, H, W, C); between units features are always (N, C, H, W), as local heads take them."""

    NONE = 0
    STEM = enum.auto()
    UNITS = enum.auto()
    HEAD = enum.auto()
    ALL = STEM | UNITS | HEAD


def to_nhwc(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(Permute([0, 2, 3, 1]), *modules)


def to_nchw(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules, Permute([0, 3, 1, 2]))


def on_nhwc(unit: nn.Module) -> nn.Module:
    """A unit that takes and gives (N, H, W, C), for (N, C, H, W)."""
    return to_nchw(*to_nhwc(unit))


class OnTokens(nn.Module):
    """A unit that takes and gives tokens (N, H W, C), for (N, C, H, W)."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.unit(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


# How a stage comes apart: into units, by their names in it.


def whole(stage: nn.Module) -> Units:
    return {"": stage}


def children(stage: nn.Module, joined: int = 0) -> Units:
    """Its children in a row, the first ``joined`` of them (a downsampling) with the one that they stand before."""
    units = in_a_row(layer_groups(nn.Sequential(OrderedDict(stage.named_children()))), whole)
    before = [units.pop(name) for name in list(units)[:joined]]
    return _joined(before, units)


_BEFORE_BLOCKS = ("downsample", "conv_down", "pool", "pos_emb")


def blocks(stage: nn.Module, on_maps: Callable[[nn.Module], nn.Module] = lambda block: block) -> Units:
    """The blocks of a stage of timm's, each made to take maps by ``on_maps``, the first with the downsampling before.

    A stage that has anything else in it does something else with it, and is a unit itself.
    """
    if isinstance(stage, nn.Sequential):
        return children(stage)
    found = dict(stage.named_children())
    if "blocks" not in found or not found.keys() <= {*_BEFORE_BLOCKS, "blocks"}:
        return whole(stage)
    before = [found[name] for name in _BEFORE_BLOCKS if name in found and not isinstance(found[name], nn.Identity)]
    return _joined(before, {f"blocks.{i}": on_maps(block) for i, block in children(found["blocks"]).items()})


def metaformer_blocks(stage: Any) -> Units:
    return blocks(stage) if stage.use_nchw else blocks(stage, OnTokens)


def tiny_vit_blocks(stage: nn.Module) -> Units:
    return blocks(stage, on_nhwc) if hasattr(stage, "downsample") else blocks(stage)  # the first stage is convolutions


def pvt_stage(stage: Any) -> Units:
    return whole(to_nhwc(stage) if stage.downsample is None else stage)  # the first stage takes what the stem gives


def _joined(before: list[nn.Module], units: Units) -> Units:
    if before:
        first = next(iter(units))
        units[first] = nn.Sequential(*before, units[first])
    return units


def in_a_row(groups: list[list[tuple[str, nn.Module]]], inside: Callable[[Any], Units]) -> Units:
    """The units of the stages that begin the groups, the last of each with what follows the stage in the group."""
    units: Units = {}
    for (name, stage), *after in groups:
        units |= {f"{name}.{inner}".rstrip("."): unit for inner, unit in inside(stage).items()}
        if after:
            last = next(reversed(units))
            units[last] = nn.Sequential(units[last], *(module for _, module in after))
    return units


def init_residual_block(unit: nn.Module) -> None:
    """He-normal convolutions (fan out); the last normalisation of a branch starts at zero where timm says so."""
    cifar_resnet.init_weights(unit)
    for m in unit.modules():
        zero = getattr(m, "zero_init_last", None)
        if callable(zero):
            zero()


@dataclass(frozen=True)
class Layout:
    """Where the parts of a class of models stand, by the names of children of the model.

    Attributes:
        stem: those that take the images, in a row; none where the first layers of ``stages`` do.
        stages: the child that is the stages in a row; or several, each of which is a stage.
        after: those that ``forward_features`` runs behind the stages, in a row. All that are left are what
            ``forward_head`` uses.
        inside: the units of a stage, by their names in it.
        nhwc: which parts work on (N, H, W, C).
        init: what draws a unit anew.
    """

    stem: str = "stem"
    stages: str = "stages"
    after: str = ""
    inside: Callable[[Any], Units] = blocks
    nhwc: Nhwc = Nhwc.NONE
    init: InitUnit | Own = reset_parameters


# By module (of timm.models) and class, as not every version of timm has all of them.
LAYOUTS: Mapping[tuple[str, str], Layout] = {
    ("byobnet", "ByobNet"): Layout(after="final_conv", init=Own(zero_init_last=True)),
    ("convmixer", "ConvMixer"): Layout(stages="blocks", inside=whole),
    ("convnext", "ConvNeXt"): Layout(after="norm_pre", init=init_convnext_block),
    ("cpubone", "CPUBone"): Layout(),
    ("csatv2", "CSATv2"): Layout("stem_dct", init=Own()),
    ("cspnet", "CspNet"): Layout(init=Own(zero_init_last=True)),
    ("cspnext", "CspNext"): Layout(inside=functools.partial(children, joined=1)),
    ("davit", "DaVit"): Layout(after="norm_pre", init=Own()),
    ("dla", "DLA"): Layout(
        "base_layer", "level0 level1 level2 level3 level4 level5", inside=whole, init=init_residual_block
    ),
    ("dpn", "DPN"): Layout("", "features"),
    ("edgenext", "EdgeNeXt"): Layout(after="norm_pre", init=Own()),
    ("efficientformer", "EfficientFormer"): Layout(after="norm", init=Own()),
    ("efficientformer_v2", "EfficientFormerV2"): Layout(after="norm", init=Own()),
    ("efficientnet", "EfficientNet"): Layout(
        "conv_stem bn1", "blocks", "conv_head bn2", init=efficientnet_init_weights
    ),
    ("efficientvit_mit", "EfficientVit"): Layout(),
    ("efficientvit_mit", "EfficientVitLarge"): Layout(),
    ("efficientvit_msra", "EfficientVitMsra"): Layout("patch_embed", init=Own()),
    ("fasternet", "FasterNet"): Layout("patch_embed", init=init_convnext_block),
    ("fastvit", "FastVit"): Layout(after="final_conv", init=Own()),
    ("focalnet", "FocalNet"): Layout("stem", "layers", "norm", init=Own()),
    ("gcvit", "GlobalContextVit"): Layout(),
    ("ghostnet", "GhostNet"): Layout("conv_stem bn1 act1", "blocks"),
    ("hgnet", "HighPerfGpuNet"): Layout(init=init_residual_block),
    ("iformer", "IFormer"): Layout(init=Own()),
    ("inception_next", "MetaNeXt"): Layout(init=Own()),
    ("inception_resnet_v2", "InceptionResnetV2"): Layout(
        "conv2d_1a conv2d_2a conv2d_2b maxpool_3a conv2d_3b conv2d_4a maxpool_5a",
        "mixed_5b repeat mixed_6a repeat_1 mixed_7a repeat_2 block8",
        "conv2d_7b",
    ),
    ("inception_v3", "InceptionV3"): Layout(
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Pool1 Conv2d_3b_1x1 Conv2d_4a_3x3 Pool2",
        "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c",
    ),
    ("inception_v4", "InceptionV4"): Layout("", "features"),
    ("lcnetv2", "LCNetV2"): Layout(init=init_residual_block),
    ("lowformer", "LowFormer"): Layout(init=Own()),
    ("mambaout", "MambaOut"): Layout(nhwc=Nhwc.ALL, init=Own()),
    ("maxxvit", "MaxxVit"): Layout(after="norm", init=Own(scheme="vit_eff")),
    ("metaformer", "MetaFormer"): Layout(inside=metaformer_blocks, init=Own()),
    ("mlp_mixer", "MlpMixer"): Layout("stem", "blocks", "norm", init=Own()),
    ("mobilenetv3", "MobileNetV3"): Layout("conv_stem bn1", "blocks", init=efficientnet_init_weights),
    ("nextvit", "NextViT"): Layout(after="norm", init=init_convnext_block),
    ("nfnet", "NormFreeNet"): Layout(after="final_conv final_act"),
    ("pvt_v2", "PyramidVisionTransformerV2"): Layout("patch_embed", inside=pvt_stage, nhwc=Nhwc.STEM, init=Own()),
    ("rdnet", "RDNet"): Layout("stem", "dense_stages", "norm_pre", inside=whole, init=Own()),
    ("regnet", "RegNet"): Layout("stem", "s1 s2 s3 s4", "final_conv", inside=children, init=Own(zero_init_last=True)),
    ("repghost", "RepGhostNet"): Layout("conv_stem bn1 act1", "blocks"),
    ("repvit", "RepVit"): Layout(),
    ("resnet", "ResNet"): Layout("conv1 bn1 act1 maxpool", "layer1 layer2 layer3 layer4", init=init_residual_block),
    ("resnetv2", "ResNetV2"): Layout(after="norm", init=Own(zero_init_last=False)),
    ("rexnet", "RexNet"): Layout("stem", "features", init=efficientnet_init_weights),
    ("senet", "SENet"): Layout("layer0 pool0", "layer1 layer2 layer3 layer4", init=init_residual_block),
    ("sequencer", "Sequencer2d"): Layout(after="norm", nhwc=Nhwc.ALL, init=Own()),
    ("shvit", "SHViT"): Layout("patch_embed"),
    ("starnet", "StarNet"): Layout(after="norm", inside=functools.partial(children, joined=1), init=Own()),
    ("swiftformer", "SwiftFormer"): Layout(after="norm", init=init_convnext_block),
    ("swin_transformer", "SwinTransformer"): Layout(
        "patch_embed", "layers", "norm", nhwc=Nhwc.ALL, init=init_transformer_block
    ),
    ("swin_transformer_v2", "SwinTransformerV2"): Layout("patch_embed", "layers", "norm", nhwc=Nhwc.ALL, init=Own()),
    ("swin_transformer_v2_cr", "SwinTransformerV2Cr"): Layout(
        "patch_embed", nhwc=Nhwc.UNITS, init=Own("init_weights_swin")
    ),
    ("tiny_vit", "TinyVit"): Layout("patch_embed", inside=tiny_vit_blocks, init=Own()),
    ("tresnet", "TResNet"): Layout("", "body", init=init_residual_block),
    ("vgg", "VGG"): Layout("", "features", init=init_residual_block),
    ("vovnet", "VovNet"): Layout(init=init_residual_block),
    ("xception", "Xception"): Layout(
        "conv1 bn1 act1 conv2 bn2 act2",
        "block1 block2 block3 block4 block5 block6 block7 block8 block9 block10 block11 block12",
        "conv3 bn3 act3 conv4 bn4 act4",
        init=init_residual_block,
    ),
    ("xception_aligned", "XceptionAligned"): Layout("stem", "blocks", "act"),
}


def from_layout(layout: Layout, module: ModuleType, model: nn.Module) -> Parts:
    """``model``, of a class of ``module``, taken apart as ``layout`` says."""
    names, prefix = layout.stages.split(), ""
    stages = _children(model, names)
    if len(names) == 1:
        (child,), prefix = stages.values(), f"{layout.stages}."
        stages = dict(child.named_children())
    groups = layer_groups(nn.Sequential(OrderedDict(stages)))
    first = _children(model, layout.stem.split()) or dict(groups.pop(0))
    stem = nn.Sequential(*first.values())
    units = {prefix + name: unit for name, unit in in_a_row(groups, layout.inside).items()}
    recomputed = checkpointed(model, units.values())
    after = _children(model, layout.after.split())
    head = nn.Sequential(*after.values(), ForwardHead(model, {*first, *names, *after}))
    if Nhwc.UNITS in layout.nhwc:
        units = {name: on_nhwc(unit) for name, unit in units.items()}
    return Parts(
        to_nchw(*stem) if Nhwc.STEM in layout.nhwc else stem,
        units,
        to_nhwc(*head) if Nhwc.HEAD in layout.nhwc else head,
        unless_skipped(model, layout.init.of(model, module) if isinstance(layout.init, Own) else layout.init),
        recomputed,
    )


def _children(model: nn.Module, names: Iterable[str]) -> Units:
    """Those of the names that the model has."""
    return {name: child for name in names if (child := model._modules.get(name)) is not None}


def register(layouts: Mapping[tuple[str, str], Layout]) -> None:
    """Of the classes that this version of timm has."""
    for (module, name), layout in layouts.items():
        with suppress(ImportError, AttributeError):
            found = importlib.import_module(f"timm.models.{module}")
            adapt.register(getattr(found, name), functools.partial(from_layout, layout, found))


register(LAYOUTS)


@adapt.register
def _(model: Levit) -> Parts:
    parts = from_layout(Layout(init=Own()), levit, model)
    if model.use_conv:
        return parts
    return dataclasses.replace(parts, stem=nn.Sequential(parts.stem, nn.Flatten(2), Permute([0, 2, 1])))


@adapt.register
def _(model: DenseNet) -> Parts:
    """Dense blocks, each with the transition after it."""
    stem, *groups = layer_groups(model.features)
    joined: list[list[tuple[str, nn.Module]]] = []
    for group in groups:
        if isinstance(group[0][1], DenseTransition):
            joined[-1] += group
        else:
            joined.append(group)
    units = {f"features.{name}": unit for name, unit in in_a_row(joined, whole).items()}
    return Parts(nn.Sequential(*dict(stem).values()), units, ForwardHead(model, {"features"}), init_dense_block)
