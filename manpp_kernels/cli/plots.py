"""Curves of one or several runs as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

History = Sequence[Mapping[str, Any]]

# Title, column of the history, factor that brings it to the unit shown.
_PANELS = (
    ("training loss", "train_loss", 1.0),
    ("training accuracy (%)", "train_acc", 100.0),
    ("test accuracy (%)", "val_acc", 100.0),
)


def plot_curves(runs: Mapping[str, History], path: Path) -> None:
    """Draw loss and accuracy over the epochs, a line a run.

    Args:
        runs: the history of each run, by the name its line gets.
        path: of the PNG file.
    """
    # Figure without pyplot: no global state, and no display is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(_PANELS), 3.2), layout="constrained")
    for axes, (title, column, factor) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for name, history in runs.items():
            rows = [row for row in history if row.get(column) is not None]
            axes.plot(
                [row["epoch"] for row in rows],
                [row[column] * factor for row in rows],
                marker="o" if len(rows) < 30 else None,
                markersize=3,
                label=name,
            )
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if runs:
        figure.axes[0].legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
