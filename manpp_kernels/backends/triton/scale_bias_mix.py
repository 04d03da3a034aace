"""``scale_bias_mix``: two feature maps mixed by a learnable scale, and its gradients in one pass.

Memory is seen as ``rows x channels x inner``, whatever the layout: ``inner`` is the stride of dimension 1 (the pixels
of a plane in NCHW, 1 in channels_last), ``rows`` what is left. A tile is two-dimensional, so that no element has to
divide its offset to find its channel: rows by pixels of one channel, or, where the channels are innermost, rows by
channels. A scale of one entry is the case of one row, one channel and everything in it.
"""

# A kernel's arguments have no Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from manpp_kernels.backends.triton.arithmetic import (
    VECTOR,
    arrives_last,
    bits_of,
    from_bits,
    narrow,
    publish,
    sum_of_slots,
    widen,
)
from manpp_kernels.backends.triton.tables import in_layout_of, is_dense, on_device, zero_counters

# Elements of a tile and warps: 16 a thread, so two to four 128-bit accesses of each operand are in flight together.
TILE = 2048
WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

# Programs of a reduction: about eight for each processor of the largest GPUs, which keeps them busy, and few enough
# that the last one adds up the partial sums in one or two steps of SLOTS.
REDUCING_PROGRAMS = 1024
SLOTS = 1024


