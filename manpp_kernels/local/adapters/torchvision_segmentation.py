"""Torchvision's models of semantic segmentation as stem, units and head: FCN, DeepLabV3 and LRASPP."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3

from manpp_kernels.local.adapters.torchvision_backbones import backbone_units, reduction
from manpp_kernels.local.parts import Parts, adapt
from manpp_kernels.models import cifar_resnet


@adapt.register(FCN)
@adapt.register(DeepLabV3)
def _(model: FCN | DeepLabV3) -> Parts:
    """The backbone's residual blocks; the classifier of pixels is the head."""
    if model.aux_classifier is not None:
        raise TypeError(
            f"{type(model).__name__} has a classifier of its own between its blocks (aux_classifier), where local "
            "learning puts others; make it with aux_loss=False, or set its aux_classifier to None, where pretrained "
            "weights bring one"
        )
    stem, units = backbone_units(model.backbone, "backbone.")
    # The model itself resizes to the images, whose size the head does not see.
    larger = nn.Upsample(scale_factor=reduction(stem, units), mode="bilinear", align_corners=False)
    return Parts(stem, units, nn.Sequential(model.classifier, larger), cifar_resnet.init_weights)


@adapt.register
def _(model: LRASPP) -> Parts:
    """Inverted residual blocks; the classifier looks at features of two depths."""
    stem, units = backbone_units(model.backbone, "backbone.")
    (low,) = (f"backbone.{name}" for name, taken in model.backbone.return_layers.items() if taken == "low")
    head = LrasppHead(model.classifier, reduction(stem, units, low))
    return Parts(stem, units, head, cifar_resnet.init_weights, taps=(low,))


class LrasppHead(nn.Module):
    """LRASPP's classifier of high and low features, and bilinear interpolation by a factor."""

    def __init__(self, classifier: nn.Module, factor: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.larger = nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=False)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        return self.larger(self.classifier({"high": high, "low": low}))  # type: ignore[no-any-return]
