"""One training run from its settings to its files; what ``manpp train`` and ``manpp demo`` do."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from manpp_kernels.checkpoint import atomic_path, export_weights
from manpp_kernels.cli.display import Display
from manpp_kernels.cli.logs import TensorBoardLog, write_csv
from manpp_kernels.cli.observe import BlockObserver, scalars
from manpp_kernels.cli.parsing import UserError, did_you_mean
from manpp_kernels.cli.plots import plot_curves
from manpp_kernels.cli.ranks import Ranks, device_named, joined
from manpp_kernels.cli.recipe import default_lr, optimizer_factory, scheduler_factory
from manpp_kernels.cli.settings import Settings
from manpp_kernels.cli.summary import summary
from manpp_kernels.data import DataError, ImageData, evaluation_loader, load, training_loader
from manpp_kernels.local.rules import with_normalization
from manpp_kernels.local.targets import BatchError, Criterion
from manpp_kernels.models import MODELS
from manpp_kernels.trainer import CHECKPOINT_NAME, LocalTrainer

CONFIG_NAME = "config.yaml"
HISTORY_NAME = "history.csv"
SUMMARY_NAME = "summary.json"
_NO_MEMORY = "the GPU's memory does not suffice: try a smaller --batch-size, a larger --accumulate, or --amp bf16"


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    folder: Path
    history: list[dict[str, Any]]
    interrupted: bool
    on_gpu: bool


def train(
    settings: Settings,
    place: Path | Callable[[], Path],
    display: Display,
    *,
    resume: Path | None = None,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Train as the settings say, and leave everything in one folder.

    Files: config.yaml (the settings), checkpoint.pt (after every epoch), history.csv, TensorBoard events, curves.png,
    model.safetensors, the weights of the model itself, blocks.csv where the blocks are observed, and, once all epochs
    are done, summary.json.

    Args:
        place: the folder; or what makes a new one, called once everything has proved to fit.
        resume: a checkpoint to continue from.
        stop: asked after every step; True ends the run as Ctrl-C does.

    Raises:
        UserError: the settings do not fit each other, the data or this machine.
    """
    with on_threads(settings.run.threads), joined(settings.trainer, settings.run.device) as ranks:
        return _train(settings, place, display, ranks, resume, stop)


