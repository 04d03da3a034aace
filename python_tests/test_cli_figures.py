"""Tables and figures of runs that are written down here by hand: the right epochs, seeds and units."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from test_compare import config

from manpp_kernels.cli import compare, comparison, comparison_plots
from manpp_kernels.cli.display import results_table
from manpp_kernels.cli.logs import write_csv
from manpp_kernels.cli.plots import plot_curves
from manpp_kernels.cli.report import RunFiles
from manpp_kernels.cli.report_plots import draw
from manpp_kernels.cli.summary import summary
from manpp_kernels.data import load
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

MIB = 2**20


def history(*accuracies: float, peak: int | None = 2 * MIB) -> list[dict[str, Any]]:
    """An epoch for each test accuracy: it took 1, 2, … seconds, and a step 1, 4, 9, … ms; the first kept the most."""
    kind = None if peak is None else "live saved tensors peak"
    return [
        {
            **{"epoch": n, "train_loss": 4.0 / n, "train_acc": accuracy / 2, "val_loss": 8.0 / n, "val_acc": accuracy},
            **{"lr": 0.1, "seconds": float(n), "seconds_per_step": n * n / 1000, "images_per_second": 1.0},
            **{"peak_memory_bytes": peak if peak is None or n == 1 else peak // 2, "memory": kind},
        }
        for n, accuracy in enumerate(accuracies, 1)
    ]


# By variant and seed; the best epoch is not the last.
RUNS = {
    "e2e": {0: history(0.25, 0.75, 0.5, peak=8 * MIB), 1: history(0.25, 0.875, 0.625, peak=4 * MIB)},
    "dgl | narrow": {0: history(0.125, 0.25, 0.375)},
    "man++/dgl": {0: history(0.5, 0.5, 0.5), 1: history(0.5, 0.75, 0.25)},
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, instead of their files."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: found.append(self))
    return found


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    return gathered(tmp_path, RUNS)


def gathered(tmp_path: Path, runs: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """What ``manpp compare`` gathers from the files of these runs."""
    asked = compare.read(config(tmp_path))
    environment = {"device": "cpu", "cpu": "abacus", "cores": 2, "threads": 1}
    environment |= {name: "1" for name in ("python", "version", "commit", "torch", "date")}
    shared = {"images": 64, "test_images": 32, "image_size": 8, "classes": 10, "parameters": 1000, "epochs": 3}
    sizes = {"blocks": 3, "auxiliary_parameters": 2500, "ema_parameters": 500}
    for variant, seed, _ in asked.runs():
        folder = compare.run_folder(tmp_path, variant, seed)
        folder.mkdir(parents=True)
        write_csv(runs[variant.name][seed], folder / "history.csv")
        (folder / "summary.json").write_text(json.dumps({"environment": environment, **shared, **sizes}))
    return comparison.collect(asked, tmp_path)


def lines(axes: Axes) -> list[list[float]]:
    return [[float(y) for y in line.get_ydata()] for line in axes.lines]


def test_the_table_of_a_comparison(results: dict[str, Any]) -> None:
    """Accuracy after the last epoch, the deviation of a sample; of the memory the most, of the times the median."""
    rows = [line for line in comparison.markdown(results).splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| e2e | 3 | 2 | 56.25 ± 8.84 | 28.12 | 8.0 (100%) | 4.0 | 2,500 | 500 |",
        "| dgl \\| narrow | 3 | 1 | 37.50 | 18.75 | 2.0 (25%) | 4.0 | 2,500 | 500 |",
        "| man++/dgl | 3 | 2 | 37.50 ± 17.68 | 18.75 | 2.0 (25%) | 4.0 | 2,500 | 500 |",
    ]
    assert [run["seconds"] for variant in results["variants"] for run in variant["runs"]] == [6.0] * 5


def test_the_figures_of_a_comparison(results: dict[str, Any], figures: list[Figure]) -> None:
    comparison_plots.plot_variants(results["variants"], Path())
    comparison_plots.plot_accuracies(results["variants"], Path())
    bars, curves = figures
    dots, *others = bars.axes
    assert [list(map(float, line.get_xdata())) for line in dots.lines[::2]] == [[50, 62.5], [37.5], [50, 25]]
    assert [float(line.get_xdata()[0]) for line in dots.lines[1::2]] == [56.25, 37.5, 37.5]
    assert [axes.get_title() for axes in others] == [
        "peak memory (MiB)",
        "ms a step",
        "auxiliary parameters (thousands)",
    ]
    assert [[bar.get_width() for bar in axes.patches] for axes in others] == [[8, 2, 2], [4] * 3, [2.5] * 3]
    assert lines(curves.axes[0]) == [[25, 81.25, 56.25], [12.5, 25, 37.5], [50, 62.5, 37.5]]
    band = curves.axes[0].collections[2].get_paths()[0].vertices
    assert {(x, y) for x, y in band.tolist()} == {(1, 50), (2, 50), (2, 75), (3, 25), (3, 50)}


def test_memory_that_was_not_measured(tmp_path: Path, figures: list[Figure]) -> None:
    """A variant has no figure and no bar for it, and no share is that of an end-to-end run without one."""
    results = gathered(tmp_path, {**RUNS, "e2e": {seed: history(0.5, peak=None) for seed in (0, 1)}})
    text = comparison.markdown(results)
    assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
        "| e2e | 3 | 2 | 50.00 ± 0.00 | 25.00 |  | 1.0 | 2,500 | 500 |",
        "| dgl \\| narrow | 3 | 1 | 37.50 | 18.75 | 2.0 | 4.0 | 2,500 | 500 |",
        "| man++/dgl | 3 | 2 | 37.50 ± 17.68 | 18.75 | 2.0 | 4.0 | 2,500 | 500 |",
    ]
    assert "Memory: live saved tensors peak, not measured;" in text
    comparison_plots.plot_variants(results["variants"], Path())
    assert [bar.get_width() for bar in figures[0].axes[1].patches if bar.get_width() >= 0] == [2, 2]
    console = Console(width=120, record=True)
    console.print(results_table({"a": history(0.5, peak=None)}, on_gpu=False))
    assert ["a", "1", "50.00 %", "–", "0.001", "1 s"] in [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()
    ]


def test_the_figure_of_a_run(figures: list[Figure]) -> None:
    blocks = [
        {
            **{"epoch": epoch, "block": block, "loss": 1.0 / epoch, "accuracy": epoch / 4 + block / 8},
            **{"scale": None, "ema_distance": None, "ema_similarity": None, "memory_bytes": (epoch + block) * MIB},
        }
        for epoch in (1, 2)
        for block in (0, 1)
    ]
    draw(RunFiles({"rule": "dgl"}, history(0.25, 0.5), blocks), Path())
    found = {axes.get_title(): axes for axes in figures[0].axes}
    assert lines(found["loss"]) == [[4, 2], [8, 4]]
    assert lines(found["accuracy (%)"]) == [[12.5, 25], [25, 50]]
    assert lines(found["loss of each block"]) == [[1, 0.5]] * 2
    assert lines(found["accuracy of each block's local head (%)"]) == [[25, 50], [37.5, 62.5]]
    heights = {name: [bar.get_height() for bar in axes.patches] for name, axes in found.items() if axes.patches}
    assert heights == {"local head after the last epoch (%)": [50, 62.5], "activation memory (MiB)": [2, 3]}


def test_the_curves_and_the_table_of_runs(figures: list[Figure]) -> None:
    runs = {"a": history(0.25, 0.75, 0.5), "b": history(0.5)}
    plot_curves(runs, Path())
    assert [lines(axes) for axes in figures[0].axes] == [
        [[4, 2, 4 / 3], [4]],
        [[12.5, 37.5, 25], [25]],
        [[25, 75, 50], [50]],
    ]
    console = Console(width=120, record=True)
    console.print(results_table(runs, on_gpu=False))
    text = console.export_text()
    for row in (["a", "3", "50.00 %", "2.0 MiB", "0.004", "6 s"], ["b", "1", "50.00 %", "2.0 MiB", "0.001", "1 s"]):
        assert any([cell.strip() for cell in line.split("│")[1:-1]] == row for line in text.splitlines()), text


def test_the_summary_of_a_run_counts_each_parameter_once() -> None:
    model = CifarResNet((1, 1, 1), widths=(4, 8, 8))
    trainer = LocalTrainer(model, TrainerConfig(rule="man++"), example=(3, 8, 8))
    found = summary(trainer, load("digits", size=8, limit=20, test_limit=10))
    auxiliary = [block.auxiliary for block in trainer.network if block.auxiliary is not None]
    averaged = sum(p.numel() for a in auxiliary for p in a.transform.ema.parameters())
    assert found["ema_parameters"] == averaged
    assert found["auxiliary_parameters"] == sum(p.numel() for a in auxiliary for p in a.parameters()) - averaged
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert (found["blocks"], found["images"], found["test_images"], found["image_size"]) == (4, 20, 10, 8)
