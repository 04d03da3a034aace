"""The results of ``manpp compare``: gathered from the files of its runs, as a table, a CSV file, JSON and figures."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manpp_kernels.checkpoint import atomic_path
from manpp_kernels.cli import comparison_times
from manpp_kernels.cli.logs import read_csv
from manpp_kernels.cli.observe import BLOCKS_NAME
from manpp_kernels.cli.recipe import default_lr
from manpp_kernels.cli.settings import Settings
from manpp_kernels.cli.training import HISTORY_NAME, SUMMARY_NAME

if TYPE_CHECKING:
    from manpp_kernels.cli.compare import Comparison

# What the runs of a comparison have in common, or ought to; where they do not, the table shows all values.
_SHARED = ("images", "test_images", "image_size", "classes", "parameters", "epochs")
_RECIPE = ("data", "model", "batch-size", "optimizer", "weight-decay", "schedule", "warmup", "amp")
_EPOCH = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc")


def collect(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Everything about the finished runs, ready for JSON; runs that have not been finished are counted only."""
    from manpp_kernels.cli.compare import run_folder

    variants = []
    summaries = []
    times = comparison_times.read(folder)
    # Of the variants whose steps, as they were timed, do not tell what the table is of: why not.
    not_timed: dict[str, str | None] = {}
    for variant in comparison.variants:
        runs, environments = [], []
        settings = next(iter(variant.runs.values()))
        for seed in variant.runs:
            path = run_folder(folder, variant, seed)
            if not (path / SUMMARY_NAME).is_file():
                continue
            summary = json.loads((path / SUMMARY_NAME).read_text(encoding="utf-8"))
            summaries.append(summary)
            environments.append(summary["environment"])
            runs.append(_run(seed, summary, path))
        row: dict[str, Any] = {"name": variant.name, "rule": settings.trainer.rule, "options": variant.options}
        row |= {"seeds": list(variant.runs), **_over_seeds(runs), "runs": runs}
        if runs and times is not None:
            timed = times["variants"].get(variant.name)
            differs = None if timed is None else comparison_times.unlike(timed, settings, environments)
            if timed is None or differs is not None:
                not_timed[variant.name] = differs
            else:
                row["seconds_per_step"] = timed["seconds"]
        variants.append(row)
    recipes = [_recipe(settings) for _, _, settings in comparison.runs()]
    return {
        "title": comparison.title,
        "environment": _merged([s["environment"] for s in summaries]),
        "recipe": _merged(recipes),
        "shared": _merged([{name: s[name] for name in _SHARED} for s in summaries]),
        "runs_done": len(summaries),
        "runs_wanted": len(recipes),
        "steps_timed_in_turns": None if times is None else times["rounds"],
        "not_timed_in_turns": not_timed,
        "variants": variants,
    }


def _recipe(settings: Settings) -> dict[str, Any]:
    content = settings.content()
    lr = default_lr(settings.run.optimizer, settings.run.batch_size) if settings.run.lr is None else settings.run.lr
    return {**{name: content.get(name) for name in _RECIPE}, "lr": "the optimizer's own" if lr is None else lr}


