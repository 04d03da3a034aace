"""Turns the JSON of bench/results/<device>/ into the tables of docs/benchmarks.md and the figures of the README.

    python bench/report.py              write both, and the plots
    python bench/report.py --check      fail where a page differs from the results
    python bench/report.py --summary D  print a short table of the JSON files in D

Both pages hold what is written here between two comments; the rest of them is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from goals import Goal, fraction_of_floor, goals
from page import COUNTED, Results, counted, mode_of, on_gpu, show_time, table, title
from readme_figures import readme_block
from training_sections import dense_section, fashion_section, processes_section, training_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OPERATORS = ("ema_scale_update", "scale_bias_mix", "detach_copy")


def load(folder: Path) -> Results:
    """The results of one device by benchmark."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def devices() -> dict[str, Results]:
    """By folder; GPUs first."""
    found = {folder.name: load(folder) for folder in sorted(RESULTS.glob("*")) if folder.is_dir()}
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: not on_gpu(item[1])))


# Markdown


def environment_line(e: dict[str, Any]) -> str:
    parts = [f"{e['date']}", f"commit {e['commit']}"]
    if "gpu" in e:
        parts += [f"{e['gpu']}, driver {e['driver']}, CUDA {e['cuda']}"]
    parts += [f"{e['cpu']}, {e['cores']} cores, {e['threads']} threads", f"Python {e['python']}, torch {e['torch']}"]
    parts += [f"{name} {e[name]}" for name in ("triton", "timm") if e.get(name)]
    return "; ".join(parts) + f"; load average {e['load']}."


def floors_line(floors: dict[str, Any]) -> str:
    copies = [f"{gb:,.0f} GB/s ({threads} threads)" for threads, gb in floors["copy_gbytes_per_second"].items()]
    if "launch_us" in floors:
        copies = [f"{next(iter(floors['copy_gbytes_per_second'].values())):,.0f} GB/s"]
        copies += [f"an empty kernel {us:.2f} µs ({mode})" for mode, us in floors["launch_us"].items()]
    return "Floors measured in the same run: copy " + ", ".join(copies) + "."


def where(row: dict[str, Any], gpu: bool) -> str:
    mode = mode_of(row) if gpu else f"{row['threads']} thr."
    return mode + (", cached" if row["resident"] else "")


def operator_table(rows: Sequence[dict[str, Any]], gpu: bool) -> str:
    lines = []
    for r in rows:
        peers = {name: c["us"] for name, c in r["contenders"].items() if not c["ours"]}
        best = min(peers, key=peers.__getitem__, default=None)
        lines.append(
            [
                f"{r['work']}, {r['size']}, {r['dtypes']}",
                where(r, gpu),
                show_time(r["us"]),
                f"{abs(r['us'] - r['again_us']) / min(r['us'], r['again_us']):.0%}",
                show_time(r["floor_us"]),
                f"{fraction_of_floor(r):.0%}",
                f"{best}, {show_time(peers[best])}" if best else "",
                f"{peers[best] / r['us']:.2f}x" if best else "",
            ]
        )
    head = ["work", "how", "ours, µs", "spread", "floor, µs", "of its speed", "fastest peer, µs", "speed-up"]
    return table(head, lines)


def contenders_table(rows: Sequence[dict[str, Any]], gpu: bool) -> str:
    lines = [
        [
            f"{r['work']}, {r['size']}, {r['dtypes']}, {where(r, gpu)}",
            "; ".join(
                f"{name} {show_time(c['us'])}" for name, c in sorted(r["contenders"].items(), key=lambda i: i[1]["us"])
            ),
            "; ".join(r["left_out"]),
        ]
        for r in rows
    ]
    return table(["row", "every contender, µs, fastest first", "could not"], lines)


def goals_table(found: Iterable[Goal]) -> str:
    lines = [
        [g.what, g.shown.format(g.value), ("≤ " if g.at_most else "≥ ") + g.shown.format(g.bar), g.verdict]
        for g in found
    ]
    return table(["goal", "measured", "bar", ""], lines)


def host_section(results: dict[str, Any], gpu: bool) -> str:
    parts = []
    for work in dict.fromkeys(r["work"] for r in results["rows"]):
        rows = [r for r in results["rows"] if r["work"] == work]
        names = dict.fromkeys(name for r in rows for name in r["times"])
        lines = [[n, *(show_time(r["times"][n]["us"]) if n in r["times"] else "" for r in rows)] for n in names]
        parts.append(table([f"{work}, µs a call", *(f"{r['tensors']:,} tensors" for r in rows)], lines))
    return "\n\n".join(parts)


