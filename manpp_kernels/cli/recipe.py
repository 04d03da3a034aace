"""Optimizers and schedules by name: any of ``torch.optim``'s, and the usual few of its schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from manpp_kernels.cli.parsing import UserError, did_you_mean
from manpp_kernels.training.config import TrainerConfig

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

# LBFGS evaluates the loss several times a step, and SparseAdam takes sparse gradients only.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
}
# The published runs: 0.8 at batch 1024.
_LR_OF_SGD_AT_128 = 0.1
_LR = {"adam": 1e-3, "adamw": 1e-3}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": TrainerConfig.sgd_momentum, "nesterov": TrainerConfig.nesterov}
}


def default_lr(optimizer: str, batch_size: int) -> float | None:
    """The learning rate where none is given; None for what the optimizer itself has as its default."""
    optimizer = optimizer.lower()
    return _LR_OF_SGD_AT_128 * batch_size / 128 if optimizer == "sgd" else _LR.get(optimizer)


def default_weight_decay(optimizer: str) -> float | None:
    """The weight decay where none is given; None for an optimizer that has none."""
    kind = OPTIMIZERS.get(optimizer.lower())
    known = kind is not None and "weight_decay" in inspect.signature(kind).parameters
    return TrainerConfig.weight_decay if known else None


def optimizer_factory(
    name: str, lr: float | None, weight_decay: float | None, arguments: Mapping[str, Any]
) -> OptimizerFactory:
    """A factory of one of ``torch.optim``'s optimizers; wrong arguments are errors here, not at the first use.

    A learning rate or weight decay of None is left to the optimizer.
    """
    name = name.lower()
    if name not in OPTIMIZERS:
        near = did_you_mean(name, OPTIMIZERS)
        raise UserError(f"there is no optimizer {name!r}{near}; there are {', '.join(sorted(OPTIMIZERS))}")
    kind = OPTIMIZERS[name]
    for argument in arguments:
        if argument in ("lr", "weight_decay"):
            raise UserError(f"{argument} has an option of its own: give --{argument.replace('_', '-')}")
    options = {**_ARGUMENTS.get(name, {}), **arguments}
    if weight_decay is not None:
        options["weight_decay"] = weight_decay
    if lr is not None:
        options["lr"] = lr
    known = [parameter for parameter in inspect.signature(kind).parameters if parameter != "params"]
    for option in options:
        if option not in known:
            raise UserError(f"{kind.__name__} has no argument {option!r}{did_you_mean(option, known)}")

    def factory(parameters: Iterable[Any]) -> Optimizer:
        return kind(parameters, **options)

    try:
        factory([torch.nn.Parameter(torch.zeros(2, 2))])
    except (ValueError, TypeError) as error:
        raise UserError(f"{kind.__name__} does not take these arguments: {error}") from error
    return factory


def _constant(optimizer: Optimizer, total: int) -> LRScheduler:
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


def _cosine(optimizer: Optimizer, total: int) -> LRScheduler:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)


def _linear(optimizer: Optimizer, total: int) -> LRScheduler:
    return lr_scheduler.PolynomialLR(optimizer, total_iters=total, power=1.0)


def _step(optimizer: Optimizer, total: int) -> LRScheduler:
    # A milestone at 0 would be reached before the first epoch; two at the same epoch count twice.
    milestones = [place for place in (total // 2, total * 3 // 4) if place]
    return lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "cosine": _cosine,
    "linear": _linear,
    "step": _step,
    "constant": _constant,
}


def scheduler_factory(name: str, epochs: int, warmup_epochs: int, per_epoch: int = 1) -> SchedulerFactory:
    """A factory of schedulers that move ``per_epoch`` times an epoch, and rise linearly in the first epochs."""
    if name not in SCHEDULES:
        raise UserError(
            f"there is no schedule {name!r}{did_you_mean(name, SCHEDULES)}; there are {', '.join(SCHEDULES)}"
        )
    if warmup_epochs >= epochs and warmup_epochs:
        raise UserError(f"the warm-up takes {warmup_epochs} of {epochs} epochs: it has to be shorter than the run")
    total, warmup = epochs * per_epoch, warmup_epochs * per_epoch

    def factory(optimizer: Optimizer) -> LRScheduler:
        if not warmup:
            return SCHEDULES[name](optimizer, total)
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        return lr_scheduler.SequentialLR(optimizer, [rise, SCHEDULES[name](optimizer, total - warmup)], [warmup])

    return factory