@dataclass(frozen=True)
class _Tiling:
    rows: int
    channels: int
    inner: int
    inside: bool  # channels are innermost, and lie along a tile
    block_rows: int
    block_x: int
    tiles: int  # for each channel, or block of channels
    channel_blocks: int
    vector: int  # so many elements in a row are never cut by the end of a row

    @classmethod
    def of(cls, x: Tensor, per_channel: bool) -> _Tiling:
        """How to tile the dense tensor ``x``."""
        channels = x.shape[1] if per_channel else 1
        inner = x.numel() if channels == 1 else x.stride(1)
        rows = x.numel() // (channels * inner)
        inside = inner == 1 and channels > 1
        length = channels if inside else inner
        block_x = min(TILE, triton.next_power_of_2(length))
        block_rows = TILE // block_x
        # A small map needs no rows it has not got; a power of two all the same, and a full warp of elements at least.
        block_rows = min(block_rows, max(triton.next_power_of_2(rows), 128 // block_x, 1))
        pieces = -(-length // block_x)
        row_blocks = -(-rows // block_rows)
        vector = next(v for v in (VECTOR, 4, 2, 1) if length % v == 0)
        tiles = row_blocks * (1 if inside else pieces)
        return cls(rows, channels, inner, inside, block_rows, block_x, tiles, pieces if inside else channels, vector)

    def arguments(self) -> dict[str, int | bool]:
        """What the kernels want to know of it."""
        return {
            "rows": self.rows,
            "channels": self.channels,
            "inner": self.inner,
            "tiles": self.tiles,
            "channel_blocks": self.channel_blocks,
            "INSIDE": self.inside,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_X": self.block_x,
            "VEC": self.vector,
        }


@triton.jit
def _tile(
    tile, block, rows, channels, inner,
    INSIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_X: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a tile of channel, or block of channels, ``block``."""
    r = tl.arange(0, BLOCK_ROWS)[:, None]
    x = tl.arange(0, BLOCK_X)[None, :]
    channels = channels.to(tl.int64)
    inner = inner.to(tl.int64)
    if INSIDE:
        row = tile.to(tl.int64) * BLOCK_ROWS
        start = block.to(tl.int64) * BLOCK_X
        stride = tl.multiple_of(channels, VEC)
        left = channels - start
        base = row * stride + start
    else:
        inner = tl.multiple_of(inner, VEC)
        pieces = tl.cdiv(inner, BLOCK_X)
        row = tile // pieces * BLOCK_ROWS
        start = tile % pieces * BLOCK_X
        stride = channels * inner
        left = inner - start
        base = row * stride + block * inner + start
    # As many elements, at most, as the tile is wide; the multiple of VEC that it is anyway, said so.
    left = tl.minimum(left, BLOCK_X).to(tl.int32)
    left = tl.multiple_of(left // VEC * VEC, VEC)
    mask = (r < tl.minimum(rows - row, BLOCK_ROWS).to(tl.int32)) & (x < left)
    return base + r * stride + x, mask


@triton.jit
def _scale_of(scale, scale_stride, block, channels, TO: tl.constexpr, INSIDE: tl.constexpr, BLOCK_X: tl.constexpr):
    """The scale of the channel, or of the channels along a tile."""
    if INSIDE:
        c = block * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
        s = widen(tl.load(scale + c * scale_stride, mask=c < channels, other=0.0), TO)
    else:
        s = widen(tl.load(scale + block * scale_stride), TO)
    return s


@triton.jit(
    do_not_specialize=["scale_stride", "total_bits", "rows", "channels", "inner", "tiles", "channel_blocks"],
    do_not_specialize_on_alignment=["scale"],
)
def scale_bias_mix_kernel(
    lb_out, ema_out, out, scale, scale_stride, total_bits: tl.int64, rows, channels, inner, tiles, channel_blocks,
    TO: tl.constexpr, INSIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_X: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A program: one tile."""
    program = tl.program_id(0)
    block = program % channel_blocks
    s = _scale_of(scale, scale_stride, block, channels, TO, INSIDE, BLOCK_X)
    offset, mask = _tile(program // channel_blocks, block, rows, channels, inner, INSIDE, BLOCK_ROWS, BLOCK_X, VEC)
    lb = widen(tl.load(lb_out + offset, mask=mask, other=0.0), TO)
    ema = widen(tl.load(ema_out + offset, mask=mask, other=0.0), TO)
    mixed = s * lb + (from_bits(total_bits).to(TO) - s) * ema
    tl.store(out + offset, narrow(mixed, out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["scale_stride", "total_bits", "rows", "channels", "inner", "tiles", "channel_blocks", "splits"],
    do_not_specialize_on_alignment=["scale", "grad_scale", "partials", "counters"],
)
def scale_bias_mix_backward_kernel(
    grad, lb_out, ema_out, grad_lb, grad_ema, scale, scale_stride, grad_scale, partials, counters,
    total_bits: tl.int64, rows, channels, inner, tiles, channel_blocks, splits,
    TO: tl.constexpr, INSIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_X: tl.constexpr, VEC: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """A program: every ``splits``-th tile of a channel, or block of channels. What is not wanted comes as None."""
    program = tl.program_id(0)
    block = program % channel_blocks
    split = program // channel_blocks
    s = _scale_of(scale, scale_stride, block, channels, TO, INSIDE, BLOCK_X)
    rest = from_bits(total_bits).to(TO) - s
    products = tl.zeros((BLOCK_ROWS, BLOCK_X), TO)
    tile = split
    while tile < tiles:
        offset, mask = _tile(tile, block, rows, channels, inner, INSIDE, BLOCK_ROWS, BLOCK_X, VEC)
        g = widen(tl.load(grad + offset, mask=mask, other=0.0), TO)
        if grad_lb is not None:
            tl.store(grad_lb + offset, narrow(s * g, grad_lb.dtype.element_ty), mask=mask)
        if grad_ema is not None:
            tl.store(grad_ema + offset, narrow(rest * g, grad_ema.dtype.element_ty), mask=mask)
        if grad_scale is not None:
            lb = widen(tl.load(lb_out + offset, mask=mask, other=0.0), TO)
            ema = widen(tl.load(ema_out + offset, mask=mask, other=0.0), TO)
            products += g * (lb - ema)
        tile += splits
    if grad_scale is not None:
        # Each program has slots of its own, added in the order of their numbers by whichever program comes last.
        if INSIDE:
            c = block * BLOCK_X + tl.arange(0, BLOCK_X)
            publish(partials + split * channels + c, tl.sum(products, 0), mask=c < channels)
            if arrives_last(counters + block, splits):
                total = tl.zeros((BLOCK_ROWS, BLOCK_X), tl.float64)
                r = tl.arange(0, BLOCK_ROWS)[:, None]
                at = 0
                while at < splits:
                    slots = partials + (at + r) * channels + c[None, :]
                    mask = (at + r < splits) & (c < channels)[None, :]
                    total += tl.load(slots, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
                    at += BLOCK_ROWS
                sums = narrow(tl.sum(total, 0), grad_scale.dtype.element_ty)
                tl.store(grad_scale + c, sums, mask=c < channels)
        else:
            publish(partials + block * splits + split, tl.sum(products))
            if arrives_last(counters + block, splits):
                total = sum_of_slots(partials + block * splits, splits, SLOTS)
                tl.store(grad_scale + block, narrow(total, grad_scale.dtype.element_ty))


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """``x``, copied if its elements do not stand in memory as those of ``like`` do."""
    return x if in_layout_of(x, like) else torch.empty_like(like, dtype=x.dtype).copy_(x)


def _arithmetic(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def scale_bias_mix(lb_out: Tensor, ema_out: Tensor, scale: Tensor, total: float) -> Tensor:
    """See the operator's schema in ``manpp_kernels/ops``."""
    out = torch.empty_like(lb_out)
    if not out.numel():
        return out
    lb_out, ema_out = _laid_out_as(lb_out, out), _laid_out_as(ema_out, out)
    tiling = _Tiling.of(out, scale.dim() == 1)
    with on_device(out.device):
        scale_bias_mix_kernel[(tiling.tiles * tiling.channel_blocks,)](
            lb_out,
            ema_out,
            out,
            scale,
            scale.stride(0) if scale.dim() else 0,
            bits_of(total),
            **tiling.arguments(),
            TO=_arithmetic(out),
            **OPTIONS,
        )
    return out


def scale_bias_mix_backward(
    grad: Tensor,
    lb_out: Tensor | None,
    ema_out: Tensor | None,
    scale: Tensor,
    total: float,
    need_lb: bool,
    need_ema: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator's schema in ``manpp_kernels/ops``."""
    like = torch.empty_like(grad) if need_lb or need_ema or not is_dense(grad) else grad
    # What is not wanted is an empty tensor of its own: no two results of an operator may be the same one.
    grad_lb = like if need_lb else grad.new_empty(0)
    grad_ema = (torch.empty_like(grad) if need_lb else like) if need_ema else grad.new_empty(0)
    need_scale = lb_out is not None and ema_out is not None
    grad_scale = torch.empty(scale.shape if need_scale else (0,), dtype=scale.dtype, device=scale.device)
    if not grad.numel():
        return grad_lb, grad_ema, grad_scale.zero_()
    if not (need_lb or need_ema or need_scale):
        return grad_lb, grad_ema, grad_scale
    grad = _laid_out_as(grad, like)
    tiling = _Tiling.of(like, scale.dim() == 1)
    splits, partials, counters = tiling.tiles, None, None
    if lb_out is not None and ema_out is not None:
        lb_out, ema_out = _laid_out_as(lb_out, like), _laid_out_as(ema_out, like)
        splits = min(tiling.tiles, max(1, REDUCING_PROGRAMS // tiling.channel_blocks))
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        partials = torch.empty(splits * tiling.channels, dtype=dtype, device=grad.device)
        counters = zero_counters(tiling.channel_blocks, grad.device)
    with on_device(grad.device):
        scale_bias_mix_backward_kernel[(splits * tiling.channel_blocks,)](
            grad,
            lb_out if need_scale else None,
            ema_out if need_scale else None,
            grad_lb if need_lb else None,
            grad_ema if need_ema else None,
            scale,
            scale.stride(0) if scale.dim() else 0,
            grad_scale if need_scale else None,
            partials,
            counters,
            bits_of(total),
            **tiling.arguments(),
            splits=splits,
            TO=_arithmetic(grad),
            SLOTS=SLOTS,
            **OPTIONS,
        )
    return grad_lb, grad_ema, grad_scale
