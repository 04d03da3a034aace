"""MAN++ in plain PyTorch, step by step as its published release does it: what the trainer is compared with.

A loop over the parameters for the EMA, the mix as element-wise operations, local heads with PyTorch's own pooling, and
one optimizer at the end, so that the gradients of all blocks are there at once.
"""

from __future__ import annotations

import contextlib
import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manpp_kernels.local import adapt

MOMENTUM = 0.995


def wide_head(channels: int, num_classes: int) -> nn.Sequential:
    """The local head of the DGL host: pool to 8x8, three 1x1 convolutions of 128, three linear layers of 512."""
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(8)]
    for i in range(3):
        conv = nn.Conv2d(channels if i == 0 else 128, 128, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(128), nn.ReLU(inplace=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for i in range(3):
        layers += [nn.Linear(128 if i == 0 else 512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(512, num_classes))


class EagerBlock(nn.Module):
    """A block of the network with LB, EMA, scale and head."""

    def __init__(self, body: nn.Module, following: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.lb = copy.deepcopy(following)
        self.ema = copy.deepcopy(following)
        for p in self.ema.parameters():
            p.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = wide_head(channels, num_classes)
        self.following = [following]  # in a list, so that it is not registered here

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        z = self.scale * self.lb(y) + (2 - self.scale) * self.ema(y)
        return y.detach(), self.head(z)

    @torch.no_grad()
    def update(self) -> None:
        for e, p in zip(self.ema.parameters(), self.following[0].parameters(), strict=True):
            e.data = e.data * MOMENTUM + p.data * (1 - MOMENTUM)


class EagerManPlusPlus:
    """Trains ``model`` with a block for the stem and for every unit."""

    def __init__(
        self,
        model: nn.Module,
        image: tuple[int, ...],
        num_classes: int,
        layout: torch.memory_format = torch.preserve_format,
        amp: torch.dtype | None = None,
    ) -> None:
        self.layout, self.amp = layout, amp
        parts = adapt(model)
        bodies = [parts.stem, *parts.units.values()]
        device = next(model.parameters()).device
        with torch.no_grad():
            # Shapes alone: on copies in evaluation mode, so that no running statistics move.
            x = torch.randn(2, *image, device=device)
            blocks = []
            for body, following in itertools.pairwise(bodies):
                x = copy.deepcopy(body).eval()(x)
                channels = copy.deepcopy(following).eval()(x).shape[1]
                blocks.append(EagerBlock(body, following, channels, num_classes).to(device))
        self.blocks = nn.ModuleList(blocks).to(memory_format=layout)
        self.last = nn.Sequential(bodies[-1], parts.head).to(memory_format=layout)
        self.optimizer = torch.optim.SGD(
            [p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
        )

    def parameters(self) -> list[nn.Parameter]:
        return [*self.blocks.parameters(), *self.last.parameters()]

    def persistent_tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.blocks.buffers(), *self.last.buffers()]

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, targets = batch
        x = x.to(memory_format=self.layout)
        self.optimizer.zero_grad()
        for block in self.blocks:
            with self._autocast(x):
                x, logits = block(x)
                loss = F.cross_entropy(logits, targets)
            loss.backward()
            block.update()
        with self._autocast(x):
            loss = F.cross_entropy(self.last(x), targets)
        loss.backward()
        self.optimizer.step()

    def _autocast(self, x: Tensor) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.amp is None else torch.autocast(x.device.type, self.amp)
