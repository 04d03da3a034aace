"""``ema_scale_update``: one launch for the EMA of a whole model, and with it the effective weights.

A launch plan calls :func:`build_table` once and :func:`launch` every step; the operator calls both each time.
"""

# A kernel's arguments have no Python types, and an `if` over a constant stands alone, to be decided early.
# mypy: allow-untyped-defs
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from manpp_kernels.backends.triton.arithmetic import (
    BF16,
    F16,
    VECTOR,
    bits_of,
    from_bits,
    load_as,
    random_bits,
    round_stochastically,
    store_as,
)
from manpp_kernels.backends.triton.tables import (
    ALIGNED_BIT,
    ALL,
    DOUBLE_BIT,
    NONE,
    SOME,
    WORDS,
    Column,
    Table,
    build,
    on_device,
)

# Elements a program handles, and its warps: 16 a thread, so four 128-bit loads of float32 of each operand in flight.
# Small enough that a small network (96 tensors of 4,800) fills a large GPU; large enough that reading the table (72
# bytes) is noise beside the data (24 KB for float32). A power of two, so that no chunk crosses an index of 2^32.
CHUNK = 2048
WARPS = 4

# No fused multiply-add: m * ema + (1 - m) * p rounds three times, as in the other backends, so that one seed gives the
# same stochastically rounded bits everywhere. The kernel waits for memory; the extra instructions are not felt.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

_WORDS = tl.constexpr(WORDS)
_VECTOR = tl.constexpr(VECTOR)
_DOUBLE_BIT = tl.constexpr(DOUBLE_BIT)
_ALIGNED_BIT = tl.constexpr(ALIGNED_BIT)
_NONE, _ALL = tl.constexpr(NONE), tl.constexpr(ALL)


@triton.jit
def _rounded(e, bits, code, EMA: tl.constexpr):
    """``e`` at one of its two neighbours in the dtype of the EMA, where that has 16 bits."""
    x = e.to(tl.float32)
    if EMA == BF16:
        e = round_stochastically(x, bits, tl.bfloat16).to(e.dtype)
    elif EMA == F16:
        e = round_stochastically(x, bits, tl.float16).to(e.dtype)
    else:
        if BF16 & EMA:
            if code == BF16:
                e = round_stochastically(x, bits, tl.bfloat16).to(e.dtype)
        if F16 & EMA:
            if code == F16:
                e = round_stochastically(x, bits, tl.float16).to(e.dtype)
    return e


