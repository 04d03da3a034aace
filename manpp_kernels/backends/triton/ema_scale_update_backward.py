"""The gradients of the effective weights: one launch for those of every bias and for the sums that make scale's."""

# A kernel's arguments have no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manpp_kernels.backends.triton.arithmetic import (
    VECTOR,
    arrives_last,
    load_as,
    narrow,
    publish,
    store_as,
    sum_of_slots,
)
from manpp_kernels.backends.triton.tables import (
    ALIGNED_BIT,
    ALL,
    DOUBLE_BIT,
    NONE,
    SOME,
    WORDS,
    Column,
    build,
    on_device,
)

# As in the forward pass: 16 elements a thread and round.
CHUNK = 2048
WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

# A program goes round its tensor more than once where there would otherwise be more partial sums than this: the last
# program to arrive adds them up alone, in four steps of SLOTS, which takes a few microseconds.
MOST_PARTIALS = 16384
# Partial sums that the last program reads at once: 16 a thread, all in flight together.
SLOTS = 2048

_WORDS = tl.constexpr(WORDS)
_VECTOR = tl.constexpr(VECTOR)
_DOUBLE_BIT = tl.constexpr(DOUBLE_BIT)
_ALIGNED_BIT = tl.constexpr(ALIGNED_BIT)
_NONE, _ALL = tl.constexpr(NONE), tl.constexpr(ALL)


