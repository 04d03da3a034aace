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
    new: bool = False  # a result in new memory, compared with such alone: memory just freed may still be in the cache

    def __str__(self) -> str:
        end = ", new" if self.new else ""
        if self.source_layout == self.target_layout:
            return f"{NAMES[self.source]} to {NAMES[self.target]}, {self.source_layout}{end}"
        return f"{NAMES[self.source]} {self.source_layout} to {NAMES[self.target]} {self.target_layout}{end}"

    @property
    def work(self) -> str:
        parts = ["cast"] if self.source != self.target else []
        parts += ["layout"] if self.source_layout != self.target_layout else []
        return " + ".join(parts) or "copy"


def _into_new(v: Variant, sets: int) -> list[Contender]:
    xs = [draw(v.size, v.source, v.source_layout) for _ in range(sets)]
    layout = FORMATS[v.target_layout]

    def ours(x: Tensor) -> Tensor:
        return detach_copy(x, dtype=v.target, memory_format=layout)

    def theirs(x: Tensor) -> Tensor:
        return x.detach().to(v.target, memory_format=layout, copy=True)

    found = [Contender(backend, [lambda x=x: ours(x) for x in xs], True, backend) for backend in backends()]
    found.append(Contender("to", [lambda x=x: theirs(x) for x in xs]))
    if COMPILE and v.size == LARGE:
        f = torch.compile(theirs)
        found.append(Contender("compiled to", [lambda x=x: f(x) for x in xs]))
    return found


def _into_given(v: Variant, sets: int) -> list[Contender]:
    pairs = [(draw(v.size, v.source, v.source_layout), draw(v.size, v.target, v.target_layout)) for _ in range(sets)]
    found = [
        Contender(backend, [lambda x=x, y=y: detach_copy(x, y) for x, y in pairs], True, backend)
        for backend in backends()
    ]
    found.append(Contender("copy_", [lambda x=x, y=y: y.copy_(x) for x, y in pairs]))
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
        headline=backends()[0],
        build=functools.partial(_into_new if v.new else _into_given, v),
        threads=threads,
        resident=resident,
        fresh=(1, count * v.target.itemsize) if v.new else (0, 0),
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
    for target, layout in ((b16, "NCHW"), (f32, "channels_last"), (b16, "channels_last")):
        yield _case(Variant(LARGE, f32, target, "NCHW", layout, new=True))
    for size in SMALL:
        for new in (False, True):
            yield _case(Variant(size, f32, b16, new=new))
            yield _case(Variant(size, f32, f32, "NCHW", "channels_last", new))
    if DEVICE.type == "cpu" and ALL_THREADS > 1:
        yield _case(Variant(LARGE, f32, b16), threads=1)
        yield _case(Variant(LARGE, f32, b16, "NCHW", "channels_last"), threads=1)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_detach_copy(benchmark, measure, case):
    measure(benchmark, case)
