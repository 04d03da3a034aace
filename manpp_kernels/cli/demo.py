"""``manpp demo``: MAN++ beside end-to-end training on the digits, in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manpp_kernels.cli.parsing import add_option, options_of
from manpp_kernels.cli.settings import DataConfig, RunConfig, Settings

# ResNet-32 in 16 gradient-isolated blocks, the stem and each of its residual blocks; and the same network in one piece.
# 110 steps of each, for some two minutes on two CPU cores, in the memory format that CPU convolutions prefer.
RECIPE: dict[str, Any] = {
    "data": "digits",
    "model": "resnet32",
    "image_size": 24,
    "batch_size": 64,
    "epochs": 5,
    "channels_last": True,
}
RULES: tuple[dict[str, Any], ...] = ({"rule": "man++", "blocks": 16}, {"rule": "e2e"})
OPTIONS = ("epochs", "image_size", "limit", "test_limit", "batch_size", "seed", "threads", "device", "out")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="compare MAN++ with end-to-end training", description=__doc__)
    for spec in (*options_of(DataConfig), *options_of(RunConfig)):
        if spec.name in OPTIONS:
            text = f"{spec.text.partition(' [')[0]} [{RECIPE[spec.name]}]" if spec.name in RECIPE else spec.text
            add_option(parser, dataclasses.replace(spec, text=text))


def run(args: argparse.Namespace) -> int:
    from manpp_kernels.cli.display import Display, results_table
    from manpp_kernels.cli.plots import plot_curves
    from manpp_kernels.cli.train import check_folder, dated_folder
    from manpp_kernels.cli.training import resume_hint, train

    given = {**RECIPE, **{name: value for name, value in vars(args).items() if name in OPTIONS}}
    out: Path | None = given.pop("out", None)
    # Made once the first of the two has proved to fit, and the same for both.
    folder: Callable[[], Path] = functools.cache(dated_folder("demo") if out is None else lambda: out)
    both = [Settings.of({**given, **options}) for options in RULES]
    display = Display()
    display.console.print(
        "ResNet-32 on scikit-learn's digits (1,437 images of 8x8 to train on), resized to {image_size}x{image_size}: "
        "{epochs} epochs with MAN++ in 16 gradient-isolated blocks, then end to end".format(**given),
        highlight=False,
    )

    def place(rule: str) -> Path:
        return folder() / rule

    histories = {}
    for settings in both:
        rule = settings.trainer.rule
        if out is not None:
            check_folder(out / rule)
        result = train(settings, functools.partial(place, rule), display)
        if result.interrupted:
            print(resume_hint(result.folder), file=sys.stderr)
            return 130
        histories[rule] = result.history
    plot_curves(histories, folder() / "curves.png")
    display.console.print(results_table(histories, result.on_gpu))
    display.console.print(f"curves: {folder() / 'curves.png'}", highlight=False, soft_wrap=True)
    return 0
