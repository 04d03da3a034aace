"""``ema_scale_update`` by op and plan, its effective weights and their backward, beside every peer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from common import ALL_THREADS, DEVICE, QUICK, Case
from ema_backward import backward_contenders
from ema_contenders import Kind, headline, make_inputs, ours, update_peers, weights_peers
from tensors import BLOCKS, SIZES, elements
from timing import Contender

FP32 = Kind("fp32")
WEIGHTS = Kind("fp32", weights=True)
BF16 = Kind("bf16 from fp32", ema=torch.bfloat16)
STOCHASTIC = Kind("bf16 from fp32, stochastic", ema=torch.bfloat16, rounding="stochastic")
FROM_BF16 = Kind("fp32 from bf16", params=torch.bfloat16)
WEIGHTS_FROM_BF16 = Kind("fp32 from bf16", params=torch.bfloat16, weights=True)

SMALL = "96 x 4,800"
ON_CPU = (SMALL, "600 x 40,000", "ResNet-50, 161 tensors", "ViT-B, 152 tensors", "YOLO-like, 1,188 tensors", "4 x 8 M")
ON_CUDA = (*ON_CPU[:-1], "4 x 25 M")
FEW = ("4 x 8 M", "4 x 25 M")


def _compiles(size: str, kind: Kind, threads: int, resident: bool) -> bool:
    """Whether the peers are also compiled. Hundreds of statements take minutes to compile, 96 take most of one."""
    return size in FEW or (size == SMALL and kind.name == "fp32" and threads == ALL_THREADS and not resident)


def _update(size: str, kind: Kind, compiled: bool, sets: int) -> list[Contender]:
    shapes, groups = SIZES[size](), BLOCKS if kind.weights and size == SMALL else 1
    inputs = [make_inputs(shapes, kind, groups) for _ in range(sets)]
    peers: Callable[..., list[Contender]] = weights_peers if kind.weights else update_peers
    return ours(inputs, kind) + peers(inputs, kind, compiled)


def _backward(size: str, sets: int) -> list[Contender]:
    inputs = [make_inputs(SIZES[size](), WEIGHTS, BLOCKS if size == SMALL else 1) for _ in range(sets)]
    return backward_contenders(inputs, size in FEW)


def _case(size: str, kind: Kind, *, threads: int = ALL_THREADS, resident: bool = False) -> Case:
    shapes = SIZES[size]()
    count = elements(shapes)
    return Case(
        operator="ema_scale_update",
        work="update + weights" if kind.weights else "update",
        size=size,
        dtypes=kind.name,
        tensors=len(shapes),
        elements=count,
        moved=count * kind.bytes_per_element(),
        footprint=count * kind.footprint_per_element(),
        headline=headline(),
        build=functools.partial(_update, size, kind, _compiles(size, kind, threads, resident)),
        threads=threads,
        resident=resident,
    )


def _backward_case(size: str) -> Case:
    shapes = SIZES[size]()
    count = elements(shapes)
    # Read: gradient, bias, ema. Written: the gradient of bias.
    return Case(
        operator="ema_scale_update",
        work="weights backward",
        size=size,
        dtypes="fp32",
        tensors=len(shapes),
        elements=count,
        moved=16 * count,
        footprint=16 * count,
        headline=headline().replace("plan", "kernel"),
        build=functools.partial(_backward, size),
    )


def cases() -> Iterator[Case]:
    if QUICK:
        for kind in (FP32, WEIGHTS, STOCHASTIC):
            yield _case(SMALL, kind, resident=True)
        yield _backward_case(SMALL)
        return
    sizes = ON_CUDA if DEVICE.type == "cuda" else ON_CPU
    for kind in (FP32, WEIGHTS):
        yield _case(SMALL, kind, resident=True)
    # The small one last: its peers take a minute to compile, and where time is short the large ones are the goal.
    for size in (*sizes[1:], sizes[0]):
        for kind in (FP32, WEIGHTS, BF16, STOCHASTIC, FROM_BF16, WEIGHTS_FROM_BF16):
            yield _case(size, kind)
        yield _backward_case(size)
    if DEVICE.type == "cpu" and ALL_THREADS > 1:
        for size in sizes:
            for kind in (FP32, WEIGHTS):
                yield _case(size, kind, threads=1)
        for kind in (FP32, WEIGHTS):
            yield _case(SMALL, kind, threads=1, resident=True)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_ema_scale_update(benchmark, measure, case):
    measure(benchmark, case)
