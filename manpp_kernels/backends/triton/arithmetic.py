"""Device functions that every kernel shares: loads and stores of any dtype, the hash, rounding, the last arrival.

Kernels read and write through addresses kept in a table, so the dtype of an operand is not in a signature. A dtype has
a code, one bit; a kernel is compiled for the set of dtypes that its operand takes over the whole list (``DTYPES``, the
codes or-ed together). For a set of one, the usual case, no branch is left; otherwise the tensor's own code picks.
"""

# A kernel's arguments have no Python types, and an `if` over a constant stands alone, to be decided early.
# mypy: allow-untyped-defs
# ruff: noqa: SIM102, SIM300

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from manpp_kernels.backends import triton_interpreted

CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 4, torch.float64: 8}
F32 = tl.constexpr(1)
BF16 = tl.constexpr(2)
F16 = tl.constexpr(4)
F64 = tl.constexpr(8)

# How many elements in a row a thread may take at once: 128 bits of the narrowest dtype. Wider ones take several loads.
VECTOR = 8


def bits_of(x: float) -> int:
    """The bits of a double, as an int64. Triton passes a Python float as float32; this way nothing is lost."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


@triton.jit
def from_bits(bits):
    """The double that :func:`bits_of` took apart."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


# The interpreter cuts float32 off to bfloat16 and garbles subnormals: there, these conversions go bit by bit.
_INTERPRETED = tl.constexpr(triton_interpreted())


@triton.jit
def widen(x, TO: tl.constexpr):
    """``x``, of any floating dtype, in ``TO``: float32 or float64."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(TO)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """``x`` (float32 or float64) in ``DTYPE``. To 16 bits by way of float32, as PyTorch does it."""
    if DTYPE == tl.bfloat16 or DTYPE == tl.float16:
        x = x.to(tl.float32)
    if _INTERPRETED and DTYPE == tl.bfloat16:
        raw = x.to(tl.uint32, bitcast=True)
        raw = tl.where(x == x, raw + 0x7FFF + ((raw >> 16) & 1), raw | 0x400000)
        stored = (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = x.to(DTYPE)
    return stored


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # Said of the pointer, not of the address: the latter's analysis does not reach through the cast.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(address, offset, mask, DTYPE: tl.constexpr, TO: tl.constexpr, ALIGNED: tl.constexpr):
    return widen(tl.load(_pointer(address, DTYPE, ALIGNED) + offset, mask=mask, other=0.0), TO)


@triton.jit
def load_as(address, code, offset, mask, DTYPES: tl.constexpr, TO: tl.constexpr, ALIGNED: tl.constexpr):
    """The elements at ``address``, of the dtype that ``code`` names (one of ``DTYPES``), as ``TO``."""
    if DTYPES == F32:
        x = _load(address, offset, mask, tl.float32, TO, ALIGNED)
    elif DTYPES == BF16:
        x = _load(address, offset, mask, tl.bfloat16, TO, ALIGNED)
    elif DTYPES == F16:
        x = _load(address, offset, mask, tl.float16, TO, ALIGNED)
    elif DTYPES == F64:
        x = _load(address, offset, mask, tl.float64, TO, ALIGNED)
    else:
        x = tl.zeros(offset.shape, TO)
        if F32 & DTYPES:
            if code == F32:
                x = _load(address, offset, mask, tl.float32, TO, ALIGNED)
        if BF16 & DTYPES:
            if code == BF16:
                x = _load(address, offset, mask, tl.bfloat16, TO, ALIGNED)
        if F16 & DTYPES:
            if code == F16:
                x = _load(address, offset, mask, tl.float16, TO, ALIGNED)
        # Whoever has a float64 operand computes in float64: there is no such load into float32.
        if F64 & DTYPES and TO == tl.float64:
            if code == F64:
                x = _load(address, offset, mask, tl.float64, TO, ALIGNED)
    return x


@triton.jit
def _store(address, offset, mask, x, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    stored = narrow(x, DTYPE)
    tl.store(_pointer(address, DTYPE, ALIGNED) + offset, stored, mask=mask)
    return widen(stored, x.dtype)


@triton.jit
def store_as(address, code, offset, mask, x, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Store ``x`` in the dtype that ``code`` names (one of ``DTYPES``); returns what now stands there, in x's dtype."""
    if DTYPES == F32:
        x = _store(address, offset, mask, x, tl.float32, ALIGNED)
    elif DTYPES == BF16:
        x = _store(address, offset, mask, x, tl.bfloat16, ALIGNED)
    elif DTYPES == F16:
        x = _store(address, offset, mask, x, tl.float16, ALIGNED)
    elif DTYPES == F64:
        x = _store(address, offset, mask, x, tl.float64, ALIGNED)
    else:
        if F32 & DTYPES:
            if code == F32:
                x = _store(address, offset, mask, x, tl.float32, ALIGNED)
        if BF16 & DTYPES:
            if code == BF16:
                x = _store(address, offset, mask, x, tl.bfloat16, ALIGNED)
        if F16 & DTYPES:
            if code == F16:
                x = _store(address, offset, mask, x, tl.float16, ALIGNED)
        if F64 & DTYPES:
            if code == F64:
                x = _store(address, offset, mask, x, tl.float64, ALIGNED)
    return x


