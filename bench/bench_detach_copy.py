"""``detach_copy`` with a cast, a change of layout, and both, beside ``Tensor.to`` and ``copy_``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from common import ALL_THREADS, COMPILE, DEVICE, QUICK, Case
from feature_maps import FORMATS, LARGE, SMALL, backends, draw, elements
from timing import Contender
from torch import Tensor

from manpp_kernels import detach_copy

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Variant:
    size: str
    source: torch.dtype
    target: torch.dtype
    source_layout: str = "NCHW"
    target_layout: str = "NCHW"

    def __str__(self) -> str:
        if self.source_layout == self.target_layout:
            return f"{NAMES[self.source]} to {NAMES[self.target]}, {self.source_layout}"
        return f"{NAMES[self.source]} {self.source_layout} to {NAMES[self.target]} {self.target_layout}"

    @property
    def work(self) -> str:
        parts = ["cast"] if self.source != self.target else []
        parts += ["layout"] if self.source_layout != self.target_layout else []
        return " + ".join(parts) or "copy"


def build(v: Variant, sets: int) -> list[Contender]:
    pairs = [(draw(v.size, v.source, v.source_layout), draw(v.size, v.target, v.target_layout)) for _ in range(sets)]
    layout = FORMATS[v.target_layout]

    def ours_new(x: Tensor) -> Tensor:
        return detach_copy(x, dtype=v.target, memory_format=layout)

    def theirs_new(x: Tensor) -> Tensor:
        return x.detach().to(v.target, memory_format=layout, copy=True)

    found = []
    for backend in backends():
        found.append(
            Contender(f"{backend}, out=", [lambda x=x, y=y: detach_copy(x, y) for x, y in pairs], True, backend)
        )
        found.append(Contender(f"{backend}, new", [lambda x=x: ours_new(x) for x, _ in pairs], True, backend))
    found.append(Contender("copy_", [lambda x=x, y=y: y.copy_(x) for x, y in pairs]))
    found.append(Contender("to, new", [lambda x=x: theirs_new(x) for x, _ in pairs]))
    if COMPILE and v.size == LARGE:
        f = torch.compile(lambda x, y: y.copy_(x))
        found.append(Contender("compiled copy_", [lambda x=x, y=y: f(x, y) for x, y in pairs]))
    return found


def _case(v: Variant, *, threads: int = ALL_THREADS, resident: bool = False) -> Case:
    count = elements(v.size)
    moved = count * (v.source.itemsize + v.target.itemsize)
    return Case(
        operator="detach_copy",
        work=v.work,
        size=v.size,
        dtypes=str(v),
        tensors=1,
        elements=count,
        moved=moved,
        footprint=moved,
        headline=f"{backends()[0]}, out=",
        build=functools.partial(build, v),
        threads=threads,
        resident=resident,
    )


def cases() -> Iterator[Case]:
    f32, b16, f16 = torch.float32, torch.bfloat16, torch.float16
    if QUICK:
        yield _case(Variant("128 x 64 x 8 x 8", f32, b16), resident=True)
        yield _case(Variant("128 x 64 x 8 x 8", f32, b16, "NCHW", "channels_last"), resident=True)
        return
    for source, target in ((f32, f32), (f32, b16), (b16, f32), (f32, f16)):
        yield _case(Variant(LARGE, source, target))
    for source, target in ((f32, f32), (b16, b16), (f32, b16)):
        yield _case(Variant(LARGE, source, target, "NCHW", "channels_last"))
        yield _case(Variant(LARGE, source, target, "channels_last", "NCHW"))
    for size in SMALL:
        yield _case(Variant(size, f32, b16))
        yield _case(Variant(size, f32, f32, "NCHW", "channels_last"))
    if DEVICE.type == "cpu" and ALL_THREADS > 1:
        yield _case(Variant(LARGE, f32, b16), threads=1)
        yield _case(Variant(LARGE, f32, b16, "NCHW", "channels_last"), threads=1)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_detach_copy(benchmark, measure, case):
    measure(benchmark, case)
