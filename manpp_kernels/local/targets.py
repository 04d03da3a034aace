"""The criterion that every block is trained by, and what the targets of a batch mean to it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchError(ValueError):
    """A batch does not fit the network or what was asked of it."""


Criterion = Callable[[Tensor, Tensor], Tensor]
Answers = Callable[[Tensor, Tensor], tuple[Tensor | int, Tensor | int]]


class Targets:
    """What the targets of batches are to a criterion; None is cross-entropy.

    Attributes:
        criterion: as the blocks hold it.
        answers: how predictions are scored; see :func:`answers`.

    Raises:
        TypeError, ValueError: as :func:`make_criterion`.
    """

    def __init__(self, criterion: Criterion | None, label_smoothing: float, device: torch.device) -> None:
        self.criterion = make_criterion(criterion, label_smoothing, device)
        self.answers = answers_to(criterion)
        self._of_classes, self._ignored = takes_class_numbers(criterion), ignored_label(criterion)

    def check(self, targets: Tensor, classes: int, *, first: bool) -> None:
        """Raise BatchError where class numbers do not fit the model's output.

        Where they lie on an accelerator, a look waits for all that was launched before: at the ``first`` of them alone.
        """
        if self._of_classes and (first or targets.device.type == "cpu"):
            check_labels(targets, classes, self._ignored)


def make_criterion(criterion: Criterion | None, label_smoothing: float, device: torch.device) -> Criterion:
    """The criterion as the blocks hold it; None is cross-entropy.

    Raises:
        TypeError: it is no function.
        ValueError: it is no mean, or has parameters to train, which would be trained by every block on its own; or
            labels were to be smoothed, which a criterion does itself.
    """
    if criterion is None:
        return functools.partial(F.cross_entropy, label_smoothing=label_smoothing)
    if label_smoothing != 0.0:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, and is of the cross-entropy of a trainer without a criterion; "
            "smooth in the criterion, as by nn.CrossEntropyLoss(label_smoothing=…), or leave it out"
        )
    if isinstance(criterion, type) or not callable(criterion):
        name = criterion.__name__ if isinstance(criterion, type) else repr(criterion)
        raise TypeError(f"criterion has to be a function or module of logits and targets, and is {name}")
    if getattr(criterion, "reduction", "mean") not in ("mean", "batchmean"):
        raise ValueError(
            f"the criterion has reduction={getattr(criterion, 'reduction', None)!r}, and a block is trained by the "
            "mean over the batch; make it with reduction='mean'"
        )
    if not isinstance(criterion, nn.Module):
        return criterion
    if any(p.requires_grad for p in criterion.parameters()):
        raise ValueError(
            f"the criterion {type(criterion).__name__} has parameters that require grad, and every local block has a "
            "loss of its own; freeze them (requires_grad_(False)), or make them part of the model"
        )
    # Not as a module, which would become a part of every block, with its tensors in their state.
    return functools.partial(criterion.to(device))


_OF_CLASSES = (F.cross_entropy, F.nll_loss)


def takes_class_numbers(criterion: Criterion | None) -> bool:
    """Whether integer targets are known to be class numbers: of other criteria the package knows nothing."""
    if isinstance(criterion, functools.partial):
        criterion = criterion.func
    return criterion is None or criterion in _OF_CLASSES or isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss)


def ignored_label(criterion: Criterion | None) -> int | None:
    """The class number of targets that do not count, where the criterion has one."""
    if isinstance(criterion, functools.partial):
        given: int | None = criterion.keywords.get("ignore_index")
        return ignored_label(criterion.func) if given is None else given
    default = -100 if criterion is None or criterion in _OF_CLASSES else None
    ignored: int | None = getattr(criterion, "ignore_index", default)
    return ignored


# Criteria whose floating-point targets are no probabilities of classes, as modules and as functions.
_OF_NUMBERS = (
    nn.BCELoss | nn.BCEWithLogitsLoss | nn.MultiLabelSoftMarginLoss | nn.MSELoss | nn.L1Loss | nn.SmoothL1Loss
    | nn.HuberLoss | nn.PoissonNLLLoss
)  # fmt: skip
_FUNCTIONS_OF_NUMBERS = (
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss, F.mse_loss, F.l1_loss,
    F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss,
)  # fmt: skip


def answers_to(criterion: Criterion | None) -> Answers:
    """How predictions are scored under a criterion; see :func:`answers`."""
    function = criterion.func if isinstance(criterion, functools.partial) else criterion
    of_numbers = isinstance(criterion, _OF_NUMBERS) or function in _FUNCTIONS_OF_NUMBERS
    return functools.partial(answers, ignored=ignored_label(criterion), probabilities=not of_numbers)


def check_labels(targets: Tensor, classes: int, ignored: int | None) -> None:
    """Raise where class numbers do not fit the model's output."""
    if ignored is not None:
        targets = targets[targets != ignored]
    if targets.is_floating_point() or targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise BatchError(
            f"labels lie between {low} and {high}, and the model has {classes} classes (0 to {classes - 1}); give the "
            "model as many outputs as there are classes"
        )


def answers(
    logits: Tensor, targets: Tensor, ignored: int | None = None, *, probabilities: bool = True
) -> tuple[Tensor | int, Tensor | int]:
    """How many predictions are right, and of how many, without waiting for the device.

    Targets are class numbers (N,), or of pixels (N, H, W), of which those equal to ``ignored`` do not count, or (where
    floating-point targets are ``probabilities``) of classes (N, C): every row none below 0, with the sum 1. Of any
    other targets nothing is right or wrong: 0 of 0. So it is of a single logit, and of pixels where there are more or
    fewer logits than targets, which a criterion of one's own may compare.
    """
    if logits.dim() not in (2, 4) or logits.shape[1] < 2:
        return 0, 0
    if targets.is_floating_point():
        if logits.dim() == 4 or not probabilities or targets.shape != logits.shape or targets.shape[1] < 2:
            return 0, 0
        # All rows or none: among images with several labels each, those that happen to have one are no sample of them.
        count = ((targets.sum(1) - 1).abs() < 0.01).all() & (targets >= 0).all()
        return (logits.argmax(1) == targets.argmax(1)).sum() * count, len(targets) * count
    if targets.shape != logits[:, 0].shape:
        return 0, 0
    right = logits.argmax(1) == targets
    if ignored is None:
        return right.sum(), targets.numel()
    counts = targets != ignored
    return (right & counts).sum(), counts.sum()
