"""Real images: MAN++ and end to end on Fashion-MNIST, the same network and recipe, by the command line.

    python bench/fashion_mnist.py [--json PATH] [--data-root FOLDER]        (MANPP_BENCH_QUICK=1 for a look)

On a CPU a small network sees a part of the images, at half their size, for a few minutes; on CUDA it is ResNet-32 in 16
local blocks and all 60,000 images. What is kept: the command, the seed, and of each epoch time, accuracy and memory.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import DEVICE, QUICK, environment, write_json
from page import text_table

SEED = 0
# In the order of what is wanted most: where time runs out, the rest is left away.
RULES = {
    "e2e": ["--rule", "e2e"],
    "MAN++ activation form": ["--rule", "man++", "--form", "activation"],
    "MAN++ parameter form": ["--rule", "man++", "--form", "parameter", "--order", "unlocked"],
}
if DEVICE.type == "cuda":
    local = {name: options for name, options in RULES.items() if name != "e2e"}
    local["DGL, narrow head"] = ["--rule", "dgl", "--width", "narrow"]
    RULES |= {f"{name}, CUDA graphs": [*options, "--cuda-graphs"] for name, options in RULES.items()}
    for name, options in local.items():
        RULES[f"{name}, CUDA graphs, 4 streams"] = [*options, "--cuda-graphs", "--streams", "4"]
QUICK_RECIPE = "--model resnet20 --image-size 8 --limit 64 --test-limit 64 --epochs 1 --batch-size 32"
CPU_RECIPE = "--model resnet20 --image-size 16 --limit 10000 --epochs 3 --batch-size 128"
CUDA_RECIPE = "--model resnet32 --image-size 32 --epochs 3 --batch-size 512 --amp bf16 --channels-last"


def recipe() -> list[str]:
    return (QUICK_RECIPE if QUICK else CUDA_RECIPE if DEVICE.type == "cuda" else CPU_RECIPE).split()


def train(rule: str, data_root: Path | None) -> dict[str, Any]:
    """One run by the command line, in a process of its own."""
    options = ["--data", "fashion-mnist", *recipe(), *RULES[rule], "--seed", str(SEED), "--device", DEVICE.type]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "manpp_kernels.cli", "train", *options, "--out", str(out)]
        if data_root is not None:
            command += ["--data-root", str(data_root)]
        subprocess.run(command, check=True)
        with (out / "history.csv").open(newline="", encoding="utf-8") as file:
            epochs = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    last = epochs[-1]
    return {
        "rule": rule,
        "command": " ".join(["manpp train", *options]),
        "seed": SEED,
        "test_accuracy": last["val_acc"],
        "seconds": round(sum(e["seconds"] for e in epochs), 3),
        "seconds_per_step": last["seconds_per_step"],
        "peak_memory_bytes": max(e["peak_memory_bytes"] for e in epochs),
        "memory": last["memory"],
        "epochs": epochs,
    }


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        try:
            return round(float(text), 6)
        except ValueError:
            return text


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            r["rule"],
            f"{r['test_accuracy']:.2%}",
            f"{r['seconds']:.1f}",
            f"{1e3 * r['seconds_per_step']:.1f}",
            f"{r['peak_memory_bytes'] / 2**20:.1f}",
        ]
        for r in rows
    ]
    return text_table(["Fashion-MNIST", "test accuracy", "s of training", "ms a step", "peak MiB"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", action="append", choices=list(RULES), help="may be repeated [all]")
    parser.add_argument("--data-root", type=Path, metavar="FOLDER", help="where the files are, if not installed")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    rows = []
    for rule in args.rule or RULES:
        rows.append(train(rule, args.data_root))
        if args.json is not None:
            write_json(args.json, {"environment": environment(), "rows": rows})
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
