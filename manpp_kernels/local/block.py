"""A local block: a part of the user's model, and what trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from manpp_kernels.local.auxiliary import Auxiliary, EmaTransform, ParameterTransform, Prepared
from manpp_kernels.local.targets import Criterion


def each(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``function`` of a tensor, or of each in a tuple."""
    return tuple(map(function, x)) if isinstance(x, tuple) else function(x)


class BlockOutput(NamedTuple):
    """What a local block gives: what it hands on, cut from the graph; its loss; the last block's logits.

    What is handed on are the block's features; in a tuple with those that the head looks at from here or before, where
    there are any. A rule whose blocks are its own may hand on more: it is passed to the next block as it is, and looked
    at by nobody else.
    """

    features: Any
    loss: Tensor
    logits: Tensor | None


class LocalBlock(nn.Module):
    """A part of the user's model with an auxiliary network and a loss of its own.

    Args:
        body: references to the user's modules.
        auxiliary: from the body's output to the local loss; None for the last block, whose body ends in the logits.
        criterion: the loss of the last block.

    Attributes:
        transforms: the EMA units of the auxiliary network.
    """

    def __init__(self, body: nn.Module, auxiliary: Auxiliary | None, criterion: Criterion) -> None:
        super().__init__()
        self.body = body
        self.auxiliary = auxiliary
        self.criterion = criterion
        # In lists, so that they are not registered a second time.
        parts = [] if auxiliary is None else list(auxiliary.modules())
        self.transforms = [m for m in parts if isinstance(m, EmaTransform)]
        self._prepared = [m for m in parts if isinstance(m, Prepared)]

    def forward(self, x: Any, images: Tensor, targets: Tensor) -> BlockOutput:
        """``x`` is what the previous block handed on; for the first block the images."""
        found = self.body(x)
        if self.auxiliary is None:
            return BlockOutput(found.detach(), self.criterion(found, targets), found.detach())
        for part in self._prepared:
            part.before_forward(images)
        features = found[0] if isinstance(found, tuple) else found
        loss = self.auxiliary(features, images, targets)
        return BlockOutput(each(Tensor.detach, found), loss, None)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that this block's loss trains."""
        return [p for p in self.parameters() if p.requires_grad]

    def release(self) -> None:
        """Drop the effective weights that were prepared for this step."""
        for t in self.transforms:
            if isinstance(t, ParameterTransform):
                t.values = None
