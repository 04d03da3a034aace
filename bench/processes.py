"""Step time and memory of training in several processes: replicas, a pipeline of local blocks, one of backpropagation.

    python bench/processes.py [--network resnet32] [--json PATH]       (MANPP_BENCH_QUICK=1 for a look)

As many processes as the CPU has cores, up to four, which share its threads, beside one process on all of them. Every
step is over as many images. The variants take turns of some steps each, in which pipelines fill and drain; memory is
the peak of live unique storages that autograd keeps, without parameters, of the process that keeps the most.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import ALL_THREADS, QUICK, environment, write_json
from page import text_table
from timing import quotient, step_times
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from manpp_kernels.local import SavedTensorMeter, partition
from manpp_kernels.local.partition import body
from manpp_kernels.models import MODELS
from manpp_kernels.trainer import LocalTrainer, TrainerConfig
from manpp_kernels.training.balance import measure_block_seconds, share_out

CLASSES = 10
IMAGE = (3, 16, 16) if QUICK else (3, 32, 32)
BATCH = 16 if QUICK else 128
# Of each variant in a row, and how many times.
STEPS, ROUNDS = (1, 2) if QUICK else (6, 9)
# The first is measured where none is named.
NETWORKS = ["resnet20"] if QUICK else ["resnet32", "resnet110"]
MICRO_BATCHES = 4

Step = Callable[[Tensor, Tensor], None]


class Backpropagation:
    """End to end over a pipeline of PyTorch's: every process has a part of the network, and micro-batches pass it."""

    def __init__(self, model: nn.Module) -> None:
        rank, count = dist.get_rank(), dist.get_world_size()
        parts = partition(model, count, example=IMAGE, balance="memory")
        part = body(parts, rank)
        self.optimizer = torch.optim.SGD(part.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
        stage = PipelineStage(part, rank, count, torch.device("cpu"))
        self._schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=F.cross_entropy)
        self._first, self._last = rank == 0, rank == count - 1
        self.parameters = list(model.parameters())

    def step(self, images: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._schedule.step(*([images] if self._first else []), **({"target": targets} if self._last else {}))
        self.optimizer.step()


def _local(model: nn.Module, **settings: Any) -> LocalTrainer:
    return LocalTrainer(model, TrainerConfig(measure_memory=False, **settings), example=IMAGE)


DGL = {"rule": "dgl", "rule_options": {"width": "narrow"}, "blocks": 4, "balance": "memory"}
MAN_PP = {"rule": "man++", "rule_options": {"form": "parameter"}, "order": "unlocked"}
E2E = {"rule": "e2e"}
ALONE, REPLICAS, PIPELINE = "one process", "data parallel", "pipeline"
# By what trains, and how.
VARIANTS: dict[tuple[str, str], dict[str, Any] | None] = {
    ("e2e", ALONE): E2E,
    ("e2e", REPLICAS): {**E2E, "data_parallel": True},
    ("e2e", f"{PIPELINE} of backpropagation"): None,
    ("dgl, narrow head, 4 blocks", ALONE): DGL,
    ("dgl, narrow head, 4 blocks", REPLICAS): {**DGL, "data_parallel": True},
    ("dgl, narrow head, 4 blocks", PIPELINE): {**DGL, "pipeline": True},
    ("MAN++ parameter form, unlocked", ALONE): MAN_PP,
    ("MAN++ parameter form, unlocked", REPLICAS): {**MAN_PP, "data_parallel": True},
    ("MAN++ parameter form, unlocked", PIPELINE): {**MAN_PP, "pipeline": True},
}


def make(network: str, name: tuple[str, str]) -> tuple[Step, list[Tensor]]:
    """A step of this process, over its share of the images, and what lies in memory anyway."""
    torch.manual_seed(0)
    model, settings = MODELS[network](CLASSES), VARIANTS[name]
    if settings is None:
        pipeline = Backpropagation(model)
        return pipeline.step, pipeline.parameters
    if name[1] == PIPELINE:
        settings = {**settings, "pipeline": shares(network, settings)}
    trainer = _local(model, **settings)
    mine = slice(dist.get_rank(), None, dist.get_world_size()) if name[1] == REPLICAS else slice(None)
    return lambda images, targets: trainer.step((images[mine], targets[mine])), trainer.persistent_tensors()


def shares(network: str, settings: dict[str, Any]) -> list[int]:
    """How many blocks each process gets, by what they take on one thread."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        alone = _local(MODELS[network](CLASSES), **{**settings, "pipeline": False})
        batch = torch.randn(BATCH, *IMAGE), torch.randint(0, CLASSES, (BATCH,))
        found = [share_out(measure_block_seconds(alone, batch), dist.get_world_size())]
    dist.broadcast_object_list(found)
    return list(found[0])


def measure(network: str) -> list[dict[str, Any]]:
    """A row for each variant, on rank 0."""
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    batch = torch.randn(BATCH, *IMAGE), torch.randint(0, CLASSES, (BATCH,))
    steps: dict[tuple[str, str], Step] = {}
    memory: dict[tuple[str, str], int] = {}
    for name in VARIANTS:
        alone = name[1] == ALONE
        threads(alone)
        peak = 0
        if rank == 0 or not alone:
            step, persistent = make(network, name)
            step(*batch)
            with SavedTensorMeter(persistent) as meter:
                step(*batch)
            steps[name], peak = step, meter.peak_bytes
        every: list[Any] = [None] * count
        dist.all_gather_object(every, peak)
        memory[name] = max(every)
        gc.collect()
    times: dict[tuple[str, str], list[float]] = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name in VARIANTS:
            threads(name[1] == ALONE)
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS if name in steps else 0):
                steps[name](*batch)
            dist.barrier()
            times[name].append((time.perf_counter() - start) / STEPS)
    first = next(iter(VARIANTS))
    return [
        {
            "network": network,
            "batch": BATCH,
            "image": list(IMAGE),
            "processes": 1 if name[1] == ALONE else count,
            "variant": name[0],
            "how": name[1],
            **step_times(times[name]),
            "rounds": ROUNDS,
            "steps": STEPS,
            "saved_bytes": memory[name],
            "memory_share": round(memory[name] / memory[first], 4),
            "of_e2e": quotient(times[name], times[first]),
        }
        for name in VARIANTS
    ]


def threads(alone: bool) -> None:
    torch.set_num_threads(ALL_THREADS if alone else max(1, ALL_THREADS // dist.get_world_size()))


def _process(rank: int, count: int, store: str, networks: list[str], path: Path | None) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    rows = []
    for network in networks:
        rows += measure(network)
        if rank == 0 and path is not None:  # after each network, so that a time limit leaves what there is
            write_json(path, {"environment": environment(), "rows": rows})
    if rank == 0:
        print(table(rows))
    dist.barrier()
    dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            f"{r['network']}, {r['variant']}, {r['how']}",
            f"{1e3 * r['seconds']:.1f}",
            f"{1e3 * r['min_seconds']:.1f}",
            f"{r['of_e2e']:.2f}",
            f"{r['saved_bytes'] / 2**20:.1f}",
            f"{r['memory_share']:.1%}",
        ]
        for r in rows
    ]
    return text_table(["training step", "ms", "min ms", "of e2e", "MiB a process", "of e2e's memory"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help=f"may be repeated [{NETWORKS[0]}]")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    count = min(4, max(2, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, f"{folder}/store", args.network or NETWORKS[:1], args.json)
        torch.multiprocessing.spawn(_process, arguments, nprocs=count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
