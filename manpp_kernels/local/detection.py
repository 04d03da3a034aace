"""Detection: torchvision's RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017) in local blocks.

The setting is that of MAN++ (arXiv 2507.16279): blocks that end where the backbone's stages do; behind each but the
last a small detection head on the pyramid level of its stride, and the loss of RetinaNet; the feature pyramid in the
last block, whose loss does not reach the blocks before::

    detector = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    trainer = LocalTrainer(
        RetinaNetOutputs(detector),
        TrainerConfig(rule="man++", blocks=stage_ends(detector)),
        example=(3, 800, 800),
        criterion=RetinaNetLoss(detector),
    )
    trainer.step(detection_batch(detector, images, targets))

What comes out is the detector itself, trained in place.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList

from manpp_kernels.backends import is_capturing
from manpp_kernels.local.adapters.torchvision_backbones import backbone_units, reduction
from manpp_kernels.local.parts import Parts, adapt
from manpp_kernels.local.targets import BatchError
from manpp_kernels.models import cifar_resnet

_BOX = 4
# Of the hidden layers of a local head, by the width of the rule that has it.
_CHANNELS = {"narrow": 64, "wide": 256, "linear": None}


class RetinaNetOutputs(nn.Module):
    """A RetinaNet as :class:`manpp_kernels.LocalTrainer` trains it.

    ``forward`` takes normalised images (N, 3, H, W), with sides that are multiples of what the backbone reduces them
    by, and gives for every anchor the logits of the K classes, four box regressions, and the anchor itself (x1, y1, x2,
    y2): (N, anchors, K + 8).

    Args:
        detector: trained in place; its other methods stay as they are, so that it detects afterwards.

    Raises:
        TypeError: it is no RetinaNet, or has another backbone.
    """

    def __init__(self, detector: RetinaNet) -> None:
        super().__init__()
        resnet_of(detector)
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        maps = list(self.detector.backbone(images).values())
        check_sides(images.shape[-2:], maps[: len(self.detector.backbone.body.return_layers)])
        outputs = self.detector.head(maps)
        found = anchors(self.detector.anchor_generator, images.shape[-2:], maps)
        return joined(outputs["cls_logits"], outputs["bbox_regression"], found)


class PyramidHead(nn.Module):
    """The feature pyramid and the head of a RetinaNet, of the features it looks at: the last and those tapped before.

    Args:
        detector: whose parts they are.
        reduction: by how much the first of the tapped features is smaller than the images.
    """

    def __init__(self, detector: RetinaNet, reduction: int) -> None:
        super().__init__()
        self.pyramid, self.head = detector.backbone.fpn, detector.head
        self._names = list(detector.backbone.body.return_layers.values())
        # In a list, as it is a module without anything to train.
        self._anchors, self._reduction = [detector.anchor_generator], reduction

    def forward(self, last: Tensor, *tapped: Tensor) -> Tensor:
        features = (*tapped, last)
        height, width = features[0].shape[-2:]
        check_sides(Size((height * self._reduction, width * self._reduction)), features)
        maps = list(self.pyramid(dict(zip(self._names, features, strict=True))).values())
        outputs = self.head(maps)
        found = anchors(self._anchors[0], Size((height * self._reduction, width * self._reduction)), maps)
        return joined(outputs["cls_logits"], outputs["bbox_regression"], found)


class LevelHead(nn.Module):
    """A small detection head: 1x1 projection, and subnets of two 3x3 convolutions for classes and for boxes.

    Args:
        features: the shape of what it takes, (N, C, H, W).
        images: the shape of the images, (N, 3, H, W).
        width: ``"wide"``: 256 channels, as published; ``"narrow"``: 64; ``"linear"``: no hidden layers.
        detector: whose anchors and classes it has; those of the pyramid level of its stride, and behind the last such
            level, which the pyramid computes from it, those of all coarser ones.
        finest: by how much the finest level of the pyramid is smaller than the images.
    """

    def __init__(self, features: Size, images: Size, width: str, detector: RetinaNet, finest: int) -> None:
        super().__init__()
        generator, head = detector.anchor_generator, detector.head.classification_head
        backbone_levels = len(detector.backbone.body.return_layers)
        stride = images[-2] // features[-2]
        self.pool = nn.AvgPool2d(max(1, finest // stride))
        level = min(backbone_levels - 1, max(0, round(math.log2(stride / finest))))
        levels = slice(level, None if level == backbone_levels - 1 else level + 1)
        own_anchors = copy.copy(generator)  # of its own class, and with the anchors that it has by now
        own_anchors.sizes, own_anchors.aspect_ratios = generator.sizes[levels], generator.aspect_ratios[levels]
        own_anchors.cell_anchors = generator.cell_anchors[levels]
        self._anchors = [own_anchors]
        self._stride, self._classes = stride, head.num_classes
        channels = _CHANNELS[width]
        self.project = nn.Identity() if channels is None else nn.Conv2d(features[1], channels, 1)
        own = features[1] if channels is None else channels
        coarser = len(own_anchors.sizes) - 1
        self.coarser = nn.ModuleList(nn.Conv2d(own, own, 3, stride=2, padding=1) for _ in range(coarser))
        # As RetinaNet begins: everything is background, with a probability of 0.99.
        self.classes = _subnet(own, channels, head.num_anchors * self._classes, -math.log(0.99 / 0.01))
        self.boxes = _subnet(own, channels, head.num_anchors * _BOX, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (side * self._stride for side in x.shape[-2:])
        maps = [self.project(self.pool(x))]
        for layer in self.coarser:
            maps.append(layer(maps[-1].relu()))
        found = anchors(self._anchors[0], Size((height, width)), maps)
        return joined(
            torch.cat([_by_anchor(self.classes(m), self._classes) for m in maps], 1),
            torch.cat([_by_anchor(self.boxes(m), _BOX) for m in maps], 1),
            found,
        )


def _subnet(features: int, channels: int | None, outputs: int, bias: float) -> nn.Sequential:
    """Two hidden layers, if any, and one to the outputs, which begin at ``bias``."""
    layers: list[nn.Module] = []
    if channels is not None:
        for _ in range(2):
            layers += [_convolution(channels, channels, 0.0), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, _convolution(features, outputs, bias))


def _convolution(inputs: int, outputs: int, bias: float) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type]  # it has one
    return layer


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """A map (N, A values, H, W) as (N, H W A, values)."""
    return x.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def check_sides(images: Size, maps: Sequence[Tensor]) -> None:
    """Raise where images of this size do not divide evenly into the ``maps`` that a backbone makes of them.

    Torchvision takes for a map's stride the whole part of what the sides are larger: anchors would drift from their
    cells, elsewhere in each block.
    """
    if any(side % of_map for m in maps for side, of_map in zip(images, m.shape[-2:], strict=True)):
        raise BatchError(
            f"images of about {images[0]} x {images[1]} pixels become maps of "
            f"{', '.join(f'{m.shape[-2]} x {m.shape[-1]}' for m in maps)}; give images whose sides are multiples of "
            "what the backbone reduces them by, as detection_batch does"
        )


def anchors(generator: AnchorGenerator, images: Size, maps: Sequence[Tensor]) -> Tensor:
    """The anchors (A, 4) of all ``maps`` of images of this size."""
    # In float32, whatever the maps are; of tensors without memory, as their sizes alone are looked at.
    like = torch.empty((), dtype=torch.float32, device=maps[0].device)
    shapes = [like.expand(1, 1, *m.shape[-2:]) for m in maps]
    image = like.expand(1, 1, *images)
    (found,) = generator(ImageList(image, [(images[0], images[1])]), shapes)
    return found


def joined(classes: Tensor, boxes: Tensor, found: Tensor) -> Tensor:
    """Outputs as :class:`RetinaNetOutputs` gives them; those of lower precision become the anchors' float32."""
    dtype = torch.promote_types(classes.dtype, found.dtype)
    return torch.cat([classes.to(dtype), boxes.to(dtype), found.to(dtype).expand(len(classes), -1, -1)], 2)


