"""The settings of a :class:`manpp_kernels.trainer.LocalTrainer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from manpp_kernels.local.options import check_choices, check_count, check_fraction, check_positive, check_weight

OptimizerFactory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
_METHODS_OF_A_SCHEDULER = ("step", "state_dict", "load_state_dict")
AMP_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainerConfig:
    """How a :class:`LocalTrainer` trains; the defaults are those of the MAN++ publication.

    Attributes:
        rule: ``"e2e"``, ``"dgl"``, ``"man"``, ``"man++"``, … (``manpp_kernels.local.rule_names()``).
        rule_options: the rule's options, as its dataclass or a mapping of some fields; None for its defaults.
        blocks: K; or boundaries, see :func:`manpp_kernels.local.partition`; None for one block a unit (e2e: 1).
        balance: how K blocks are distributed over the units, ``"count"`` or ``"memory"``.
        order: of a step. ``"published"``: for each block forward, backward, EMA update; one optimizer step at the end.
            ``"unlocked"``: all EMA updates in one launch first, then for each block forward, backward, optimizer step,
            gradients freed, so that gradients never exist for more than one block.
        learning_rate, sgd_momentum, nesterov, weight_decay: of SGD, where the trainer is given no optimizer; with a
            learning rate of None it has to be given one.
        schedule: how often a scheduler steps, every ``"epoch"`` or every ``"step"``.
        label_smoothing: of the cross-entropy, in training and evaluation alike; with a criterion of one's own an error.
        clip_norm: the most that the gradient norm of each block may be; None does not clip.
        accumulate: micro-batches that a batch is split into; their gradients are averaged by their sizes, and the EMA
            and the optimizer step once a batch.
        amp: autocast to ``"bf16"`` or ``"fp16"`` (the latter with loss scaling); None for full precision.
        channels_last: keep the model and the images in the channels-last memory format. (On a CPU with one thread,
            strided 1x1 convolutions of PyTorch 2.14 corrupt memory in it where they take fewer than 8 channels.)
        recompute: run the units of a block once more in its backward pass, in place of keeping their activations until
            then: less memory, most so where a block has many units, and more time (activation checkpointing). With
            ``cuda_graphs`` for units alone that draw no random numbers (dropout); with ``compile`` by the backends
            ``"inductor"`` and ``"aot_eager"``, for blocks that do not overlap (as those of ``mlaan`` and ``lookahead``
            do) and units without spectral normalisation.
        compile: the ``torch.compile`` backend for the blocks, such as ``"inductor"``; None for none. The body and the
            auxiliary network of each are compiled on their own, in the first step.
        cuda_graphs: capture a step in a CUDA graph after the first few, and replay it: on a GPU small blocks otherwise
            wait for the host to launch them. Captured anew where the learning rate has changed, so not for a schedule
            that steps every step. For optimizers that can be captured (SGD; Adam and its like with
            ``capturable=True``), and not with ``amp="fp16"``, whose loss scaling waits for the device, or
            ``data_parallel``. A replay repeats what the captured step did on the device, and none of its Python: no
            hooks, no counters or random numbers on the host, no numbers of modules that were changed since. (Tensors of
            the network, and of a criterion that is a module, may be replaced; a criterion keeps no others from one call
            to the next.) It has memory of its own, beside which a batch of another size needs its own: leave room for
            both (``peak_memory_bytes`` is that of the larger).
        streams: over which a captured step spreads its blocks, in turn: each begins as soon as the one before hands on
            its features, beside what that has left to do. The values are those of blocks one after the other, where the
            criterion changes no tensors of its own. Memory that one stream has done with is not another's, and cuBLAS
            takes some for each.
        data_parallel: train a copy on every rank of ``torch.distributed``'s default process group, on batches of its
            own (as of a ``DistributedSampler``), with averaged gradients. All but ``evaluate`` is then called on every
            rank, with as many batches and the same folder for checkpoints. Running statistics are each rank's own, and
            from the end of an epoch on rank 0's. Ctrl-C ends it at once, without a checkpoint.
        pipeline: share the blocks out over the ranks of ``torch.distributed``'s default process group, some in a row to
            each: True evenly, a sequence as many as it says to each rank. A rank hands on its features and turns to the
            next batch, so that all work at once; the values are those of one process. Rank 0's batches are everyone's:
            elsewhere ``step`` may be given None, and a loader's length alone counts. All methods are called on every
            rank, with the same folder for checkpoints. A rank has all parameters, but activations, gradients and
            optimizer states of its own blocks alone; others' blocks are brought up to date at the end of an epoch, by
            ``save``, ``evaluate`` and ``export_state_dict``. Random numbers (dropout, the rounding of EMAs in half
            precision) are each rank's own, and so are its optimizer and what a criterion keeps. Not for rules whose
            blocks overlap, ``amp="fp16"``, ``cuda_graphs`` or ``data_parallel``. Ctrl-C ends it at once, without a
            checkpoint.
        measure_memory: report the peak memory of each epoch; the history has none otherwise.
    """

    rule: str = "man++"
    rule_options: Any = None
    blocks: int | Sequence[int | str] | None = None
    balance: Literal["count", "memory"] = "count"
    order: Literal["published", "unlocked"] = "published"
    learning_rate: float | None = 0.1
    sgd_momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    schedule: Literal["epoch", "step"] = "epoch"
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    accumulate: int = 1
    amp: Literal["bf16", "fp16"] | None = None
    channels_last: bool = False
    recompute: bool = False
    compile: str | None = None
    cuda_graphs: bool = False
    streams: int = 1
    data_parallel: bool = False
    pipeline: bool | Sequence[int] = False
    measure_memory: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        check_count("accumulate", self.accumulate)
        check_count("streams", self.streams)
        check_fraction("label_smoothing", self.label_smoothing)
        if self.learning_rate is not None:
            check_weight("learning_rate", self.learning_rate)
        check_weight("sgd_momentum", self.sgd_momentum)
        check_weight("weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        if self.compile is not None and not isinstance(self.compile, str):
            raise TypeError(
                "compile has to be the name of a torch.compile backend, such as 'inductor', or None, and is "
                f"{self.compile!r}"
            )
        if self.streams > 1 and not self.cuda_graphs:
            raise ValueError("streams is of use for captured steps alone; set cuda_graphs too, or streams to 1")
        if self.cuda_graphs:
            self._check_against("cuda_graphs", schedule="step", amp="fp16", data_parallel=True)
        if not isinstance(self.pipeline, bool):
            if isinstance(self.pipeline, str) or not isinstance(self.pipeline, Sequence):
                raise TypeError(f"pipeline has to be True, False or a number for each rank, and is {self.pipeline!r}")
            for count in self.pipeline:
                check_count("every number of blocks in pipeline", count)
        if self.shares_out:
            self._check_against("pipeline", amp="fp16", cuda_graphs=True, data_parallel=True)

    @property
    def shares_out(self) -> bool:
        """Whether the blocks are shared out over the ranks of a process group."""
        return self.pipeline is not False

    def _check_against(self, setting: str, **others: Any) -> None:
        """Raise where another setting has a value that ``setting`` does not go with."""
        for name, value in others.items():
            if getattr(self, name) == value:
                raise ValueError(f"{setting} does not go with {name}={value!r}")

    def sgd(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer that a trainer uses which is given none.

        Raises:
            ValueError: there is no learning rate.
        """
        if self.learning_rate is None:
            raise ValueError(
                "the config has no learning rate, as it is not for SGD: give the trainer an optimizer (of a recipe: "
                "optimizer=recipe.optimizer), or set learning_rate"
            )
        return torch.optim.SGD(
            parameters,
            self.learning_rate,
            momentum=self.sgd_momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


def make_optimizers(make: OptimizerFactory, groups: Sequence[list[torch.nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """An optimizer for each list of parameters; raises where the trainer does not know how to step one."""
    _check_factory(
        "optimizer",
        make,
        "a list of parameters, those of the auxiliary networks among them, such as lambda parameters: "
        "torch.optim.SGD(parameters, lr=0.1)",
    )
    optimizers = [make(group) for group in groups]
    _check_optimizers(optimizers, groups)
    return optimizers


def make_schedulers(
    make: SchedulerFactory | None, optimizers: Sequence[torch.optim.Optimizer], schedule: str
) -> list[Any]:
    """A scheduler for each optimizer, or none; raises where the trainer does not know how to step one."""
    if make is None:
        return []
    _check_factory(
        "scheduler",
        make,
        "an optimizer, such as lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)",
    )
    schedulers = [make(optimizer) for optimizer in optimizers]
    _check_schedulers(schedulers, schedule)
    for scheduler, optimizer in zip(schedulers, optimizers, strict=True):
        moved = getattr(scheduler, "optimizer", None)
        # By their groups, as what wraps an optimizer has the groups of the one inside.
        if isinstance(moved, torch.optim.Optimizer) and not _share_groups(moved, optimizer):
            raise ValueError(
                f"{type(scheduler).__name__} was made for another optimizer, and the rates of this one would stay: "
                "make it of the optimizer that the factory is called with"
            )
    return schedulers


def _share_groups(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    return any(group is other for group in a.param_groups for other in b.param_groups)


def _check_factory(name: str, make: Any, of: str) -> None:
    if not callable(make):
        raise TypeError(
            f"{name} has to be a function that makes one for {of}, and is of the class {type(make).__name__}"
        )


def _check_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[list[torch.nn.Parameter]]
) -> None:
    """Raise where the trainer does not know how to step an optimizer, or it steps others than it was given."""
    for optimizer, given in zip(optimizers, parameters, strict=True):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer has to make a torch.optim.Optimizer, and made {type(optimizer).__name__}")
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if held != set(given):
            raise ValueError(
                f"{type(optimizer).__name__} holds {len(held & set(given))} of the {len(given)} parameters it was given"
                f" and {len(held - set(given))} others: make it of the list that the factory is called with, which has "
                "those of the auxiliary networks"
            )
        needed = _needed(optimizer.step)
        if needed:
            raise TypeError(
                f"the step method of {type(optimizer).__name__} needs {', '.join(needed)}, and the trainer calls it "
                "without arguments, once a step; use another optimizer"
            )


def _needed(method: Callable[..., Any]) -> list[str]:
    """The arguments without which ``method`` cannot be called."""
    return [
        parameter.name
        for parameter in inspect.signature(method).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]


def _check_schedulers(schedulers: Sequence[Any], schedule: str) -> None:
    """Raise where the trainer does not know how to step a scheduler."""
    for scheduler in schedulers:
        name = type(scheduler).__name__
        if isinstance(scheduler, ReduceLROnPlateau):
            if schedule == "step":
                raise ValueError(
                    f"{name} looks at the loss of an epoch; set schedule to 'epoch', and it is {schedule!r}"
                )
            continue
        missing = [m for m in _METHODS_OF_A_SCHEDULER if not callable(getattr(scheduler, m, None))]
        needed = _needed(scheduler.step) if "step" not in missing else []
        if needed:
            raise TypeError(
                f"the step method of the scheduler {name} needs {', '.join(needed)}, and the trainer calls it without "
                "arguments; wrap it, or use one of torch.optim.lr_scheduler"
            )
        if missing:
            raise TypeError(
                f"scheduler has to make an object with the methods {', '.join(_METHODS_OF_A_SCHEDULER)}, and made "
                f"{name}; return one of torch.optim.lr_scheduler (for several at once there is ChainedScheduler)"
            )
