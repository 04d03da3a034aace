"""The picture of ``manpp report``."""

from __future__ import annotations

from pathlib import Path

# Figure without pyplot: no global state, and no display is looked for.
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from manpp_kernels.cli.report import Rows, RunFiles

_COLUMNS = 3
# Column of history.csv, label, for each of two panels.
_LOSSES = (("train_loss", "training"), ("val_loss", "test"))
_ACCURACIES = (("train_acc", "training"), ("val_acc", "test"))
# Column of blocks.csv, title, factor that brings it to the unit shown.
_OVER_EPOCHS = (
    ("loss", "loss of each block", 1.0),
    ("accuracy", "accuracy of each block's local head (%)", 100.0),
    ("scale", "s, the scale of LB", 1.0),
    ("ema_distance", "distance of EMA and source (share of its norm)", 1.0),
    ("ema_similarity", "cosine of EMA and source", 1.0),
)
_BY_BLOCK = (
    ("accuracy", "local head after the last epoch (%)", 100.0),
    ("memory_bytes", "activation memory (MiB)", 2.0**-20),
)


def draw(found: RunFiles, path: Path) -> None:
    """Losses and accuracies, and every measure of the blocks that the run has, in one PNG file."""
    curves = [spec for spec in _OVER_EPOCHS if _has(found.blocks, spec[0])]
    bars = [spec for spec in _BY_BLOCK if _has(found.blocks, spec[0])]
    count = 2 + len(curves) + len(bars)
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for spare in every[count:]:
        spare.set_axis_off()
    panels = iter(every)
    _history(next(panels), found.history, _LOSSES, 1.0, "loss")
    _history(next(panels), found.history, _ACCURACIES, 100.0, "accuracy (%)")
    by_block = _by_block(found.blocks)
    colours = colormaps["viridis"]
    shade = Normalize(0, max(len(by_block) - 1, 1))
    for column, title, factor in curves:
        axes = next(panels)
        for block, lines in enumerate(by_block):
            measured = [row for row in lines if row[column] is not None]
            epochs, values = [row["epoch"] for row in measured], [row[column] * factor for row in measured]
            axes.plot(epochs, values, ".-", color=colours(shade(block)), linewidth=1, markersize=3)
        _finish(axes, title, "epoch")
        if len(by_block) > 1:
            bar = figure.colorbar(ScalarMappable(shade, colours), ax=axes, pad=0.01)
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            bar.set_label("block", fontsize=7)
    for column, title, factor in bars:
        axes = next(panels)
        last = [(block, lines[-1][column]) for block, lines in enumerate(by_block) if lines[-1][column] is not None]
        axes.bar([block for block, _ in last], [value * factor for _, value in last], color="#1f6fb4")
        _finish(axes, title, "block")
    figure.suptitle(title_of(found), fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def title_of(found: RunFiles) -> str:
    """The run in a line."""
    s, last = found.settings, found.history[-1]
    accuracy = "" if last["val_acc"] is None else f", test accuracy {100 * last['val_acc']:.2f} %"
    blocks = f" in {len(_by_block(found.blocks))} blocks" if found.blocks else ""
    return f"{s.get('rule')}: {s.get('model')}{blocks} on {s.get('data')}, {last['epoch']} epochs{accuracy}"


def _history(axes: Axes, history: Rows, lines: tuple[tuple[str, str], ...], factor: float, title: str) -> None:
    for column, label in lines:
        rows = [row for row in history if row[column] is not None]
        epochs, values = [row["epoch"] for row in rows], [row[column] * factor for row in rows]
        axes.plot(epochs, values, ".-", label=label)
    axes.legend(fontsize=8)
    _finish(axes, title, "epoch")


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(label, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _by_block(rows: Rows) -> list[Rows]:
    blocks = sorted({row["block"] for row in rows})
    return [[row for row in rows if row["block"] == block] for block in blocks]


def _has(rows: Rows, column: str) -> bool:
    return any(row[column] is not None for row in rows)
