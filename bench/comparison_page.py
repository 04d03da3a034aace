"""Fills docs/comparison.md from the results that are kept, bench/results/<device>/comparison*.json.

    manpp compare --config bench/comparisons/fashion_mnist_cpu.yaml --out runs/comparison
    cp runs/comparison/comparison.json bench/results/<device>/comparison_fashion_mnist.json
    python bench/comparison_page.py              write the page and its figures
    python bench/comparison_page.py --check      fail where the page differs from the results

The table is the one that ``manpp compare`` prints. What is outside the two comments is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from manpp_kernels.cli.comparison import markdown
from manpp_kernels.cli.comparison_plots import plot_accuracies, plot_variants

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "comparison.md"
BEGIN, END = "<!-- comparison:begin -->", "<!-- comparison:end -->"


def results() -> dict[str, dict[str, Any]]:
    """The comparisons that are kept, by the name of their figures."""
    found = sorted(RESULTS.glob("*/comparison*.json"))
    return {f"{path.parent.name}-{path.stem}": json.loads(path.read_text(encoding="utf-8")) for path in found}


def blocks_table(found: dict[str, Any]) -> str:
    """The local heads' accuracy in the last epoch, block by block, of the variants that were observed."""
    firsts = [(variant["name"], run) for variant in found["variants"] for run in variant["runs"][:1]]
    observed = [(name, run["last_epoch_by_block"]) for name, run in firsts if "last_epoch_by_block" in run]
    if not observed:
        return ""
    count = max(len(rows) for _, rows in observed)
    lines = [["training accuracy by block, %", *map(str, range(count))], ["---", *["---:"] * count]]
    for name, rows in observed:
        shown = ["" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}" for row in rows]
        lines.append([name.replace("|", "\\|"), *shown, *[""] * (count - len(shown))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block(found: dict[str, dict[str, Any]]) -> str:
    """What stands between the comments."""
    parts = []
    for name, one in found.items():
        parts += [markdown(one), blocks_table(one)]
        parts += [f"![{one['title']}](figures/{name}.png)", f"![accuracy by epoch](figures/{name}-curves.png)"]
    return "\n\n".join(part for part in parts if part) or "No results are kept yet."


def replaced(text: str, content: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{PAGE.name} has to have {BEGIN} and {END} once each")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    args = parser.parse_args(argv)
    found = results()
    text = PAGE.read_text(encoding="utf-8")
    page = replaced(text, block(found))
    if args.check:
        if page != text:
            print(f"{PAGE.relative_to(ROOT)} differs from bench/results: run python bench/comparison_page.py")
        return int(page != text)
    PAGE.write_text(page, encoding="utf-8")
    figures = PAGE.parent / "figures"
    for name, one in found.items():
        figures.mkdir(exist_ok=True)
        done = [variant for variant in one["variants"] if variant["runs"]]
        plot_variants(done, figures / f"{name}.png")
        plot_accuracies(done, figures / f"{name}-curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
