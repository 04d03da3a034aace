"""The units of a model as K local blocks: by count, by explicit boundaries, or balanced by measured memory."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels.checkpoint import kept_rng_state
from manpp_kernels.local.memory import saved_bytes_of
from manpp_kernels.local.parts import Parts, logits_of, take_apart
from manpp_kernels.local.recompute import Recomputed


@dataclass(frozen=True)
class Segment:
    """The stem or a unit, as measured on an example.

    Attributes:
        name: ``"stem"`` or the unit's name.
        module: the user's own module.
        shape: of its output for the example, the batch dimension included.
        saved_bytes: what its forward pass saves for backward per image; 0 unless it was asked for.
        writes_input: whether it changes its input in place.
    """

    name: str
    module: nn.Module
    shape: torch.Size
    saved_bytes: int
    writes_input: bool


@dataclass(frozen=True)
class Partition:
    """K local blocks of a model.

    Attributes:
        model: the user's model.
        parts: its stem, units and head.
        segments: the stem and then the units, measured.
        blocks: for each local block the range of its segments; the last block also carries the head.
        input_shape: of the example.
        output_shape: of the model's logits for the example, (N, num_classes), or (N, num_classes, H, W) of pixels.
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
        return len(self.output_shape) == 4

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
    segments, output_shape = _measure(model, parts, images, by_memory)
    if by_memory:
        ends = _minimax(_block_bytes(segments, parts.recomputed, images.element_size()), count)
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


def _minimax(costs: list[list[int]], count: int) -> list[int]:
    """Ends of ``count`` non-empty runs of which the dearest costs the least possible, by dynamic programming.

    Args:
        costs: of the run from i to j (included) at [i][j - i].
        count: how many runs.
    """
    n = len(costs)
    # best[i]: (the least dearest of the first i in k runs, the ends of those runs)
    best: list[tuple[int, list[int]] | None] = [(0, [])] + [None] * n
    for k in range(1, count + 1):
        now: list[tuple[int, list[int]] | None] = [None] * (n + 1)
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


def _measure(model: nn.Module, parts: Parts, images: Tensor, by_memory: bool) -> tuple[tuple[Segment, ...], torch.Size]:
    """Run the example through the parts, and check that together they are the model."""
    named = [("stem", parts.stem), *parts.units.items()]
    _check_parameters(model, [*named, ("head", parts.head)])
    segments = []
    # The parts too: an adapter may have put modules into them that the model has not.
    with evaluating(model, *(module for _, module in named), parts.head), torch.no_grad():
        # Clones, as a stem may begin in place, and the images are the caller's.
        expected, x = logits_of(model(images.clone())), images.clone()
        for name, module in named:
            saved = _saved_bytes(module, x) if by_memory else 0
            version = x._version
            y = _run_part(name, module, x)
            segments.append(Segment(name, module, y.shape, saved, x._version != version))
            x = y
        output = _run_part("head", parts.head, x)
    if not isinstance(expected, Tensor) or expected.dim() not in (2, 4):
        found = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
        raise ValueError(
            "the model has to return logits (N, num_classes), or (N, num_classes, H, W) of pixels, and returned "
            f"{found}"
        )
    if output.shape != expected.shape:
        raise ValueError(
            f"stem, units and head of {type(model).__name__}, run in a row, give {tuple(output.shape)} for images of "
            f"{tuple(images.shape)}, and the model itself gives {tuple(expected.shape)}; "
            + (
                "take images whose sides are multiples of what the units reduce them by"
                if expected.dim() == 4
                else "register an adapter that takes the model's forward apart as it is"
            )
        )
    if not _alike(output, expected) or (_lost(output, expected) and _gives_again(model, images, expected)):
        raise ValueError(
            f"stem, units and head of {type(model).__name__}, run in a row, do not give what the model itself gives; "
            "register an adapter that takes the model's forward apart as it is"
        )
    _check_training(model, parts, images[:1])
    return tuple(segments), output.shape


