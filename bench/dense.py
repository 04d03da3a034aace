"""Step time and memory where pixels or boxes are classified: torchvision's FCN and RetinaNet in four local blocks.

    python bench/dense.py [--json PATH]                                (MANPP_BENCH_QUICK=1 for a look)

Blocks end where the stages of the ResNet-50 do. The variants of a model take their steps in turns; memory is that of
bench/training.py.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, QUICK, environment, write_json
from page import text_table
from timing import quotient, step_times
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.segmentation import fcn_resnet50
from training import GPU, RECIPE, step_memory, step_seconds

from manpp_kernels.local.detection import RetinaNetLoss, RetinaNetOutputs, detection_batch, stage_ends
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

CLASSES = 21
SIDE, BATCH = (64, 1) if QUICK else (512, 8) if GPU else (256, 2)
ROUNDS = 1 if QUICK else 5
# In four blocks but for those end to end.
VARIANTS: dict[str, dict[str, Any]] = {
    "e2e": {"rule": "e2e"},
    "e2e, checkpointed": {"rule": "e2e", "recompute": True},
    "dgl, narrow head": {"rule": "dgl"},
    "dgl, narrow head, checkpointed": {"rule": "dgl", "recompute": True},
    "MAN++ activation form": {"rule": "man++"},
    "MAN++ parameter form, narrow head": {
        "rule": "man++",
        "rule_options": {"form": "parameter", "host_options": {"width": "narrow"}},
    },
}

Batch = tuple[Tensor, Tensor]


def segmentation(settings: dict[str, Any]) -> tuple[LocalTrainer, Batch]:
    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)
    ends = [f"backbone.{stage}" for stage in ("layer1.2", "layer2.3", "layer3.5")]
    batch = torch.rand(BATCH, 3, SIDE, SIDE), torch.randint(CLASSES, (BATCH, SIDE, SIDE))
    return _trainer(model, ends, settings), batch


def detection(settings: dict[str, Any]) -> tuple[LocalTrainer, Batch]:
    sides = {"min_size": SIDE, "max_size": SIDE}
    detector = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES, **sides)
    corners = torch.rand(BATCH, 8, 2) * SIDE / 2
    boxes = torch.cat([corners, corners + SIDE / 16 + torch.rand(BATCH, 8, 2) * SIDE / 4], 2)
    targets = [{"boxes": b, "labels": torch.randint(CLASSES, (8,))} for b in boxes]
    batch = detection_batch(detector, list(torch.rand(BATCH, 3, SIDE, SIDE)), targets)
    return _trainer(RetinaNetOutputs(detector), stage_ends(detector), settings, RetinaNetLoss(detector)), batch


def _trainer(model: nn.Module, ends: list[str], settings: dict[str, Any], criterion: Any = None) -> LocalTrainer:
    blocks = None if settings["rule"] == "e2e" else ends
    config = TrainerConfig(blocks=blocks, learning_rate=0.001, measure_memory=False, **RECIPE, **settings)
    return LocalTrainer(model.to(DEVICE), config, example=(3, SIDE, SIDE), criterion=criterion)


TASKS: dict[str, Callable[[dict[str, Any]], tuple[LocalTrainer, Batch]]] = {
    "segmentation, FCN, ResNet-50": segmentation,
    "detection, RetinaNet, ResNet-50": detection,
}


def measure(task: str) -> list[dict[str, Any]]:
    """A row for each variant."""
    ready: dict[str, tuple[LocalTrainer, Batch]] = {}
    memory: dict[str, dict[str, int]] = {}
    for name, settings in VARIANTS.items():
        torch.manual_seed(0)
        trainer, batch = TASKS[task](settings)
        ready[name] = trainer, (batch[0].to(DEVICE), batch[1].to(DEVICE))
        trainer.step(ready[name][1])  # the optimizer's state, the plans, the choice of convolutions
        memory[name] = step_memory(*ready[name])
        gc.collect()
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name, (trainer, batch) in ready.items():
            times[name].append(step_seconds(trainer, batch, 1))
    first, kind = next(iter(VARIANTS)), "allocated_bytes" if GPU else "saved_bytes"
    return [
        {
            "task": task,
            "batch": BATCH,
            "side": SIDE,
            **RECIPE,
            "variant": name,
            **step_times(times[name]),
            "rounds": ROUNDS,
            **memory[name],
            "memory_share": round(memory[name][kind] / memory[first][kind], 4),
            "of_e2e": quotient(times[name], times[first]),
        }
        for name in VARIANTS
    ]


def table(rows: list[dict[str, Any]]) -> str:
    kind = "allocated_bytes" if GPU else "saved_bytes"
    lines = [
        [
            f"{r['task']}: {r['variant']}",
            f"{1e3 * r['seconds']:.1f}",
            f"{r['of_e2e']:.2f}",
            f"{r[kind] / 2**20:.1f}",
            f"{r['memory_share']:.1%}",
        ]
        for r in rows
    ]
    return text_table(["training step", "ms", "of e2e", "MiB", "of e2e's memory"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        rows += measure(task)
        gc.collect()
        if args.json is not None:  # after each task, so that a time limit leaves what there is
            write_json(args.json, {"environment": environment(), "rows": rows})
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
