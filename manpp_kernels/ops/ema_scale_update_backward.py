"""The effective weights of ``ema_scale_update`` in autograd's graph, and the operator of their backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manpp_kernels._library import Operator, checked_operator, compiled_serves
from manpp_kernels.backends import eager


def _fake_backward(*args: Any) -> None:
    return None


update_backward = Operator(
    "ema_scale_update_backward",
    "(Tensor[] grad, Tensor[] bias, Tensor[] ema, Tensor scale, int[] groups, float total,"
    " Tensor(a!)[] grad_bias, Tensor(b!)? grad_scale) -> ()",
    fake=_fake_backward,
    eager=eager.ema_scale_update_backward,
)
# The gradients of bias, if they are wanted, and after them that of scale where there are bias and ema.
_backward_checked = checked_operator(
    "_ema_scale_update_backward_checked",
    "(Tensor[] grad, Tensor[] bias, Tensor[] ema, Tensor scale, int[] groups, bool need_bias) -> Tensor[]",
    declined=[],
)


class _EffectiveWeights(torch.autograd.Function):
    """Gives weights that were computed already their place in the graph: w = scale bias + (total - scale) ema."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: Tensor,
        groups: list[int],
        total: float,
        ema: tuple[Tensor, ...],
        out: tuple[Tensor, ...],
        *bias: Tensor,
    ) -> tuple[Tensor, ...]:
        # ema and out come in tuples, at which autograd does not look: that of each tensor takes most of a microsecond.
        need_scale, need_bias = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        # bias and ema are read for the gradient of scale alone, scale for that of bias.
        ctx.save_for_backward(scale, *(bias + ema if need_scale else ()))
        ctx.groups, ctx.total, ctx.count = groups, total, len(bias)
        ctx.need_bias, ctx.need_scale = need_bias, need_scale
        ctx.bias_dtypes = [b.dtype for b in bias]
        # Weights that the loss does not use then cost nothing; as zeros they would be read, and written, in full.
        ctx.set_materialize_grads(False)
        return tuple([w.detach() for w in out])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        scale, *saved = ctx.saved_tensors
        count = ctx.count
        bias, ema = saved[:count], saved[count:]
        differentiable = torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in (*grads, scale))
        if differentiable or _batched(grads):
            grad_scale, grad_bias = _differentiable_backward(ctx, scale, bias, ema, grads)
        else:
            grad_scale, grad_bias = _fused_backward(ctx, scale, bias, ema, grads)
        return (grad_scale, None, None, None, None, *grad_bias)


def _batched(grads: tuple[Tensor | None, ...]) -> bool:
    """Whether these are several gradients at once (``is_grads_batched``), which an operator that writes cannot take."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and any(is_batched(g) for g in grads if g is not None)


def _fused_backward(
    ctx: Any, scale: Tensor, bias: list[Tensor], ema: list[Tensor], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:
    used = [i for i, g in enumerate(grads) if g is not None]
    if not used:
        return None, [None] * ctx.count
    grad = [g for g in grads if g is not None]
    operands = (
        grad,
        [bias[i] for i in used] if ctx.need_scale else [],
        [ema[i] for i in used] if ctx.need_scale else [],
        scale.contiguous(),
        [ctx.groups[i] for i in used] if ctx.groups else [],
    )
    grad_bias = _backward_in_common_case(*operands, ctx.need_bias)
    if grad_bias:
        grad_scale = grad_bias.pop() if ctx.need_scale else None
    else:
        grad_bias = [torch.empty_like(g, dtype=ctx.bias_dtypes[i]) for i, g in zip(used, grad, strict=True)]
        grad_scale = torch.empty_like(scale) if ctx.need_scale else None
        update_backward(scale.device, *operands, ctx.total, grad_bias if ctx.need_bias else [], grad_scale)
    by_index: list[Tensor | None] = [None] * ctx.count
    if ctx.need_bias:
        for i, g in zip(used, grad_bias, strict=True):
            by_index[i] = g
    return grad_scale, by_index


def _backward_in_common_case(
    grad: list[Tensor], bias: list[Tensor], ema: list[Tensor], scale: Tensor, groups: list[int], need_bias: bool
) -> list[Tensor]:
    """All gradients at once, that of scale last, where a compiled backend can; nothing elsewhere."""
    if torch.compiler.is_compiling() or not compiled_serves(grad, bias, ema, (scale,)):
        return []
    try:
        return _backward_checked(grad, bias, ema, scale, groups, need_bias)
    except NotImplementedError:  # sparse tensors
        return []


def _differentiable_backward(
    ctx: Any, scale: Tensor, bias: list[Tensor], ema: list[Tensor], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The same in plain PyTorch, so that the gradients can be differentiated again (gradient penalties, checks)."""
    flat = scale.reshape(-1)
    grad_scale = torch.zeros_like(flat, dtype=eager._arithmetic_dtype(flat)) if ctx.need_scale else None
    grad_bias: list[Tensor | None] = [None] * ctx.count
    for i, g in enumerate(grads):
        if g is None:
            continue
        group = ctx.groups[i] if ctx.groups else 0
        if ctx.need_bias:
            grad_bias[i] = (flat[group] * g).to(ctx.bias_dtypes[i])
        if grad_scale is not None:
            dtype = eager._arithmetic_dtype(g, bias[i], ema[i])
            share = (g.to(dtype) * (bias[i].to(dtype) - ema[i].to(dtype))).sum().to(grad_scale.dtype)
            grad_scale = grad_scale.index_add(0, torch.tensor([group], device=scale.device), share.reshape(1))
    return None if grad_scale is None else grad_scale.to(scale.dtype).view(scale.shape), grad_bias


def attach_effective_weights(
    out: list[Tensor], scale: Tensor, bias: list[Tensor], ema: Sequence[Tensor], groups: list[int], total: float
) -> list[Tensor]:
    """``out``, holding scale bias + (total - scale) ema already, as differentiable functions of scale and bias."""
    if not torch.is_grad_enabled() or not (scale.requires_grad or any(b.requires_grad for b in bias)):
        return out
    return list(_EffectiveWeights.apply(scale, groups, total, tuple(ema), tuple(out), *bias))
