"""The reconstruction of the input images from a block's features: InfoPro's second loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from manpp_kernels.local.auxiliary import Prepared
from manpp_kernels.local.features import describe, to_map
from manpp_kernels.local.targets import BatchError
from manpp_kernels.models.cifar_resnet import init_weights

# Images of 16-bit precision, and rounding when a normalisation is undone, pass the ends of [0, 1] by less than this.
_SLACK = 0.02


class Decoder(nn.Module, Prepared):
    """Features to images, compared with the images the network was given.

    Bilinear resize to the image's size (corners aligned), 3x3 convolution to 12, batch normalisation, ReLU, 3x3
    convolution to the image's channels, sigmoid; binary cross-entropy against the image with values in [0, 1].

    Args:
        features: the shape it takes; tokens are laid out on their grid, vectors are maps of one pixel.
        images: (N, C, H, W).
        mean, std: what the images were normalised with, as values / channel, which is undone for the comparison; None
            for images that lie in [0, 1] as they are.
        hidden: channels between the convolutions.

    Raises:
        ValueError: images that are no maps, tokens that form no grid, or a mean and std that do not fit the channels.
    """

    def __init__(
        self,
        features: Size,
        images: Size,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        hidden: int = 12,
    ) -> None:
        super().__init__()
        if len(images) != 4:
            raise ValueError(
                f"the decoder reconstructs images (N, C, H, W), and the model's inputs are {describe(images)}; use a "
                "rule without a decoder"
            )
        channels = images[1]
        self.to_map, shape = to_map("the decoder", features)
        self.layers = nn.Sequential(
            nn.Conv2d(shape[1], hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )
        init_weights(self.layers)
        self.mean: Tensor
        self.std: Tensor
        # Not in the state_dict: settings, and no result of training.
        self.register_buffer("mean", _per_channel("mean", mean, channels, 0.0), persistent=False)
        self.register_buffer("std", _per_channel("std", std, channels, 1.0), persistent=False)
        self._checked = False

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """The reconstruction loss, a scalar."""
        wanted = (images * self.std + self.mean).clamp(0, 1)
        x = F.interpolate(self.to_map(features), images.shape[2:], mode="bilinear", align_corners=True)
        logits = self.layers(x)
        # With the sigmoid inside the loss, which neither overflows nor loses the small gradients of certain pixels.
        return F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype))

    def before_forward(self, images: Tensor) -> None:
        """Check the images, in the first step only, as looking at them waits for the device.

        Raises:
            BatchError: their values do not lie in [0, 1].
        """
        if self._checked:
            return
        wanted = images * self.std + self.mean
        low, high = wanted.min().item(), wanted.max().item()
        if low < -_SLACK or high > 1 + _SLACK:
            raise BatchError(
                f"the decoder needs images with values between 0 and 1, and these lie between {low:.3g} and "
                f"{high:.3g}; set the options mean and std of the rule infopro to what the images were normalised with"
            )
        self._checked = True


def _per_channel(name: str, values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    given = [default] if values is None else [float(v) for v in values]
    if len(given) not in (1, channels) or (name == "std" and min(given) <= 0):
        raise ValueError(
            f"{name} has to be one{' positive' if name == 'std' else ''} number for each of the {channels} channels of "
            f"an image, and is {values}"
        )
    return torch.tensor(given).view(1, -1, 1, 1)
