"""``scale_bias_mix``: the learnable scaling bias of MAN++ (arXiv 2507.16279) on two feature maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from manpp_kernels._library import Operator, checked_operator, compiled_serves, transformed
from manpp_kernels.backends import eager
from manpp_kernels.ops import _checks


def _fake(lb_out: Tensor, ema_out: Tensor, scale: Tensor, total: float) -> Tensor:
    return torch.empty_like(lb_out)


def _fake_backward(
    grad: Tensor,
    lb_out: Tensor | None,
    ema_out: Tensor | None,
    scale: Tensor,
    total: float,
    need_lb: bool,
    need_ema: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(grad) if need_lb else grad.new_empty(0),
        torch.empty_like(grad) if need_ema else grad.new_empty(0),
        scale.new_empty(0) if lb_out is None or ema_out is None else torch.empty_like(scale),
    )


_mix = Operator(
    "scale_bias_mix",
    "(Tensor lb_out, Tensor ema_out, Tensor scale, float total) -> Tensor",
    fake=_fake,
    eager=eager.scale_bias_mix,
)
# lb_out and ema_out are only read for the gradient of scale: without them it is neither computed nor returned (an
# empty tensor stands in its place, as for a gradient that need_lb or need_ema says nobody wants).
_mix_backward = Operator(
    "scale_bias_mix_backward",
    "(Tensor grad, Tensor? lb_out, Tensor? ema_out, Tensor scale, float total, bool need_lb, bool need_ema)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    eager=eager.scale_bias_mix_backward,
)
# The compiled operator with the checks of the common case; None where a case is not common.
_mix_checked = checked_operator(
    "_scale_bias_mix_checked", "(Tensor lb_out, Tensor ema_out, Tensor scale, float total) -> Tensor?", declined=None
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lb_out, ema_out, scale, total = inputs
    keep = ctx.needs_input_grad[2]
    ctx.save_for_backward(lb_out if keep else None, ema_out if keep else None, scale)
    ctx.total = total


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    lb_out, ema_out, scale = ctx.saved_tensors
    need_lb, need_ema, need_scale, _ = ctx.needs_input_grad
    grad_lb, grad_ema, grad_scale = _mix_backward(
        grad.device, grad, lb_out, ema_out, scale, ctx.total, need_lb, need_ema
    )
    return grad_lb if need_lb else None, grad_ema if need_ema else None, grad_scale if need_scale else None, None


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, lb_out, ema_out, scale, total, ctx.need_lb, ctx.need_ema = inputs
    ctx.save_for_backward(grad, lb_out, ema_out, scale)
    ctx.total = total


def _double_backward(ctx: Any, gg_lb: Tensor | None, gg_ema: Tensor | None, gg_scale: Tensor | None) -> Any:
    # A second derivative is asked for by gradient penalties and checks, not by training steps: plain PyTorch serves.
    grad, lb_out, ema_out, scale = ctx.saved_tensors
    s = eager._per_channel(scale, grad)
    d_grad, d_scale = torch.zeros_like(grad), torch.zeros_like(s)
    d_lb = d_ema = None
    others = [d for d in range(grad.dim()) if scale.dim() == 0 or d != 1]
    if ctx.need_lb and gg_lb is not None:
        d_grad = d_grad + s * gg_lb
        d_scale = d_scale + (grad * gg_lb).sum(others, keepdim=True).view(s.shape)
    if ctx.need_ema and gg_ema is not None:
        d_grad = d_grad + (ctx.total - s) * gg_ema
        d_scale = d_scale - (grad * gg_ema).sum(others, keepdim=True).view(s.shape)
    if lb_out is not None and gg_scale is not None:
        gg = eager._per_channel(gg_scale, grad)
        d_grad = d_grad + gg * (lb_out - ema_out)
        d_lb = gg * grad
        d_ema = -d_lb
    return d_grad, d_lb, d_ema, d_scale.view(scale.shape), None, None, None


class _Mix(torch.autograd.Function):
    """The common case in autograd's graph: the Python around a formula that is registered there takes longer."""

    @staticmethod
    def forward(ctx: Any, lb_out: Tensor, ema_out: Tensor, scale: Tensor, total: float) -> Tensor | None:
        out: Tensor | None = _mix_checked(lb_out, ema_out, scale, total)
        if out is not None:
            _setup_context(ctx, (lb_out, ema_out, scale, total), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # For a second derivative, which the operator in autograd's graph has, and where the compiler traces this.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _backward(ctx, grad)
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(ctx, grad)


def _mix_in_common_case(lb_out: Tensor, ema_out: Tensor, scale: Tensor, total: float) -> Tensor | None:
    """The mix where a compiled backend can make it, checking as it goes; None elsewhere."""
    if (
        torch.compiler.is_compiling()
        or type(total) is not float
        or not math.isfinite(total)
        or not compiled_serves((lb_out, ema_out, scale))
    ):
        return None
    recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(lb_out, ema_out, scale)
    try:
        out: Tensor | None = (_Mix.apply if recorded else _mix_checked)(lb_out, ema_out, scale, total)
    except NotImplementedError:  # sparse tensors
        return None
    return out


for _overload in _mix.overloads():
    torch.library.register_autograd(_overload, _backward, setup_context=_setup_context)
for _overload in _mix_backward.overloads():
    torch.library.register_autograd(_overload, _double_backward, setup_context=_setup_context_backward)


def scale_bias_mix(lb_out: Tensor, ema_out: Tensor, scale: Tensor, *, total: float = 2.0) -> Tensor:
    """Mix two feature maps by a learnable scale: ``scale * lb_out + (total - scale) * ema_out``.

    The published form of MAN++ (arXiv 2507.16279): ``lb_out`` is what the learnable bias makes of a local block's
    output, ``ema_out`` what the EMA copy of the next unit makes of it. One pass forward; one pass backward, which
    yields the gradients of both maps and the reduction for ``scale`` together, accumulated in float32, in a fixed
    order.

    Args:
        lb_out: any shape, of float64, float32, bfloat16 or float16.
        ema_out: the same shape and device. Of another dtype, both are promoted as PyTorch promotes them.
        scale: 0-dim or of shape ``(1,)``, or of shape ``(C,)`` for one entry per channel (dimension 1 of ``lb_out``);
            any of these dtypes.
        total: what the two coefficients sum to; 2 as published.

    Returns:
        A tensor like ``lb_out``. Differentiable in all three tensors, twice; under ``torch.func`` and in forward mode
        it is computed by plain PyTorch.

    Raises:
        TypeError: an argument is not a dense tensor of these dtypes, or total not a number.
        ValueError: the shapes or devices do not fit, a storage was freed, or total is not finite.
    """
    out = _mix_in_common_case(lb_out, ema_out, scale, total)
    if out is not None:
        return out
    for name, t in (("lb_out", lb_out), ("ema_out", ema_out), ("scale", scale)):
        _checks.check_tensor(name, t)
        if t.device != lb_out.device:
            raise ValueError(f"{name} is on {t.device}, lb_out on {lb_out.device}")
        if not torch.compiler.is_compiling():
            _checks.check_not_freed(name, t)
    if lb_out.shape != ema_out.shape:
        raise ValueError(f"ema_out has the shape {tuple(ema_out.shape)}, lb_out {tuple(lb_out.shape)}")
    if scale.dim() == 1 and scale.numel() == 1:
        scale = scale.reshape(())  # FSDP2 shards no parameter of 0 dimensions, so there a scale has one
    if scale.dim() != 0 and (lb_out.dim() < 2 or scale.shape != lb_out.shape[1:2]):
        channels = f"({lb_out.shape[1]},)" if lb_out.dim() >= 2 else "() only, as lb_out has no dimension 1"
        raise ValueError(f"scale has to be of shape () or {channels}, and has {tuple(scale.shape)}")
    _checks.check_total(total)
    if lb_out.dtype != ema_out.dtype:
        dtype = torch.promote_types(lb_out.dtype, ema_out.dtype)
        lb_out, ema_out = lb_out.to(dtype), ema_out.to(dtype)
    if transformed():
        return eager.scale_bias_mix(lb_out, ema_out, scale, float(total))
    return _mix(lb_out.device, lb_out, ema_out, scale.contiguous(), float(total))
