"""``manpp train``: train a network on images, by local learning or end to end."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from manpp_kernels.cli.parsing import UserError, key
from manpp_kernels.cli.settings import Settings, add_setting_options, from_file
from manpp_kernels.recipes import recipe

# What may differ when a run is resumed, as it does not change what is computed.
FREE_ON_RESUME = {"data_root", "download", "workers", "threads", "device", "tensorboard", "observe"}


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
    if args.resume is not None:
        for name in ("config", "recipe"):
            if getattr(args, name) is not None:
                raise UserError(f"--resume continues a run with its own options: leave out --{name}")
        folder, checkpoint = _saved_run(args.resume)
        settings = _resumed(given, folder)
    else:
        checkpoint = None
        given = {**(from_file(args.config) if args.config is not None else {}), **given}
        settings = Settings.of(given if args.recipe is None else _by_recipe(args.recipe, given))
        folder = new_folder(settings)
    display = Display()
    result = train(settings, folder, display, resume=checkpoint)
    display.console.print(results_table({settings.trainer.rule: result.history}, result.on_gpu))
    display.console.print(f"files of the run: {folder}", highlight=False, soft_wrap=True)
    if result.interrupted:
        print(resume_hint(folder), file=sys.stderr)
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
    # The rule's own options belong to the recipe's rule: with another rule they are left out.
    settings = found.settings()
    if given.get("rule", found.rule) != found.rule:
        settings = {option: value for option, value in settings.items() if option not in found.rule_options}
    return {**settings, **given}


def new_folder(settings: Settings) -> Path:
    """The folder of a new run."""
    from manpp_kernels.cli.training import CONFIG_NAME

    if settings.run.out is None:
        data = settings.data.data.removeprefix("folder:").rstrip("/").rpartition("/")[2]
        moment = datetime.now().strftime("%Y%m%d-%H%M%S")
        return Path("runs") / f"{data}-{settings.run.model}-{settings.trainer.rule}-{moment}"
    if (settings.run.out / CONFIG_NAME).exists():
        raise UserError(f"{settings.run.out} holds a run already: continue it with --resume, or choose another folder")
    if settings.run.out.exists() and not settings.run.out.is_dir():
        raise UserError(f"{settings.run.out} is a file, and --out needs a folder")
    return settings.run.out


def _saved_run(path: Path) -> tuple[Path, Path]:
    """Folder and checkpoint of a run, from the path of either."""
    from manpp_kernels.cli.training import CHECKPOINT_NAME, CONFIG_NAME

    folder, checkpoint = (path, path / CHECKPOINT_NAME) if path.is_dir() else (path.parent, path)
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint {checkpoint}")
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} holds no run: there is no {CONFIG_NAME} in it")
    return folder, checkpoint


def _resumed(given: dict[str, Any], folder: Path) -> Settings:
    """The settings of a saved run; options that would change what it computes are refused."""
    from manpp_kernels.cli.training import CONFIG_NAME

    saved = Settings.of(from_file(folder / CONFIG_NAME))
    values = saved.values()
    for name, value in given.items():
        if name not in FREE_ON_RESUME and values.get(name) != value:
            raise UserError(f"--resume continues a run as it was, and --{key(name)} would change it: leave it out")
    return saved.replace(**given)