def counters_section(results: dict[str, Any], gpu: bool) -> str:
    said = (
        "Percentages are of the most that the memory, the L2 cache and the multiprocessors sustain, and of the warps "
        "that fit on one. The times, with the caches emptied before every kernel, are no benchmark's."
    )
    return f"{said}\n\n{table(COUNTED, [counted(row) for row in results['rows']])}"


def operator_section(results: dict[str, Any], gpu: bool) -> str:
    rows = results["rows"]
    parts = [
        floors_line(results["floors"]),
        operator_table(rows, gpu),
        "<details><summary>Every contender of every row</summary>",
        contenders_table(rows, gpu),
        "</details>",
    ]
    return "\n\n".join(parts)


# By file: its heading and what writes it.
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any], bool], str]]] = {
    **{name: (f"`{name}`", operator_section) for name in OPERATORS},
    "counters": ("Hardware counters", counters_section),
    "host_cost": ("Host cost", host_section),
    "training": ("Training steps", training_section),
    "processes": ("Training steps in several processes", processes_section),
    "dense": ("Training steps of segmentation and detection", dense_section),
    "fashion_mnist": ("Fashion-MNIST", fashion_section),
}


def page_block(found: dict[str, Results]) -> str:
    """What docs/benchmarks.md shows."""
    parts = []
    for name, results in found.items():
        gpu = on_gpu(results)
        held = list(goals(results, gpu))
        parts += [f"## {title(results)}", *(["### Goals", goals_table(held)] if held else [])]
        for key, (heading, section) in SECTIONS.items():
            if key in results:
                source = f"From bench/results/{name}/{key}.json: {environment_line(results[key]['environment'])}"
                parts += [f"### {heading}", source, *([results[key]["note"]] if "note" in results[key] else [])]
                parts.append(section(results[key], gpu))
                if key in OPERATORS:
                    parts.append(f"![{key}](figures/{name}-{key}.png)")
    return "\n\n".join(parts) or "No results are kept yet."


# Pages


def replaced(text: str, block: str, name: str) -> str:
    """``text`` with ``block`` between the two comments."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{name} has to have {BEGIN} and {END} once each")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def pages(found: dict[str, Results]) -> dict[Path, str]:
    """What each page should be; a README without the comments is left alone."""
    blocks = {PAGE: page_block(found)}
    if README.exists() and BEGIN in README.read_text(encoding="utf-8"):
        blocks[README] = readme_block(found)
    return {path: replaced(path.read_text(encoding="utf-8"), block, path.name) for path, block in blocks.items()}


def summary(folder: Path) -> str:
    """A short table for a terminal."""
    results = load(folder)
    if not results:
        return f"{folder} holds no results"
    lines = []
    for key in OPERATORS:
        for r in results.get(key, {}).get("rows", []):
            peers = [c["us"] for c in r["contenders"].values() if not c["ours"]]
            speed_up = f"{min(peers) / r['us']:5.2f}x" if peers else ""
            label = f"{r['work']}, {r['size']}, {r['dtypes']}, {where(r, on_gpu(results))}"
            lines.append(f"{label:78} {show_time(r['us']):>8} us {fraction_of_floor(r):6.0%} of floor {speed_up}")
    for r in results.get("training", {}).get("rows", []):
        label = f"{r['network']}, {r['variant']}"
        lines.append(f"{label:78} {1e3 * r['seconds']:8.1f} ms {r['speed_up']:5.2f}x  {r['memory_share']:.1%} memory")
    for r in results.get("fashion_mnist", {}).get("rows", []):
        lines.append(f"{'Fashion-MNIST, ' + r['rule']:78} {r['test_accuracy']:8.2%}  {r['seconds']:.1f} s")
    missed = [g for g in goals(results, on_gpu(results)) if not g.met]
    lines += [f"missed: {g.what}: {g.shown.format(g.value)}, bar {g.shown.format(g.bar)}" for g in missed]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page differs")
    parser.add_argument("--summary", type=Path, metavar="FOLDER", help="print a short table of these results")
    args = parser.parse_args(argv)
    if args.summary is not None:
        print(summary(args.summary))
        return 0
    found = devices()
    stale = [path for path, text in pages(found).items() if path.read_text(encoding="utf-8") != text]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from bench/results: run python bench/report.py")
        return 1 if stale else 0
    for path, text in pages(found).items():
        path.write_text(text, encoding="utf-8")
    from plots import draw

    for name, results in found.items():
        for key in OPERATORS:
            if key in results:
                draw(
                    results[key]["rows"], on_gpu(results), title(results), PAGE.parent / "figures" / f"{name}-{key}.png"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
