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
from page import mib, table
from training_sections import dense_section, fashion_section, processes_section, training_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OPERATORS = ("ema_scale_update", "scale_bias_mix", "detach_copy")

Results = dict[str, dict[str, Any]]


def load(folder: Path) -> Results:
    """The results of one device by benchmark."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def devices() -> dict[str, Results]:
    """By folder; GPUs first."""
    found = {folder.name: load(folder) for folder in sorted(RESULTS.glob("*")) if folder.is_dir()}
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: not on_gpu(item[1])))


def first_environment(results: Results) -> dict[str, Any]:
    return next(iter(results.values()))["environment"]


def on_gpu(results: Results) -> bool:
    return first_environment(results)["device"].startswith("cuda")


def title(results: Results) -> str:
    e = first_environment(results)
    return e["gpu"] if on_gpu(results) else f"{e['cpu']}, {e['cores']} cores"


# Markdown


def time(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


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
    mode = ("captured" if row["mode"] == "graph" else "eager") if gpu else f"{row['threads']} thr."
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
                time(r["us"]),
                f"{abs(r['us'] - r['again_us']) / min(r['us'], r['again_us']):.0%}",
                time(r["floor_us"]),
                f"{fraction_of_floor(r):.0%}",
                f"{best}, {time(peers[best])}" if best else "",
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
                f"{name} {time(c['us'])}" for name, c in sorted(r["contenders"].items(), key=lambda i: i[1]["us"])
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
        lines = [[n, *(time(r["times"][n]["us"]) if n in r["times"] else "" for r in rows)] for n in names]
        parts.append(table([f"{work}, µs a call", *(f"{r['tensors']:,} tensors" for r in rows)], lines))
    return "\n\n".join(parts)


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


def measured_last(found: dict[str, Results]) -> list[Results]:
    """The results of one GPU and of one CPU, those that are newest."""

    def newest(results: Results) -> str:
        return max(r.get("environment", {}).get("date", "") for r in results.values())

    kinds = [[r for r in found.values() if on_gpu(r) is gpu] for gpu in (True, False)]
    return [max(results, key=newest) for results in kinds if results]


README_SIZES = ("96 x 4,800", "600 x 40,000", "ResNet-50, 161 tensors")


def readme_block(found: dict[str, Results]) -> str:
    """The few figures of the README."""
    parts = []
    for results in measured_last(found):
        operators, steps = _readme_operators(results), _readme_steps(results)
        if operators:
            parts.append(table([title(results), "`EmaPlan`", "the fastest alternative", ""], operators))
        if steps:
            first = results["training"]["rows"][0]
            kind = "memory" if on_gpu(results) else "activations"
            what = f"{title(results)}, a step of {first['batch']} images"
            head = [what, "ms", "of end to end", f"{kind}, MiB", "of end to end"]
            parts.append(table(head, steps))
        if "dense" in results:
            first = results["dense"]["rows"][0]
            kind = "memory" if on_gpu(results) else "activations"
            what = f"{title(results)}, a step of {first['batch']} images of {first['side']} x {first['side']}"
            head = [what, "ms", "of end to end", f"{kind}, MiB", "of end to end"]
            parts.append(table(head, _readme_dense(results)))
    return "\n\n".join(parts) or "No results are kept yet."


def _readme_operators(results: Results) -> list[list[str]]:
    lines = []
    rows = results.get("ema_scale_update", {}).get("rows", [])
    threads = max((r["threads"] for r in rows), default=1)
    for r in rows:
        usual = r["dtypes"] == "fp32" and not r["resident"] and r["mode"] == "eager" and r["threads"] == threads
        if not usual or r["size"] not in README_SIZES or r["work"] == "weights backward":
            continue
        peers = {n: c["us"] for n, c in r["contenders"].items() if not c["ours"]}
        best = min(peers, key=lambda n: peers[n])
        us = peers[best]
        lines.append(
            [f"EMA {r['work']}, {r['size']}", f"{time(r['us'])} µs", f"{best}: {time(us)} µs", f"{us / r['us']:.1f}x"]
        )
    return lines


# The training steps of the README, and what they are called there. Captured steps are compared with the captured one.
README_STEPS = {
    "cpu": {
        "end to end": "e2e",
        "end to end, recomputed": "e2e, checkpointed",
        "DGL, 4 blocks": "dgl, narrow head, 4 blocks",
        "DGL, 4 blocks, recomputed": "dgl, narrow head, 4 blocks, checkpointed",
        "MAN++ as published, in plain PyTorch": "MAN++, plain PyTorch",
        "MAN++ as published": "MAN++ activation form",
        "MAN++, parameter form, unlocked": "MAN++ parameter form, unlocked",
    },
    "gpu": {
        "end to end": "e2e",
        "end to end, recomputed": "e2e, checkpointed",
        "DGL, 4 blocks": "dgl, narrow head, 4 blocks",
        "MAN++ as published, in plain PyTorch": "MAN++, plain PyTorch",
        "MAN++ as published": "MAN++ activation form",
        "captured: end to end": "e2e, CUDA graph",
        "captured: end to end, recomputed": "e2e, checkpointed, CUDA graph",
        "captured: end to end, compiled": "e2e, compiled, CUDA graph",
        "captured: end to end, recomputed, compiled": "e2e, checkpointed, compiled, CUDA graph",
        "captured: DGL": "dgl, narrow head, CUDA graph",
        "captured: DGL, 3 streams": "dgl, narrow head, CUDA graph, 3 streams",
        "captured: DGL, 4 blocks": "dgl, narrow head, 4 blocks, CUDA graph",
        "captured: DGL, 4 blocks, recomputed": "dgl, narrow head, 4 blocks, checkpointed, CUDA graph",
        "captured: DGL, 4 blocks, compiled": "dgl, narrow head, 4 blocks, compiled, CUDA graph",
        "captured: DGL, 4 blocks, compiled, 2 streams": "dgl, narrow head, 4 blocks, compiled, CUDA graph, 2 streams",
        "captured: DGL, 4 blocks, recomputed, compiled": (
            "dgl, narrow head, 4 blocks, checkpointed, compiled, CUDA graph"
        ),
        "captured: MAN++ as published": "MAN++ activation form, CUDA graph",
        "captured: MAN++, parameter form, unlocked": "MAN++ parameter form, unlocked, CUDA graph",
    },
}


def _readme_steps(results: Results) -> list[list[str]]:
    gpu = on_gpu(results)
    kind = "allocated_bytes" if gpu else "saved_bytes"
    rows = {(r["network"], r["variant"]): r for r in results.get("training", {}).get("rows", [])}
    lines = []
    for network in dict.fromkeys(network for network, _ in rows):
        for what, variant in README_STEPS["gpu" if gpu else "cpu"].items():
            if (network, variant) in rows:
                r = rows[network, variant]
                lines.append(_readme_step(f"{network}: {what}", r, kind, 1 if gpu else 0))
    return lines


def _readme_step(what: str, r: dict[str, Any], kind: str, digits: int) -> list[str]:
    ms = f"{1e3 * r['seconds']:,.{digits}f}"
    return [what, ms, f"{r['of_e2e']:.2f}x", mib(r[kind]), f"{r['memory_share']:.0%}"]


# What of segmentation and detection is shown there, and how it is called.
README_DENSE = {
    "end to end": "e2e",
    "end to end, recomputed": "e2e, checkpointed",
    "DGL, 4 blocks": "dgl, narrow head",
    "DGL, 4 blocks, recomputed": "dgl, narrow head, checkpointed",
    "MAN++, 4 blocks": "MAN++ activation form",
}


def _readme_dense(results: Results) -> list[list[str]]:
    kind = "allocated_bytes" if on_gpu(results) else "saved_bytes"
    rows = {(r["task"], r["variant"]): r for r in results["dense"]["rows"]}
    return [
        _readme_step(f"{task}: {what}", r, kind, 0)
        for task in dict.fromkeys(task for task, _ in rows)
        for what, variant in README_DENSE.items()
        if (r := rows.get((task, variant))) is not None
    ]


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
            lines.append(f"{label:78} {time(r['us']):>8} us {fraction_of_floor(r):6.0%} of floor {speed_up}")
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
