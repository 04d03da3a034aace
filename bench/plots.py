"""Bars of how near each row comes to its floor, ours beside the peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# More rows than this are no picture any more; the page's table has them all.
MOST = 28


def draw(rows: Sequence[dict[str, Any]], gpu: bool, title: str, path: Path) -> None:
    """One bar each for ours and the fastest peer, as a fraction of the speed of the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [r for r in rows if r["mode"] == "eager" and not r["resident"]]
    most_threads = max(r["threads"] for r in rows)
    chosen = [r for r in chosen if gpu or r["threads"] == most_threads][:MOST]
    if not chosen:
        return
    labels = [f"{r['work']}, {r['size']}, {r['dtypes']}" for r in chosen]
    ours = [r["floor_us"] / r["us"] for r in chosen]
    peers = [
        r["floor_us"] / min((c["us"] for c in r["contenders"].values() if not c["ours"]), default=float("inf"))
        for r in chosen
    ]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.32 * len(chosen)), layout="constrained")
    places = range(len(chosen))
    axes.barh([p - 0.2 for p in places], ours, 0.4, label="manpp_kernels", color="#1f6fb4")
    axes.barh([p + 0.2 for p in places], peers, 0.4, label="fastest peer", color="#c9c9c9")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("of the floor's speed (1: bytes at the measured copy bandwidth, or the launch latency)", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date inside, so that the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
