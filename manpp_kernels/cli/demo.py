"""``manpp demo``: MAN++ beside end-to-end training on the digits, in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from manpp_kernels.cli.settings import Settings

# ResNet-32 in 16 gradient-isolated blocks: the stem, and each of its residual blocks.
RULES: tuple[dict[str, Any], ...] = ({"rule": "man++", "blocks": 16}, {"rule": "e2e"})
EPOCHS = 12


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="compare MAN++ with end-to-end training", description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="passes over the images [%(default)s]")
    parser.add_argument("--image-size", type=int, default=32, metavar="N", help="the digits' side [%(default)s]")
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N images only")
    parser.add_argument("--out", type=Path, metavar="PATH", help="folder of the files; by default a new one in runs/")


def run(args: argparse.Namespace) -> int:
    from manpp_kernels.cli.display import Display, results_table
    from manpp_kernels.cli.plots import plot_curves
    from manpp_kernels.cli.training import resume_hint, train

    folder = args.out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    common = {"epochs": args.epochs, "image_size": args.image_size, "limit": args.limit, "model": "resnet32"}
    display = Display()
    display.console.print(
        f"ResNet-32 on scikit-learn's digits, resized to {args.image_size}x{args.image_size}: {args.epochs} epochs "
        "by MAN++ with 16 gradient-isolated blocks, then end to end",
        highlight=False,
    )
    histories = {}
    for options in RULES:
        settings = Settings.of({**common, **options})
        name = options["rule"]
        result = train(settings, folder / name, display)
        if result.interrupted:
            print(resume_hint(result.folder), file=sys.stderr)
            return 130
        histories[name] = result.history
    plot_curves(histories, folder / "curves.png")
    display.console.print(results_table(histories, result.on_gpu))
    display.console.print(f"curves: {folder / 'curves.png'}", highlight=False, soft_wrap=True)
    return 0