def _run_part(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """What a part gives for what the parts before it gave; raises with its name."""
    try:
        y = module(x)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{name} does not take {tuple(x.shape)}, which the parts before it give: {error}") from error
    if not isinstance(y, Tensor):
        raise ValueError(f"{name} returns {type(y).__name__}, and the next part takes one tensor; wrap it so")
    return y


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or b.numel() == 0:
        return a.shape == b.shape
    eps = _eps(b)  # of bfloat16 it is more than the tolerance that serves float32
    largest = b.abs().max().nan_to_num(0.0, 0.0).item()
    return torch.allclose(a, b, rtol=max(1e-3, 16 * eps), atol=max(1e-5, eps * largest), equal_nan=True)


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def _lost(output: Tensor, expected: Tensor) -> bool:
    """Whether outputs that are alike differ by a tenth of what one image differs from another.

    A deep network that is not trained may give much the same for every image, next to nothing at times: all its outputs
    are alike then, whatever a part leaves out. Where images differ by their rounding alone, parts that compute the same
    in another order do, too.
    """
    images = (expected - expected.roll(1, 0)).abs().max()
    rounding = 16 * _eps(expected) * expected.abs().max()
    return bool(images > 0 and (output - expected).abs().max() > torch.maximum(images / 10, rounding))


def _gives_again(model: nn.Module, images: Tensor, expected: Tensor) -> bool:
    """Whether the model gives the same bits a second time: no difference to it is by chance then."""
    with evaluating(model), torch.no_grad():
        return torch.equal(logits_of(model(images.clone())), expected)


def _check_training(model: nn.Module, parts: Parts, images: Tensor) -> None:
    """Raise where the model's own ``forward`` has what only training mode shows, such as a dropout, and no part has."""
    row = nn.Sequential(parts.stem, *parts.units.values(), parts.head)
    try:
        expected, output = _in_training(model, images), _in_training(row, images)
    except Exception:  # it cannot be copied, or takes more than images then, such as targets: nothing to compare with
        return
    if not isinstance(expected, Tensor) or not isinstance(output, Tensor) or _alike(output, expected):
        return
    if _alike(_in_training(model, images), expected):  # it is no other by itself from one time to the next
        raise ValueError(
            f"stem, units and head of {type(model).__name__}, run in a row, do not give what the model itself gives in "
            "training mode; what its forward does by itself, such as F.dropout, belongs into a part of the adapter"
        )


@torch.no_grad()
def _in_training(module: nn.Module, images: Tensor) -> Any:
    """What it gives in training mode, with the same random numbers every time; nothing is changed.

    Batch normalisations are in evaluation mode: statistics of so few images would make much of the smallest difference.
    """
    # With buffers of its own alone; what is not trained by gradients may be moved by a forward pass.
    module = copy.deepcopy(module, {id(p): p for p in module.parameters() if p.requires_grad})
    for m in module.modules():
        m.training = not isinstance(m, nn.modules.batchnorm._NormBase)
    with kept_rng_state():
        return logits_of(module(images.clone()))


def _check_parameters(model: nn.Module, named: list[tuple[str, nn.Module]]) -> None:
    owner: dict[int, str] = {}
    for name, module in named:
        for p in module.parameters():
            if owner.setdefault(id(p), name) != name:
                raise ValueError(f"{owner[id(p)]} and {name} share a parameter, so no boundary can come between them")
    own = {id(p) for p in model.parameters()}
    for key, p in model.named_parameters():
        if id(p) not in owner:
            raise ValueError(f"the adapter of {type(model).__name__} leaves out the parameter {key}")
    for name, module in named:
        for key, p in module.named_parameters():
            if id(p) not in own:
                raise ValueError(
                    f"the adapter of {type(model).__name__} adds the parameter {key} to {name}, which the model has "
                    "not, and which would be trained and lost; make it part of the model"
                )


def _saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes per image that ``module`` saves for backward in training, its input included."""
    module = copy.deepcopy(module).train()  # a copy, so that running statistics stay as they are
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), saved_bytes_of([*module.parameters(), *module.buffers()]) as meter:
        module(x.clone().requires_grad_().clone())  # no leaf: a unit may begin in place
    return meter.peak_bytes // x.shape[0]


class evaluating:
    """Evaluation mode inside the ``with`` block; afterwards every module is in the mode it was in."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules

    def __enter__(self) -> None:
        self._modes = [(m, m.training) for module in self._modules for m in module.modules()]
        for module in self._modules:
            module.eval()

    def __exit__(self, *exception: Any) -> None:
        for m, training in self._modes:
            m.training = training


def modules_of(partition: Partition, block: int) -> Iterator[nn.Module]:
    """The modules of one block in order, the head included for the last."""
    for i in partition.blocks[block]:
        unit = partition.segments[i].module
        yield Recomputed(unit) if partition.parts.recomputed and i > 0 else unit
    if block == len(partition) - 1:
        yield partition.parts.head
