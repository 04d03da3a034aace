"""Step time and memory of training: end to end, checkpointed, by local rules, and by MAN++ in plain PyTorch.

    python bench/training.py [--network resnet32] [--json PATH]        (MANPP_BENCH_QUICK=1 for a look)

The variants take their steps in turns, so that drift of the machine falls on all of them alike. Memory on the CPU is
the peak of live unique storages that autograd keeps, without parameters; on CUDA the allocator's peak above what lies
there before the step, or, of a captured step, what the graph has taken from the allocator.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from common import DEVICE, QUICK, environment, write_json
from eager_man_pp import EagerManPlusPlus
from page import text_table
from timing import quotient, step_times
from torch import Tensor, nn

from manpp_kernels.local import SavedTensorMeter
from manpp_kernels.models import MODELS
from manpp_kernels.trainer import LocalTrainer, TrainerConfig
from manpp_kernels.training.graphs import StepGraph

CLASSES = 10
IMAGE = (3, 16, 16) if QUICK else (3, 32, 32)
# On a GPU as one trains there.
GPU = DEVICE.type == "cuda"
BATCH = 8 if QUICK else 512 if GPU else 128
RECIPE: dict[str, Any] = {"amp": "bf16", "channels_last": True} if GPU else {}
# The network, its blocks (the stem and every unit) where a variant says no other, and how many rounds are timed.
NETWORKS = {"resnet20": (10, 2)} if QUICK else {"resnet32": (16, 11), "resnet110": (55, 7)}
E2E, EAGER = "e2e", "MAN++, plain PyTorch"
WIDE, NARROW = {"width": "wide"}, {"width": "narrow"}
FOUR = {"blocks": 4, "balance": "memory", "rule_options": NARROW}


class Trains(Protocol):
    def step(self, batch: tuple[Tensor, Tensor]) -> object: ...

    def persistent_tensors(self) -> list[Tensor]: ...


def _ours(**settings: Any) -> Callable[[nn.Module], Trains]:
    config = TrainerConfig(measure_memory=False, **RECIPE, **settings)
    return lambda model: LocalTrainer(model, config, example=IMAGE)


def _man_pp(form: str, **settings: Any) -> Callable[[nn.Module], Trains]:
    return _ours(rule="man++", rule_options={"form": form}, **settings)


def _plain(layout: torch.memory_format) -> Callable[[nn.Module], Trains]:
    return lambda model: EagerManPlusPlus(model, IMAGE, CLASSES, layout, torch.bfloat16 if GPU else None)


VARIANTS: dict[str, Callable[[nn.Module], Trains]] = {
    E2E: _ours(rule="e2e"),
    "e2e, checkpointed": _ours(rule="e2e", recompute=True),
    "dgl, wide head": _ours(rule="dgl", rule_options=WIDE),
    EAGER: _plain(torch.channels_last if GPU else torch.preserve_format),
    "MAN++ activation form": _man_pp("activation"),
    "MAN++ activation form, unlocked": _man_pp("activation", order="unlocked"),
    "MAN++ parameter form": _man_pp("parameter"),
    "MAN++ parameter form, unlocked": _man_pp("parameter", order="unlocked"),
    # With few blocks, which cost the least accuracy and time.
    "dgl, narrow head, 4 blocks": _ours(rule="dgl", **FOUR),
    "dgl, narrow head, 4 blocks, checkpointed": _ours(rule="dgl", recompute=True, **FOUR),
}
if not GPU:
    # The same in the memory format that convolutions on a CPU prefer.
    VARIANTS |= {
        "e2e, channels_last": _ours(rule="e2e", channels_last=True),
        "MAN++, plain PyTorch, channels_last": _plain(torch.channels_last),
        "MAN++ parameter form, channels_last": _man_pp("parameter", channels_last=True),
        "e2e, channels_last, compiled": _ours(rule="e2e", channels_last=True, compile="inductor"),
        "dgl, narrow head, 4 blocks, channels_last, compiled": _ours(
            rule="dgl", channels_last=True, compile="inductor", **FOUR
        ),
        "MAN++ parameter form, unlocked, channels_last, compiled": _man_pp(
            "parameter", order="unlocked", channels_last=True, compile="inductor"
        ),
    }
# What a GPU runs as one graph, and over how many streams.
CAPTURED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    E2E: ((1,), {"rule": "e2e"}),
    "e2e, checkpointed": ((1,), {"rule": "e2e", "recompute": True}),
    "e2e, compiled": ((1,), {"rule": "e2e", "compile": "inductor"}),
    "e2e, checkpointed, compiled": ((1,), {"rule": "e2e", "recompute": True, "compile": "inductor"}),
    "dgl, wide head": ((1, 4), {"rule": "dgl", "rule_options": WIDE}),
    "dgl, narrow head": ((1, 2, 3, 4, 8), {"rule": "dgl", "rule_options": NARROW}),
    "dgl, narrow head, 4 blocks": ((1, 2, 4), {"rule": "dgl", **FOUR}),
    "dgl, narrow head, 4 blocks, checkpointed": ((1, 2), {"rule": "dgl", "recompute": True, **FOUR}),
    "dgl, narrow head, 4 blocks, compiled": ((1, 2, 4), {"rule": "dgl", "compile": "inductor", **FOUR}),
    "dgl, narrow head, 4 blocks, checkpointed, compiled": (
        (1, 2),
        {"rule": "dgl", "recompute": True, "compile": "inductor", **FOUR},
    ),
    "dgl, narrow head, compiled": ((1, 3), {"rule": "dgl", "compile": "inductor", "rule_options": NARROW}),
    "MAN++ activation form": ((1, 4), {"rule": "man++", "rule_options": {"form": "activation"}}),
    "MAN++ parameter form, unlocked": (
        (1, 2, 4),
        {"rule": "man++", "rule_options": {"form": "parameter"}, "order": "unlocked"},
    ),
    "MAN++ parameter form, unlocked, compiled": (
        (1, 4),
        {"rule": "man++", "rule_options": {"form": "parameter"}, "order": "unlocked", "compile": "inductor"},
    ),
}
if GPU:
    for _name, (_counts, _settings) in CAPTURED.items():
        for _streams in _counts:
            _variant = f"{_name}, CUDA graph" + (f", {_streams} streams" if _streams > 1 else "")
            VARIANTS[_variant] = _ours(cuda_graphs=True, streams=_streams, **_settings)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def step_memory(trainer: Trains, batch: tuple[Tensor, Tensor]) -> dict[str, int]:
    """Memory of one step, gradients of the step before dropped first."""
    for t in trainer.persistent_tensors():
        t.grad = None
    gc.collect()
    before = 0
    if GPU:
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with SavedTensorMeter(trainer.persistent_tensors()) as meter:
        trainer.step(batch)
    memory = {"saved_bytes": meter.peak_bytes}
    if GPU:
        memory["allocated_bytes"] = torch.cuda.max_memory_allocated() - before
    return memory


def step_seconds(trainer: Trains, batch: tuple[Tensor, Tensor], steps: int) -> float:
    synchronize()
    start = time.perf_counter_ns()
    for _ in range(steps):
        trainer.step(batch)
    synchronize()
    return (time.perf_counter_ns() - start) * 1e-9 / steps


def measure(
    network: str, variants: list[str], rounds: int | None = None, *, prepare: float | None = None
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """A row for each variant; for those that have none, the reason; and which of these failed.

    A variant that fails, or whose turn to be made ready comes after ``prepare`` seconds, costs the others nothing.
    """
    blocks, usual = NETWORKS[network]
    rounds = rounds or usual
    steps = 3 if GPU and not QUICK else 1
    torch.manual_seed(0)
    batch = torch.randn(BATCH, *IMAGE, device=DEVICE), torch.randint(0, CLASSES, (BATCH,), device=DEVICE)
    trainers: dict[str, Trains] = {}
    memory: dict[str, dict[str, int]] = {}
    left_out: dict[str, str] = {}
    failed: list[str] = []
    begin = time.perf_counter()
    # Compiling may take minutes: what comes last, and is left out first.
    for name in sorted(variants, key=lambda name: "compiled" in name):
        taken = time.perf_counter() - begin
        if prepare is not None and taken > prepare:
            left_out[name] = f"its turn to be made ready came after {taken:.0f} s"
            continue
        try:
            trainers[name], memory[name] = make_ready(network, name, batch)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
            failed.append(name)
    for name, why in left_out.items():
        print(f"{network}, {name}: left out ({why})", file=sys.stderr, flush=True)
    variants = [name for name in variants if name in trainers]
    if not variants:
        return [], left_out, failed
    trainers = {name: trainers[name] for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    again: list[float] = []
    for _ in range(rounds):
        for name, trainer in trainers.items():
            times[name].append(step_seconds(trainer, batch, steps))
        again.append(step_seconds(trainers[variants[0]], batch, steps))
    kind = "allocated_bytes" if GPU else "saved_bytes"
    rows = [
        {
            "network": network,
            "blocks": blocks,
            "batch": BATCH,
            "image": list(IMAGE),
            **RECIPE,
            "variant": name,
            **step_times(times[name]),
            "again_seconds": round(statistics.median(again), 6) if name == variants[0] else None,
            "rounds": rounds,
            **memory[name],
            "memory_share": round(memory[name][kind] / memory[peer(name)][kind], 4) if peer(name) in memory else None,
            "speed_up": quotient(times[EAGER], times[name]) if EAGER in times else None,
            "of_e2e": quotient(times[name], times[peer(name)]) if peer(name) in times else None,
        }
        for name in variants
    ]
    return rows, left_out, failed


def make_ready(network: str, name: str, batch: tuple[Tensor, Tensor]) -> tuple[Trains, dict[str, int]]:
    """A trainer that has nothing left to set up, and what a step of it takes in memory."""
    torch.manual_seed(0)
    trainer = VARIANTS[name](MODELS[network](CLASSES).to(DEVICE).train())
    trainer.step(batch)  # the optimizer's state, the plans, the choice of convolutions
    memory = step_memory(trainer, batch)
    graph: StepGraph | None = getattr(trainer, "_graph", None)
    for _ in range(StepGraph.WARM_UP if graph is not None else 0):  # so that nothing is captured in timed steps
        trainer.step(batch)
    if graph is not None:
        memory["allocated_bytes"] = graph.graph_bytes
    return trainer, memory


def peer(name: str) -> str:
    """The end-to-end variant that another is compared with: captured, if that is."""
    return f"{E2E}, CUDA graph" if "CUDA graph" in name else E2E


def table(rows: list[dict[str, Any]]) -> str:
    kind = "allocated_bytes" if GPU else "saved_bytes"

    def share(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    lines = [
        [
            f"{r['network']}, K = {r['blocks']}: {r['variant']}",
            f"{1e3 * r['seconds']:.1f}",
            f"{1e3 * r['min_seconds']:.1f}",
            share(r["of_e2e"], "{:.2f}"),
            share(r["speed_up"], "{:.2f}x"),
            f"{r[kind] / 2**20:.1f}",
            share(r["memory_share"], "{:.1%}"),
        ]
        for r in rows
    ]
    head = ["training step", "ms", "min ms", "of e2e", "over plain", "MiB", "of e2e's memory"]
    return text_table(head, lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="may be repeated [all]")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated [all]")
    parser.add_argument("--rounds", type=int, metavar="N", help="steps of each variant that are timed")
    parser.add_argument(
        "--prepare", type=float, metavar="SECONDS", help="leave out what has not begun to be made ready by then"
    )
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    failures: list[str] = []
    for network in args.network or NETWORKS:
        # Compiling takes minutes: for the larger network, and on a CPU, where it gains nothing, only when asked for.
        usual = [name for name in VARIANTS if "compiled" not in name or (GPU and network != "resnet110")]
        found, left_out, failed = measure(network, args.variant or usual, args.rounds, prepare=args.prepare)
        rows += found
        missing |= {f"{network}, {name}": why for name, why in left_out.items()}
        failures += failed
        gc.collect()
        if args.json is not None:  # after each network, so that a time limit leaves what there is
            content = {"environment": environment(), **({"left_out": missing} if missing else {}), "rows": rows}
            write_json(args.json, content)
    print(table(rows))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
