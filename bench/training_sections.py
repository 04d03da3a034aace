"""The sections of docs/benchmarks.md on training: from the JSON of a benchmark to Markdown."""

from __future__ import annotations

from typing import Any

from page import mib, table


def _milliseconds(r: dict[str, Any], digits: int) -> list[str]:
    """Of a step: the median, and the range."""
    median, least, most = (f"{1e3 * r[key]:,.{digits}f}" for key in ("seconds", "min_seconds", "max_seconds"))
    return [median, f"{least} to {most}"]


def _memory(r: dict[str, Any], kind: str) -> list[str]:
    return [mib(r[kind]), f"{r['memory_share']:.1%}"]


def training_section(results: dict[str, Any], gpu: bool) -> str:
    kind = "allocated_bytes" if gpu else "saved_bytes"
    memory = "memory of a step" if gpu else "saved activations"
    lines = []
    for r in results["rows"]:
        spread = r["again_seconds"]
        lines.append(
            [
                f"{r['network']}, K = {r['blocks']}, {r['variant']}",
                *_milliseconds(r, 1),
                f"{abs(spread - r['seconds']) / min(spread, r['seconds']):.0%}" if spread else "",
                f"{r['of_e2e']:.2f}",
                f"{r['speed_up']:.2f}x",
                *_memory(r, kind),
            ]
        )
    head = ["training", "ms a step", "range", "spread", "of e2e", "over plain PyTorch", f"{memory}, MiB", "of e2e"]
    first = results["rows"][0]
    recipe = [f"batches of {first['batch']} images of {' x '.join(map(str, first['image']))}", first.get("amp", "fp32")]
    recipe += ["channels_last"] if first.get("channels_last") else []
    return f"{', '.join(recipe).capitalize()}.\n\n{table(head, lines)}"


def processes_section(results: dict[str, Any], gpu: bool) -> str:
    rows = results["rows"]
    lines = [
        [
            f"{r['network']}, {r['variant']}, {r['how']}",
            str(r["processes"]),
            *_milliseconds(r, 1),
            f"{r['of_e2e']:.2f}",
            *_memory(r, "saved_bytes"),
        ]
        for r in rows
    ]
    head = ["training", "processes", "ms a step", "range", "of e2e", "saved activations of one, MiB", "of e2e"]
    first = rows[0]
    said = f"Batches of {first['batch']} images of {' x '.join(map(str, first['image']))} over all processes together"
    return f"{said}; medians of {first['rounds']} turns of {first['steps']} steps.\n\n{table(head, lines)}"


def dense_section(results: dict[str, Any], gpu: bool) -> str:
    kind = "allocated_bytes" if gpu else "saved_bytes"
    lines = [
        [
            f"{r['task']}, {r['variant']}",
            *_milliseconds(r, 0),
            f"{r['of_e2e']:.2f}",
            *_memory(r, kind),
        ]
        for r in results["rows"]
    ]
    memory = "memory of a step" if gpu else "saved activations"
    first = results["rows"][0]
    said = f"Batches of {first['batch']} images of {first['side']} x {first['side']}; four blocks but for end to end."
    return f"{said}\n\n{table(['training', 'ms a step', 'range', 'of e2e', f'{memory}, MiB', 'of e2e'], lines)}"


def fashion_section(results: dict[str, Any], gpu: bool) -> str:
    lines = [
        [
            r["rule"],
            str(r["seed"]),
            f"{r['test_accuracy']:.2%}",
            f"{r['seconds']:,.1f}",
            f"{1e3 * r['seconds_per_step']:,.1f}",
            mib(r["peak_memory_bytes"]),
            f"`{r['command']}`",
        ]
        for r in results["rows"]
    ]
    memory = f"MiB ({results['rows'][0]['memory']})"
    return table(["rule", "seed", "test accuracy", "s of training", "ms a step", memory, "command"], lines)
