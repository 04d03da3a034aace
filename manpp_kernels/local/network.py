"""K local blocks, put together from a partitioned model and a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from manpp_kernels.checkpoint import plain_numbers
from manpp_kernels.local.auxiliary import EmaUpdates, Site
from manpp_kernels.local.block import BlockOutput, LocalBlock
from manpp_kernels.local.partition import Partition, body
from manpp_kernels.local.rules import Rule
from manpp_kernels.local.targets import Criterion

__all__ = ["BlockOutput", "LocalBlock", "LocalNetwork"]


class LocalNetwork(nn.Module):
    """The local blocks of a model, and the EMA updates between them.

    Args:
        partition: of the user's model, whose modules are trained in place.
        rule: what the auxiliary networks are.
        criterion: loss of logits, as the model's, and targets.
        num_classes: None for the size of the model's output.

    Raises:
        ValueError: the rule cannot train this partition, or ``num_classes`` differs from the model's output.
    """

    def __init__(self, partition: Partition, rule: Rule, criterion: Criterion, num_classes: int | None = None) -> None:
        super().__init__()
        # Of a local_head's model the outputs may be one number an image, (N,).
        outputs = partition.output_shape[1] if len(partition.output_shape) > 1 else 1
        if num_classes is not None and num_classes != outputs and partition.parts.local_head is None:
            raise ValueError(f"num_classes is {num_classes}, and the model's output has {outputs}; make them agree")
        rule.check(len(partition.segments), len(partition))
        if not partition.of_images and not rule.any_outputs:
            raise ValueError(
                f"the auxiliary networks of the rule {rule.name!r}, or of its host, classify images, and what "
                f"{type(partition.model).__name__} gives is {tuple(partition.output_shape)}; choose 'dgl', or 'man', "
                "'man++' or 'lookahead' with the host 'dgl'"
            )
        if partition.parts.taps and type(rule).block is not Rule.block:
            raise ValueError(
                f"the blocks of the rule {rule.name!r} hand on features in a way of their own, and the head of "
                f"{type(partition.model).__name__} looks at features of several units; choose another rule"
            )
        like = next(partition.model.parameters())
        blocks: list[LocalBlock] = []
        for j in range(len(partition)):
            auxiliary = None
            if j < len(partition) - 1:
                last = partition.segments[partition.blocks[j][-1]]
                shape = last.shape
                if len(shape) == 3 and any(isinstance(m, nn.Conv1d) for m in last.module.modules()):
                    raise ValueError(
                        f"{last.name} ends in features (N, C, length) of a one-dimensional convolution, and local "
                        "heads take maps (N, C, H, W), tokens (N, T, C) and vectors (N, C)"
                    )
                auxiliary = rule.auxiliary(Site(partition, j, shape, outputs, criterion))
                auxiliary.to(device=like.device, dtype=like.dtype)
            blocks.append(rule.block(body(partition, j), auxiliary, criterion, blocks))
        if not blocks[-1].trainable():
            raise ValueError(
                "nothing in the last block requires grad, so that its loss has nothing to train; unfreeze a part of "
                "it, or give it more units (blocks)"
            )
        self.blocks = nn.ModuleList(blocks)
        self.num_classes = outputs
        self.rule = rule
        self.partition = partition

    def __iter__(self) -> Iterator[LocalBlock]:
        return (block for block in self.blocks if isinstance(block, LocalBlock))

    def __len__(self) -> int:
        return len(self.blocks)

    def least_images(self) -> int:
        """How many images a batch has to have: batch statistics of a local head, or of a copied unit, need two.

        What the network's own layers need, they say themselves. Of a model of pixels or places an image has many.
        """
        if not self.partition.of_images:
            return 1
        beside = (m for block in self if block.auxiliary is not None for m in block.auxiliary.modules())
        return 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in beside) else 1

    def ema_updates(self, own: range | None = None) -> EmaUpdates:
        """The updates of all blocks in one launch, which also prepares the effective weights of the parameter form.

        Where only the blocks ``own`` are trained here, theirs alone.
        """
        transforms = [t for j, block in enumerate(self) if own is None or j in own for t in block.transforms]
        return EmaUpdates(transforms, self.rule.momentum, prepare=True)

    def ema_updates_by_block(self) -> list[EmaUpdates]:
        """The updates of each block on their own."""
        return [EmaUpdates(block.transforms, self.rule.momentum, prepare=False) for block in self]

    def auxiliary_state_dict(self) -> dict[str, Tensor]:
        """Everything that is trained beside the user's model, by block."""
        return {
            f"{j}.{key}": value
            for j, block in enumerate(self)
            if block.auxiliary is not None
            for key, value in block.auxiliary.state_dict().items()
        }

    def load_auxiliary_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state of :meth:`auxiliary_state_dict` in; keys and shapes have to be the same."""
        for j, block in enumerate(self):
            if block.auxiliary is not None:
                prefix = f"{j}."
                block.auxiliary.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})

    def describe(self) -> dict[str, object]:
        """What has to agree for two trainings to be of the same kind: the rule, its options, the blocks."""
        return {
            "rule": self.rule.name,
            "rule options": repr(plain_numbers(dataclasses.asdict(self.rule.options))),
            "blocks": [" ".join(names) for names in self.partition.names()],
        }

    @torch.no_grad()
    def persistent_tensors(self) -> list[Tensor]:
        """Parameters, EMAs and buffers: what is in memory whether or not there is a graph."""
        return [*self.parameters(), *self.buffers()]
