"""Tables of addresses: how one launch reaches any number of tensors, and finds its way among them.

A table is one int64 tensor, written on the host and moved by one copy:

    rows     8 words a tensor: four addresses, elements, first program, group, codes
    ranges   2 words a group (where a reduction asks for them): its first program, and the one past its last
    counters 4 bytes a group: how many of its programs have arrived; zero between launches
    owners   4 bytes a program: the row it works on

A program reads its owner, then its row (one 64-byte line), then data: two short dependent reads, whatever the number
of tensors, where a search in prefix sums would take one for each doubling of it. A row a program would save one of the
two and make the table, which an operator call has to copy, sixteen times as long.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from manpp_kernels.backends import is_capturing, keep_for_graphs
from manpp_kernels.backends.eager import _is_dense
from manpp_kernels.backends.triton.arithmetic import CODES, VECTOR

WORDS = 8

# What holds for none, for all, or for some of the tensors of a table. Only the last leaves a branch in a kernel.
NONE, ALL, SOME = 0, 1, 2

DOUBLE_BIT, ALIGNED_BIT = 1 << 16, 1 << 17

# An address that 128-bit accesses may start at.
ALIGNMENT = 16

Copies = list[tuple[Tensor, Tensor]]


@dataclass
class Table:
    """What a launch needs that does not change from call to call. Holds on to every buffer the addresses lead to."""

    buffer: Tensor  # on the device of the tensors
    rows: Tensor
    owners: Tensor
    ranges: Tensor
    counters: Tensor
    programs: int
    dtypes: tuple[int, ...]  # of each column: the codes of its dtypes, or-ed; 0 for a column that is not there
    double: int  # which tensors compute in float64: NONE, ALL or SOME
    aligned: int  # which tensors 128-bit accesses fit all through
    before: Copies = field(default_factory=list)  # (to, from) ahead of the launch: operands in another layout
    after: Copies = field(default_factory=list)  # (to, from) behind the launch: results in another layout
    keep: list[Tensor] = field(default_factory=list)


@dataclass
class Column:
    """One operand of every row; ``tensors`` is empty where the launch does without it."""

    tensors: Sequence[Tensor]
    reads: bool
    writes: bool


def in_layout_of(x: Tensor, like: Tensor) -> bool:
    """Whether elements of the same index stand at the same offset in ``x`` and ``like`` (of the same shape)."""
    if x.stride() == like.stride():
        return True
    return all(a == b or n == 1 for a, b, n in zip(x.stride(), like.stride(), x.shape, strict=True))


def is_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` fill one stretch of memory, in whatever order."""
    return x.is_contiguous() or _is_dense(x)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` current: Triton launches there, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _state(flags: Sequence[bool]) -> int:
    return ALL if all(flags) else SOME if any(flags) else NONE


def build(columns: Sequence[Column], groups: Sequence[int], span: int, group_count: int | None = None) -> Table:
    """A table of the rows ``columns[0].tensors[i], columns[1].tensors[i], …``, cut into programs of ``span`` elements.

    The first column that is there sets the layout; tensors of another, or not dense, are worked on in copies, which
    the table's ``before`` and ``after`` fill and empty. ``groups[i]`` is the group of row i (0 if ``groups`` is empty).
    With ``group_count`` the rows have to be in the order of their groups, ranges and counters are set up, and every
    group has a program, if need be one without elements.
    """
    present = [c for c in columns if len(c.tensors)]
    layouts = present[0].tensors
    table_copies: tuple[Copies, Copies, list[Tensor]] = ([], [], [])
    rows: list[list[int]] = []
    counts: list[int] = []
    doubles: list[bool] = []
    aligned: list[bool] = []
    dtypes = [0] * len(columns)
    for i, first in enumerate(layouts):
        numel = first.numel()
        layout = first if is_dense(first) else torch.empty(first.shape, device="meta")
        addresses = [0] * len(columns)
        codes = 0
        union = 0
        for k, column in enumerate(columns):
            if not len(column.tensors):
                continue
            t = column.tensors[i]
            code = CODES[t.dtype]
            union |= code
            codes |= code << (4 * k)
            dtypes[k] |= code
            if numel and not in_layout_of(t, layout):
                t = _stand_in(t, layout, column, *table_copies)
            addresses[k] = t.data_ptr()
        double = bool(union & CODES[torch.float64])
        fits = not any(a % ALIGNMENT for a in addresses)
        codes |= DOUBLE_BIT * double | ALIGNED_BIT * fits
        doubles.append(double)
        aligned.append(fits and numel % VECTOR == 0)
        counts.append(-(-numel // span))
        rows.append([*addresses, numel, 0, groups[i] if groups else 0, codes])
    if group_count is not None:
        rows, counts = _with_every_group(rows, counts, group_count)
    before, after, keep = table_copies
    buffer, views = _upload(rows, counts, group_count or 0, layouts[0].device)
    table_rows, owners, ranges, counters = views
    return Table(
        buffer,
        table_rows,
        owners,
        ranges,
        counters,
        programs=sum(counts),
        dtypes=tuple(dtypes),
        double=_state(doubles),
        aligned=_state(aligned),
        before=before,
        after=after,
        keep=keep,
    )


def _stand_in(t: Tensor, layout: Tensor, column: Column, before: Copies, after: Copies, keep: list[Tensor]) -> Tensor:
    """A buffer for ``t`` in the layout wanted, entered among the copies of the table."""
    buffer = torch.empty_strided(t.shape, layout.stride(), dtype=t.dtype, device=t.device)
    if column.reads:
        before.append((buffer, t))
    if column.writes:
        after.append((t, buffer))
    keep.append(buffer)
    return buffer


def _with_every_group(rows: list[list[int]], counts: list[int], group_count: int) -> tuple[list[list[int]], list[int]]:
    """Rows without elements for the groups that have no program, so that one writes their sum, which is 0."""
    served = {row[6] for row, count in zip(rows, counts, strict=True) if count}
    # Any dtype code of the list will do: nothing is read. Addresses of 0 count as aligned.
    codes = rows[0][7] | ALIGNED_BIT
    for group in sorted(set(range(group_count)) - served):
        at = sum(row[6] < group for row in rows)
        rows.insert(at, [0, 0, 0, 0, 0, 0, group, codes])
        counts.insert(at, 1)
    return rows, counts


def _upload(
    rows: list[list[int]], counts: list[int], group_count: int, device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The table in one device tensor, and its four parts."""
    ends = numpy.cumsum(counts, dtype=numpy.int64)
    programs = int(ends[-1])
    sizes = [WORDS * len(rows), 2 * group_count, (group_count + 1) // 2, (programs + 1) // 2]
    edges = numpy.cumsum([0, *sizes])
    # Pinned, so that the copy runs behind the host's back; PyTorch keeps the buffer until the copy is done.
    pin = device.type == "cuda"
    host = torch.empty(int(edges[-1]), dtype=torch.int64, pin_memory=pin)
    words = host.numpy()
    table = words[: edges[1]].reshape(-1, WORDS)
    table[:] = rows
    table[:, 5] = ends - counts
    if group_count:
        group_of = numpy.repeat(table[:, 6], counts)
        ranges = words[edges[1] : edges[2]].reshape(-1, 2)
        ranges[:, 0] = numpy.searchsorted(group_of, numpy.arange(group_count), "left")
        ranges[:, 1] = numpy.searchsorted(group_of, numpy.arange(group_count), "right")
        words[edges[2] : edges[3]] = 0
    owners = words[edges[3] :].view(numpy.int32)
    owners[:programs] = numpy.repeat(numpy.arange(len(rows), dtype=numpy.int32), counts)
    if is_capturing(device):
        keep_for_graphs(host)  # the copy becomes part of the graph
    buffer = host.to(device, non_blocking=True)
    parts = [buffer[a:b] for a, b in itertools.pairwise(edges)]
    return buffer, (parts[0], parts[3].view(torch.int32), parts[1], parts[2].view(torch.int32))


_counters: dict[tuple[torch.device, int], Tensor] = {}

# Counters that captures may take, on each device: 1 MB, several hundred launches at the least.
RESERVE = 1 << 18
_reserves: dict[torch.device, Tensor] = {}


def zero_counters(count: int, device: torch.device) -> Tensor:
    """``count`` int32 counters at zero, for a kernel that leaves them at zero: no launch to clear them.

    Kept for each stream, as two launches may share counters only where one follows the other. Nothing says on which
    streams a graph will be replayed, nor when it ends: each launch that is captured takes counters from a reserve, for
    good. The reserve is made by the first launch outside a capture; without one, a graph clears the counters itself.
    """
    if is_capturing(device):
        reserve = _reserves.get(device)
        if reserve is None or len(reserve) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _reserves[device] = reserve[count:]
        return reserve[:count]
    if device not in _reserves:
        _reserves[device] = _zeros_for_good(RESERVE, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters = _counters.get((device, stream))
    if counters is None or counters.numel() < count:
        counters = _counters[device, stream] = _zeros_for_good(max(count, 4096), device)
    return counters


def _zeros_for_good(count: int, device: torch.device) -> Tensor:
    """Zeros for any stream, in memory of no graph.

    Made by another thread: what this one allocates goes to the pool of a graph while torch.compile warms it up (in
    mode="reduce-overhead"), which then finds there what is none of the graph's outputs.
    """

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
