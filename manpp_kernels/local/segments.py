"""The stem and the units of a model, measured on an example, and whether with the head they are the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels.checkpoint import kept_rng_state
from manpp_kernels.local.memory import saved_bytes_of
from manpp_kernels.local.parts import Parts, TappedRow, logits_of


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


def measure(model: nn.Module, parts: Parts, images: Tensor, by_memory: bool) -> tuple[tuple[Segment, ...], torch.Size]:
    """Run the example through the parts, and check that together they are the model.

    Returns:
        The stem and the units, measured, and the shape of the model's logits.

    Raises:
        ValueError: they are not, or the head cannot look at what is tapped.
    """
    named = [("stem", parts.stem), *parts.units.items()]
    _check_parameters(model, [*named, ("head", parts.head)])
    segments: list[Segment] = []
    taps: list[Tensor] = []
    # The parts too: an adapter may have put modules into them that the model has not.
    with evaluating(model, *(module for _, module in named), parts.head), torch.no_grad():
        # Clones, as a stem may begin in place, and the images are the caller's.
        expected, x = logits_of(model(images.clone())), images.clone()
        for name, module in named:
            saved = _saved_bytes(module, x) if by_memory else 0
            version = x._version
            y = _run_part(name, module, x)
            segments.append(Segment(name, module, y.shape, saved, x._version != version))
            if segments[-1].writes_input and len(segments) > 1 and segments[-2].name in parts.taps:
                raise ValueError(
                    f"{name} changes its input in place, at which the head looks as well; give its first layer "
                    "inplace=False"
                )
            taps += [y] if name in parts.taps else []
            x = y
        output = _run_part("head", parts.head, x, *taps)
    if not isinstance(expected, Tensor) or (expected.dim() not in (2, 4) and parts.local_head is None):
        found = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
        raise ValueError(
            "the model has to return logits (N, num_classes), or (N, num_classes, H, W) of pixels, and returned "
            f"{found}; for others its adapter has to make the local heads (Parts.local_head)"
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


def _run_part(name: str, module: nn.Module, x: Tensor, *taps: Tensor) -> Tensor:
    """What a part gives for what the parts before it gave; raises with its name."""
    try:
        y = module(x, *taps)
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
    named = {"stem": parts.stem, **parts.units}
    row = TappedRow(named.values(), [name in parts.taps for name in named], parts.head)
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