def _run(seed: int, summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    history = read_csv(folder / HISTORY_NAME)
    run: dict[str, Any] = {
        "seed": seed,
        "accuracy": history[-1]["val_acc"],
        "train_accuracy": history[-1]["train_acc"],
        "seconds": sum(row["seconds"] for row in history),
        "seconds_per_step": statistics.median(row["seconds_per_step"] for row in history),
        # Empty, or 0 in older files, where it was not measured.
        "peak_memory_bytes": max(row["peak_memory_bytes"] or 0 for row in history) or None,
        "memory": history[-1]["memory"],
        "epochs": [{name: _rounded(row[name]) for name in _EPOCH} for row in history],
        **{name: summary[name] for name in ("blocks", "auxiliary_parameters", "ema_parameters")},
    }
    if (folder / BLOCKS_NAME).is_file():
        # Of the blocks where they have arrived; how they came there is in the run's own files.
        rows = read_csv(folder / BLOCKS_NAME)[-run["blocks"] :]
        run["last_epoch_by_block"] = [{name: _rounded(value) for name, value in row.items()} for row in rows]
    return {name: _rounded(value) for name, value in run.items()}


def _over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A variant's figures; the standard deviation is that of a sample, and needs two seeds."""
    if not runs:
        return {}
    found = [run["accuracy"] for run in runs]
    peaks = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"]]
    return {
        "accuracy": _rounded(statistics.fmean(found)),
        "accuracy_std": _rounded(statistics.stdev(found)) if len(found) > 1 else None,
        "accuracy_range": [min(found), max(found)],
        "train_accuracy": _rounded(statistics.fmean(run["train_accuracy"] for run in runs)),
        "seconds_per_step": _rounded(statistics.median(run["seconds_per_step"] for run in runs)),
        "peak_memory_bytes": max(peaks, default=None),
        "memory": runs[0]["memory"],
        **{name: runs[0][name] for name in ("blocks", "auxiliary_parameters", "ema_parameters")},
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _merged(facts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The facts that several runs have, a list of the values where they differ."""
    found: dict[str, list[Any]] = {}
    for one in facts:
        for name, value in one.items():
            values = found.setdefault(name, [])
            if value not in values:
                values.append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def write(results: dict[str, Any], folder: Path) -> None:
    """comparison.md, .csv and .json, and the figures comparison.png and curves.png, in ``folder``."""
    from manpp_kernels.cli.comparison_plots import plot_accuracies, plot_variants

    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "comparison.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    _write_text(folder / "comparison.md", markdown(results) + "\n")
    with atomic_path(folder / "comparison.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *_COLUMNS])
        for variant in results["variants"]:
            writer.writerows(
                [variant["name"], run["seed"], *(run[name] for name in _COLUMNS)] for run in variant["runs"]
            )
    done = [variant for variant in results["variants"] if variant["runs"]]
    if done:
        plot_variants(done, folder / "comparison.png")
        plot_accuracies(done, folder / "curves.png")


_COLUMNS = (
    "accuracy",
    "train_accuracy",
    "peak_memory_bytes",
    "seconds_per_step",
    "seconds",
    "blocks",
    "auxiliary_parameters",
    "ema_parameters",
    "memory",
)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    """The table, with all that its figures depend on above it."""
    if not results["runs_done"]:
        return f"**{results['title']}**: no run is finished yet ({results['runs_wanted']} to do)."
    base = next((v for v in results["variants"] if v["runs"] and v["rule"] == "e2e"), None)
    memory = "peak memory" if results["environment"]["device"] == "cuda" else "activation memory"
    head = ["variant", "K", "seeds", "test accuracy, %", "train, %", f"{memory}, MiB", "ms a step", "auxiliary", "EMA"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [_line(variant, base) for variant in results["variants"]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_conditions(results)}\n\n{table}\n\n{_legend(results)}"


def _line(variant: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    runs, wanted = variant["runs"], len(variant["seeds"])
    name = variant["name"].replace("|", "\\|")
    if not runs:
        return [name, "", f"0 of {wanted}", "not done", *[""] * 5]
    spread = "" if variant["accuracy_std"] is None else f" ± {100 * variant['accuracy_std']:.2f}"
    peak = variant["peak_memory_bytes"]
    share = f" ({peak / base['peak_memory_bytes']:.0%})" if base and peak and base["peak_memory_bytes"] else ""
    return [
        name,
        str(variant["blocks"]),
        str(len(runs)) if len(runs) == wanted else f"{len(runs)} of {wanted}",
        f"{100 * variant['accuracy']:.2f}{spread}",
        f"{100 * variant['train_accuracy']:.2f}",
        f"{peak / 2**20:.1f}{share}" if peak else "",
        f"{1e3 * variant['seconds_per_step']:.1f}",
        f"{variant['auxiliary_parameters']:,}",
        f"{variant['ema_parameters']:,}",
    ]


def _conditions(results: dict[str, Any]) -> str:
    e, r, s = results["environment"], results["recipe"], results["shared"]
    device = _shown(e["gpu"]) if "gpu" in e else f"{_shown(e['cpu'])}, {_shown(e['cores'])} cores"
    versions = f"manpp-kernels {_shown(e['version'])} (commit {_shown(e['commit'])}), torch {_shown(e['torch'])}"
    side = s["image_size"]
    facts = [
        f"{_shown(r['model'])}, {_number(s['parameters'])} parameters",
        f"{_shown(r['data'])}: {_number(s['images'])} training and {_number(s['test_images'])} test images at "
        f"{_shown(side)}x{_shown(side)}",
        f"{_shown(s['epochs'])} epochs in batches of {_shown(r['batch-size'])}, {_shown(r['optimizer'])}, "
        f"learning rate {_shown(r['lr'])}, {_shown(r['schedule'])}",
        f"seeds {', '.join(map(str, sorted({seed for v in results['variants'] for seed in v['seeds']})))}",
        f"{device}, {_shown(e['threads'])} threads, Python {_shown(e['python'])}, {versions}, {_shown(e['date'])}",
        f"{results['runs_done']} of {results['runs_wanted']} runs done",
    ]
    return f"**{results['title']}**: {'; '.join(facts)}."


def _legend(results: dict[str, Any]) -> str:
    kinds = {run["memory"] or "not measured" for variant in results["variants"] for run in variant["runs"]}
    timed = _step_times(results)
    return (
        "Accuracy after the last epoch: mean over the seeds ± standard deviation of a sample. Memory: "
        f"{', '.join(sorted(kinds))}; in brackets the share of end to end. Step time: {timed}. "
        "Auxiliary: parameters that are trained beside the network; EMA: those that are averaged."
    )


def _step_times(results: dict[str, Any]) -> str:
    """What the step times are medians of, and which times are left out."""
    rounds, others = results.get("steps_timed_in_turns"), results.get("not_timed_in_turns") or {}
    done = [variant["name"] for variant in results["variants"] if variant["runs"]]
    if not rounds or others.keys() >= set(done):
        text = "the median over epochs and seeds"
    elif others:
        text = f"the median of {rounds} taken in turns; of {', '.join(others)} the median over epochs and seeds"
    else:
        text = f"the median of {rounds} that all variants took in turns"
    left_out = [f"{name}, timed with {differs}" for name, differs in others.items() if differs is not None]
    return text + (f" (left out: {'; '.join(left_out)})" if left_out else "")


def _shown(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: Any) -> str:
    return " and ".join(f"{v:,}" for v in value) if isinstance(value, list) else f"{value:,}"
