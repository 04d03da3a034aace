"""Step times of the variants of a comparison, measured in turns: ``manpp compare --time ROUNDS``.

What the runs of a comparison took says little where they did not have the machine to themselves. Here every variant
takes a step, then every variant the next one, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manpp_kernels.checkpoint import atomic_path
from manpp_kernels.training.graphs import StepGraph

if TYPE_CHECKING:
    from manpp_kernels.cli.compare import Variant
    from manpp_kernels.cli.settings import Settings

TIMES_NAME = "step_times.json"
UNCOUNTED = StepGraph.WARM_UP + 1  # what is set up in the first steps, a graph of one of them included


def measure(variants: Sequence[Variant], folder: Path, rounds: int) -> None:
    """Time ``rounds`` steps of every variant, after some that are not counted, and write them to ``folder``.

    Raises:
        UserError: a variant cannot be trained.
    """
    from manpp_kernels.cli.ranks import device_named
    from manpp_kernels.cli.summary import environment
    from manpp_kernels.cli.training import on_threads, prepared_step

    settings = {v.name: next(iter(v.runs.values())) for v in variants}
    steps = {name: prepared_step(s) for name, s in settings.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-UNCOUNTED, rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number >= 0:
                times[name].append(time.perf_counter() - begin)
    variants_found = {}
    for name, values in times.items():
        with on_threads(settings[name].run.threads):
            machine = _machine(environment(device_named(settings[name].run.device)))
        variants_found[name] = {
            "seconds": float(f"{statistics.median(values):.6g}"),
            "machine": machine,
            "settings": _content(settings[name]),
        }
    found: dict[str, Any] = {"rounds": rounds, "variants": variants_found}
    before = read(folder)
    if before is not None and before["rounds"] == rounds:  # of other variants, chosen by --only
        found["variants"] = {**before["variants"], **found["variants"]}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / TIMES_NAME) as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """What :func:`measure` wrote; None where it has not been asked to."""
    path = folder / TIMES_NAME
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if "variants" in found else None  # times without their settings, of before, say nothing


def unlike(timed: Mapping[str, Any], settings: Settings, environments: Iterable[Mapping[str, Any]]) -> str | None:
    """How the steps that a variant was ``timed`` by differ from those of its runs, in words; None if they do not."""
    from manpp_kernels.cli.compare import difference

    for environment in environments:
        for name, value in _machine(environment).items():
            if timed["machine"].get(name) != value:
                return f"{name} {timed['machine'].get(name, 'none')}, and its runs had {value}"
    return difference(timed["settings"], _content(settings))


def _content(settings: Settings) -> dict[str, Any]:
    """The seed says which of a variant's runs was timed, and they all take the same time."""
    return {name: value for name, value in settings.content().items() if name != "seed"}


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: environment[name] for name in ("device", "gpu" if "gpu" in environment else "cpu", "threads")}
