"""``detach_copy``: a cast, a change of layout, or both, in one pass."""

# A kernel's arguments have no Python types, and an `if` over a constant stands alone, to be decided early.
# mypy: allow-untyped-defs

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from manpp_kernels.backends.triton.arithmetic import CODES, VECTOR, narrow, widen
from manpp_kernels.backends.triton.tables import in_layout_of, is_dense, on_device

# Elements a program copies, and its warps: 16 a thread, so two to four 128-bit loads are in flight.
CHUNK = 2048
WARPS = 4

# A tile of a transpose, each way: 64 elements of 16 bits are a full line of 128 bytes, of 32 bits two. It is turned
# round in shared memory (8 to 32 KB); 8 warps give each thread 16 elements.
SIDE = 64
TRANSPOSE_WARPS = 8


@triton.jit
def _cast(x, DTYPE: tl.constexpr):
    if x.dtype == DTYPE:  # as it is: a NaN keeps its bits
        y = x
    elif x.dtype == tl.float64:
        y = narrow(x, DTYPE)
    else:
        y = narrow(widen(x, tl.float32), DTYPE)
    return y


@triton.jit(do_not_specialize=["numel"])
def cast_kernel(x, out, numel, CHUNK: tl.constexpr):
    """A program: one chunk, the same offsets on both sides."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    local = tl.arange(0, CHUNK)
    if first + CHUNK <= numel:
        values = tl.load(x + first + local)
        tl.store(out + first + local, _cast(values, out.dtype.element_ty))
    else:
        mask = local < (numel - first).to(tl.int32)
        values = tl.load(x + first + local, mask=mask)
        tl.store(out + first + local, _cast(values, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["a", "b", "blocks_a", "blocks_b"])
def transpose_kernel(
    x, out, a, b, blocks_a, blocks_b, VEC_A: tl.constexpr, VEC_B: tl.constexpr, SIDE: tl.constexpr
):  # fmt: skip
    """A program: one tile of one matrix; ``x`` holds matrices of ``a`` by ``b``, ``out`` the same of ``b`` by ``a``."""
    program = tl.program_id(0)
    matrix = (program // (blocks_a * blocks_b)).to(tl.int64)
    i0 = (program // blocks_b % blocks_a).to(tl.int64) * SIDE
    j0 = (program % blocks_b).to(tl.int64) * SIDE
    a = tl.multiple_of(a.to(tl.int64), VEC_A)
    b = tl.multiple_of(b.to(tl.int64), VEC_B)
    i = tl.arange(0, SIDE)[:, None]
    j = tl.arange(0, SIDE)[None, :]
    # What is left of the matrix in each direction; multiples of the vectors, said so.
    left_a = tl.multiple_of(tl.minimum(a - i0, SIDE).to(tl.int32) // VEC_A * VEC_A, VEC_A)
    left_b = tl.multiple_of(tl.minimum(b - j0, SIDE).to(tl.int32) // VEC_B * VEC_B, VEC_B)
    mask = (i < left_a) & (j < left_b)
    values = tl.load(x + (matrix * a * b + i0 * b + j0) + i * b + j, mask=mask)
    # The store's layout is the transposed one, so that both sides are coalesced; the compiler turns the tile round.
    tl.store(out + (matrix * a * b + j0 * a + i0) + j * a + i, _cast(values, out.dtype.element_ty), mask=mask)


def _order(x: Tensor) -> list[int]:
    """The dimensions of more than one element, outermost in memory first."""
    return sorted((d for d in range(x.dim()) if x.shape[d] != 1), key=x.stride, reverse=True)


def as_transpose(x: Tensor, out: Tensor) -> tuple[int, int, int] | None:
    """(matrices, a, b) if ``out`` holds each of a batch of a-by-b matrices of ``x`` transposed; else None.

    NCHW against channels_last, in either direction and in any number of dimensions, is such a case: after the outer
    dimensions that both orders begin with, the one order is the other, rotated.
    """
    if not (is_dense(x) and is_dense(out)):
        return None
    one, other = _order(x), _order(out)
    batch = []
    while one and one[0] == other[0]:
        batch.append(one.pop(0))
        other.pop(0)
    if not one:
        return None
    cut = one.index(other[0])
    if one[cut:] + one[:cut] != other:
        return None
    sizes = [math.prod(x.shape[d] for d in dims) for dims in (batch, one[:cut], one[cut:])]
    return sizes[0], sizes[1], sizes[2]


def _vector(size: int) -> int:
    return next(v for v in (VECTOR, 4, 2, 1) if size % v == 0)


def detach_copy(x: Tensor, out: Tensor) -> None:
    """See the operator's schema in ``manpp_kernels/ops``."""
    if not x.numel():
        return
    if x.dtype not in CODES or out.dtype not in CODES:
        out.copy_(x)
    elif in_layout_of(x, out) and is_dense(x):
        if x.dtype == out.dtype:
            out.copy_(x)  # a plain copy of memory, for which there is an engine
        else:
            with on_device(x.device):
                cast_kernel[(triton.cdiv(x.numel(), CHUNK),)](x, out, x.numel(), CHUNK=CHUNK, num_warps=WARPS)
    elif (shape := as_transpose(x, out)) is not None:
        matrices, a, b = shape
        blocks_a, blocks_b = triton.cdiv(a, SIDE), triton.cdiv(b, SIDE)
        with on_device(x.device):
            transpose_kernel[(matrices * blocks_a * blocks_b,)](
                x,
                out,
                a,
                b,
                blocks_a,
                blocks_b,
                VEC_A=_vector(a),
                VEC_B=_vector(b),
                SIDE=SIDE,
                num_warps=TRANSPOSE_WARPS,
            )
    else:
        out.copy_(x)
