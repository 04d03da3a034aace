"""The units of a model as K local blocks: by count, by explicit boundaries, or balanced by measured memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels.local.parts import Parts, TappedRow, take_apart
from manpp_kernels.local.recompute import Recomputed
from manpp_kernels.local.segments import Segment, measure


@dataclass(frozen=True)
class Partition:
    """K local blocks of a model.

    Attributes:
        model: the user's model.
        parts: its stem, units and head.
        segments: the stem and then the units, measured.
        blocks: for each local block the range of its segments; the last block also carries the head.
        input_shape: of the example.
        output_shape: of the model's logits for the example, (N, num_classes), or (N, num_classes, H, W) of pixels; or
            of what else it gives.
    """

    model: nn.Module
    parts: Parts
    segments: tuple[Segment, ...]
    blocks: tuple[range, ...]
    input_shape: torch.Size
    output_shape: torch.Size

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def of_pixels(self) -> bool:
        """Whether the model classifies every pixel: semantic segmentation."""
        return len(self.output_shape) == 4 and self.parts.local_head is None

    @property
    def of_images(self) -> bool:
        """Whether it classifies every image."""
        return len(self.output_shape) == 2 and self.parts.local_head is None

    def handed_on(self, block: int) -> int:
        """How many tensors a block hands on: its features, and what the head looks at from it and those before."""
        return 1 + sum(self.segments[i].name in self.parts.taps for i in range(self.blocks[block].stop))

    def names(self) -> list[list[str]]:
        """The names of the segments of each block."""
        return [[self.segments[i].name for i in block] for block in self.blocks]


Boundaries = Sequence[int | str]


def partition(
    model: nn.Module,
    blocks: int | Boundaries | None = None,
    *,
    example: Any,
    balance: str = "count",
    recompute: bool = False,
) -> Partition:
    """Divide ``model`` into K local blocks.

    The segments that are divided are the stem and then each unit, so ResNet-32 has 16 and ResNet-110 has 55. With one
    segment a block (K = 16 and 55 there) the stem is a block of its own; the last block also carries the head.

    Args:
        model: any model that an adapter is registered for.
        blocks: K; or explicit boundaries, the last segment of every block but the last, each as the name of a unit
            (``"layer1.4"``) or its place (0 for ``"stem"``, 1 for the first unit). None makes every segment a block;
            1 is end to end.
        example: a batch of images, a batch (images, targets), or the shape of an image, for which the outputs are
            measured (in evaluation mode; the model is not changed).
        balance: how a count is distributed. ``"count"``: as evenly as possible, where it does not come out even the
            later blocks have one segment more, as their activations are smaller. ``"memory"``: so that the most
            saved-activation bytes of any block's body, measured (of recomputed units: their inputs, and what one of
            them keeps while it runs again), are as few as possible.
        recompute: the units run once more in the backward pass, and keep no activations until then.

    Raises:
        TypeError: there is no adapter for the model, or ``blocks`` is of no fitting type.
        ValueError: K is not between 1 and the number of segments; boundaries that name no unit or do not ascend;
            an unknown balance; an adapter whose parts are not the model.
    """
    if balance not in ("count", "memory"):
        raise ValueError(f"balance has to be one of count, memory, and is {balance!r}")
    if balance != "count" and isinstance(blocks, Sequence):
        raise ValueError(f"balance {balance!r} distributes a number of blocks, and blocks gives the boundaries itself")
    parts = take_apart(model)
    if recompute:
        parts = dataclasses.replace(parts, recomputed=True)
    names = ["stem", *parts.units]
    ends = _ends(blocks, names) if isinstance(blocks, Sequence) else None
    count = len(names) if blocks is None else len(ends) if ends is not None else _whole(blocks)
    if not 1 <= count <= len(names):
        raise ValueError(
            f"blocks is {count}, and {type(model).__name__} can be divided into 1 to {len(names)} local blocks "
            f"(the stem and {len(names) - 1} units); choose a number in between"
        )
    images = example_images(example, next(model.parameters()))
    by_memory = balance == "memory" and ends is None and count < len(names)
    segments, output_shape = measure(model, parts, images, by_memory)
    if by_memory:
        ends = minimax(_block_bytes(segments, parts.recomputed, images.element_size()), count)
    elif ends is None:
        ends = _evenly(len(names), count)
    starts = [0, *ends[:-1]]
    ranges = tuple(range(a, b) for a, b in zip(starts, ends, strict=True))
    return Partition(model, parts, segments, ranges, images.shape, output_shape)


def example_images(example: Any, like: Tensor) -> Tensor:
    """Two images to measure shapes with, of the device and dtype of ``like``.

    They come from a batch, or are drawn for a shape (C, H, W) or (N, C, H, W).
    """
    if isinstance(example, tuple | list) and example and isinstance(example[0], Tensor):
        example = example[0]
    if isinstance(example, Tensor):
        if not example.is_floating_point():
            raise ValueError(
                f"the example images are {example.dtype}, and images have to be of a floating dtype (tokens have to be "
                "embedded before)"
            )
        return (example if len(example) > 1 else torch.cat([example, example]))[:2].to(like)
    if not isinstance(example, tuple | list) or not example or not all(isinstance(n, int) for n in example):
        raise TypeError(f"example has to be a batch of images or the shape of one, and is {example!r}")
    shape = tuple(example)[-3:] if len(example) >= 3 else tuple(example)
    # A generator of its own: measuring must not move the random numbers that training draws.
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(like)


def _whole(blocks: Any) -> int:
    """K; also where it is a whole number of NumPy's."""
    try:
        if not isinstance(blocks, bool):
            return operator.index(blocks)
    except TypeError:
        pass
    raise TypeError(f"blocks has to be a number or a sequence of boundaries, and is {blocks!r}")


