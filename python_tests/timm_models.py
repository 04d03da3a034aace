"""A small instance of each class of timm's that has an adapter, some in several versions: name -> (side, factory)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from torch import nn

timm = pytest.importorskip("timm")
models = timm.models
metaformer, efficientvit = models.metaformer, models.efficientvit_mit

Factory = Callable[[], nn.Module]


def vit(cls: type[nn.Module] = models.VisionTransformer, **options) -> nn.Module:
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 4, "num_heads": 2, "num_classes": 5}
    return cls(**{**settings, **options})


def convnext(**options) -> nn.Module:
    settings = {"depths": (1, 1, 2, 1), "dims": (4, 4, 8, 8), "num_classes": 5}
    return models.ConvNeXt(**{**settings, **options})


def resnet_v1(block: type[nn.Module] = models.resnet.BasicBlock, **options) -> nn.Module:
    return models.ResNet(block, (1, 2, 1, 1), channels=(8, 8, 8, 8), num_classes=5, **options)


def resnet_v2(**options) -> nn.Module:
    return models.ResNetV2((1, 2, 1, 1), channels=(128,) * 4, stem_chs=32, num_classes=5, **options)


def rotary(**options) -> nn.Module:
    """Eva, whose heads have 4 channels: a rotary embedding takes 4 at least."""
    settings = {"img_size": 16, "embed_dim": 16, "num_heads": 2, "use_rot_pos_emb": True, "qkv_fused": False}
    return vit(models.Eva, **{**settings, **options})


def dinov3(**options) -> nn.Module:
    settings = {"rope_type": "dinov3", "dynamic_img_size": True, "num_reg_tokens": 2, "use_abs_pos_emb": False}
    return rotary(**{**settings, **options})


def swin(cls: type[nn.Module] = models.SwinTransformer, **options) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 12, "depths": (1, 2, 1), "num_heads": (2, 2, 2), "window_size": 2}
    return cls(num_classes=5, **{**sizes, **options})


def small(name: str, **options) -> Factory:
    return functools.partial(timm.create_model, name, num_classes=5, **options)


def of(cls: Callable[..., nn.Module], *args, **options) -> Factory:
    return functools.partial(cls, *args, num_classes=5, **options)


FOUR = {"depths": (1, 1, 2, 1)}
MIXER = {"img_size": 32, "num_blocks": 3, "embed_dim": 16}
MIXERS = {
    "token_mixers": [metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
    "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
}
XCEPTION = [
    {"in_chs": 64, "out_chs": 32, "stride": 2},
    {"in_chs": 32, "out_chs": 32, "stride": 1},
    {"in_chs": 32, "out_chs": (32, 32, 64), "stride": 1, "no_skip": True, "start_with_relu": False},
]
GHOST = [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0.25, 2]], [[3, 72, 24, 0, 1]], [[5, 72, 40, 0.25, 2]]]

# Of many or wide units, of which copies take long to train.
WIDE = {
    "byobnet, repvgg",
    "inception v3",
    "inception v4",
    "inception resnet v2",
    "nextvit",
    "xception, legacy",
}

MODELS: dict[str, tuple[int, Factory]] = {
    "resnet": (32, resnet_v1),
    "resnet-d": (32, lambda: resnet_v1(models.resnet.Bottleneck, stem_type="deep", stem_width=8, avg_down=True)),
    "eca-resnext": (
        32,
        lambda: resnet_v1(models.resnet.Bottleneck, cardinality=2, base_width=32, block_args={"attn_layer": "eca"}),
    ),
    "resnet with dropout": (32, lambda: resnet_v1(drop_rate=0.2, drop_path_rate=0.1)),
    "resnet v2": (32, resnet_v2),
    "resnet v2, no pre-activation": (32, lambda: resnet_v2(preact=False, drop_rate=0.1)),
    "regnet": (32, small("regnetx_002")),
    "regnet, squeeze and excitation": (32, small("regnety_002")),
    "efficientnet": (32, small("efficientnet_lite0")),
    "efficientnet, dropouts": (32, small("efficientnet_b0", drop_rate=0.1, drop_path_rate=0.1)),
    "mobilenet v3": (32, small("mobilenetv3_small_050")),
    "mobilenet v4": (32, small("mobilenetv4_conv_small_050")),
    "convnext": (32, convnext),
    "convnext v2": (32, lambda: convnext(use_grn=True, ls_init_value=None, conv_mlp=True)),
    "convnext, head norm last": (32, lambda: convnext(head_norm_first=True, stem_type="overlap")),
    "vit": (8, vit),
    "vit, mean of the tokens": (8, lambda: vit(class_token=False, global_pool="avg")),
    "vit, registers": (8, lambda: vit(reg_tokens=2, no_embed_class=True, init_values=1e-1)),
    "vit, attention pool": (8, lambda: vit(global_pool="map", class_token=False)),
    "vit, dropouts": (8, lambda: vit(drop_rate=0.1, pos_drop_rate=0.1, drop_path_rate=0.1, pre_norm=True)),
    "vit, some of the patches": (8, lambda: vit(patch_drop_rate=0.5)),
    "deit, two heads": (8, lambda: vit(models.VisionTransformerDistilled, drop_rate=0.1)),
    "eva": (8, lambda: vit(models.Eva, init_values=0.1, drop_rate=0.1, pos_drop_rate=0.1, patch_drop_rate=0.5)),
    "eva 02": (16, lambda: rotary(swiglu_mlp=True, scale_mlp=True, use_post_norm=True, drop_path_rate=0.1)),
    "eva, attention pool": (16, lambda: rotary(attn_type="rope", global_pool="map", class_token=False)),
    "dino v3": (16, dinov3),
    "beit": (8, lambda: vit(models.Beit, use_rel_pos_bias=True, init_values=0.1, pos_drop_rate=0.1)),
    "vit, relative positions": (8, lambda: vit(models.VisionTransformerRelPos, class_token=True, drop_rate=0.1)),
    "vit, biases of positions": (8, lambda: vit(models.VisionTransformerRelPos, rel_pos_type="bias", fc_norm=True)),
    "swin": (32, swin),
    "swin, dropouts": (32, lambda: swin(drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.5)),
    "swin v2": (32, lambda: swin(models.SwinTransformerV2)),
    "swin v2 cr": (32, lambda: swin(models.SwinTransformerV2Cr, extra_norm_stage=True)),
    "byobnet": (32, small("test_byobnet")),
    "byobnet, repvgg": (32, small("mobileone_s0", drop_rate=0.1)),
    "coatnet": (32, small("test_coatnet", img_size=32)),
    "maxvit": (32, small("maxvit_rmlp_pico_rw_256", img_size=32, depths=(1, 1, 1, 1))),
    "nfnet": (32, small("test_nfnet", drop_path_rate=0.1)),
    "cspnet": (32, small("cs3darknet_focus_s")),
    "darknet": (32, small("darknet17")),
    "cspnext": (32, of(models.CspNext, depths=(1, 1, 1, 1), channels=(16, 16, 32, 32))),
    "poolformer": (32, of(models.MetaFormer, dims=(8, 8, 16, 16), layer_scale_init_values=0.1, **FOUR)),
    "caformer": (32, of(models.MetaFormer, dims=(8, 8, 32, 32), drop_rate=0.1, **MIXERS, **FOUR)),
    "mlp mixer": (32, of(models.MlpMixer, **MIXER)),
    "resmlp": (32, of(models.MlpMixer, block_layer=models.mlp_mixer.ResBlock, mlp_ratio=4, **MIXER)),
    "mambaout": (32, small("test_mambaout")),
    "fastvit": (32, of(models.FastVit, layers=(1, 2, 1, 1), embed_dims=(8, 8, 16, 16), layer_scale_init_value=0.1)),
    "focalnet": (32, of(models.FocalNet, embed_dim=8, layerscale_value=0.1, **FOUR)),
    "rexnet": (32, small("rexnet_100", depth_mult=0.5, width_mult=0.5)),
    "ghostnet": (32, of(models.GhostNet, GHOST)),
    "ghostnet v2": (32, of(models.GhostNet, GHOST, version="v2")),
    "repghost": (32, of(models.RepGhostNet, GHOST)),
    "vovnet": (32, small("ese_vovnet19b_slim_dw")),
    "hgnet": (32, small("hgnetv2_b0")),
    "senet": (32, of(models.SENet, models.senet.SEResNetBlock, (1, 1, 1, 1), groups=1, reduction=16, inplanes=64)),
    "davit": (32, of(models.DaVit, embed_dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), window_size=2)),
    "repvit": (32, of(models.RepVit, embed_dim=(8, 8, 16), depth=(1, 2, 1))),
    "vgg": (32, of(models.VGG, [8, "M", 8, "M", 16, 16, "M"], mlp_ratio=1 / 256, norm_layer=nn.BatchNorm2d)),
    "densenet": (32, of(models.DenseNet, growth_rate=8, block_config=(2, 2, 2), drop_rate=0.1)),
    "pvt v2": (32, of(models.PyramidVisionTransformerV2, embed_dims=(12, 12, 16, 16), num_heads=(1, 1, 2, 2), **FOUR)),
    "starnet": (32, of(models.StarNet, base_dim=8, depths=[1, 1, 2, 1])),
    "fasternet": (32, of(models.FasterNet, embed_dim=8, feature_dim=32, **FOUR)),
    "edgenext": (32, small("edgenext_xx_small", depths=(1, 2, 2, 2))),
    "gcvit": (
        64,
        of(models.GlobalContextVit, img_size=64, embed_dim=8, window_ratio=(8, 16, 16, 32), depths=(2, 2, 2, 2)),
    ),
    "tiny vit": (
        32,
        of(models.TinyVit, embed_dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), window_sizes=(2, 2, 2, 1), **FOUR),
    ),
    "xception": (32, of(models.XceptionAligned, XCEPTION)),
    "xception, legacy": (32, small("legacy_xception")),
    "inception v3": (80, small("inception_v3")),
    "inception v4": (80, small("inception_v4")),
    "inception resnet v2": (80, small("inception_resnet_v2")),
    "inception next": (32, of(models.MetaNeXt, dims=(16, 16, 32, 32), **FOUR)),
    "efficientvit": (
        32,
        of(efficientvit.EfficientVit, widths=(8, 8, 16, 32, 32), depths=(1, 1, 1, 1, 1), head_widths=(32, 32)),
    ),
    "efficientvit, large": (
        32,
        of(efficientvit.EfficientVitLarge, widths=(8, 8, 16, 32, 32), depths=(1, 1, 1, 1, 1), head_widths=(32, 32)),
    ),
    "efficientvit, msra": (64, small("efficientvit_m0", img_size=64, embed_dim=(16, 32, 48), key_dim=(4, 4, 4))),
    "convmixer": (32, of(models.ConvMixer, 8, 3)),
    "tresnet": (32, of(models.TResNet, [1, 1, 1, 1], width_factor=0.25)),
    "levit": (64, of(models.Levit, img_size=64, embed_dim=(16, 32), key_dim=8, depth=(1, 2), num_heads=(2, 4))),
    "levit, two heads": (64, small("levit_128s", img_size=64)),
    "levit, convolutions": (
        64,
        of(models.Levit, img_size=64, embed_dim=(16, 32), key_dim=8, depth=(1, 2), num_heads=(2, 4), use_conv=True),
    ),
    "rdnet": (
        32,
        of(
            models.RDNet,
            growth_rates=(8, 8, 8),
            num_blocks_list=(1, 1, 1),
            block_type=("Block", "BlockESE", "BlockESE"),
            is_downsample_block=(None, True, True),
            num_init_features=16,
        ),
    ),
    "dpn": (32, of(models.DPN, (1, 1, 1, 1), (8, 8, 8, 8), k_r=32, groups=8, small=True)),
    "dla": (32, of(models.DLA, (1, 1, 1, 2, 1, 1), (8, 8, 16, 16, 32, 32), block=models.dla.DlaBasic)),
    "cpubone": (32, small("cpubone_nano")),
    "lowformer": (32, of(models.LowFormer, [8, 8, 16, 32, 32], [0, 1, 1, 2, 2], head_widths=(32, 32))),
    "iformer": (32, of(models.IFormer, dims=(16, 16, 32, 32), depths=(1, 1, 9, 6))),
    "lcnet v2": (32, of(models.LCNetV2, scale=0.25, depths=(1, 1, 2, 1))),
    "shvit": (64, of(models.SHViT, embed_dim=(16, 32, 48), partial_dim=(8, 8, 16), norm_layer=nn.BatchNorm2d)),
    "swiftformer": (32, of(models.SwiftFormer, [1, 1, 2, 1], [8, 8, 16, 16])),
    "efficientformer": (224, of(models.EfficientFormer, (1, 1, 1, 3), (8, 8, 16, 16), num_vit=1)),
    "efficientformer v2": (64, of(models.EfficientFormerV2, (1, 1, 1, 2), img_size=64, embed_dims=(8, 8, 16, 16))),
    "nextvit": (32, small("nextvit_small", depths=(1, 1, 5, 1))),
    "sequencer": (
        32,
        of(models.Sequencer2d, img_size=32, layers=(1, 1, 2, 1), embed_dims=(8, 8, 16, 16), hidden_sizes=(2, 2, 4, 4)),
    ),
    "csatv2": (64, of(models.CSATv2, dims=(32, 16, 16, 32), depths=(1, 1, 1, 1), transformer_depths=(0, 0, 1, 1))),
}
