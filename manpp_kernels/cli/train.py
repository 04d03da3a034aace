"""``manpp train``: train a network on images, by local learning or end to end."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from manpp_kernels.cli.parsing import UserError, key
from manpp_kernels.cli.settings import Settings, add_setting_options, from_file
from manpp_kernels.recipes import recipe

# What may differ when a run is resumed, as it does not change what is computed.
FREE_ON_RESUME = {
    "data_root",
    "download",
    "workers",
    "threads",
    "device",
    "tensorboard",
    "observe",
    "cuda_graphs",
    "streams",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("train", help="train a network", description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or TOML; its keys are the options below")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="continue a run: its folder or its checkpoint")
    parser.add_argument(
        "--recipe", metavar="NAME", help="published settings, as man++/cifar10/resnet32-k16; other options change them"
    )
    add_setting_options(parser)


def run(args: argparse.Namespace) -> int:
    from manpp_kernels.cli.display import Display, results_table
    from manpp_kernels.cli.training import resume_hint, train

    given = {name: value for name, value in vars(args).items() if name not in ("command", "config", "resume", "recipe")}
    place: Path | Callable[[], Path]
    if args.resume is not None:
        for name in ("config", "recipe"):
            if getattr(args, name) is not None:
                raise UserError(f"--resume continues a run with its own options: leave out --{name}")
        place, checkpoint = _saved_run(args.resume)
        settings = _resumed(given, place)
    else:
        checkpoint = None
        if args.config is not None and args.recipe is not None:
            raise UserError("--config and --recipe both say what to train, and would be mixed: use one of them")
        given = {**(from_file(args.config) if args.config is not None else {}), **given}
        settings = Settings.of(given if args.recipe is None else _by_recipe(args.recipe, given))
        place = new_folder(settings)
    display = Display()
    result = train(settings, place, display, resume=checkpoint)
    display.console.print(results_table({settings.trainer.rule: result.history}, result.on_gpu))
    display.console.print(f"files of the run: {result.folder}", highlight=False, soft_wrap=True)
    if result.interrupted:
        print(resume_hint(result.folder), file=sys.stderr)
        return 130
    return 0


def _by_recipe(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a recipe, with those in their place that were given."""
    try:
        found = recipe(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if found.data is None and "data" not in given:
        raise UserError(f"the recipe {name!r} needs the folder of its images: --data folder:PATH")
    settings = found.settings()
    # What belongs to the recipe's images, rule, host or optimizer is left out where another takes its place.
    dropped: set[str] = set()
    data = given.get("data", found.data)
    if data != found.data and not (found.data is None and str(data).startswith("folder:")):
        dropped |= {"crop", "flip", "image_size"}
    if given.get("rule", found.rule) != found.rule:
        dropped |= set(found.rule_options)
    if given.get("host", settings.get("host")) != settings.get("host"):
        dropped |= {"host_options"}
    if given.get("optimizer", settings["optimizer"]).lower() != settings["optimizer"]:
        dropped |= {"optimizer_arg", "lr", "weight_decay"}
    return {**{option: value for option, value in settings.items() if option not in dropped}, **given}


def new_folder(settings: Settings) -> Path | Callable[[], Path]:
    """The folder of a new run, or what makes one where none was asked for."""
    if settings.run.out is None:
        data = settings.data.data.removeprefix("folder:").rstrip("/").rpartition("/")[2]
        return dated_folder(f"{data}-{settings.run.model}-{settings.trainer.rule}")
    check_folder(settings.run.out)
    return settings.run.out


def dated_folder(name: str) -> Callable[[], Path]:
    """What makes a new folder in runs/, of this name and the present moment; a number follows where that is taken."""
    return functools.partial(_make_new, Path("runs") / f"{name.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}")


def _make_new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, numbers = path, itertools.count(2)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder = path.with_name(f"{path.name}-{next(numbers)}")


def check_folder(folder: Path) -> None:
    """Raise where ``folder`` has a run that a new one would overwrite.

    Settings are written before the first step, a checkpoint after the first epoch: without one, a run starts again.
    """
    from manpp_kernels.cli.training import CHECKPOINT_NAME, CONFIG_NAME, SUMMARY_NAME

    if (folder / CONFIG_NAME).exists():
        if (folder / CHECKPOINT_NAME).exists():
            again = f"continue it with manpp train --resume {folder}"
            raise UserError(f"{folder} holds a run already: {again}, or choose another folder")
        if (folder / SUMMARY_NAME).exists():
            raise UserError(f"{folder} holds a finished run, whose checkpoint is gone: choose another folder")
    for place in (folder, *folder.parents):
        if place.is_file():
            raise UserError(f"{place} is a file, and --out needs a folder")


def _saved_run(path: Path) -> tuple[Path, Path]:
    """Folder and checkpoint of a run, from the path of either."""
    from manpp_kernels.cli.training import CHECKPOINT_NAME, CONFIG_NAME, SUMMARY_NAME

    folder, checkpoint = (path, path / CHECKPOINT_NAME) if path.is_dir() else (path.parent, path)
    if not checkpoint.is_file():
        config = folder / CONFIG_NAME
        died = path.is_dir() and config.is_file() and not (folder / SUMMARY_NAME).exists()
        again = f": start the run again with --config {config} --out {folder}" if died else ""
        raise UserError(f"there is no checkpoint {checkpoint}{again}")
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} holds no run: there is no {CONFIG_NAME} in it")
    return folder, checkpoint


def _resumed(given: dict[str, Any], folder: Path) -> Settings:
    """The settings of a saved run; options that would change what it computes are refused."""
    from manpp_kernels.cli.training import CONFIG_NAME

    saved = Settings.of(from_file(folder / CONFIG_NAME))
    values = {**saved.values(), "out": folder}
    for name, value in given.items():
        if name not in FREE_ON_RESUME and values.get(name) != value:
            raise UserError(f"--resume continues a run as it was, and --{key(name)} would change it: leave it out")
    return saved.replace(**given)
