"""Host cost: microseconds of Python and C++ a call, on tensors so small that the work itself takes no time.

    python bench/host_cost.py [--json PATH]            (MANPP_BENCH_QUICK=1 for a look)

On the CPU the update itself is in the figures (8 elements a tensor); on CUDA the calls are timed without waiting for
the device, few enough at once that the queue of launches never fills.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, EFFORT, QUICK, environment, write_json
from ema_contenders import (
    MOMENTUM,
    Composition,
    Inputs,
    Kind,
    foreach_lerp,
    lerp_mul,
    loop,
    make_inputs,
    mul_add,
    our_backends,
    ours,
    update_peers,
)
from page import show_time, text_table
from timing import Contender, Effort, LaunchClock, race

import manpp_kernels

COUNTS = (10, 100, 1000)
UPDATE, WEIGHTS = "update", "update + weights"
# On CUDA a thousand launches fill the queue, and the host would wait for the device: few calls at once, many times.
CALLS_AT_ONCE, MOST_LAUNCHES = 4, 900


def _parts_of_a_plan(x: Inputs) -> list[Contender]:
    """What a plan's update consists of, beside Python's own cost: the launch, and telling autograd of the write."""
    found = []
    for backend in our_backends():
        with manpp_kernels.use_backend(backend):
            plan = manpp_kernels.EmaPlan(x.ema, x.params)
            plan.update(MOMENTUM)
        launch = getattr(plan, "_update_alone", None)  # of the plan's own; where that changes, the row goes
        if launch is not None:
            call = [lambda f=launch: f(MOMENTUM)]
            found.append(Contender(f"{backend} plan, the launch alone", call, ours=True, backend=backend))
    versions = [lambda: torch.autograd.graph.increment_version(x.ema)]
    found.append(Contender("version counters alone", versions, ours=True))
    return found


def contenders(count: int, work: str) -> list[Contender]:
    kind = Kind("fp32", weights=work == WEIGHTS)
    x = make_inputs([(8,)] * count, kind, 1)
    # The eager backend is no competitor here, and its launches would fill the queue.
    found = [c for c in ours([x], kind) if c.backend != "eager"]
    if work == UPDATE:
        found += _parts_of_a_plan(x)
        found.append(Contender("foreach lerp_", [lambda: foreach_lerp(x.ema, x.params)]))
        found += [c for c in update_peers([x], kind, compiled=False) if "ModelE" in c.name or "Averaged" in c.name]
        found.append(Contender("loop, mul_ add_", [lambda: loop(x.ema, x.params)]))
    else:
        c = Composition(x, [])
        found.append(Contender("foreach lerp_, mul, add_", [lambda: mul_add(c)]))
        found.append(Contender("foreach lerp_, lerp, mul_", [lambda: lerp_mul(c)]))
        scale, bias = x.scale.clone().requires_grad_(), [b.clone().requires_grad_() for b in x.bias]
        for backend in our_backends():
            with manpp_kernels.use_backend(backend):
                plan = manpp_kernels.EmaPlan(x.ema, x.params, bias=bias)
            call = [lambda p=plan: p.update(MOMENTUM, scale=scale)]
            found.append(Contender(f"{backend} plan, with a graph", call, ours=True, backend=backend))
    return found


def measure() -> list[dict[str, Any]]:
    rows = []
    for work in (UPDATE, WEIGHTS):
        for count in COUNTS:
            effort = EFFORT
            if DEVICE.type == "cuda":
                effort = Effort(EFFORT.seconds, EFFORT.rounds * 4, most_calls=CALLS_AT_ONCE)
            found = contenders(count, work)
            if DEVICE.type == "cuda":
                launches = 2 * count * CALLS_AT_ONCE
                found = [c for c in found if launches <= MOST_LAUNCHES or not c.name.startswith("loop")]
            samples, left_out = race(found, LaunchClock, effort)
            times = {
                name: {"us": round(s.median * 1e6, 3), "min_us": round(s.least * 1e6, 3)} for name, s in samples.items()
            }
            rows.append({"work": work, "tensors": count, "times": times, "left_out": left_out})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    parts = []
    for work in (UPDATE, WEIGHTS):
        chosen = [r for r in rows if r["work"] == work]
        names = list(dict.fromkeys(name for r in chosen for name in r["times"]))
        lines = [
            [name, *(show_time(r["times"][name]["us"]) if name in r["times"] else "-" for r in chosen)]
            for name in names
        ]
        parts.append(text_table([f"{work}, us a call", *(f"{r['tensors']} tensors" for r in chosen)], lines))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    rows = measure()
    if args.json is not None:
        write_json(args.json, {"environment": environment(), "rows": rows})
    print(table(rows))
    print(f"device {DEVICE}, {'quick, ' if QUICK else ''}torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
