"""The few figures of the README: from the JSON of the benchmarks to Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from page import Results, mib, mode_of, on_gpu, show_time, table, title


def chosen(found: dict[str, Results], gpu: bool, benchmark: str) -> Results | None:
    """Of the GPUs, or of the CPUs, the results of the one on which a benchmark has most rows; of several the newest."""

    def order(results: Results) -> tuple[int, str]:
        content = results[benchmark]
        return len(content["rows"]), content["environment"].get("date", "")

    have = [results for results in found.values() if on_gpu(results) is gpu and benchmark in results]
    return max(have, key=order, default=None)


def readme_block(found: dict[str, Results]) -> str:
    """What the README shows between its two comments."""
    parts = []
    for gpu in (True, False):
        for benchmark, section in SECTIONS.items():
            results = chosen(found, gpu, benchmark)
            if results is not None:
                parts += section(results)
    return "\n\n".join(parts) or "No results are kept yet."


SIZES = ("96 x 4,800", "600 x 40,000", "ResNet-50, 161 tensors")


def _operators(results: Results) -> list[str]:
    gpu, lines = on_gpu(results), []
    rows = results["ema_scale_update"]["rows"]
    threads = max((r["threads"] for r in rows), default=1)
    for r in rows:
        usual = r["dtypes"] == "fp32" and not r["resident"] and r["threads"] == threads
        if not usual or r["size"] not in SIZES or r["work"] == "weights backward":
            continue
        peers = {n: c["us"] for n, c in r["contenders"].items() if not c["ours"]}
        best = min(peers, key=lambda n: peers[n])
        us = peers[best]
        what = f"EMA {r['work']}, {r['size']}" + (f", {mode_of(r)}" if gpu else "")
        lines.append([what, f"{show_time(r['us'])} µs", f"{best}: {show_time(us)} µs", f"{us / r['us']:.1f}x"])
    return [table([title(results), "`EmaPlan`", "the fastest alternative", ""], lines)] if lines else []


# The training steps that are shown, and what they are called. Captured steps are compared with the captured one.
STEPS = {
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


def _steps(results: Results) -> list[str]:
    gpu = on_gpu(results)
    rows = {(r["network"], r["variant"]): r for r in results["training"]["rows"]}
    lines = []
    for network in dict.fromkeys(network for network, _ in rows):
        for what, variant in STEPS["gpu" if gpu else "cpu"].items():
            if (network, variant) in rows:
                lines.append(_step(f"{network}: {what}", rows[network, variant], gpu, 1 if gpu else 0))
    return _step_table(results, f"a step of {results['training']['rows'][0]['batch']} images", lines)


def _step(what: str, r: dict[str, Any], gpu: bool, digits: int) -> list[str]:
    ms = f"{1e3 * r['seconds']:,.{digits}f}"
    memory = r["allocated_bytes" if gpu else "saved_bytes"]
    return [what, ms, f"{r['of_e2e']:.2f}x", mib(memory), f"{r['memory_share']:.0%}"]


def _step_table(results: Results, what: str, lines: list[list[str]]) -> list[str]:
    kind = "memory" if on_gpu(results) else "activations"
    return [table([f"{title(results)}, {what}", "ms", "of end to end", f"{kind}, MiB", "of end to end"], lines)]


# What of segmentation and detection is shown, and how it is called.
DENSE = {
    "end to end": "e2e",
    "end to end, recomputed": "e2e, checkpointed",
    "DGL, 4 blocks": "dgl, narrow head",
    "DGL, 4 blocks, recomputed": "dgl, narrow head, checkpointed",
    "MAN++, 4 blocks": "MAN++ activation form",
}


def _dense(results: Results) -> list[str]:
    rows = {(r["task"], r["variant"]): r for r in results["dense"]["rows"]}
    lines = [
        _step(f"{task}: {what}", r, on_gpu(results), 0)
        for task in dict.fromkeys(task for task, _ in rows)
        for what, variant in DENSE.items()
        if (r := rows.get((task, variant))) is not None
    ]
    first = results["dense"]["rows"][0]
    return _step_table(results, f"a step of {first['batch']} images of {first['side']} x {first['side']}", lines)


# By benchmark: its tables, of the results of one device.
SECTIONS: dict[str, Callable[[Results], list[str]]] = {
    "ema_scale_update": _operators,
    "training": _steps,
    "dense": _dense,
}
