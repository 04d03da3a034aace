"""Every way to compute the backward pass of the effective weights: the gradients of bias and of the scale."""

from __future__ import annotations

import torch
from common import COMPILE, DEVICE
from ema_contenders import MOMENTUM, MOST_CAPTURED, TOTAL, Inputs, our_backends
from timing import Call, Contender
from torch import Tensor

import manpp_kernels
from manpp_kernels import EmaPlan


def backward_contenders(sets: list[Inputs], compiled: bool) -> list[Contender]:
    """Gradients of bias and of the scale, from gradients of all weights; everything fp32."""
    found = []
    grads = [[torch.randn_like(b) for b in x.bias] for x in sets]
    for backend in our_backends():
        with manpp_kernels.use_backend(backend):
            calls = [_our_backward(x, g) for x, g in zip(sets, grads, strict=True)]
        found.append(Contender(f"{backend} plan", calls, ours=True, backend=backend, capture=False))
        kernels = [_our_backward_kernel(x, g) for x, g in zip(sets, grads, strict=True)]
        found.append(Contender(f"{backend} kernel", kernels, ours=True, backend=backend))
    pairs = list(zip(sets, grads, strict=True))
    found.append(Contender("foreach mul, sub, mul_, sum", [lambda x=x, g=g: foreach_backward(x, g) for x, g in pairs]))
    dots = [lambda x=x, g=g: dot_backward(x, g) for x, g in pairs]
    found.append(Contender("foreach mul, dot", dots, capture=4 * len(sets[0].ema) * len(sets) <= MOST_CAPTURED))
    found.append(Contender("autograd of the formula", [_formula_backward(x, g) for x, g in pairs], capture=False))
    if compiled and COMPILE:
        f = torch.compile(plain_backward)
        scales = [list(x.scale.reshape(-1)[x.groups].unbind()) if x.groups else [x.scale] * len(x.ema) for x in sets]
        calls = [lambda x=x, g=g, s=s: f(g, x.bias, x.ema, s) for (x, g), s in zip(pairs, scales, strict=True)]
        found.append(Contender("compiled formula", calls))
    return found


def _our_backward(x: Inputs, grads: list[Tensor]) -> Call:
    scale = x.scale.clone().requires_grad_()
    bias = [b.detach().requires_grad_() for b in x.bias]
    ema = [e.clone() for e in x.ema]  # another backend's update of the same ones would spoil this one's graph
    plan = EmaPlan(ema, x.params, bias=bias, groups=x.groups or None, total=TOTAL)
    weights = plan.update(MOMENTUM, scale=scale)
    return lambda: torch.autograd.grad(weights, [scale, *bias], grads, retain_graph=True)


def _our_backward_kernel(x: Inputs, grads: list[Tensor]) -> Call:
    from manpp_kernels.ops.ema_scale_update_backward import update_backward

    grad_bias = [torch.empty_like(b) for b in x.bias]
    grad_scale = torch.zeros_like(x.scale)
    return lambda: update_backward(DEVICE, grads, x.bias, x.ema, x.scale, x.groups, TOTAL, grad_bias, grad_scale)


def foreach_backward(x: Inputs, grads: list[Tensor]) -> object:
    """Any scales; the shares of the scale's gradient come tensor by tensor."""
    grad_bias = torch._foreach_mul(grads, x.scales)
    difference = torch._foreach_sub(x.bias, x.ema)
    torch._foreach_mul_(difference, grads)
    return grad_bias, torch.stack([d.sum() for d in difference])


def dot_backward(x: Inputs, grads: list[Tensor]) -> object:
    grad_bias = torch._foreach_mul(grads, x.scales)
    shares = [
        torch.dot(g.flatten(), b.flatten()) - torch.dot(g.flatten(), e.flatten())
        for g, b, e in zip(grads, x.bias, x.ema, strict=True)
    ]
    return grad_bias, torch.stack(shares)


def plain_backward(grads: list[Tensor], bias: list[Tensor], ema: list[Tensor], scales: list[Tensor]) -> object:
    grad_bias = [s * g for s, g in zip(scales, grads, strict=True)]
    return grad_bias, torch.stack([(g * (b - e)).sum() for g, b, e in zip(grads, bias, ema, strict=True)])


def _formula_backward(x: Inputs, grads: list[Tensor]) -> Call:
    scale = x.scale.clone().requires_grad_()
    bias = [b.detach().requires_grad_() for b in x.bias]
    flat = scale.reshape(-1)
    groups = x.groups or [0] * len(bias)
    weights = [flat[g] * b + (TOTAL - flat[g]) * e for g, b, e in zip(groups, bias, x.ema, strict=True)]
    return lambda: torch.autograd.grad(weights, [scale, *bias], grads, retain_graph=True)
