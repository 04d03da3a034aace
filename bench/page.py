"""How results, and numbers, are shown on the pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Results = dict[str, dict[str, Any]]  # of one device, by benchmark


def first_environment(results: Results) -> dict[str, Any]:
    return next(iter(results.values()))["environment"]


def on_gpu(results: Results) -> bool:
    return first_environment(results)["device"].startswith("cuda")


def title(results: Results) -> str:
    e = first_environment(results)
    return e["gpu"] if on_gpu(results) else f"{e['cpu']}, {e['cores']} cores"


def mode_of(row: dict[str, Any]) -> str:
    """How a GPU was given the work of a row."""
    return "captured" if row["mode"] == "graph" else "eager"


def show_time(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def text_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left and the others to the right."""
    table = [list(head), *([str(cell) for cell in line] for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in table
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def mib(count: float) -> str:
    return f"{count / 2**20:,.1f}"


COUNTED = ["work", "kernels", "µs", "MB needed", "MB moved", "memory", "L2", "multiprocessors", "occupancy"]


def counted(row: dict[str, Any]) -> list[str]:
    """A line of what the hardware counted: sums over a work's kernels; percentages are of the time that all take."""
    kernels = row["kernels"]
    time = sum(k["nanoseconds"] for k in kernels)
    moved = sum(k["bytes_read"] + k["bytes_written"] for k in kernels)
    names = ("memory_percent", "l2_percent", "multiprocessor_percent", "occupancy_percent")
    return [
        f"{row['work']}, {row['size']}, {row['dtypes']}: {row['contender']}",
        str(len(kernels)),
        f"{time / 1e3:,.1f}",
        f"{row['bytes_needed'] / 1e6:,.0f}",
        f"{moved / 1e6:,.0f}",
        *(f"{sum(k[name] * k['nanoseconds'] for k in kernels) / time:.0f}%" for name in names),
    ]