def resnet_of(detector: RetinaNet) -> Any:
    """The ResNet below a detector's pyramid, up to the last stage that the pyramid looks at.

    Raises:
        TypeError: there is none.
    """
    if not isinstance(detector, RetinaNet):
        raise TypeError(f"the detector has to be a RetinaNet of torchvision, and is {type(detector).__name__}")
    backbone = detector.backbone
    body = backbone.body if isinstance(backbone, BackboneWithFPN) else None
    if body is None or not hasattr(body, "layer1"):
        raise TypeError(
            "a RetinaNet comes apart on the feature pyramid of a ResNet alone (resnet_fpn_backbone), and the backbone "
            f"is {type(backbone).__name__}" + ("" if body is None else " of another network")
        )
    return body


def _end(body: nn.Module, stage: str) -> str:
    """The last unit of a stage."""
    return f"{stage}.{len(body.get_submodule(stage)) - 1}"  # type: ignore[arg-type]  # a row of units


@adapt.register
def _(model: RetinaNet) -> Parts:
    raise TypeError(
        "a RetinaNet takes images and targets at once; train RetinaNetOutputs(detector) with the criterion "
        "RetinaNetLoss(detector), both of manpp_kernels.local.detection (docs/models.md shows it)"
    )


@adapt.register
def _(model: RetinaNetOutputs) -> Parts:
    """Residual blocks; pyramid and head are the head, and look at the ends of several stages."""
    detector = model.detector
    body = resnet_of(detector)
    stem, units = backbone_units(body, "")
    seen = [_end(body, stage) for stage in body.return_layers]
    finest = reduction(stem, units, seen[0])
    return Parts(
        stem,
        units,
        PyramidHead(detector, finest),
        cifar_resnet.init_weights,
        taps=seen[:-1],
        local_head=functools.partial(LevelHead, detector=detector, finest=finest),
    )


