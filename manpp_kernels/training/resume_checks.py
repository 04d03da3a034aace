"""What of a checkpoint has to agree with the training that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manpp_kernels.checkpoint import CheckpointError, check_tensors

# What a trainer's checkpoint has, beside the tensors of its networks.
_PARTS = (
    *("kind", "model", "auxiliary", "optimizers", "schedulers", "scaler"),
    *("progress", "totals", "history", "epoch_start", "rng"),
)


def check_kind(state: Mapping[str, Any], kind: Mapping[str, Any], parts: Sequence[str], ranks: int) -> None:
    """Raise CheckpointError where a checkpoint is of another kind of training: rule, options, blocks, order.

    Args:
        state: the checkpoint's.
        kind: of the training that is to go on from it.
        parts: those that each of so many ``ranks`` has its own of.
        ranks: how many train together.
    """
    for part in _PARTS:
        if part not in state:
            raise CheckpointError(f"the checkpoint is not complete: its part {part!r} is missing")
    for what, value in kind.items():
        if state["kind"].get(what) != value:
            raise CheckpointError(
                f"the checkpoint is of another training: its {what} is {state['kind'].get(what)!r}, here it is "
                f"{value!r}"
            )
    for part in parts:
        if not isinstance(state.get(part), list) or len(state[part]) != ranks:
            raise CheckpointError(f"the checkpoint is not complete: its part {part!r} is not that of {ranks} ranks")


def check_fits(
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    schedulers: Sequence[Any],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Raise CheckpointError where a checkpoint of this kind is not of these tensors, schedulers and optimizers."""
    for what, expected in tensors.items():
        check_tensors(what, state[what], expected)
    # The first checkpoints had no names: there the keys of a state have to do.
    names = state.get("classes", {})
    _check_schedulers(state["schedulers"], names.get("schedulers"), schedulers)
    _check_optimizers(state["optimizers"], names.get("optimizers"), optimizers)


def classes(optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[Any]) -> dict[str, list[str]]:
    """The names of the classes, by which a checkpoint knows what can go on from it."""
    return {"optimizers": [_name(o) for o in optimizers], "schedulers": [_name(s) for s in schedulers]}


def _name(stepper: Any) -> str:
    """Without its module, which moves from one release to the next; with the schedulers that a scheduler is made of."""
    name, inner = type(stepper).__name__, getattr(stepper, "_schedulers", None)
    return f"{name} of {', '.join(map(_name, inner))}" if inner else name


def _check_optimizers(
    found: Sequence[Any], names: Sequence[str] | None, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Raise CheckpointError where optimizer states do not fit the optimizers."""
    if len(found) != len(optimizers):
        raise CheckpointError(f"the checkpoint has {len(found)} optimizers, here there are {len(optimizers)}")
    for i, (state, optimizer) in enumerate(zip(found, optimizers, strict=True)):
        _check_name("optimizer", None if names is None else names[i], _name(optimizer))
        ours = optimizer.state_dict()["param_groups"]
        theirs = state["param_groups"]
        # Theirs may have more keys: some optimizers, such as timm's, add to a group in their first step.
        if [len(g["params"]) for g in theirs] != [len(g["params"]) for g in ours] or any(
            not set(b) <= set(a) for a, b in zip(theirs, ours, strict=True)
        ):
            raise CheckpointError(
                f"the checkpoint's optimizer is no {_name(optimizer)} over these parameters in these groups; use the "
                "optimizer it was written with"
            )


def _check_schedulers(found: Sequence[Any], names: Sequence[str] | None, schedulers: Sequence[Any]) -> None:
    """Raise CheckpointError where scheduler states do not fit the schedulers."""
    if len(found) != len(schedulers):
        raise CheckpointError(f"the checkpoint has {len(found)} schedulers, here there are {len(schedulers)}")
    for i, (state, scheduler) in enumerate(zip(found, schedulers, strict=True)):
        _check_name("scheduler", None if names is None else names[i], _name(scheduler))
        if not _alike(state, scheduler.state_dict()):
            raise CheckpointError(
                f"the checkpoint's scheduler is no {_name(scheduler)}; use the scheduler it was written with"
            )


def _alike(state: Any, ours: Any) -> bool:
    """Whether a scheduler's state has all that ours has, and is made of as many schedulers."""
    if not isinstance(state, Mapping) or not isinstance(ours, Mapping):
        return type(state) is type(ours)
    inner, our_inner = state.get("_schedulers", ()), ours.get("_schedulers", ())
    return set(ours) <= set(state) and len(inner) == len(our_inner) and all(map(_alike, inner, our_inner))


def _check_name(what: str, found: str | None, name: str) -> None:
    if found is not None and found != name:
        raise CheckpointError(
            f"the checkpoint's {what} is {found}, here it is {name}; use the {what} it was written with"
        )
