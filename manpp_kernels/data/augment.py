"""Augmentation of a whole batch at once, as torchvision v2 transforms.

A v2 transform draws its parameters once a call: on a batch, every image gets the same crop and the same flip. The two
transforms here draw once an *image*, and are otherwise what ``v2.RandomCrop`` and ``v2.RandomHorizontalFlip`` are: they
compose with them, and draw from torch's global generator, as all v2 transforms do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2


class PerImageCrop(v2.Transform):
    """Shift every image of a batch by up to ``padding`` pixels each way, on a reflected border."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        if padding < 0:
            raise ValueError(f"padding has to be 0 or more, and is {padding}")
        self.padding = padding

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        # Drawn on the CPU, so that a run on a GPU sees the same crops as a run on the CPU.
        return {"offsets": torch.randint(2 * self.padding + 1, (2, flat_inputs[0].shape[0]))}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        if self.padding == 0:
            return inpt
        height, width = inpt.shape[-2:]
        if self.padding >= min(height, width):
            raise ValueError(
                f"a reflected border of {self.padding} needs images larger than that, not {width}x{height}"
            )
        padded = v2.functional.pad(inpt, [self.padding], padding_mode="reflect")
        # A view of every possible crop, of which one gather then copies the chosen one.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        rows, columns = params["offsets"].to(inpt.device)
        return crops[torch.arange(len(inpt), device=inpt.device), :, rows, columns]


class PerImageFlip(v2.Transform):
    """Mirror every image of a batch left to right with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p has to be between 0 and 1, and is {p}")
        self.p = p

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"mirrored": torch.rand(flat_inputs[0].shape[0]) < self.p}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        mirrored = params["mirrored"].to(inpt.device).view(-1, 1, 1, 1)
        return torch.where(mirrored, v2.functional.horizontal_flip(inpt), inpt)


def training_transform(crop: int, flip: bool, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """From a batch of uint8 images to what the network trains on: shifted, mirrored, three channels, normalised."""
    steps: list[v2.Transform] = []
    if crop:
        steps.append(PerImageCrop(crop))
    if flip:
        steps.append(PerImageFlip())
    return v2.Compose([*steps, *_to_network_input(mean, std)])


def evaluation_transform(mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """The same without anything random."""
    return v2.Compose(_to_network_input(mean, std))


def _to_network_input(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    # Grey images become three equal channels, so that every model for colour images can be trained on them.
    return [v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
