"""The operators in plain PyTorch: the readable reference, and what runs on a device no other backend serves.

Each function has the arguments of its operator's schema (``manpp_kernels/ops``) and expects them checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _widest(device: torch.device) -> torch.dtype:
    """The dtype to add up in: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def _mix32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on 32-bit values held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def random_bits(seed: Tensor, tensor: int, numel: int) -> Tensor:
    """32 random bits (as int64) for each element of tensor number ``tensor``: a hash of seed, tensor and element."""
    index = torch.arange(numel, dtype=torch.int64, device=seed.device)
    low, high = seed & _MASK, (seed >> 32) & _MASK
    key = _mix32(low ^ ((tensor * _GOLDEN) & _MASK))
    key = _mix32(key ^ high ^ ((index >> 32) & _MASK))
    return _mix32((index & _MASK) ^ key)


def round_stochastically(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """``x`` (float32) in ``dtype`` (bfloat16 or float16), up or down with the odds that make the mean exact.

    Adding random bits below the last kept bit, then cutting there, carries into the kept bits with just those odds.
    A value past the largest finite one, an infinity and a NaN are rounded to nearest.
    """
    drop = 16 if dtype == torch.bfloat16 else 13
    raw = x.view(torch.int32).to(torch.int64) & _MASK
    cut = (raw + (bits >> (32 - drop))) >> drop << drop
    rounded = torch.where(cut > 0x7FFFFFFF, cut - (1 << 32), cut).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:
        # Below 2^-14 float16 has a fixed step of 2^-24, which float32's exponent does not follow.
        steps = x.abs() * 2.0**24
        whole = steps.floor()
        whole = whole + ((bits >> 8).to(torch.float32) * 2.0**-24 < steps - whole)
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign(whole * 2.0**-24, x), rounded)
    nearest = ~(x.abs() <= torch.finfo(dtype).max)
    return torch.where(nearest, x, rounded).to(dtype)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(x.stride(), x.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _storage_order(x: Tensor, like: Tensor) -> Tensor:
    """The elements of ``x``, flat, in the order in which those of ``like`` stand in memory."""
    if like.numel() == 0 or not _is_dense(like):
        return x.reshape(-1)
    order = sorted(range(like.dim()), key=lambda d: (like.stride(d), like.shape[d]), reverse=True)
    return x.permute(order).reshape(-1)


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
    for i, (e, p) in enumerate(zip(ema, params, strict=True)):
        dtype = _arithmetic_dtype(e, p, *bias[i : i + 1])
        if momentum_tensor is None:
            updated = e.to(dtype) * momentum + p.to(dtype) * (1.0 - momentum)
        else:
            m = momentum_tensor.to(_widest(momentum_tensor.device))
            updated = e.to(dtype) * m.to(dtype) + p.to(dtype) * (1.0 - m).to(dtype)
        if seed is not None and e.dtype in (torch.bfloat16, torch.float16):
            x = updated.to(torch.float32)
            bits = random_bits(seed, i, e.numel())
            flat = round_stochastically(_storage_order(x, e), e.dtype, bits)
            # Scattering by the same permutation puts each element back where it came from.
            index = torch.arange(e.numel(), device=e.device).view(e.shape)
            updated = torch.empty_like(flat).index_copy_(0, _storage_order(index, e), flat).view(e.shape)
        e.copy_(updated)
        if bias:
            assert scale is not None
            s = scale.reshape(-1)[groups[i] if groups else 0].to(dtype)
            out[i].copy_(s * bias[i].to(dtype) + (total - s) * e.to(dtype))


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
    sums = None
    if grad_scale is not None:
        sums = torch.zeros(grad_scale.numel(), dtype=_widest(grad_scale.device), device=grad_scale.device)
    for i, g in enumerate(grad):
        # bias and ema come only where the gradient of scale is asked for.
        dtype = _arithmetic_dtype(g, *bias[i : i + 1], *ema[i : i + 1])
        group = groups[i] if groups else 0
        if grad_bias:
            grad_bias[i].copy_(scale.reshape(-1)[group].to(dtype) * g.to(dtype))
        if sums is not None:
            sums[group] += (g.to(dtype) * (bias[i].to(dtype) - ema[i].to(dtype))).sum(dtype=sums.dtype)
    if grad_scale is not None and sums is not None:
        grad_scale.copy_(sums.view(grad_scale.shape))


def _per_channel(scale: Tensor, x: Tensor) -> Tensor:
    """``scale`` in a shape that broadcasts along dimension 1 of ``x``."""
    return scale if scale.dim() == 0 else scale.view([-1] + [1] * (x.dim() - 2))


def scale_bias_mix(lb_out: Tensor, ema_out: Tensor, scale: Tensor, total: float) -> Tensor:
    dtype = _arithmetic_dtype(lb_out)
    s = _per_channel(scale, lb_out).to(dtype)
    return (s * lb_out.to(dtype) + (total - s) * ema_out.to(dtype)).to(lb_out.dtype)


def scale_bias_mix_backward(
    grad: Tensor,
    lb_out: Tensor | None,
    ema_out: Tensor | None,
    scale: Tensor,
    total: float,
    need_lb: bool,
    need_ema: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _arithmetic_dtype(grad)
    g, s = grad.to(dtype), _per_channel(scale, grad).to(dtype)
    grad_lb = (s * g).to(grad.dtype) if need_lb else grad.new_empty(0)
    grad_ema = ((total - s) * g).to(grad.dtype) if need_ema else grad.new_empty(0)
    if lb_out is None or ema_out is None:
        return grad_lb, grad_ema, scale.new_empty(0)
    product = g * (lb_out.to(dtype) - ema_out.to(dtype))
    others = [d for d in range(grad.dim()) if scale.dim() == 0 or d != 1]
    return grad_lb, grad_ema, (product.sum(others) if others else product).to(scale.dtype).view(scale.shape)


def detach_copy(x: Tensor, out: Tensor) -> None:
    out.copy_(x)
