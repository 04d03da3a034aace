"""Step times of the variants of a comparison, measured in turns: ``manpp compare --time ROUNDS``.

What the runs of a comparison took says little where they did not have the machine to themselves. Here every variant
takes a step, then every variant the next one, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manpp_kernels.checkpoint import atomic_path
from manpp_kernels.local.graphs import StepGraph

if TYPE_CHECKING:
    from manpp_kernels.cli.compare import Comparison

TIMES_NAME = "step_times.json"
UNCOUNTED = StepGraph.WARM_UP + 1  # what is set up in the first steps, a graph of one of them included


def measure(comparison: Comparison, folder: Path, rounds: int) -> None:
    """Time ``rounds`` steps of every variant, after some that are not counted, and write them to ``folder``.

    Raises:
        UserError: a variant cannot be trained.
    """
    from manpp_kernels.cli.training import prepared_step

    steps = {v.name: prepared_step(next(iter(v.runs.values()))) for v in comparison.variants}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-UNCOUNTED, rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number >= 0:
                times[name].append(time.perf_counter() - begin)
    found: dict[str, Any] = {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "seconds": {name: float(f"{statistics.median(values):.6g}") for name, values in times.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / TIMES_NAME) as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """What :func:`measure` wrote; None where it has not been asked to."""
    path = folder / TIMES_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
