"""``manpp compare``: train the variants of a configuration file alike, for every seed, and put them side by side."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from manpp_kernels.cli.parsing import UserError, add_option, check_writable, did_you_mean, key, options_of, read_config
from manpp_kernels.cli.settings import DataConfig, RunConfig, Settings, from_content, from_file
from manpp_kernels.cli.train import FREE_ON_RESUME

_KEYS = ("title", "seeds", "common", "variants")
# What a comparison sets for each of its runs.
_OURS = ("seed", "out")


@dataclass(frozen=True)
class Variant:
    """One line of the table: the options that make it what it is, and all settings of its run with each seed."""

    name: str
    options: dict[str, Any]
    runs: dict[int, Settings]

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9+.=-]+", "-", self.name).strip("-") or "variant"


@dataclass(frozen=True)
class Comparison:
    """What a configuration file asks for."""

    title: str
    variants: list[Variant]

    def runs(self) -> list[tuple[Variant, int, Settings]]:
        """Every run, seed by seed: whatever ends a comparison early, the variants have been treated alike."""
        seeds = sorted({seed for variant in self.variants for seed in variant.runs})
        return [(v, seed, v.runs[seed]) for seed in seeds for v in self.variants if seed in v.runs]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("compare", help="train several variants alike", description=__doc__)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", required=True, help="YAML or TOML; see docs/comparison.md"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="folder of the comparison; what is done there is not done again [runs/ and the name of the file]",
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="train (or time) this variant only; repeatable")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="stop after so long; run again to continue")
    parser.add_argument("--table", action="store_true", help="train nothing: the table of what is there")
    parser.add_argument(
        "--time",
        type=int,
        metavar="ROUNDS",
        help="train nothing: time so many steps of every variant, in turns, for the table",
    )
    group = parser.add_argument_group("instead of what the file says, for every variant")
    for spec in (*options_of(DataConfig), *options_of(RunConfig)):
        if spec.name not in _OURS:
            add_option(group, dataclasses.replace(spec, text=spec.text.partition(" [")[0]))


def run(args: argparse.Namespace) -> int:
    from manpp_kernels.cli import comparison_times
    from manpp_kernels.cli.comparison import collect, markdown, write
    from manpp_kernels.cli.display import Display

    if args.time_limit is not None and not args.time_limit > 0:
        raise UserError(f"--time-limit has to be a positive number of minutes, and is {args.time_limit:g}")
    if args.time is not None and args.time < 1:
        raise UserError(f"--time has to be a positive number of steps, and is {args.time}")
    ours = ("command", "config", "out", "only", "time_limit", "table", "time")
    given = {name: value for name, value in vars(args).items() if name not in ours}
    comparison = read(args.config, given)
    folder: Path = getattr(args, "out", Path("runs") / args.config.stem)
    for variant, seed, settings in comparison.runs():
        _check_saved(settings, run_folder(folder, variant, seed))
    runs = _chosen(comparison, args.only or [])
    check_writable("--out", folder / "comparison.json", "comparison")
    display = Display()
    outcome = Outcome()

    def table() -> None:
        write(collect(comparison, folder), folder)

    if args.time is not None:
        chosen = {variant.name: variant for variant, _, _ in runs}
        comparison_times.measure(list(chosen.values()), folder, args.time)
    elif not args.table:
        deadline = None if args.time_limit is None else monotonic() + 60 * args.time_limit
        try:
            outcome = _train_all(runs, folder, display, deadline, table)
        except BaseException:
            table()  # of the runs that are there, whatever happened
            raise
    results = collect(comparison, folder)
    write(results, folder)
    display.console.print(markdown(results), highlight=False, soft_wrap=True, markup=False)
    display.console.print(f"table, figures and runs: {folder}", highlight=False, soft_wrap=True)
    if outcome.stopped:
        print(f"{outcome.stopped}; run the same command again to continue", file=sys.stderr)
    if outcome.failed:
        count = len(outcome.failed)
        raise UserError(f"{count} of {len(runs)} runs could not be done; the first, {outcome.failed[0]}")
    return 130 if outcome.interrupted else 0


@dataclass
class Outcome:
    """How the training of a comparison ended: why it stopped before its end, by whom, and what could not be done."""

    stopped: str = ""
    interrupted: bool = False
    failed: list[str] = dataclasses.field(default_factory=list)


def _train_all(
    runs: list[tuple[Variant, int, Settings]],
    folder: Path,
    display: Any,
    deadline: float | None,
    after_each: Callable[[], None],
) -> Outcome:
    """Do what has not been done. A run that cannot be done leaves the others their turn."""
    import torch

    from manpp_kernels.cli.training import SUMMARY_NAME, train
    from manpp_kernels.trainer import CHECKPOINT_NAME

    def late() -> bool:
        return deadline is not None and monotonic() >= deadline

    outcome = Outcome()
    for number, (variant, seed, settings) in enumerate(runs, 1):
        where = run_folder(folder, variant, seed)
        if (where / SUMMARY_NAME).is_file():
            continue
        if late():
            outcome.stopped = "the time is over"
            break
        display.console.print(f"{variant.name}, seed {seed} ({number} of {len(runs)})", highlight=False, markup=False)
        checkpoint = where / CHECKPOINT_NAME
        # Settings are written before the first step, a checkpoint after the first epoch: without one, start again.
        try:
            result = train(settings, where, display, resume=checkpoint if checkpoint.is_file() else None, stop=late)
        except UserError as error:
            outcome.failed.append(f"{variant.name} with seed {seed}: {error}")
            print(f"manpp compare: {outcome.failed[-1]}", file=sys.stderr)
            continue
        if result.interrupted:
            outcome.stopped = "the time is over" if late() else "interrupted"
            outcome.interrupted = not late()
            break
        after_each()
        # A trainer is full of cycles, and what it holds should not count as memory of the run that comes next.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return outcome


def run_folder(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / variant.folder / f"seed-{seed}"


def _check_saved(settings: Settings, folder: Path) -> None:
    """Raise where ``folder`` has a run with other settings: a table of both would compare what is not alike."""
    from manpp_kernels.cli.training import CONFIG_NAME

    path = folder / CONFIG_NAME
    if not path.is_file():
        return
    differs = difference(Settings.of(from_file(path)).content(), settings.content())
    if differs is not None:
        raise UserError(f"{folder} holds a run with {differs}: choose another --out, or remove that folder")


def difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """How the contents of two settings differ, in words; None where what a table has of their runs is alike."""
    # Captured steps compute the same, but not in the same time and memory, which the table has too.
    free = {key(name) for name in FREE_ON_RESUME - {"cuda_graphs", "streams"}}
    for name in (*wanted, *saved):
        if name not in free and saved.get(name) != wanted.get(name):
            return f"{name} {saved.get(name, 'by default')}, and now it is {wanted.get(name, 'by default')}"
    return None


def _chosen(comparison: Comparison, only: Iterable[str]) -> list[tuple[Variant, int, Settings]]:
    names = [variant.name for variant in comparison.variants]
    for name in only:
        if name not in names:
            raise UserError(f"there is no variant {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    return [item for item in comparison.runs() if not only or item[0].name in only]


# The configuration file


def read(path: Path, given: Mapping[str, Any] | None = None) -> Comparison:
    """The comparison that a file describes; ``given`` options take the place of the file's, for every variant.

    Raises:
        UserError: the file cannot be read, or a variant is none that could be trained.
    """
    content = read_config(path)
    for name in content:
        if name not in _KEYS:
            raise UserError(
                f"{path}: there is no key {name!r}{did_you_mean(name, _KEYS)}; there are {', '.join(_KEYS)}"
            )
    common = _mapping(content.get("common") or {}, f"{path}: common")
    described = _mapping(content.get("variants") or {}, f"{path}: variants")
    if not described:
        raise UserError(f"{path} has to name one variant or more, as in 'variants: {{dgl: {{rule: dgl}}}}'")
    seeds = _seeds(content.get("seeds", [0]), f"{path}: seeds")
    variants = [_variant(name, options, common, seeds, given or {}, path) for name, options in described.items()]
    folders: dict[str, str] = {}
    for variant in variants:
        other = folders.setdefault(variant.folder.lower(), variant.name)
        if other != variant.name:
            raise UserError(f"{path}: the variants {other!r} and {variant.name!r} would share a folder; rename one")
    return Comparison(str(content.get("title", path.stem)), variants)


def _variant(
    name: str, options: Any, common: Mapping[str, Any], seeds: list[int], given: Mapping[str, Any], path: Path
) -> Variant:
    source = f"{path}: variant {name!r}"
    options = dict(_mapping(options or {}, source))
    seeds = _seeds(options.pop("seeds"), f"{source}: seeds") if "seeds" in options else seeds
    merged = {**common, **options}
    for word in _OURS:
        if word in merged:
            instead = {"seed": "seeds: [0, 1]", "out": "--out"}[word]
            raise UserError(f"{source}: {word} is set by the comparison; use {instead} instead")
    values = {**from_content(merged, source), **given}
    try:
        runs = {seed: Settings.of({**values, "seed": seed}) for seed in seeds}
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for several in ("data_parallel", "pipeline"):
        if any(getattr(settings.trainer, several) for settings in runs.values()):
            raise UserError(f"{source}: {key(several)} is for manpp train; a comparison trains in one process")
    return Variant(name, options, runs)


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{source} has to hold keys and values, and is {value!r}")
    return {str(name): item for name, item in value.items()}


def _seeds(value: Any, source: str) -> list[int]:
    seeds = [value] if isinstance(value, int) else value
    valid = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not valid or len(set(seeds)) != len(seeds):
        raise UserError(f"{source} has to be whole numbers from 0 on, each once, and is {value!r}")
    return list(seeds)