def _ends(boundaries: Boundaries, names: list[str]) -> list[int]:
    """One past the last segment of every block."""
    if isinstance(boundaries, str):
        raise TypeError(f"blocks has to be a number or a sequence of boundaries, and is {boundaries!r}")
    ends: list[int] = []
    for boundary in boundaries:
        if isinstance(boundary, str) and boundary not in names:
            raise ValueError(f"the boundary {boundary!r} is no unit of this model; there are {', '.join(names)}")
        if not isinstance(boundary, str | int) or isinstance(boundary, bool):
            raise TypeError(f"a boundary has to be the name of a unit or its place, and is {boundary!r}")
        end = (names.index(boundary) if isinstance(boundary, str) else boundary) + 1
        if not 1 <= end < len(names):
            raise ValueError(
                f"the boundary {boundary!r} leaves a block empty: a boundary is the last segment of a block but the "
                f"last, from 0 (the stem) to {len(names) - 2} ({names[-2] if len(names) > 1 else 'none'})"
            )
        if ends and end <= ends[-1]:
            raise ValueError(f"boundaries have to ascend along the network, and are {list(boundaries)}")
        ends.append(end)
    return [*ends, len(names)]


def _evenly(segments: int, count: int) -> list[int]:
    small, rest = divmod(segments, count)
    return list(itertools.accumulate(small + (i >= count - rest) for i in range(count)))


def _block_bytes(segments: Sequence[Segment], recomputed: bool, item: int) -> list[list[int]]:
    """What a block of the segments i to j keeps per image at most, at [i][j - i]; values have ``item`` bytes.

    Recomputed, a unit keeps its input alone until it runs once more, when those behind it are done; the stem is not.
    """
    table = []
    for i in range(len(segments)):
        held, most, row = 0, 0, []
        for j in range(i, len(segments)):
            own = segments[j].saved_bytes
            kept = item * math.prod(segments[j - 1].shape[1:]) if recomputed and j > 0 else own
            most, held = max(most, held + own, held + kept), held + kept
            row.append(most)
        table.append(row)
    return table


def minimax(costs: Sequence[Sequence[float]], count: int) -> list[int]:
    """Ends of ``count`` non-empty runs of which the dearest costs the least possible, by dynamic programming.

    Args:
        costs: of the run from i to j (included) at [i][j - i].
        count: how many runs.
    """
    n = len(costs)
    # best[i]: (the least dearest of the first i in k runs, the ends of those runs)
    best: list[tuple[float, list[int]] | None] = [(0, [])] + [None] * n
    for k in range(1, count + 1):
        now: list[tuple[float, list[int]] | None] = [None] * (n + 1)
        for i in range(k, n + 1):
            options = ((max(b[0], costs[j][i - 1 - j]), j) for j in range(k - 1, i) if (b := best[j]) is not None)
            value, j = min(options)
            before = best[j]
            assert before is not None
            now[i] = (value, [*before[1], i])
        best = now
    found = best[n]
    assert found is not None
    return found[1]


def body(partition: Partition, block: int) -> nn.Module:
    """The modules of one block in a row, the head included for the last."""
    parts, segments = partition.parts, [partition.segments[i] for i in partition.blocks[block]]
    modules = [Recomputed(s.module) if parts.recomputed and s.name != "stem" else s.module for s in segments]
    head = parts.head if block == len(partition) - 1 else None
    if parts.taps:
        return TappedRow(modules, [s.name in parts.taps for s in segments], head)
    return nn.Sequential(*modules, *([] if head is None else [head]))