class RetinaNetLoss:
    """The criterion: torchvision's own losses of a RetinaNet, by default focal for classes and L1 for boxes.

    Args:
        detector: whose matcher and losses are used; none of its parameters.
    """

    def __init__(self, detector: RetinaNet) -> None:
        self._detector = detector

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of both, a mean over the images.

        Args:
            outputs: (N, anchors, K + 8), as :class:`RetinaNetOutputs` or a local head gives them.
            targets: (N, M, 5), a box (x1, y1, x2, y2) and its class in each row; a class below 0 is no box.

        Raises:
            BatchError: the targets have another shape.
            RuntimeError: a CUDA graph is being captured.
        """
        if is_capturing(outputs.device):
            raise RuntimeError("the losses of a RetinaNet look at where there are boxes: set cuda_graphs=False")
        if targets.dim() != 3 or targets.shape[2] != _BOX + 1:
            raise BatchError(
                f"the targets of a detector have to be (N, boxes, 5), as detection_batch makes them, and are "
                f"{tuple(targets.shape)}"
            )
        classes, boxes, found = outputs.split([outputs.shape[2] - 2 * _BOX, _BOX, _BOX], 2)
        rows = [t[t[:, _BOX] >= 0] for t in targets.to(outputs.dtype)]
        of_images = [{"boxes": r[:, :_BOX], "labels": r[:, _BOX].long()} for r in rows]
        given = {"cls_logits": classes, "bbox_regression": boxes}
        losses = self._detector.compute_loss(of_images, given, list(found.detach().unbind()))
        return losses["classification"] + losses["bbox_regression"]


def detection_batch(
    detector: RetinaNet, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A batch for ``LocalTrainer.step``, resized, normalised and padded by the detector's own transform.

    Args:
        detector: whose transform is used.
        images: (3, H, W) each, from 0 to 1, of any sizes.
        targets: of each image ``"boxes"`` (M, 4) as x1, y1, x2, y2 and ``"labels"`` (M,), as for torchvision.

    Returns:
        Images (N, 3, H, W) and targets (N, M, 5), see :class:`RetinaNetLoss`.

    Raises:
        BatchError: a box has no area, or a label is no class of the detector.
    """
    for i, t in enumerate(targets):
        _check_target(i, t, detector.head.classification_head.num_classes)
    found, resized = detector.transform(list(images), [dict(t) for t in targets])
    most = max((len(t["labels"]) for t in resized), default=0)
    # Not in half precision with the images: bfloat16 has every second pixel from 256 on, and every fourth from 512.
    dtype = torch.promote_types(found.tensors.dtype, torch.float32)
    rows = torch.full((len(resized), most, _BOX + 1), -1.0, dtype=dtype, device=found.tensors.device)
    for row, t in zip(rows, resized, strict=True):
        row[: len(t["labels"])] = torch.cat([t["boxes"].to(dtype), t["labels"][:, None].to(dtype)], 1)
    return found.tensors, rows


def _check_target(image: int, target: Mapping[str, Tensor], classes: int) -> None:
    boxes, labels = target["boxes"], target["labels"]
    if boxes.shape != (len(labels), _BOX):
        raise BatchError(
            f"image {image} has boxes of the shape {tuple(boxes.shape)} and {len(labels)} labels; give a box "
            "(x1, y1, x2, y2) for each label, and (0, 4) where there are none"
        )
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if empty.any():  # their loss would be infinite
        raise BatchError(f"image {image} has the box {boxes[empty][0].tolist()} (x1, y1, x2, y2), which has no area")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise BatchError(
            f"image {image} has labels between {int(labels.min())} and {int(labels.max())}, and the detector has "
            f"{classes} classes (0 to {classes - 1})"
        )


def stage_ends(detector: RetinaNet) -> list[str]:
    """The boundaries of local blocks that end where the stages of the backbone do: four, as published.

    Raises:
        TypeError: as :class:`RetinaNetOutputs`.
    """
    body = resnet_of(detector)
    *stages, _ = (name for name, _ in body.named_children() if name.startswith("layer"))
    return [_end(body, stage) for stage in stages]