@triton.jit
def _mix32(x):
    """The finaliser of MurmurHash3 on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def random_bits(seed, tensor, first, offset):
    """32 random bits for each element ``first + offset`` of tensor number ``tensor``; the hash of backends/eager.py.

    ``first`` has to be a multiple of a power of two that ``offset`` stays below: then no carry reaches the high half,
    which is the same for the whole block.
    """
    key = _mix32(seed.to(tl.uint32) ^ (tensor.to(tl.uint32) * 0x9E3779B9))
    key = _mix32(key ^ (seed >> 32).to(tl.uint32) ^ (first >> 32).to(tl.uint32))
    index = first.to(tl.uint32) + offset.to(tl.uint32)
    return _mix32(index ^ key)


@triton.jit
def round_stochastically(x, bits, DTYPE: tl.constexpr):
    """``x`` (float32), still in float32, at one of its two neighbours in ``DTYPE`` (bfloat16 or float16).

    Adding random bits below the last kept bit, then cutting there, carries into the kept bits with the odds that make
    the mean exact. A value past the largest finite one, an infinity and a NaN are left to rounding to nearest.
    """
    raw = x.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:
        rounded = ((raw + (bits >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((raw + (bits >> 19)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 float16 has a fixed step of 2^-24, which float32's exponent does not follow.
        steps = tl.abs(x) * 16777216.0
        whole = tl.floor(steps)
        up = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 < steps - whole
        small = tl.where(up, whole + 1.0, whole) * 5.9604644775390625e-08
        signed = small.to(tl.uint32, bitcast=True) | (raw & 0x80000000)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, signed.to(tl.float32, bitcast=True), rounded)
    largest: tl.constexpr = 3.3895313892515355e38 if DTYPE == tl.bfloat16 else 65504.0
    return tl.where(tl.abs(x) <= largest, rounded, x)


@triton.jit
def publish(slots, values, mask=None):
    """Store partial sums for the program that :func:`arrives_last`.

    By an exchange rather than a store: on AMD a barrier does not wait for the stores of other waves, so the thread that
    then counts the arrival could release nothing but its own; an atomic that also acquires is waited for by its wave.
    """
    if values.dtype == tl.float64:
        BITS: tl.constexpr = tl.int64
    else:
        BITS: tl.constexpr = tl.int32
    # As integers: the interpreter exchanges no floats.
    words = slots.to(tl.pointer_type(BITS), bitcast=True)
    tl.atomic_xchg(words, values.to(BITS, bitcast=True), mask=mask, sem="acq_rel", scope="gpu")


@triton.jit
def arrives_last(counter, count):
    """Whether this program is the last of ``count`` to come here; what the others published before is then visible.

    Why there is no race: the barrier orders what every thread of this program published before the one thread that
    adds. The addition releases it and acquires that of all programs that added before (release sequences go through
    read-modify-writes), and the barrier that hands its result to the other threads passes this on to them. Exactly one
    program sees ``count - 1``; it puts the counter back to 0, which the next launch on the stream, or the next replay
    of a graph, finds. Nobody waits for anybody, so it does not matter which programs run at the same time.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_of_slots(slots, count, SLOTS: tl.constexpr):
    """The sum of ``slots[:count]`` in float64, in an order that ``count`` alone fixes; after :func:`arrives_last`."""
    local = tl.arange(0, SLOTS)
    total = tl.zeros((SLOTS,), tl.float64)
    # Here and elsewhere `while`, as Triton 3.6 interprets no `range` over a tensor beside NumPy 2.4.
    at = 0
    while at < count:
        # Past the L1 cache, which is not kept in step with what other processors store.
        slot = tl.load(slots + at + local, mask=local < count - at, other=0.0, cache_modifier=".cg")
        total += slot.to(tl.float64)
        at += SLOTS
    return tl.sum(total)