@triton.jit
def _update(
    row, tensor, first, count, m, rest, s, total, seed,
    EMA: tl.constexpr, PARAMS: tl.constexpr, BIAS: tl.constexpr, OUT: tl.constexpr,
    STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, TO: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk: ``count`` elements from ``first`` on, computed in ``TO``. The scalars come in float64."""
    ema = tl.load(row)
    params = tl.load(row + 1)
    codes = tl.load(row + 7)
    if ALIGNED:
        count = tl.multiple_of(count // _VECTOR * _VECTOR, _VECTOR)  # the same number, known to be a multiple
    local = tl.arange(0, CHUNK)
    offset = first + local
    mask = local < count
    e = load_as(ema, codes & 15, offset, mask, EMA, TO, ALIGNED)
    p = load_as(params, (codes >> 4) & 15, offset, mask, PARAMS, TO, ALIGNED)
    if BIAS:
        bias = tl.load(row + 2)
        b = load_as(bias, (codes >> 8) & 15, offset, mask, BIAS, TO, ALIGNED)
    e = e * m.to(TO) + p * rest.to(TO)
    if STOCHASTIC:
        e = _rounded(e, random_bits(seed, tensor, first, local), codes & 15, EMA)
    e = store_as(ema, codes & 15, offset, mask, e, EMA, ALIGNED)
    if BIAS:
        out = tl.load(row + 3)
        # From the EMA as it now stands in memory, rounded to its dtype.
        w = s.to(TO) * b + (total.to(TO) - s.to(TO)) * e
        store_as(out, (codes >> 12) & 15, offset, mask, w, OUT, ALIGNED)


@triton.jit
def _update_in(
    row, tensor, first, count, m, rest, s, total, seed,
    EMA: tl.constexpr, PARAMS: tl.constexpr, BIAS: tl.constexpr, OUT: tl.constexpr,
    STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, DOUBLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Picks the precision of the arithmetic: float64 for a tensor with a float64 operand."""
    if DOUBLE == _NONE:
        _update(row, tensor, first, count, m, rest, s, total, seed, EMA, PARAMS, BIAS, OUT, STOCHASTIC, CHUNK,
                tl.float32, ALIGNED)  # fmt: skip
    elif DOUBLE == _ALL:
        _update(row, tensor, first, count, m, rest, s, total, seed, EMA, PARAMS, BIAS, OUT, STOCHASTIC, CHUNK,
                tl.float64, ALIGNED)  # fmt: skip
    else:
        if tl.load(row + 7) & _DOUBLE_BIT != 0:
            _update(row, tensor, first, count, m, rest, s, total, seed, EMA, PARAMS, BIAS, OUT, STOCHASTIC, CHUNK,
                    tl.float64, ALIGNED)  # fmt: skip
        else:
            _update(row, tensor, first, count, m, rest, s, total, seed, EMA, PARAMS, BIAS, OUT, STOCHASTIC, CHUNK,
                    tl.float32, ALIGNED)  # fmt: skip


@triton.jit(
    do_not_specialize=["momentum_bits", "rest_bits", "scale_stride", "total_bits"],
    do_not_specialize_on_alignment=["rows", "owners", "momentum_tensor", "scale", "seed"],
)
def ema_scale_update_kernel(
    rows, owners, momentum_tensor, momentum_bits: tl.int64, rest_bits: tl.int64, scale, scale_stride,
    total_bits: tl.int64, seed,
    EMA: tl.constexpr, PARAMS: tl.constexpr, BIAS: tl.constexpr, OUT: tl.constexpr,
    DOUBLE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program: one chunk of one tensor. ``momentum_tensor``, ``scale`` and ``seed`` may be None."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    row = rows + tensor * _WORDS
    first = (program - tl.load(row + 5)) * CHUNK
    count = tl.minimum(tl.load(row + 4) - first, CHUNK).to(tl.int32)
    if momentum_tensor is not None:
        m = tl.load(momentum_tensor).to(tl.float64)
        rest = 1.0 - m
    else:
        m = from_bits(momentum_bits)
        rest = from_bits(rest_bits)
    total = from_bits(total_bits)
    s = total
    if BIAS:
        s = tl.load(scale + tl.load(row + 6) * scale_stride).to(tl.float64)
    STOCHASTIC: tl.constexpr = seed is not None
    drawn = first
    if STOCHASTIC:
        drawn = tl.load(seed)
    if ALIGNED == _ALL:
        _update_in(row, tensor, first, count, m, rest, s, total, drawn, EMA, PARAMS, BIAS, OUT, STOCHASTIC, CHUNK,
                   DOUBLE, True)  # fmt: skip
    else:
        # A last chunk that does not end on a vector goes element by element, like every misaligned tensor.
        if (tl.load(row + 7) & _ALIGNED_BIT != 0) & (count % _VECTOR == 0):
            _update_in(row, tensor, first, count, m, rest, s, total, drawn, EMA, PARAMS, BIAS, OUT, STOCHASTIC, CHUNK,
                       DOUBLE, True)  # fmt: skip
        else:
            _update_in(row, tensor, first, count, m, rest, s, total, drawn, EMA, PARAMS, BIAS, OUT, STOCHASTIC, CHUNK,
                       DOUBLE, False)  # fmt: skip


def build_table(
    ema: list[Tensor], params: list[Tensor], bias: list[Tensor], out: list[Tensor], groups: list[int]
) -> Table | None:
    """The table of a launch over these tensors; None where they have no elements between them.

    Lists as the operator takes them: ``bias`` and ``out`` are empty where no effective weights are wanted, ``groups``
    where every tensor is in group 0. The table holds addresses, and buffers for tensors that are laid out unlike their
    EMA, but not the tensors themselves: whoever keeps a table keeps them, and builds a new one when one of them moves.
    """
    columns = [
        Column(ema, True, True),
        Column(params, True, False),
        Column(bias, True, False),
        Column(out, False, True),
    ]
    if not any(e.numel() for e in ema):
        return None
    return build(columns, groups, CHUNK)


def launch(
    table: Table | None,
    momentum: float,
    momentum_tensor: Tensor | None,
    scale: Tensor | None,
    total: float,
    seed: Tensor | None,
) -> None:
    """Update the tensors of ``table``, on the current stream: one launch, no allocation, no synchronisation.

    Can be captured in a CUDA graph: a replay reads the values that ``momentum_tensor``, ``scale`` and ``seed`` hold by
    then (a seed that stands still rounds every replay alike); ``momentum`` and ``total`` are fixed by the capture.
    Tensors in another layout than their EMA cost a copy each way beside the launch.
    """
    if table is None:
        return
    for to, source in table.before:
        to.copy_(source)
    ema, params, bias, out = table.dtypes
    with on_device(table.buffer.device):
        ema_scale_update_kernel[(table.programs,)](
            table.rows,
            table.owners,
            momentum_tensor,
            bits_of(momentum),
            bits_of(1.0 - momentum),
            scale if bias else None,
            scale.stride(0) if scale is not None and scale.dim() else 0,
            bits_of(total),
            seed,
            EMA=ema,
            PARAMS=params,
            BIAS=bias,
            OUT=out,
            DOUBLE=table.double,
            ALIGNED=SOME if table.aligned == NONE else table.aligned,
            CHUNK=CHUNK,
            **OPTIONS,
        )
    for to, source in table.after:
        to.copy_(source)


def ema_scale_update(
    ema: list[Tensor],
    params: list[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
    scale: Tensor | None,
    bias: list[Tensor],
    groups: list[int],
    total: float,
    seed: Tensor | None,
    out: list[Tensor],
) -> None:
    """See the operator's schema in ``manpp_kernels/ops``."""
    launch(build_table(ema, params, bias, out, groups), momentum, momentum_tensor, scale, total, seed)