@triton.jit
def _stretch(
    row, start, count, s,
    GRAD: tl.constexpr, BIAS: tl.constexpr, EMA: tl.constexpr, GRAD_BIAS: tl.constexpr,
    CHUNK: tl.constexpr, TO: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``count`` elements from ``start`` on: stores s * grad, returns the sum of grad * (bias - ema)."""
    grad = tl.load(row)
    codes = tl.load(row + 7)
    if ALIGNED:
        count = tl.multiple_of(count // _VECTOR * _VECTOR, _VECTOR)  # the same number, known to be a multiple
    if BIAS:
        bias = tl.load(row + 1)
        ema = tl.load(row + 2)
    if GRAD_BIAS:
        grad_bias = tl.load(row + 3)
    local = tl.arange(0, CHUNK)
    products = tl.zeros((CHUNK,), TO)
    chunk = 0
    while chunk * CHUNK < count:
        offset = start + chunk * CHUNK + local
        mask = local < count - chunk * CHUNK
        g = load_as(grad, codes & 15, offset, mask, GRAD, TO, ALIGNED)
        if BIAS:
            b = load_as(bias, (codes >> 4) & 15, offset, mask, BIAS, TO, ALIGNED)
            e = load_as(ema, (codes >> 8) & 15, offset, mask, EMA, TO, ALIGNED)
            products += g * (b - e)
        if GRAD_BIAS:
            store_as(grad_bias, (codes >> 12) & 15, offset, mask, s.to(TO) * g, GRAD_BIAS, ALIGNED)
        chunk += 1
    return tl.sum(products)


@triton.jit
def _stretch_in(
    row, start, count, s,
    GRAD: tl.constexpr, BIAS: tl.constexpr, EMA: tl.constexpr, GRAD_BIAS: tl.constexpr,
    CHUNK: tl.constexpr, DOUBLE: tl.constexpr, ALIGNED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Picks the precision of the arithmetic: float64 for a tensor with a float64 operand. The sum comes in ``SUM``."""
    if DOUBLE == _NONE:
        share = _stretch(row, start, count, s, GRAD, BIAS, EMA, GRAD_BIAS, CHUNK, tl.float32, ALIGNED).to(SUM)
    elif DOUBLE == _ALL:
        share = _stretch(row, start, count, s, GRAD, BIAS, EMA, GRAD_BIAS, CHUNK, tl.float64, ALIGNED).to(SUM)
    else:
        if tl.load(row + 7) & _DOUBLE_BIT != 0:
            share = _stretch(row, start, count, s, GRAD, BIAS, EMA, GRAD_BIAS, CHUNK, tl.float64, ALIGNED).to(SUM)
        else:
            share = _stretch(row, start, count, s, GRAD, BIAS, EMA, GRAD_BIAS, CHUNK, tl.float32, ALIGNED).to(SUM)
    return share


@triton.jit(
    do_not_specialize=["scale_stride", "grad_scale_stride", "span"],
    do_not_specialize_on_alignment=["rows", "owners", "ranges", "counters", "partials", "scale", "grad_scale"],
)
def ema_scale_update_backward_kernel(
    rows, owners, ranges, counters, partials, scale, scale_stride, grad_scale, grad_scale_stride, span,
    GRAD: tl.constexpr, BIAS: tl.constexpr, EMA: tl.constexpr, GRAD_BIAS: tl.constexpr,
    DOUBLE: tl.constexpr, ALIGNED: tl.constexpr, SUM: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A program: ``span`` elements of one tensor. BIAS = 0 leaves the sums away, GRAD_BIAS = 0 the bias's gradient."""
    program = tl.program_id(0)
    row = rows + tl.load(owners + program) * _WORDS
    group = tl.load(row + 6)
    start = (program - tl.load(row + 5)) * span // CHUNK * CHUNK  # span is a multiple of CHUNK: this says so
    count = tl.minimum(tl.load(row + 4) - start, span).to(tl.int32)
    s = tl.load(scale + group * scale_stride).to(tl.float64)
    if ALIGNED == _ALL:
        share = _stretch_in(row, start, count, s, GRAD, BIAS, EMA, GRAD_BIAS, CHUNK, DOUBLE, True, SUM)
    else:
        if (tl.load(row + 7) & _ALIGNED_BIT != 0) & (count % _VECTOR == 0):
            share = _stretch_in(row, start, count, s, GRAD, BIAS, EMA, GRAD_BIAS, CHUNK, DOUBLE, True, SUM)
        else:
            share = _stretch_in(row, start, count, s, GRAD, BIAS, EMA, GRAD_BIAS, CHUNK, DOUBLE, False, SUM)
    if BIAS:
        # Every partial sum has its own slot, and the slots of a group are added in the order of their numbers by
        # whichever program comes last: the result does not depend on which one that is.
        publish(partials + program, share)
        first = tl.load(ranges + 2 * group)
        end = tl.load(ranges + 2 * group + 1)
        if arrives_last(counters + group, (end - first).to(tl.int32)):
            total = sum_of_slots(partials + first, (end - first).to(tl.int32), SLOTS)
            tl.store(grad_scale + group * grad_scale_stride, narrow(total, grad_scale.dtype.element_ty))


def ema_scale_update_backward(
    grad: list[Tensor],
    bias: list[Tensor],
    ema: list[Tensor],
    scale: Tensor,
    groups: list[int],
    total: float,
    grad_bias: list[Tensor],
    grad_scale: Tensor | None,
) -> None:
    """See the operator's schema in ``manpp_kernels/ops``. ``total`` has no part in these gradients."""
    if grad_scale is not None and not grad:
        grad_scale.zero_()
    if not grad or (grad_scale is None and not (grad_bias and any(g.numel() for g in grad))):
        return
    order = sorted(range(len(grad)), key=groups.__getitem__) if groups else list(range(len(grad)))

    def sorted_by_group(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in order] if tensors else []

    sums = grad_scale is not None
    columns = [
        Column(sorted_by_group(grad), True, False),
        Column(sorted_by_group(bias) if sums else [], True, False),
        Column(sorted_by_group(ema) if sums else [], True, False),
        Column(sorted_by_group(grad_bias), False, True),
    ]
    chunks = sum(-(-g.numel() // CHUNK) for g in grad)
    span = CHUNK * max(1, -(-chunks // MOST_PARTIALS))
    table = build(columns, [groups[i] for i in order] if groups else [], span, scale.numel() if sums else None)
    for to, source in table.before:
        to.copy_(source)
    sum_dtype = torch.float32 if table.double == NONE else torch.float64
    partials = torch.empty(table.programs, dtype=sum_dtype, device=scale.device) if sums else None
    codes = dict(zip(("GRAD", "BIAS", "EMA", "GRAD_BIAS"), table.dtypes, strict=True))
    with on_device(scale.device):
        ema_scale_update_backward_kernel[(table.programs,)](
            table.rows,
            table.owners,
            table.ranges if sums else None,
            table.counters if sums else None,
            partials,
            scale,
            scale.stride(0) if scale.dim() else 0,
            grad_scale,
            grad_scale.stride(0) if grad_scale is not None and grad_scale.dim() else 0,
            span,
            **codes,
            DOUBLE=table.double,
            ALIGNED=SOME if table.aligned == NONE else table.aligned,
            SUM=tl.float32 if table.double == NONE else tl.float64,
            CHUNK=CHUNK,
            SLOTS=SLOTS,
            **OPTIONS,
        )
    for to, source in table.after:
        to.copy_(source)
