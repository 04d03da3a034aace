"""``manpp bench``: run the benchmarks of a checkout with pytest-benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import manpp_kernels
from manpp_kernels.cli.parsing import UserError, check_writable, did_you_mean

PREFIX = "bench_"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="run the benchmarks of a checkout", description=__doc__)
    parser.add_argument("name", nargs="?", help="one benchmark, as ema_scale_update; all of them where none is named")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look at the figures, not a measurement")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write pytest-benchmark's results to this file")


def bench_folder() -> Path:
    """The folder bench of the checkout that this package is installed from, or of the current folder."""
    for root in (Path(manpp_kernels.__file__).resolve().parents[1], Path.cwd()):
        if any((root / "bench").glob(f"{PREFIX}*.py")):
            return root / "bench"
    raise UserError(
        "the benchmarks are no part of an installed package: run this in a checkout, which has a folder bench"
    )


def run(args: argparse.Namespace) -> int:
    folder = bench_folder()
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise UserError("the benchmarks need pytest-benchmark: pip install 'manpp-kernels[bench]'")
    files = {file.stem.removeprefix(PREFIX): file for file in sorted(folder.glob(f"{PREFIX}*.py"))}
    if args.name is not None and args.name not in files:
        near = did_you_mean(args.name, files)
        raise UserError(f"there is no benchmark {args.name!r}{near}; there are {', '.join(files)}")
    chosen = files.values() if args.name is None else [files[args.name]]
    command = [sys.executable, "-m", "pytest", "-o", f"python_files={PREFIX}*.py", "-p", "no:cacheprovider", "-s"]
    if args.quick:
        command += ["--benchmark-min-rounds=3", "--benchmark-max-time=0.2", "--benchmark-warmup=off"]
    if args.json is not None:
        check_writable("--json", args.json, "results")
        command.append(f"--benchmark-json={args.json.resolve()}")
    # From the folder itself, and with this package found first: in its root Python would import the checkout's, which
    # has no compiled library where another is installed.
    own = Path(manpp_kernels.__file__).resolve().parents[1]
    paths = os.pathsep.join([str(own), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, **({"MANPP_BENCH_QUICK": "1"} if args.quick else {})}
    process = subprocess.Popen([*command, *map(str, chosen)], cwd=folder, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:  # of which pytest has heard as well, and shows what it has
        process.wait()
        raise
