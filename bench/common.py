"""What all benchmarks share: the environment, the floors of the machine, rows, tables and their JSON."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from page import show_time, text_table
from timing import Contender, DeviceClock, Effort, GraphClock, HostClock, Sample, race

import manpp_kernels

ROOT = Path(__file__).resolve().parents[1]
QUICK = os.environ.get("MANPP_BENCH_QUICK") == "1"
# Compiling the peers takes longer than measuring everything else.
COMPILE = os.environ.get("MANPP_BENCH_COMPILE", "0" if QUICK else "1") == "1"
DEVICE = torch.device(os.environ.get("MANPP_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
ALL_THREADS = torch.get_num_threads()

if QUICK:
    EFFORT = Effort(0.006, 3)
elif DEVICE.type == "cuda":
    EFFORT = Effort(0.045, 15)
else:
    EFFORT = Effort(0.25, 15)


# Environment


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _output(*words: str) -> str:
    """What a command prints; nothing where there is no such command or it fails."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _version(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return None


def environment() -> dict[str, Any]:
    """What the figures depend on; the load of the minute before."""
    return {**_facts(), "load": round(os.getloadavg()[0], 2)}


@functools.cache
def _facts() -> dict[str, Any]:
    told = os.environ.get("MANPP_COMMIT")  # of a tree that came without its history
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": told or _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "changed": told is None and bool(_output("git", "status", "--porcelain", "--", "csrc", "manpp_kernels")),
        "device": str(DEVICE),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": ALL_THREADS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "backends": manpp_kernels.available(),
        "quick": QUICK,
        "last_level_cache_bytes": last_level_cache(),
    }
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver.splitlines()[0] if driver else "unknown",
        }
    return facts


def device_name() -> str:
    """The machine measured, as a folder name: nvidia-h200, amd-epyc-2-cores."""
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else f"{_cpu_model()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def last_level_cache() -> int:
    """Bytes of the L2 of the GPU, of the L3 of the CPU."""
    if DEVICE.type == "cuda":
        return int(torch.cuda.get_device_properties(DEVICE).L2_cache_size)
    for index in (3, 2):
        try:
            text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        return int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
    return 32 << 20


# Floors

EAGER, GRAPH = "eager", "graph"
CLOCKS: dict[str, type[HostClock]] = {EAGER: DeviceClock if DEVICE.type == "cuda" else HostClock, GRAPH: GraphClock}
MODES = (EAGER, GRAPH) if DEVICE.type == "cuda" else (EAGER,)


@functools.cache
def copy_bandwidth(threads: int) -> float:
    """Bytes a second, read and written, of one large ``copy_`` beyond the last-level cache."""
    _set_threads(threads)
    count = (16 << 20 if QUICK else 64 << 20) if DEVICE.type == "cpu" else 512 << 20
    source, target = torch.randn(count, device=DEVICE), torch.randn(count, device=DEVICE)
    copy = Contender("copy", [lambda: target.copy_(source)])
    samples, _ = race([copy], CLOCKS[EAGER], Effort(0.05 if QUICK else 0.5, 5 if QUICK else 15))
    return 2 * 4 * count / samples["copy"].median


