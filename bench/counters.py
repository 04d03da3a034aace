"""What the hardware counts while our kernels run, and while peers do: how near they are to its limits, and to which.

    python bench/counters.py [--json PATH]        (needs ncu from the CUDA toolkit, and leave to read the counters)

By Nsight Compute, which runs every kernel several times with the caches emptied before: its times are no benchmark's.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import DEVICE, Case, environment, write_json
from feature_maps import LARGE
from page import COUNTED, counted, text_table

VIT, SMALL, MANY, LONG = "ViT-B, 152 tensors", "96 x 4,800", "600 x 40,000", "YOLO-like, 1,188 tensors"


class Work(NamedTuple):
    """A contender of a case of a benchmark."""

    module: str
    work: str
    size: str
    dtypes: str
    contender: str


EMA, MIX, COPY = "bench_ema_scale_update", "bench_scale_bias_mix", "bench_detach_copy"
WORKS = (
    Work(EMA, "update", SMALL, "fp32", "cuda plan"),
    Work(EMA, "update", LONG, "fp32", "cuda plan"),
    Work(EMA, "update", VIT, "fp32", "cuda plan"),
    Work(EMA, "update", VIT, "fp32", "foreach lerp_"),
    Work(EMA, "update + weights", VIT, "fp32", "cuda plan"),
    Work(EMA, "update + weights", VIT, "fp32", "foreach lerp_, mul, add_"),
    Work(EMA, "update + weights", LONG, "fp32", "cuda plan"),
    Work(EMA, "weights backward", VIT, "fp32", "cuda kernel"),
    Work(EMA, "weights backward", MANY, "fp32", "cuda kernel"),
    Work(EMA, "weights backward", LONG, "fp32", "cuda kernel"),
    Work(MIX, "forward", LARGE, "fp32, NCHW, scalar scale", "cuda"),
    Work(MIX, "backward", LARGE, "fp32, NCHW, scalar scale", "cuda"),
    Work(MIX, "backward", LARGE, "fp32, NCHW, scalar scale", "triton"),
    Work(MIX, "backward", LARGE, "fp32, channels_last, per-channel scale", "cuda"),
    Work(MIX, "backward", LARGE, "bf16, channels_last, per-channel scale", "cuda"),
    Work(COPY, "cast", LARGE, "bf16 to fp32, NCHW", "cuda"),
    Work(COPY, "layout", LARGE, "fp32 NCHW to fp32 channels_last", "cuda"),
)
# By the names of Nsight Compute, and ours; in base units.
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessor_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}
MARK = "spin_kernel"  # of torch.cuda._sleep, ahead of each work's own


def find(work: Work) -> Case:
    for case in importlib.import_module(work.module).cases():
        if (case.work, case.size, case.dtypes) == work[1:4] and not case.resident:
            return case
    raise LookupError(f"{work.module} has no case {work[1:4]}")


def run() -> None:
    """All works, each behind a mark, for Nsight Compute to watch."""
    for work in WORKS:
        (contender,) = (c for c in find(work).build(1) if c.name == work.contender)
        with contender.in_force():
            for _ in range(2):
                contender.calls[0]()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            torch.cuda._sleep(1)
            contender.calls[0]()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        torch.cuda.empty_cache()


def parse(log: str) -> list[list[dict[str, Any]]]:
    """The kernels between two marks, and what was counted of each, from the table that Nsight Compute writes."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if row["Metric Name"] in METRICS:
            kernel[METRICS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    found: list[list[dict[str, Any]]] = []
    for kernel in kernels.values():
        if MARK in kernel["kernel"]:
            found.append([])
        elif found:
            found[-1].append(kernel)
    return found


def profile(ncu: str) -> list[list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        command = [ncu, "--csv", "--print-units", "base", "--log-file", str(log), "--clock-control", "none"]
        command += ["--profile-from-start", "off", "--metrics", ",".join(METRICS)]
        # The peers that are compiled take a minute, and are not watched.
        done = subprocess.run(
            [*command, sys.executable, __file__, "--run"],
            env={**os.environ, "MANPP_BENCH_COMPILE": "0"},
            check=False,
        )
        text = log.read_text(encoding="utf-8") if log.exists() else ""
    if done.returncode:
        problems = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        raise RuntimeError(f"ncu ended with {done.returncode}: {' '.join(problems) or text[-2000:]}")
    return parse(text)


def row_of(work: Work, kernels: list[dict[str, Any]]) -> dict[str, Any]:
    return {**work._asdict(), "bytes_needed": find(work).moved, "kernels": kernels}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        run()
        return 0
    ncu = shutil.which("ncu")
    if DEVICE.type != "cuda" or ncu is None:
        missing = "a GPU" if DEVICE.type != "cuda" else "ncu, which the CUDA toolkit has"
        print(f"counters.py: this needs {missing}", file=sys.stderr)
        return 1
    kernels = profile(ncu)
    if len(kernels) != len(WORKS) or not all(kernels):
        raise RuntimeError(f"ncu saw {len(kernels)} of {len(WORKS)} works, with {[len(k) for k in kernels]} kernels")
    rows = [row_of(work, found) for work, found in zip(WORKS, kernels, strict=True)]
    if args.json is not None:
        write_json(args.json, {"environment": environment(), "rows": rows})
    print(text_table(COUNTED, [counted(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
