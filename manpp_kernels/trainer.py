"""``LocalTrainer``: gradient-isolated training of any model, one local block at a time.

Used as::

    trainer = LocalTrainer(model, TrainerConfig(rule="man++"), example=(3, 32, 32))
    trainer.fit(train_loader, epochs=100, val_loader=val_loader, checkpoint_dir="run")
    trainer.export_state_dict()  # the model's own, as ever
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels import checkpoint
from manpp_kernels.local.network import LocalNetwork
from manpp_kernels.local.options import check_count
from manpp_kernels.local.partition import partition
from manpp_kernels.local.parts import take_apart
from manpp_kernels.local.recompute import make_capturable
from manpp_kernels.local.rules import make_rule
from manpp_kernels.local.targets import Criterion, Targets
from manpp_kernels.training.compiled import check_backend, compile_blocks
from manpp_kernels.training.config import OptimizerFactory, SchedulerFactory, TrainerConfig, make_schedulers
from manpp_kernels.training.epoch import (
    EpochMeter,
    EpochTotals,
    check_trained,
    deferred_interrupt,
    history_row,
    step_schedulers,
)
from manpp_kernels.training.evaluation import evaluate
from manpp_kernels.training.graphs import StepGraph, check_device, make_step_graph
from manpp_kernels.training.group import Alone
from manpp_kernels.training.pipeline import Pipeline
from manpp_kernels.training.progress import Progress, length_of
from manpp_kernels.training.replicas import Replicas
from manpp_kernels.training.resume import CHECKPOINT_NAME, Checkpoints, TrainingState
from manpp_kernels.training.resume_settings import optimizer_settings, settings_of
from manpp_kernels.training.step import Batch, StepResult, TrainingStep, autocast, check_batch

__all__ = ["CHECKPOINT_NAME", "LocalTrainer", "StepResult", "TrainerConfig"]


class LocalTrainer:
    """Trains a model by a rule of local learning; the model that comes out is the user's own.

    Args:
        model: a model with an adapter (see :mod:`manpp_kernels.local.parts`), trained in place.
        config: every setting.
        example: a batch of images, or the shape of an image (C, H, W), to measure features with.
        num_classes: checked against the model's output; None takes it from there.
        optimizer: from a list of parameters to an optimizer; called once, in the unlocked order once a block. None is
            SGD by the config. A pipeline's rank has one for its own blocks.
        scheduler: from an optimizer to a learning-rate scheduler of torch.optim; None keeps the rate.
            ``ReduceLROnPlateau`` follows the validation loss, or the training loss where nothing is validated.
        criterion: loss of logits and targets, a mean over the batch; None is cross-entropy. A module is used as it is,
            on the device, and trained nowhere.
        device: where to train; None leaves the model where it is.

    Attributes:
        model, config, device, network: what is trained; ``network`` holds the local blocks.
        optimizers, schedulers: one of each, in the unlocked order one for each block; no schedulers without a factory.
        epoch, position: epochs done, and batches done of the current one.
        history: a row for each epoch done.
        interrupted: whether the last ``fit`` was ended by Ctrl-C.

    Raises:
        ValueError: the rule, its options, the blocks or the classes cannot be; the message says what to change.
        TypeError: there is no adapter for the model; ``optimizer`` or ``scheduler`` makes what the trainer cannot step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainerConfig | None = None,
        *,
        example: Any,
        num_classes: int | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        criterion: Criterion | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if config is not None and not isinstance(config, TrainerConfig):
            raise TypeError(f"config has to be a TrainerConfig, and is {type(config).__name__}")
        self._config = config = config or TrainerConfig()
        like = next(model.parameters(), None)
        if like is None:
            raise ValueError(f"{type(model).__name__} has no parameters to train")
        self.device = torch.device(device) if device is not None else like.device
        rule = make_rule(config.rule, config.rule_options)
        rule.check_order(config.order)
        rule.check_apart(config.streams, config.shares_out)
        if config.compile is not None:
            check_backend(config.compile)
        if config.cuda_graphs:
            check_device(self.device)
        self._layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.model = model.to(self.device)
        blocks = rule.default_blocks(1 + len(take_apart(model).units)) if config.blocks is None else config.blocks
        parts = partition(model, blocks, example=example, balance=config.balance, recompute=config.recompute)
        if criterion is None and parts.parts.local_head is not None:
            raise ValueError(f"{type(model).__name__} gives no logits of classes; give the trainer a criterion")
        self._targets = Targets(criterion, config.label_smoothing, self.device)
        # The layout comes last: initial values are drawn in the order of memory, and should not depend on it.
        self.network = LocalNetwork(parts, rule, self._targets.criterion, num_classes).to(memory_format=self._layout)
        self._ranks: Alone
        if config.shares_out:
            self._ranks = Pipeline(self.network, self.device, config)
        else:
            self._ranks = Replicas(self.network, self.device) if config.data_parallel else Alone()
        if config.compile is not None:
            # A capture launches what the steps before it did; code for any size, made for a smaller last batch, would
            # come in between, and has not run by then.
            compile_blocks(self.network, config.compile, dynamic=False if config.cuda_graphs else None)

        factory = config.sgd if optimizer is None else optimizer
        shared = [criterion] if isinstance(criterion, nn.Module) else []
        self._local_step = TrainingStep(self.network, config, factory, self.device, ranks=self._ranks, shared=shared)
        self._own_parameters = list(model.parameters())
        made = optimizer_settings(self.optimizers)
        self._schedulers = make_schedulers(scheduler, self.optimizers, config.schedule)
        self._graph: StepGraph | None = None
        if config.cuda_graphs:
            make_capturable(self.network)
            self._graph = make_step_graph(self._local_step, [self.network, *shared], self.optimizers, self.device)

        self.interrupted = False
        self._stepping, self._first_step = False, True
        self._progress = Progress()
        self._checkpoints = Checkpoints(
            TrainingState(self.network, self.optimizers, self.schedulers, self._local_step.scaler, self._progress),
            self.network.describe() | {"order": config.order, "amp": config.amp} | self._ranks.describe(),
            settings_of(config, criterion, made, self.optimizers, self.schedulers),
            self._ranks,
        )

    # Read only: another one in the place of any would be the trainer's alone, and not what trains.

    @property
    def config(self) -> TrainerConfig:
        return self._config

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self._local_step.optimizers

    @property
    def schedulers(self) -> list[Any]:
        return self._schedulers

    @property
    def epoch(self) -> int:
        return self._progress.epoch

    @property
    def position(self) -> int:
        return self._progress.position

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._progress.history

    # One step

    def step(self, batch: Batch | None) -> StepResult:
        """Train every block on one batch.

        A model that is in evaluation mode is put into training mode. Parts of it that alone are in evaluation mode,
        such as frozen batch normalisations, stay in it.

        Args:
            batch: images (N, ...) of a floating dtype, and targets: class numbers (N,), or of pixels (N, H, W), or what
                the criterion takes. Of a pipeline's ranks, rank 0's is everyone's, and the others' is not looked at.

        Raises:
            TypeError: the batch is no pair of tensors.
            ValueError: it does not fit the network (labels on an accelerator are checked in the first step only); the
                model has other parameters than when the trainer was made (looked at in the first step and by ``fit``).
        """
        batch = self._ranks.batch(batch)
        check_batch(batch, self.config.accumulate, self.network.least_images)
        self._targets.check(batch[1], self.network.num_classes, first=self._first_step)
        if self._first_step:
            self._check_model()
        self._first_step = False
        images, targets = self._on_device(batch)
        self._ranks.hand_on(images, targets)
        if not (self.model.training and self.network.training):
            self.model.train()
            self.network.train()
        self._stepping = True
        result = self._local_step(images, targets) if self._graph is None else self._graph.step(images, targets)
        for scheduler in self.schedulers if self.config.schedule == "step" else ():
            scheduler.step()
        self._stepping = False
        return result

    def _check_model(self) -> None:
        """Raise where the model is no longer what the blocks and optimizers hold, and would not be what is trained."""
        # In any order: a parametrisation, or pruning, goes on with the parameter under another name.
        if set(map(id, self.model.parameters())) != set(map(id, self._own_parameters)):
            raise ValueError(
                f"{type(self.model).__name__} has other parameters than when the trainer was made, as after "
                "load_state_dict(assign=True) or with a new layer, and those would not be trained; make the trainer "
                "afterwards"
            )

    def _on_device(self, batch: Batch) -> Batch:
        images, targets = batch
        images = images.to(self.device, non_blocking=True)
        if images.dim() == 4:
            images = images.to(memory_format=self._layout)
        return images, targets.to(self.device, non_blocking=True)

    # Many steps

    def fit(
        self,
        loader: Iterable[Batch],
        epochs: int,
        *,
        val_loader: Iterable[Batch] | None = None,
        on_step: Callable[[LocalTrainer, StepResult], None] | None = None,
        on_epoch: Callable[[LocalTrainer, dict[str, Any]], None] | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool | str | Path = False,
    ) -> list[dict[str, Any]]:
        """Train until ``epochs`` epochs are done, those done before (or in a resumed checkpoint) included.

        Resuming is exact, in the middle of an epoch too, for a loader whose order is a function of the random number
        generators (Python's, NumPy's, torch's, or ``torch.Generator`` objects of the loader and its samplers) or of
        ``set_epoch`` of the loader or its sampler, which is called with the number of epochs done.

        Args:
            loader: batches (images, targets), anew for every epoch.
            epochs: how many in all.
            val_loader: evaluated after every epoch; the random numbers it draws are none of the training's.
            on_step: called after every step with the trainer and its :class:`StepResult`.
            on_epoch: called after every epoch with the trainer and its row of the history. What it changes, such as a
                learning rate, is in the epoch's checkpoint, but for ``requires_grad``.
            checkpoint_dir: where ``checkpoint.pt`` is written: after every epoch, on Ctrl-C, where validating fails.
            checkpoint_every: also write it every so many steps.
            resume: True for the checkpoint in ``checkpoint_dir``, or the path of one or of its folder (see ``load``).

        Returns:
            The history, a row for each epoch: ``epoch`` (from 1), ``train_loss`` and ``train_acc`` (the network's own,
            over the epoch's steps), ``val_loss`` (by the loss trained by, label smoothing included) and ``val_acc``
            (both None without ``val_loader``), ``lr``, ``seconds`` (of the training), ``seconds_per_step`` (without the
            first, which measures memory), ``images_per_second``, ``peak_memory_bytes`` and ``memory`` (what that is: on
            CUDA the allocator's peak over the epoch, or what lay there and what a captured step takes; elsewhere the
            peak of live saved tensors in its first step; both None with ``measure_memory=False``). Ctrl-C ends it after
            the step at hand: the checkpoint is written, ``interrupted`` set, the history so far returned; a second
            Ctrl-C raises at once.

        Raises:
            TypeError: ``epochs`` is no whole number (an endless training is one of many: ``10**9``); or as
                :meth:`step`.
            ValueError: it is negative; the loader gives no batch; ``val_loader`` has none; ``checkpoint_every`` or
                ``resume=True`` without ``checkpoint_dir``; of several ranks one is given what others are not; or as
                :meth:`step`.
            FileExistsError: ``checkpoint_dir`` has the checkpoint of another training.
            OSError: nothing can be written to ``checkpoint_dir``. Like the errors before, it comes before the first
                step.
            FileNotFoundError, CheckpointError: as :meth:`load`, or the loader is not the one of the batches done.
        """
        self._check_model()
        check_count("epochs", epochs, least=0)
        self._ranks.agree(
            epochs=epochs,
            val_loader=None if val_loader is None else "a loader",
            checkpoint_dir=None if checkpoint_dir is None else "a folder",
            checkpoint_every=checkpoint_every,
            resume=bool(resume),
            epoch=self.epoch,
            position=self.position,
        )
        loader = self._ranks.loader(loader)
        path = self._begin(loader, val_loader, checkpoint_dir, checkpoint_every, resume)
        self.interrupted = self._stepping = False
        # The ranks would not agree on the step after which to stop: Ctrl-C then ends them at once.
        with deferred_interrupt(self._ranks.count == 1) as interrupt:
            try:
                while self.epoch < epochs and not interrupt.is_set():
                    if self._train_epoch(loader, interrupt, on_step, path, checkpoint_every):
                        self._finish_epoch(val_loader, path)
                        with self._checkpoints.kept_in(path, self.save):
                            if on_epoch is not None:
                                on_epoch(self, self.history[-1])
                        if path is not None:  # with what the callback changed, such as a learning rate
                            self.save(path)
            except KeyboardInterrupt:
                if self._stepping or self._ranks.count > 1:  # half a step is no state to save
                    raise
                interrupt.set()
            self.interrupted = interrupt.is_set()
            if self.interrupted and path is not None:
                self.save(path)
        return self.history

    def _begin(
        self,
        loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None,
        folder: str | Path | None,
        every: int | None,
        resume: bool | str | Path,
    ) -> Path | None:
        """What ``fit`` does before its first step, where all shows that could only fail later; its checkpoint."""
        path = self._checkpoints.place(folder, every, resume)
        if val_loader is not None and length_of(val_loader) == 0:
            raise ValueError("val_loader has no batch to evaluate; give it images, or None for no validation")
        if resume:
            self.load(path if resume is True and path is not None else str(resume))
        if path is not None:
            self._ranks.first(functools.partial(checkpoint.check_place, path))
        self._progress.use(loader)
        return path

    def _train_epoch(
        self,
        loader: Iterable[Batch],
        interrupt: threading.Event,
        on_step: Callable[[LocalTrainer, StepResult], None] | None,
        path: Path | None,
        every: int | None,
    ) -> bool:
        """The rest of an epoch; False where it was interrupted."""
        totals = self._progress.totals
        meter = EpochMeter(totals, self.config, self.device, self.persistent_tensors)
        for batch in self._ranks.counted(self._progress.batches(loader), self.position):
            with meter.step():
                result = self.step(batch)
            self._progress.position += 1
            if result.logits is not None:
                totals.add(result.losses[-1], result.logits, result.targets, self._targets.answers)
            meter.tick(0 if self._graph is None else self._graph.peak_bytes)
            if on_step is not None:
                on_step(self, result)
            if path is not None and every and self.position % every == 0:
                self.save(path)
                meter.skip()
            if interrupt.is_set():
                return False
        meter.end()
        self._progress.ended = True
        return True

    def _finish_epoch(self, val_loader: Iterable[Batch] | None, path: Path | None) -> None:
        totals = self._ranks.totals(self._progress.totals)
        check_trained(totals, self.epoch)
        self._ranks.end_epoch()
        validation = None
        if val_loader is not None:
            # Where it fails, the epoch is in the checkpoint, and is validated on resuming.
            with self._checkpoints.kept_in(path, self.save), self._progress.kept_rng_state():
                validation = self._evaluate(val_loader)
            validation = self._ranks.totals(validation)
        row = history_row(self.epoch, totals, validation, self.optimizers, self.device)
        if self.config.schedule == "epoch":
            step_schedulers(self.schedulers, row)
        self._progress.finish_epoch(row)

    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float | None]:
        """The deployed model in evaluation mode: ``accuracy`` (0 to 1, None without classes), ``loss``, ``images``.

        The loss is the one trained by, label smoothing included. Batches without images are passed over.

        Raises:
            TypeError, ValueError: as :meth:`step`, but for the number of images; or there are none at all.
        """
        self._ranks.collect()
        totals = self._evaluate(loader)
        return {"accuracy": totals.accuracy(), "loss": totals.mean_loss(), "images": totals.images}

    def _evaluate(self, loader: Iterable[Batch]) -> EpochTotals:
        precision = functools.partial(autocast, self.config, self.device)
        return evaluate(self.model, loader, self._targets, self.network.num_classes, self._on_device, precision)

    # Checkpoints, and what comes out

    def save(self, path: str | Path) -> None:
        """Write a checkpoint atomically: all that the next step depends on, by rank 0 for all ranks.

        Raises:
            CheckpointError: a part holds other things than tensors, numbers and strings; the file is as it was.
        """
        self._ranks.collect()
        self._checkpoints.save(path)

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint of :meth:`save`, of the same rule, network, blocks and optimizer.

        The numbers of optimizers and schedulers, such as a learning rate, are then the checkpoint's, and all others
        those that this trainer was made with; one warning names what differs.

        Args:
            path: the checkpoint, or the folder that ``fit`` wrote it to.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: the file is damaged, foreign, or of another training. Nothing was changed.
        """
        self._ranks.collect()  # what is on its way belongs to the state that is left
        self._checkpoints.load(path)

    def persistent_tensors(self) -> list[Tensor]:
        """Parameters, EMAs and buffers: in memory whether or not there is a graph."""
        return self.network.persistent_tensors()

    def export_state_dict(self) -> dict[str, Any]:
        """The user's model's own ``state_dict``: the same keys, nothing auxiliary; copies on the CPU."""
        self._ranks.collect()
        return {
            key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
            for key, value in self.model.state_dict().items()  # where a module has extra state, of any type
        }