@functools.cache
def fresh_memory_seconds(count: int, threads: int) -> float:
    """What it costs on the CPU that a result of ``count`` bytes is new memory, whose pages are mapped as it is written.

    The difference between ``clone`` and ``copy_``. On CUDA the caching allocator hands out memory that is mapped.
    """
    if DEVICE.type != "cpu" or count == 0:
        return 0.0
    _set_threads(threads)
    source, target = torch.randn(count // 4), torch.randn(count // 4)
    copy, clone = Contender("copy", [lambda: target.copy_(source)]), Contender("clone", [source.clone])
    samples, _ = race([copy, clone], HostClock, Effort(0.02 if QUICK else 0.3, 3 if QUICK else 15))
    return max(0.0, samples["clone"].median - samples["copy"].median)


@functools.cache
def launch_latency(mode: str) -> float:
    """Seconds that an empty kernel takes among many in a row; 0 on the CPU."""
    if DEVICE.type != "cuda":
        return 0.0
    empty = Contender("empty", [lambda: torch.cuda._sleep(0)] * 100)
    samples, _ = race([empty], CLOCKS[mode], Effort(0.1, 15))
    return samples["empty"].median


def floors() -> dict[str, Any]:
    """The floors measured so far; asking for them measures those of the whole device."""
    found: dict[str, Any] = {"copy_gbytes_per_second": {str(ALL_THREADS): round(copy_bandwidth(ALL_THREADS) / 1e9, 1)}}
    if DEVICE.type == "cpu" and ALL_THREADS > 1 and not QUICK:
        found["copy_gbytes_per_second"]["1"] = round(copy_bandwidth(1) / 1e9, 1)
    if DEVICE.type == "cuda":
        found["launch_us"] = {mode: round(launch_latency(mode) * 1e6, 3) for mode in MODES}
    return found


def _set_threads(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


# Cases and rows


@dataclass(frozen=True)
class Case:
    """One piece of work, done by several contenders on the same inputs.

    Attributes:
        operator: whose benchmark this is.
        work: what of it, as ``update + weights``.
        size: the tensors, as ``96 x 4,800``.
        dtypes: as ``fp32`` or ``bf16 from fp32``.
        tensors, elements: how many.
        moved: bytes that have to move: every input read once, every output written once.
        footprint: bytes of one input set.
        headline: the contender of ours that the row is about, which is timed twice.
        build: makes the contenders, with that many input sets.
        threads: on the CPU.
        fresh: how many results the headline puts into new memory, and the bytes of each.
        resident: leave the inputs in the cache: one set, used again and again.
    """

    operator: str
    work: str
    size: str
    dtypes: str
    tensors: int
    elements: int
    moved: int
    footprint: int
    headline: str
    build: Callable[[int], list[Contender]]
    threads: int = ALL_THREADS
    resident: bool = False
    fresh: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        parts = [self.work, self.size, self.dtypes, f"{self.threads}t" if DEVICE.type == "cpu" else ""]
        return ", ".join(p for p in [*parts, "cache-resident" if self.resident else ""] if p)

    def sets(self) -> int:
        """How many input sets leave nothing of one in the cache when it comes round again."""
        if self.resident:
            return 1
        return max(1, min(64, -(-2 * last_level_cache() // max(self.footprint, 1))))


@dataclass
class Row:
    """What was measured of a case, in one mode."""

    operator: str
    work: str
    size: str
    dtypes: str
    tensors: int
    elements: int
    bytes: int
    threads: int
    resident: bool
    mode: str
    sets: int
    floor_us: float
    floor: str
    headline: str
    us: float
    again_us: float
    contenders: dict[str, dict[str, Any]]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """By how much two measurements of the same version differ."""
        return abs(self.us - self.again_us) / min(self.us, self.again_us)

    @property
    def ratio(self) -> float:
        return self.us / self.floor_us

    def peers(self) -> dict[str, float]:
        return {name: c["us"] for name, c in self.contenders.items() if not c["ours"]}

    def best_peer(self) -> tuple[str, float] | None:
        peers = self.peers()
        name = min(peers, key=peers.__getitem__, default=None)
        return None if name is None else (name, peers[name])


AGAIN = " (again)"
CACHED_COPY = "copy of as many bytes"


def run_case(case: Case) -> tuple[list[Row], list[Contender]]:
    """Measure a case in every mode the device has."""
    _set_threads(case.threads)
    sets = case.sets()
    contenders = case.build(sets)
    (headline,) = (c for c in contenders if c.name == case.headline)
    contenders.append(dataclasses.replace(headline, name=headline.name + AGAIN))
    if case.resident:
        contenders.append(_cached_copy(case.moved))
    rows = []
    for mode in MODES:
        if mode != EAGER and not headline.capture:
            continue
        taking_part = [c for c in contenders if mode == EAGER or c.capture]
        samples, left_out = race(taking_part, CLOCKS[mode], EFFORT)
        rows.append(_row(case, mode, sets, {c.name: c.ours for c in taking_part}, samples, left_out))
    return rows, contenders


def _cached_copy(moved: int) -> Contender:
    source = torch.randn(max(1, moved // 8), device=DEVICE)
    target = torch.randn_like(source)
    return Contender(CACHED_COPY, [lambda: target.copy_(source)], ours=True)


def _row(
    case: Case,
    mode: str,
    sets: int,
    ours: Mapping[str, bool],
    samples: dict[str, Sample],
    left_out: dict[str, str],
) -> Row:
    again = samples.pop(case.headline + AGAIN)
    if case.resident:
        floor, what = samples.pop(CACHED_COPY).median, "copy of as many bytes, cache-resident"
    else:
        floor, what = case.moved / copy_bandwidth(case.threads), "bytes over copy bandwidth"
    results, size = case.fresh
    fresh = results * fresh_memory_seconds(size, case.threads)
    if fresh:
        floor, what = floor + fresh, what + ", and new memory for the result"
    if launch_latency(mode) > floor:
        floor, what = launch_latency(mode), "launch latency"
    times = {
        name: {
            "us": round(s.median * 1e6, 4),
            "min_us": round(s.least * 1e6, 4),
            "low_us": round(s.low * 1e6, 4),
            "high_us": round(s.high * 1e6, 4),
            "rounds": s.rounds,
            "calls": s.calls,
            "ours": ours[name],
        }
        for name, s in samples.items()
    }
    return Row(
        case.operator,
        case.work,
        case.size,
        case.dtypes,
        case.tensors,
        case.elements,
        case.moved,
        case.threads,
        case.resident,
        mode,
        sets,
        round(floor * 1e6, 4),
        what,
        case.headline,
        times[case.headline]["us"],
        round(again.median * 1e6, 4),
        times,
        left_out,
    )


# Output


def write_rows(path: Path | None, rows: Iterable[Row]) -> None:
    """The rows so far, where they are to be kept."""
    if path is not None:
        content = {"environment": environment(), "floors": floors()}
        write_json(path, {**content, "rows": [dataclasses.asdict(row) for row in rows]})


def run_cases(cases: Iterable[Case], path: Path | None) -> None:
    """Measure and show them; the rows so far are kept, where they are to be."""
    rows: list[Row] = []
    for case in cases:
        rows += run_case(case)[0]
        write_rows(path, rows)
    print(rows_table(rows))
    print(contenders_table(rows))


def contenders_table(rows: Iterable[Row]) -> str:
    """One line a row: the time of every contender, the fastest first."""
    lines = []
    for r in rows:
        times = sorted(r.contenders.items(), key=lambda item: item[1]["us"])
        names = "; ".join(f"{name} {show_time(c['us'])}" for name, c in times)
        lines.append(f"{r.size}, {r.dtypes}, {r.mode}: {names}")
    return "\n".join(lines)


def rows_table(rows: Iterable[Row]) -> str:
    """One line a row: our time, its spread, the floor and our time over it, and the fastest peer."""
    lines = []
    for r in rows:
        name, peer = r.best_peer() or ("none", float("nan"))
        where = [r.work, r.size, r.dtypes, f"{r.threads}t" if DEVICE.type == "cpu" else r.mode]
        lines.append(
            [
                ", ".join(where) + (", cached" if r.resident else ""),
                show_time(r.us),
                f"{100 * r.spread:.0f}%",
                show_time(r.floor_us),
                f"{r.ratio:.2f}",
                show_time(peer),
                f"{peer / r.us:.2f}x",
                name,
            ]
        )
    return text_table(["work", "us", "spread", "floor", "of floor", "peer us", "speed-up", "fastest peer"], lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One row a line: small enough to keep, and a change of one row is a change of one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {k: v for k, v in content.items() if k != "rows"}
    lines = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in content["rows"])
    text = json.dumps(head, indent=1)[:-2]
    # Whoever is stopped in the middle leaves the file of before.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(f'{text},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    unfinished.replace(path)
