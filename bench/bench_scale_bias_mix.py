"""``scale_bias_mix``, forward and backward, in both layouts, beside the formula in PyTorch, eager and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from common import ALL_THREADS, COMPILE, DEVICE, QUICK, Case
from feature_maps import LARGE, MAPS, SMALL, backends, draw, elements
from timing import Call, Contender
from torch import Tensor

import manpp_kernels

TOTAL = 2.0
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    size: str
    dtype: torch.dtype
    layout: str
    per_channel: bool

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{dtype}, {self.layout}, {'per-channel' if self.per_channel else 'scalar'} scale"


@dataclass
class Inputs:
    lb: Tensor
    ema: Tensor
    scale: Tensor
    grad: Tensor


def make_inputs(v: Variant) -> Inputs:
    scale = torch.rand(MAPS[v.size][1] if v.per_channel else (), device=DEVICE) + 0.5
    lb, ema, grad = (draw(v.size, v.dtype, v.layout) for _ in range(3))
    return Inputs(lb, ema, scale, grad)


def ours(lb: Tensor, ema: Tensor, scale: Tensor) -> Tensor:
    return manpp_kernels.scale_bias_mix(lb, ema, scale, total=TOTAL)


def _broadcast(scale: Tensor, x: Tensor) -> Tensor:
    """In the dtype of the maps, as float32 would make the products and the result float32."""
    return scale.to(x.dtype).view(-1, 1, 1) if scale.dim() else scale


def formula(lb: Tensor, ema: Tensor, scale: Tensor) -> Tensor:
    s = _broadcast(scale, lb)
    return s * lb + (TOTAL - s) * ema


def lerped(lb: Tensor, ema: Tensor, scale: Tensor) -> Tensor:
    """Coefficients that sum to one, then the total."""
    return torch.lerp(ema, lb, _broadcast(scale, lb).to(lb.dtype) / TOTAL) * TOTAL


def peers(v: Variant) -> dict[str, Mix]:
    found: dict[str, Mix] = {"formula": formula, "lerp, mul": lerped}
    # Compiling takes seconds a row: for the plainest rows alone.
    if COMPILE and v.size == LARGE and v.layout == "NCHW" and not v.per_channel:
        found["compiled formula"] = torch.compile(formula)
        if DEVICE.type == "cuda" and v.dtype == torch.float32:
            found["compiled formula, max-autotune"] = torch.compile(formula, mode="max-autotune-no-cudagraphs")
    return found


def _forward_call(f: Mix, x: Inputs) -> Call:
    return lambda: f(x.lb, x.ema, x.scale)


def _backward_call(f: Mix, x: Inputs) -> Call:
    """The backward pass alone, again and again on one graph."""
    wanted = [t.detach().requires_grad_() for t in (x.lb, x.ema, x.scale)]
    y = f(*wanted)
    return lambda: torch.autograd.grad(y, wanted, x.grad, retain_graph=True)


def _both_call(f: Mix, x: Inputs) -> Call:
    wanted = [t.detach().requires_grad_() for t in (x.lb, x.ema, x.scale)]
    return lambda: torch.autograd.grad(f(*wanted), wanted, x.grad)


# What is done, the maps it has to read and write, those that one input set holds, and those that it makes anew.
WORKS: dict[str, tuple[Callable[[Mix, Inputs], Call], int, int, int]] = {
    "forward": (_forward_call, 3, 3, 1),
    "backward": (_backward_call, 5, 5, 2),
    "forward + backward": (_both_call, 8, 6, 3),
}


def build(v: Variant, work: str, sets: int) -> list[Contender]:
    inputs = [make_inputs(v) for _ in range(sets)]
    make = WORKS[work][0]
    # A graph of autograd's own would have to be recorded anew in every capture; a capture holds no warm-up.
    capture = work != "backward"
    found = []
    for backend in backends():
        with manpp_kernels.use_backend(backend):
            calls = [make(ours, x) for x in inputs]
        found.append(Contender(backend, calls, ours=True, backend=backend, capture=capture))
    found += [Contender(name, [make(f, x) for x in inputs], capture=capture) for name, f in peers(v).items()]
    return found


def _case(v: Variant, work: str, *, threads: int = ALL_THREADS, resident: bool = False) -> Case:
    count = elements(v.size)
    _, maps, held, made = WORKS[work]
    return Case(
        operator="scale_bias_mix",
        work=work,
        size=v.size,
        dtypes=str(v),
        tensors=1,
        elements=count,
        moved=maps * count * v.dtype.itemsize,
        footprint=held * count * v.dtype.itemsize,
        headline=backends()[0],
        build=functools.partial(build, v, work),
        threads=threads,
        resident=resident,
        fresh=(made, count * v.dtype.itemsize),
    )


def cases() -> Iterator[Case]:
    if QUICK:
        v = Variant("128 x 64 x 8 x 8", torch.float32, "NCHW", False)
        yield from (_case(v, work, resident=True) for work in WORKS)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("NCHW", "channels_last"):
            for per_channel in (False, True):
                for work in ("forward", "backward"):
                    yield _case(Variant(LARGE, dtype, layout, per_channel), work)
    for size in SMALL:
        yield _case(Variant(size, torch.float32, "NCHW", False), "forward + backward")
    yield _case(Variant(LARGE, torch.float32, "NCHW", False), "forward + backward")
    if DEVICE.type == "cpu" and ALL_THREADS > 1:
        for work in ("forward", "backward"):
            yield _case(Variant(LARGE, torch.float32, "NCHW", False), work, threads=1)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_scale_bias_mix(benchmark, measure, case):
    measure(benchmark, case)
