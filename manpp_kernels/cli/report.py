"""``manpp report``: one picture of a run, from the files that it left: its curves, and what went on in each block."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manpp_kernels.cli.parsing import UserError, read_config

REPORT_NAME = "report.png"
Rows = Sequence[dict[str, Any]]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("report", help="draw what went on in a run", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run of manpp train")
    parser.add_argument("--out", type=Path, metavar="PATH", help=f"the PNG file [{REPORT_NAME} in the run's folder]")


def run(args: argparse.Namespace) -> int:
    from manpp_kernels.cli.observe import BLOCKS_NAME
    from manpp_kernels.cli.report_plots import draw

    path: Path = args.out or args.run_dir / REPORT_NAME
    if path.suffix.lower() != ".png":
        raise UserError(f"--out has to end in .png, and is {path}")
    found = load(args.run_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(found, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    print(path)
    if not found.blocks:
        print(f"there is no {BLOCKS_NAME} in {args.run_dir}: with --observe, manpp train follows every block")
    return 0


@dataclass(frozen=True)
class RunFiles:
    """What a run says of itself: its settings, a row an epoch, and a row an epoch and block where it was observed."""

    settings: dict[str, Any]
    history: Rows
    blocks: Rows


def load(folder: Path) -> RunFiles:
    """The files of a run.

    Raises:
        UserError: there is none, or no epoch of it is done.
    """
    from manpp_kernels.cli.logs import read_csv
    from manpp_kernels.cli.observe import BLOCKS_NAME
    from manpp_kernels.cli.training import CONFIG_NAME, HISTORY_NAME

    if not (folder / CONFIG_NAME).is_file():
        runs = sorted(folder.glob(f"*/*/{CONFIG_NAME}"))
        near = f"; name one of the runs in it, as {runs[0].parent}" if runs else ""
        raise UserError(f"{folder} holds no run: there is no {CONFIG_NAME} in it{near}")
    history = folder / HISTORY_NAME
    rows = read_csv(history) if history.is_file() else []
    if not rows:
        raise UserError(f"no epoch of the run in {folder} is done yet: {history.name} says nothing")
    blocks = folder / BLOCKS_NAME
    return RunFiles(read_config(folder / CONFIG_NAME), rows, read_csv(blocks) if blocks.is_file() else [])