def _train(
    settings: Settings,
    place: Path | Callable[[], Path],
    display: Display,
    ranks: Ranks,
    resume: Path | None,
    stop: Callable[[], bool] | None,
) -> Result:
    run = settings.run
    display.console.quiet = not ranks.first

    def made() -> Path:
        folder = place if isinstance(place, Path) else place()
        folder.mkdir(parents=True, exist_ok=True)
        settings.save(folder / CONFIG_NAME)
        return folder

    with _as_user_errors():
        data = _data(settings, ranks)
        loader, val_loader = _loaders(settings, data, ranks)
        torch.manual_seed(run.seed)
        observer = _observer(settings) if run.observe else None
        criterion = None if observer is None else observer.criterion
        trainer = _trainer(settings, ranks.device, data, len(loader), criterion)
        if not ranks.first:  # whose dropout is its own, as its images are
            torch.manual_seed(run.seed + ranks.rank)
        if resume is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")  # also what another run in this process has heard
                trainer.load(resume)
            for warning in caught:
                display.console.print(str(warning.message), style="yellow")
        folder = ranks.agree(made)
    if observer is not None:
        observer.attach(trainer, folder)
    with contextlib.ExitStack() as stack:
        board = TensorBoardLog(folder, trainer.epoch) if run.tensorboard and ranks.first else None
        if board is not None:
            stack.callback(board.close)
        steps, done = run.epochs * len(loader), trainer.epoch * len(loader) + trainer.position
        stack.enter_context(display.run(settings.trainer.rule, steps, done))

        def on_step(trainer: LocalTrainer, result: Any) -> None:
            display.step(trainer, result)
            if board is not None:
                board.step(result.losses)
            if observer is not None:
                observer.step(trainer, result)
            if stop is not None and stop():
                # What fit takes as Ctrl-C: between two steps, it saves a checkpoint and returns.
                raise KeyboardInterrupt

        def on_epoch(trainer: LocalTrainer, row: dict[str, Any]) -> None:
            display.epoch(row, run.epochs)
            if math.isnan(row["train_loss"]):
                display.console.print("the loss is not a number: try a smaller --lr, or --clip-norm", style="yellow")
            if ranks.first:
                write_csv(trainer.history, folder / HISTORY_NAME)
            if board is not None:
                board.epoch(row)
            for measured in observer.epoch(trainer, folder) if observer is not None else ():
                if board is not None:
                    board.add(scalars(measured), row["epoch"])

        try:
            history = trainer.fit(
                loader,
                run.epochs,
                val_loader=val_loader,
                on_step=on_step,
                on_epoch=on_epoch,
                checkpoint_dir=folder,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(_NO_MEMORY) from error
        except (DataError, BatchError, OSError) as error:
            raise UserError(str(error)) from error
    if ranks.first:
        plot_curves({settings.trainer.rule: history}, folder / "curves.png")
        export_weights(trainer.model, folder / "model.safetensors")
        if not trainer.interrupted:
            with atomic_path(folder / SUMMARY_NAME) as path:
                path.write_text(json.dumps(summary(trainer, data, ranks.count), indent=1) + "\n", encoding="utf-8")
    return Result(folder, history, trainer.interrupted, ranks.device.type == "cuda")


def prepared_step(settings: Settings) -> Callable[[], None]:
    """A training step of such a run, with everything ready, on the same batch every time; returns when it is done.

    Raises:
        UserError: the settings do not fit each other, the data or this machine.
    """
    device = device_named(settings.run.device)
    alone = Ranks(0, 1, device)
    with on_threads(settings.run.threads), _as_user_errors():
        data = _data(settings, alone)
        loader, _ = _loaders(settings, data, alone)
        torch.manual_seed(settings.run.seed)
        trainer = _trainer(settings, device, data, len(loader), None)
    batch = next(iter(loader))

    def step() -> None:
        with on_threads(settings.run.threads):
            trainer.step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    return step


@contextlib.contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """On so many CPU threads (None: as before), and afterwards as before: those of a variant are not the next one's."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def resume_hint(folder: Path) -> str:
    """The sentence that an interrupted run ends with."""
    return (
        f"interrupted; the run is saved in {folder / CHECKPOINT_NAME}: continue it with manpp train --resume {folder}"
    )


@contextlib.contextmanager
def _as_user_errors() -> Iterator[None]:
    """While a run is put together, a value that does not fit is the user's; once it trains, it would be a bug."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_NO_MEMORY) from error
    except (DataError, ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def _fitting(
    model: str, size: int, errors: tuple[type[Exception], ...] = (AssertionError, RuntimeError)
) -> Iterator[None]:
    """While a network is made and sees its first images, what it asserts and what its layers refuse is their size."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except errors as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"{model} cannot be made for images of {size}x{size} ({reason}): choose another --image-size or --model"
        ) from error


def _data(settings: Settings, ranks: Ranks) -> ImageData:
    config, run = settings.data, settings.run
    data = load(
        config.data,
        config.data_root,
        size=config.image_size,
        limit=config.limit,
        test_limit=config.test_limit,
        download=config.download,
    )
    if data.num_classes < 2:
        raise UserError(f"{config.data} has images of one class alone, and there is nothing to tell apart")
    _, shares = ranks.share
    if run.batch_size % shares:
        raise UserError(
            f"a batch of {run.batch_size} images does not come out even over {shares} processes: choose a multiple of "
            "their number"
        )
    if shares > 1 and (len(data.train) < run.batch_size or len(data.test) < shares):
        raise UserError(
            f"{len(data.train)} training and {len(data.test)} test images are too few for {shares} processes and "
            f"batches of {run.batch_size}"
        )
    least = 2 * settings.trainer.accumulate * shares
    if min(run.batch_size, len(data.train)) < least:
        raise UserError(
            f"there are {len(data.train)} training images in batches of {run.batch_size}: "
            f"batch normalisation needs {least} or more in a batch"
        )
    return data


def _loaders(settings: Settings, data: ImageData, ranks: Ranks) -> tuple[Any, Any]:
    """The loaders of training and test images."""
    config, run = settings.data, settings.run
    placing: dict[str, Any] = {"device": ranks.device, "workers": config.workers, "share": ranks.share}
    train = training_loader(data, run.batch_size, seed=run.seed, crop=config.crop, flip=config.flip, **placing)
    # Evaluation keeps no activations, so that larger batches fit; they change nothing but the time.
    return train, evaluation_loader(data, max(run.batch_size, 256), **placing)


def _observer(settings: Settings) -> BlockObserver:
    return BlockObserver(functools.partial(F.cross_entropy, label_smoothing=settings.trainer.label_smoothing))


def _trainer(
    settings: Settings, device: torch.device, data: ImageData, steps: int, criterion: Criterion | None
) -> LocalTrainer:
    run = settings.run
    lr = default_lr(run.optimizer, run.batch_size) if run.lr is None else run.lr
    per_epoch = steps if settings.trainer.schedule == "step" else 1
    rule_options = with_normalization(
        settings.trainer.rule, settings.trainer.rule_options, tuple(data.mean), tuple(data.std)
    )
    # The criterion of an observer smooths labels itself.
    smoothing = settings.trainer.label_smoothing if criterion is None else 0.0
    with _fitting(run.model, data.size, (AssertionError, RuntimeError, ValueError)):  # the name is known to be one
        model = build_model(run.model, data.num_classes, data.size)
    with _fitting(run.model, data.size):
        return LocalTrainer(
            model,
            dataclasses.replace(settings.trainer, rule_options=rule_options, label_smoothing=smoothing),
            example=(3, data.size, data.size),
            num_classes=data.num_classes,
            optimizer=optimizer_factory(run.optimizer, lr, run.weight_decay, run.optimizer_arg),
            scheduler=scheduler_factory(run.schedule, run.epochs, run.warmup, per_epoch),
            criterion=criterion,
            device=device,
        )


def build_model(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """One of this package's models, of torchvision's or, as ``timm/NAME``, of timm's, untrained.

    A vision transformer, whose position embedding fits images of one size, is made for those of ``image_size``, or
    where that is None for those that it was published with.
    """
    library, _, timm_name = name.rpartition("/")
    if library == "timm":
        return _timm_model(timm_name, num_classes, image_size)
    if name in MODELS:
        return MODELS[name](num_classes)
    return _torchvision_model(name, num_classes, image_size)


def _torchvision_model(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    from torchvision import models

    theirs = models.list_models(module=models)
    if name not in theirs:
        raise UserError(
            f"there is no model {name!r}{did_you_mean(name, [*MODELS, *theirs])}; there are {', '.join(MODELS)}, "
            "torchvision's classification models, and timm's as timm/NAME"
        )
    made = inspect.signature(models.get_model_builder(name)).return_annotation
    options: dict[str, Any] = {}
    if made in (models.GoogLeNet, models.Inception3):
        # Classifiers between their blocks are what a rule adds. The initial values are the default, which warns.
        options = {"aux_logits": False, "init_weights": True}
    elif image_size is not None and made is models.VisionTransformer:
        options = {"image_size": image_size}
    elif image_size is not None and made is models.MaxVit:
        options = {"input_size": (image_size, image_size)}
    return models.get_model(name, weights=None, num_classes=num_classes, **options)


def _timm_model(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"timm/{name} needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    # What timm itself asks before it gives a model the size of the images that it was published with.
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    sized: dict[str, Any] = {} if image_size is None or not fixed else {"img_size": image_size}
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **sized)
    return model
