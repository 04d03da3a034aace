"""The settings of a training as its checkpoints keep them, and which side's are in force where it is resumed."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manpp_kernels.checkpoint import CheckpointError, plain_numbers
from manpp_kernels.local.targets import Criterion
from manpp_kernels.training.config import TrainerConfig

# By where they come from on resuming: "loaded" with the states of optimizers and schedulers, or "given" to the new
# trainer; "schedule" has to be the same. As text, as they are to be compared and shown.
Settings = dict[str, dict[str, str]]
# How a step is computed, what follows from the rest, and what only a scheduler looks at, who is asked itself.
_LEFT_OUT = {"params", "foreach", "fused", "capturable", "differentiable", "initial_lr", "base_lrs", "last_epoch"}


def settings_of(
    config: TrainerConfig,
    criterion: Criterion | None,
    made: Mapping[str, str],
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[Any],
) -> Settings:
    """What a trainer was made with; ``made`` is :func:`optimizer_settings` as it was before there were schedulers."""
    given = {"clip_norm": config.clip_norm, "accumulate": config.accumulate}
    if criterion is None:
        given["label_smoothing"] = config.label_smoothing
    shown = {name: repr(plain_numbers(value)) for name, value in given.items()}
    loss = _criterion(criterion)
    if loss is not None:
        shown["criterion"] = loss
    return {
        "loaded": {
            **optimizer_settings(optimizers),
            **made,
            **_together(entry for s in schedulers for entry in _of_scheduler(s)),
        },
        "given": shown,
        "schedule": {"schedule": repr(config.schedule)},
    }


def optimizer_settings(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, str]:
    """The values of their groups, such as learning rates."""
    return _together(
        (f"{type(optimizer).__name__}.{key}", value)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for key, value in group.items()
        if key not in _LEFT_OUT
    )


def check_schedule(found: Settings | None, ours: Settings) -> None:
    """Raise CheckpointError where the scheduler of a checkpoint counts what it does not count here."""
    schedule, expected = ((settings or ours)["schedule"]["schedule"] for settings in (found, ours))
    if schedule != expected:
        raise CheckpointError(
            f"the checkpoint is of a training with schedule={schedule}, here it is {expected}, and a scheduler would "
            "count something else; use the schedule it was written with"
        )


def differences(found: Settings | None, ours: Settings) -> str | None:
    """A text that names every setting which differs, both values, and which one is in force; None where none does."""
    if found is None:
        return None
    loaded = [f"{name} {theirs} (here {value})" for name, theirs, value in _differing(found["loaded"], ours["loaded"])]
    given = [f"{name} {value} (there {theirs})" for name, theirs, value in _differing(found["given"], ours["given"])]
    texts = ["the checkpoint's go on for " + ", ".join(loaded)] if loaded else []
    texts += ["this trainer's hold for " + ", ".join(given)] if given else []
    return f"the checkpoint is of a training with other settings: {'; '.join(texts)}" if texts else None


def _differing(found: Mapping[str, str], ours: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, value in ours.items():
        if found.get(name, value) != value:
            yield name, found[name], value


def _of_scheduler(scheduler: Any) -> Iterator[tuple[str, Any]]:
    state = scheduler.state_dict()
    for key, value in state.items() if isinstance(state, Mapping) else ():
        if key not in _LEFT_OUT and (not key.startswith("_") or key == "_milestones"):
            yield f"{type(scheduler).__name__}.{key.lstrip('_')}", value
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _of_scheduler(inner)


def _together(entries: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """The values of each name, as one where they are all the same."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, value in entries:
        shown = _shown(value)
        if shown is not None:
            found[name].append(shown)
    return {name: v[0] if len(set(v)) == 1 else f"[{', '.join(v)}]" for name, v in found.items()}


def _shown(value: Any) -> str | None:
    """As text, where it is a number, a text, or made of some; functions have none that is the same in every process."""
    if isinstance(value, Tensor | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        parts = [_shown(entry) for entry in value]
        return None if None in parts else f"[{', '.join(str(part) for part in parts)}]"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else None


def _short(t: Tensor) -> str:
    """A tensor's numbers, or how many and their sum."""
    return repr(t.tolist()) if t.numel() <= 16 else f"{t.numel()} numbers with the sum {float(t.sum()):g}"


def _criterion(criterion: Criterion | None) -> str | None:
    """Its name and numbers; None where it is neither a module nor a plain function."""
    if criterion is None:
        return "cross_entropy"
    if isinstance(criterion, nn.Module):
        values = {k: _shown(v) for k, v in vars(criterion).items() if not k.startswith("_") and k != "training"}
        values |= {name: _short(buffer) for name, buffer in criterion.named_buffers()}
        return f"{type(criterion).__name__}({', '.join(f'{k}={v}' for k, v in values.items() if v is not None)})"
    return criterion.__qualname__ if inspect.isfunction(criterion) else None
