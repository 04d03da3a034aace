"""What a finished run says about itself beside its history: the size of what was trained, and what it ran on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import manpp_kernels
from manpp_kernels.data import ImageData
from manpp_kernels.trainer import LocalTrainer


def summary(trainer: LocalTrainer, data: ImageData, ranks: int = 1) -> dict[str, Any]:
    """Blocks, images, parameters and the environment of a run.

    ``auxiliary_parameters`` are those trained beside the model, ``ema_parameters`` the averaged ones, which are not
    trained; neither is part of the model that comes out.
    """
    beside = [p for block in trainer.network if block.auxiliary is not None for p in block.auxiliary.parameters()]
    return {
        "blocks": len(trainer.network),
        "images": len(data.train),
        "test_images": len(data.test),
        "image_size": data.size,
        "classes": data.num_classes,
        "parameters": _count(trainer.model.parameters()),
        "auxiliary_parameters": _count(p for p in beside if p.requires_grad),
        "ema_parameters": _count(p for p in beside if not p.requires_grad),
        "epochs": trainer.epoch,
        "processes": ranks,
        "environment": environment(trainer.device),
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures of a run depend on."""
    facts: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "version": manpp_kernels.__version__,
        "commit": os.environ.get("MANPP_COMMIT") or commit(),
        "device": device.type,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def commit() -> str:
    """The commit of the checkout that the package runs from, with a + where its sources have been changed since."""
    root = Path(manpp_kernels.__file__).resolve().parents[1]
    # An installed package may lie inside somebody else's repository, whose commit would say nothing.
    if not (root / ".git").exists():
        return "unknown"
    found = _git(root, "rev-parse", "--short", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", "csrc", "manpp_kernels")
    return f"{found or 'unknown'}{'+' if changed else ''}"


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
