"""The figures of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Figure without pyplot: no global state, and no display is looked for.
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Variants = Sequence[dict[str, Any]]

# Title, and a variant's value in the unit of the title; one that was not measured has no bar.
_BARS: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
    ("peak memory (MiB)", lambda variant: (variant["peak_memory_bytes"] or math.nan) / 2**20),
    ("ms a step", lambda variant: 1e3 * variant["seconds_per_step"]),
    ("auxiliary parameters (thousands)", lambda variant: variant["auxiliary_parameters"] / 1e3),
)


def plot_variants(variants: Variants, path: Path) -> None:
    """A line a variant: accuracy of each seed and their mean; memory, step time and auxiliary parameters as bars."""
    figure = Figure(figsize=(4 + 4 * len(_BARS), 1.2 + 0.32 * len(variants)), layout="constrained")
    panels = figure.subplots(1, 1 + len(_BARS), sharey=True)
    places = range(len(variants))
    panels[0].set(title="test accuracy (%)")
    _dots(panels[0], [[100 * run["accuracy"] for run in variant["runs"]] for variant in variants])
    for axes, (title, value) in zip(panels[1:], _BARS, strict=True):
        axes.set(title=title)
        axes.barh(places, [value(variant) for variant in variants], 0.6, color="#1f6fb4")
    for axes in panels:
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(list(places), [variant["name"] for variant in variants])
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _dots(axes: Axes, found: Sequence[Sequence[float]]) -> None:
    """Each seed as a dot and the mean as a stroke: the differences are small, so the axis does not begin at zero."""
    for place, values in enumerate(found):
        axes.plot(values, [place] * len(values), "o", color="#1f6fb4", alpha=0.6, markersize=5)
        axes.plot([statistics.fmean(values)], [place], "|", color="black", markersize=14, markeredgewidth=2)


def plot_accuracies(variants: Variants, path: Path) -> None:
    """Test accuracy over the epochs, the mean of a variant's seeds with their range."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"]
    for index, variant in enumerate(variants):
        epochs = [row["epoch"] for row in variant["runs"][0]["epochs"]]
        by_epoch = [
            [100 * row["val_acc"] for row in rows]
            for rows in zip(*(run["epochs"] for run in variant["runs"]), strict=True)
        ]
        # Twenty colours: beyond them, the strokes tell variants apart.
        colour, stroke = colours(index % 20), "-" if index < 20 else "--"
        means = [statistics.fmean(values) for values in by_epoch]
        axes.plot(epochs, means, color=colour, linestyle=stroke, label=variant["name"])
        axes.fill_between(epochs, [*map(min, by_epoch)], [*map(max, by_epoch)], color=colour, alpha=0.12)
    axes.set(title="test accuracy (%), mean and range over seeds", xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, metadata={"Software": None})
